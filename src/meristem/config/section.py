"""The base of every config part."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from meristem.config.kinds import require_numbers


class ConfigSection(BaseModel):
    """The frozen settings of one room. An unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """By key, the keys of the same part that it stands in for: given in one layer, it makes null of theirs below."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: object, info: ValidationInfo) -> object:
        require_numbers(cls.model_fields[str(info.field_name)], value)
        return value
