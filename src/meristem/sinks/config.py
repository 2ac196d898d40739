"""How a run is recorded."""

from pydantic import Field

from meristem.config import ConfigSection


class SinksConfig(ConfigSection):
    """The files of records, the measurements of the machine, and trackers."""

    system_every_s: float = Field(10.0, ge=0.5, description="seconds between two measurements of the machine")
    rotate_mib: int = Field(256, ge=1, description="MiB at which a file of records is set aside and a new one begun")
    use: tuple[str, ...] = Field(
        (), description="trackers: tensorboard, mlflow, wandb or a plug-in; with `?` after it, where it is installed"
    )
    project: str = Field("meristem", min_length=1, description="under which a tracker lists the run")
    places: dict[str, str] = Field(
        default_factory=dict, description="of trackers: mlflow=http://... instead of a file, wandb=online"
    )
