"""When the levels of a model fire: a counter and periods, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from meristem.errors import WrongValue

UNITS: Final = ("steps", "tokens")


@dataclass(frozen=True)
class Clock:
    """How much was counted, and the period of each level, the fastest first.

    Level l fires iff ``count mod periods[l] == 0``; at count 0 all fire. Whoever takes part in a step reads the same
    pulse, then the clock advances once: it belongs to the run, is saved with it, and nothing counts for itself.

    unit: what is counted, ``steps`` or ``tokens``.
    """

    count: int
    periods: tuple[int, ...]
    unit: str

    def __post_init__(self) -> None:
        reasons = [
            *([] if self.count >= 0 else [f"the count is {self.count}; expected 0 or more"]),
            *([] if self.unit in UNITS else [f"the unit is {self.unit!r}; expected {' or '.join(UNITS)}"]),
            *_wrong(self.periods),
        ]
        if reasons:
            raise WrongValue(f"this is no clock: {'; '.join(reasons)}.", periods=self.periods)

    def pulse(self) -> tuple[bool, ...]:
        """Which levels fire now."""
        return tuple(self.count % period == 0 for period in self.periods)

    def advanced(self, n: int) -> Self:
        """The clock ``n`` later."""
        return replace(self, count=self.count + n)

    def to_json(self) -> dict[str, object]:
        return {"count": self.count, "periods": list(self.periods), "unit": self.unit}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(values["count"], tuple(values["periods"]), values["unit"])


def _wrong(periods: tuple[int, ...]) -> list[str]:
    if not periods:
        return ["there is no period; expected one for each level"]
    reasons = [] if periods[0] >= 1 else [f"the first period is {periods[0]}; expected 1 or more"]
    for earlier, later in zip(periods, periods[1:], strict=False):
        if later <= earlier:
            reasons.append(f"period {later} follows {earlier}; expected periods that increase strictly")
    return reasons
