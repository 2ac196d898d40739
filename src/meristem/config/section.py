"""The base of every config part."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class ConfigSection(BaseModel):
    """The frozen settings of one room. An unknown key is an error.

    outside_identity: the keys that change nothing of what is trained. A run is still the same where these are others
        (``config.identity``). Every section of the settings of a run declares it.
    """

    outside_identity: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
