"""What the texts of a run have to keep to."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from meristem.config import ConfigSection
from meristem.errors import DeadKey


class SafetyConfig(ConfigSection):
    """The policy of prompts and outputs that a run applies to the texts it writes down."""

    outside_identity: ClassVar = frozenset({"policy", "bypass"})

    policy: str | None = Field(
        default=None,
        examples=["default"],
        description="policy of the texts that the run lets its model write: a YAML file, or `default`",
    )
    bypass: str | None = Field(
        default=None,
        pattern=r"\S",
        examples=["a drill on Monday"],
        description="reason not to apply the policy; it is recorded, and run.json says so",
    )

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        if self.policy is None and self.bypass is not None:
            raise DeadKey("safety.bypass is given, but no safety.policy that it would bypass. Leave it out.")
        return self
