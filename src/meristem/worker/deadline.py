"""A moment by which work has to be done, as a value that is handed down to it.

Source: growth.md section 22.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Deadline:
    """A moment on a clock, handed down to work that checks it between its pieces.

    at_s: the moment, on ``clock``, at which the time is over.
    """

    at_s: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    @classmethod
    def after(cls, seconds: float, clock: Callable[[], float] = time.monotonic) -> "Deadline":
        """The moment ``seconds`` from now."""
        return cls(clock() + seconds, clock)

    @property
    def left_s(self) -> float:
        """Seconds that are left; negative once it is over."""
        return self.at_s - self.clock()

    @property
    def is_over(self) -> bool:
        return self.left_s <= 0
