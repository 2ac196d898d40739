"""How a run is recorded."""

from pydantic import Field

from meristem.config import ConfigSection


class SinksConfig(ConfigSection):
    """The files of records and the measurements of the machine."""

    system_every_s: float = Field(10.0, ge=0.5, description="seconds between two measurements of the machine")
    rotate_mib: int = Field(256, ge=1, description="MiB at which a file of records is set aside and a new one begun")
