"""The base of every config section."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from meristem.config.kinds import require_numbers
from meristem.errors import DeadKey


class ConfigSection(BaseModel):
    """The frozen settings of one room. An unknown key is an error, and so is a number that is not finite.

    outside_identity: the keys that change nothing of what is trained. A run is still the same where these are others
        (``config.identity``). Every section of the settings of a run declares it.
    outside_while_null: the keys that change nothing where they are null. A key that is new is one of these, so that the
        runs of before it are still the same.
    """

    outside_identity: ClassVar[frozenset[str]] = frozenset()
    outside_while_null: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """By key, the keys of the same section that it stands in for: given in one layer, it makes null of theirs below."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: object, info: ValidationInfo) -> object:
        require_numbers(cls.model_fields[str(info.field_name)], value)
        return value

    @property
    def is_outside_identity(self) -> bool:
        """Whether nothing of this section changes what is trained."""
        return False

    def refuse_dead(self, section: str, reads: frozenset[str], why: str, choice: str, *, who: str = "it") -> None:
        """Raise DeadKey where a key that is not in ``reads`` has another value than its default.

        section: the dotted path of this section. why, choice: of the message; ``choice`` is the key that decides what
        is read. who: what reads the others.
        """
        fields = type(self).model_fields
        dead = [key for key in fields if key not in reads and getattr(self, key) != fields[key].default]
        if dead:
            found = ", ".join(f"{section}.{key} is {getattr(self, key)!r}" for key in dead)
            raise DeadKey(
                f"{found}, but {why}; {who} reads {', '.join(sorted(reads))}. Remove the key, or choose another "
                f"{choice}.",
                path=f"{section}.{dead[0]}",
                value=getattr(self, dead[0]),
            )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some values replaced; pydantic's own would take a key that does not exist without a word."""
        unknown = sorted(set(update or ()) - set(type(self).model_fields))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no key {', '.join(unknown)}")
        return super().model_copy(update=update, deep=deep)
