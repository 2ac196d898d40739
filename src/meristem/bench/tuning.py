"""Settings that studies share: seeds, and learning rates of which each candidate gets its best."""

from typing import Annotated, ClassVar

from pydantic import Field

from meristem.config import ConfigSection

Settings = Annotated[tuple[str, ...], Field(description="Settings as on the command line, as memory.rule=delta.")]


class TunedConfig(ConfigSection):
    """What is compared is tuned alike and runs from the same seeds.

    place: the directory below ``run.dir`` that its runs are in.
    """

    place: ClassVar[str]

    seeds: Annotated[tuple[int, ...], Field(min_length=1, description="Random seeds, one run of each cell for each.")]
    rates: Annotated[tuple[float, ...], Field(min_length=1, description="Learning rates, the best of which is used.")]
    rate_share: Annotated[float, Field(gt=0, le=1, description="Share of the budget for which a rate is tried.")] = 0.2
    settings: Settings = ()
