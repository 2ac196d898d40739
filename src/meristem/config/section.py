"""The base of every config section."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class ConfigSection(BaseModel):
    """The frozen settings of one room. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some values replaced; pydantic's own would take a key that does not exist without a word."""
        unknown = sorted(set(update or ()) - set(type(self).model_fields))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no key {', '.join(unknown)}")
        return super().model_copy(update=update, deep=deep)
