"""What a sweep file says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from meristem.config import ConfigSection, read_yaml
from meristem.config.mistakes import explain
from meristem.errors import ConfigError

KINDS = ("grid", "random", "list", "search")


class RangeConfig(ConfigSection):
    """From where a value is drawn: evenly, or evenly in its logarithm; whole where both ends are."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("low below high, and above 0 where log is true")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def within(self, value: float) -> int | float:
        """The value as it is used: whole, or six digits of it, and not beyond the ends."""
        rounded = round(value) if self.is_whole else float(f"{value:.6g}")
        return min(max(rounded, self.low), self.high)


class RandomConfig(ConfigSection):
    """Points drawn at random. keys: the range of each; a list stands for a choice."""

    n: int = Field(ge=1, le=10_000)
    random_seed: int = Field(default=0, ge=0)
    keys: dict[str, RangeConfig | list[Any]] = Field(min_length=1)


class SearchConfig(ConfigSection):
    """Points drawn where earlier ones were good, by the tree-structured Parzen estimator of Optuna.

    n_random: so many come first, at random, as ``random`` draws them. keys: the range of each; a list is a choice.
    """

    n: int = Field(ge=1, le=10_000)
    n_random: int = Field(default=5, ge=1)
    random_seed: int = Field(default=0, ge=0)
    keys: dict[str, RangeConfig | list[Any]] = Field(min_length=1)


class PruneConfig(ConfigSection):
    """When a run is ended early. Whichever comes first counts.

    percentile: at an evaluation, where the best that it reached so far is not among the best so many percent of what
    earlier runs had at that step. It is asked once ``after_points`` runs have finished, and from ``after_step`` on.
    rollbacks: how often its guard rolled back. warnings: how often its guard warned, rollbacks not counted.
    """

    percentile: float | None = Field(default=None, gt=0, lt=100)
    after_points: int = Field(default=4, ge=1)
    after_step: int = Field(default=0, ge=0)
    rollbacks: int | None = Field(default=None, ge=1)
    warnings: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _has_a_reason(self) -> Self:
        if self.percentile is None and self.rollbacks is None and self.warnings is None:
            raise ValueError("one of percentile, rollbacks and warnings")
        return self


class SweepConfig(ConfigSection):
    """A sweep file. base: a preset or a settings file. settings: of every run, over the base.

    metric: as an evaluation calls it; ``lower_is_better`` says how the table is ordered. jobs: runs at once.
    memory_gib: that the runs at once may need together, by their plans; null sets no limit.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    dir: Path = Path("sweeps")
    base: str = "default"
    settings: dict[str, Any] = {}
    grid: dict[str, list[Any]] | None = None
    random: RandomConfig | None = None
    list: tuple[dict[str, Any], ...] | None = None
    search: SearchConfig | None = None
    prune: PruneConfig | None = None
    metric: str = Field(default="val/bits_per_byte", pattern=r"^[a-z]+/\w+$")
    lower_is_better: bool = True
    jobs: int = Field(default=1, ge=1, le=256)
    memory_gib: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_one_kind(self) -> Self:
        kinds = [name for name in KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            among = f"{', '.join(KINDS[:-1])} and {KINDS[-1]}"
            raise ValueError(f"exactly one of {among}, not {' and '.join(kinds) or 'none'}")
        return self

    @property
    def compares(self) -> bool:
        """Whether what a point is, or how long it runs, depends on what earlier ones came to.

        Then point k knows the points up to k - ``jobs``, and waits for all of them, whichever ends first: so the order
        in which runs happen to end changes nothing.
        """
        return self.search is not None or (self.prune is not None and self.prune.percentile is not None)

    def known_to(self, number: int) -> int:
        """The last point whose row is known where this one is drawn and compared."""
        return max(number - self.jobs, 0)


Ranges = dict[str, RangeConfig | list[Any]]
Choice = RangeConfig | Sequence[Any]


def read_sweep(path: Path) -> SweepConfig:
    """The sweep that a file describes; ConfigError where it describes none."""
    try:
        said = read_yaml(path.read_text(encoding="utf-8"), f"sweep {path}")
        return SweepConfig.model_validate(said)
    except (OSError, UnicodeDecodeError) as cause:
        why = cause.strerror if isinstance(cause, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"the sweep {path} cannot be read: {why}. Give a YAML file.", path=str(path)) from cause
    except ValidationError as cause:
        raise explain(cause, SweepConfig, lambda key: f"sweep {path}") from None
