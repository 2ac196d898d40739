"""What a drill is, and what it comes to."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Seen:
    """What a drill saw.

    checks: each thing that had to be so, as a sentence, and whether it was.
    told: the figures behind that, as plain JSON values.
    """

    checks: Mapping[str, bool]
    told: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Drill:
    """One fault and what it must lead to.

    fault: what is broken. does: what the run does about it. user: what the user sees, and has to do.
    exit_code: that of the run which meets the fault; None where it is killed and has none.
    act: breaks it, in a directory of its own, and checks.
    """

    name: str
    fault: str
    does: str
    user: str
    exit_code: int | None
    act: Callable[["Drill", Path], Seen]


@dataclass(frozen=True)
class Outcome:
    """What became of one drill. ``error``: what ended the drill itself, where something did."""

    name: str
    fault: str
    expected: str
    seen: Seen
    seconds: float
    error: str | None = None

    @property
    def is_as_expected(self) -> bool:
        """Everything that had to be so was so."""
        return self.error is None and bool(self.seen.checks) and all(self.seen.checks.values())

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        figures = {"is_as_expected": self.is_as_expected, "seconds": round(self.seconds, 2)}
        return {name: value for name, value in vars(self).items() if name != "seen"} | asdict(self.seen) | figures
