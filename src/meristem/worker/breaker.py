"""When to stop trying what keeps failing, as a value.

Source: growth.md section 22.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

BreakerState = Literal["closed", "open", "half-open"]


@dataclass(frozen=True)
class Breaker:
    """Whether something that failed is worth another try, as a value. A new one is closed: everything is tried.

    ``n_failures`` failures within ``span`` open it: nothing is tried. After ``pause`` it is half-open: tries are
    allowed, the first failure opens it again and ``n_successes`` successes in a row close it. Times are in the unit of
    the caller's clock, seconds or steps; it is monotonic.

    failed_at: failures, oldest first, that still count toward opening. opened_at: when it opened last, or None while
    closed. n_good: successes since it became half-open.
    """

    n_failures: int = 3
    span: float = 60
    pause: float = 30
    n_successes: int = 2
    failed_at: tuple[float, ...] = ()
    opened_at: float | None = None
    n_good: int = 0

    def state(self, now: float) -> BreakerState:
        """Closed and half-open let a try through, open does not."""
        if self.opened_at is None:
            return "closed"
        return "open" if now < self.opened_at + self.pause else "half-open"

    def failed(self, now: float) -> "Breaker":
        """The breaker after a failure. While open it stays as it is: that try began before, or was made regardless."""
        state = self.state(now)
        if state == "open":
            return self
        recent = (*(at for at in self.failed_at if at > now - self.span), now)
        if state == "half-open" or len(recent) >= self.n_failures:
            return replace(self, failed_at=(), opened_at=now, n_good=0)
        return replace(self, failed_at=recent)

    def succeeded(self, now: float) -> "Breaker":
        """The breaker after a success. Failures of a closed one are forgotten by their age alone."""
        if self.state(now) != "half-open":
            return self
        if self.n_good + 1 >= self.n_successes:
            return replace(self, failed_at=(), opened_at=None, n_good=0)
        return replace(self, n_good=self.n_good + 1)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "failed_at": list(self.failed_at)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Breaker":
        return cls(**{**saved, "failed_at": tuple(saved["failed_at"])})
