"""Configuration: one base class for every part, and the loader that merges its layers."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """The frozen settings of one room. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
