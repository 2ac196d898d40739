"""Rollback to an earlier state of the run, with deadlines; and the record of how that went."""

import bisect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self, TypeAlias

from meristem.errors import MeristemError, RollbackFailed, SnapshotTooLarge
from meristem.train.config import RollbackConfig

TierName = Literal["fast", "full"]

FAST: Final[Mapping[str, float]] = {"prepare": 0.150, "commit": 0.250, "confirm": 0.100}
"""Seconds for each phase of a rollback to a snapshot in memory (growth.md 20)."""

FULL: Final[Mapping[str, float]] = {
    "load": 3.0,
    "model": 2.0,
    "optimizer": 2.0,
    "policy": 0.5,
    "slots": 0.5,
    "coordination": 2.0,
    "verify": 1.0,
    "slack": 1.0,
}
"""Seconds for each phase of a rollback to a checkpoint on disk (growth.md 20)."""

BOUNDS_S: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 12.0, 30.0)
"""Upper ends of the classes in which latencies are counted; one class more holds what lies above."""

USUAL: Final = 3
"""Snapshots that are kept where nothing else is configured: one to roll back to, one before it, one being written."""

SOUND_AFTER: Final = 200
"""Steps after a panic that end a row of them: as many as those among which the guard counts skipped ones."""

MOST_IN_ROW: Final = 3
"""Panics in a row that stop the run: what the first two changed has not helped (growth.md 20)."""

Act: TypeAlias = Callable[[], None]
"""One phase. It raises what makes its tier fail."""


@dataclass(frozen=True)
class Tier:
    """One tier of rollback: what it does, in order (name to act), and how many seconds it may take in all."""

    name: TierName
    phases: Mapping[str, Act]
    deadline_s: float


@dataclass(frozen=True)
class Attempt:
    """How one tier went.

    started_at, deadline_at, tripped_at: on the clock of the caller, in seconds; tripped_at is when the deadline was
        first seen to have passed, None where it was met.
    phases: name and seconds of each phase that was begun. failure: why the next tier was needed, None for the last.
    """

    tier: TierName
    started_at: float
    deadline_at: float
    seconds: float
    phases: tuple[tuple[str, float], ...]
    tripped_at: float | None = None
    failure: str | None = None

    @property
    def is_violation(self) -> bool:
        """It took longer than it may."""
        return self.tripped_at is not None


@dataclass(frozen=True)
class Latency:
    """How long a tier took, over the whole run: a histogram over ``BOUNDS_S``, and how often it was too long."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    n_violations: int = 0

    def observed(self, attempt: Attempt) -> Self:
        """With one attempt more."""
        place = bisect.bisect_left(BOUNDS_S, attempt.seconds)
        counts = tuple(count + (index == place) for index, count in enumerate(self.counts))
        return replace(self, counts=counts, n_violations=self.n_violations + attempt.is_violation)


@dataclass(frozen=True)
class Rollbacks:
    """The rollbacks of a run. It survives a rollback, or a run could roll back for ever.

    n_in_row: rollbacks without a sequence of steps between them that proved the run sound. last_step: the step of the
    last
        panic. latencies: by tier.
    """

    n: int = 0
    n_in_row: int = 0
    last_step: int | None = None
    latencies: Mapping[TierName, Latency] = field(default_factory=lambda: {"fast": Latency(), "full": Latency()})

    def panicked(self, step: int) -> Self:
        """With a panic at ``step`` more; ``SOUND_AFTER`` steps since the last one begin a new row."""
        is_new = self.last_step is None or step - self.last_step > SOUND_AFTER
        return replace(self, n=self.n + 1, n_in_row=1 if is_new else self.n_in_row + 1, last_step=step)

    def observed(self, attempts: Sequence[Attempt]) -> Self:
        """With what the tiers took."""
        latencies = dict(self.latencies)
        for attempt in attempts:
            latencies[attempt.tier] = latencies[attempt.tier].observed(attempt)
        return replace(self, latencies=latencies)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        latencies = {
            tier: {"counts": list(each.counts), "n_violations": each.n_violations}
            for tier, each in self.latencies.items()
        }
        return {"n": self.n, "n_in_row": self.n_in_row, "last_step": self.last_step, "latencies": latencies}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What ``to_json`` wrote."""
        values = cls().to_json() | dict(values)
        latencies = {
            tier: Latency(tuple(each["counts"]), each["n_violations"]) for tier, each in values["latencies"].items()
        }
        return cls(values["n"], values["n_in_row"], values["last_step"], latencies)


def n_snapshots(config: RollbackConfig, each_bytes: int, free_bytes: int) -> int:
    """How many snapshots of ``each_bytes`` a run keeps: as many as are configured, or as fit, at most ``USUAL``.

    free_bytes: of the machine; a quarter of it may be used where ``config`` gives no limit. Raises SnapshotTooLarge if
    the configured number does not fit.
    """
    max_bytes = most_bytes(config, free_bytes)
    if config.snapshots is None:
        fitting = min(USUAL, max_bytes // each_bytes)
        return fitting if fitting > 1 else 0
    if config.snapshots * each_bytes > max_bytes:
        raise SnapshotTooLarge(
            f"rollback.snapshots={config.snapshots} of {each_bytes:,} bytes each take "
            f"{config.snapshots * each_bytes:,} bytes; {max_bytes:,} are allowed. Raise rollback.max_bytes, "
            "or set rollback.snapshots=0 to roll back by checkpoints only.",
            path="rollback.snapshots",
            found=config.snapshots * each_bytes,
            expected=max_bytes,
        )
    return config.snapshots


def most_bytes(config: RollbackConfig, free_bytes: int) -> int:
    """What all snapshots may take together."""
    return config.max_bytes if config.max_bytes is not None else free_bytes // 4


def restore(tiers: Sequence[Tier], clock: Callable[[], float] = time.monotonic) -> tuple[Attempt, ...]:
    """Roll back by the first tier that manages; every attempt, the one that succeeded last.

    A tier fails by an error of ours or of the system in one of its phases, or because its deadline passed before its
    last phase began while another tier is left. Time never undoes what was done: a last phase that ends late, and a
    last tier however late, count as violations and stand. Raises RollbackFailed when no tier managed.
    """
    attempts: list[Attempt] = []
    for index, tier in enumerate(tiers):
        attempts.append(_attempt(tier, clock, is_last=index == len(tiers) - 1))
        if attempts[-1].failure is None:
            return tuple(attempts)
    told = "; ".join(f"{attempt.tier}: {attempt.failure}" for attempt in attempts) or "there is nothing to roll back to"
    raise RollbackFailed(
        f"the run could not roll back ({told}). What was saved is untouched: check its checkpoints "
        "(`meristem checkpoint ls`), then resume from a good one with --resume PATH.",
        attempts=tuple(attempts),
    )


def _attempt(tier: Tier, clock: Callable[[], float], *, is_last: bool) -> Attempt:
    started_at = clock()
    deadline_at = started_at + tier.deadline_s
    phases: list[tuple[str, float]] = []
    tripped_at: float | None = None
    failure: str | None = None
    for name, act in tier.phases.items():
        began = clock()
        if tripped_at is None and began >= deadline_at:
            tripped_at = began
        if tripped_at is not None and not is_last:
            failure = f"{tripped_at - started_at:.3f} s had passed before '{name}', of {tier.deadline_s} s"
            break
        try:
            act()
        except (MeristemError, OSError) as error:
            failure = f"'{name}': {error}"
            break
        finally:
            phases.append((name, clock() - began))
    ended = clock()
    if tripped_at is None and ended > deadline_at:
        tripped_at = ended
    return Attempt(tier.name, started_at, deadline_at, ended - started_at, tuple(phases), tripped_at, failure)
