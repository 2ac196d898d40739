"""The base of every config part."""

from pydantic import BaseModel, ConfigDict


class ConfigSection(BaseModel):
    """The frozen settings of one room. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
