"""Where a run stands, as a value: it goes into the loop and comes out of every step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from meristem.data.stream import Cursor
from meristem.memory.state import State
from meristem.train.config import TrainConfig


@dataclass(frozen=True)
class Progress:
    """Everything of a run besides weights and moments.

    seconds_used: time spent in training steps; preparing, evaluating and saving do not count.
    flops: floating-point operations of all passes so far, counted where ``train.flops`` limits them.
    n_nonfinite, n_nonfinite_in_row: skipped steps, in all and without a good one since.
    ease, eased_until: a factor on the learning rate of the steps before that one, after the run rolled back to an
    earlier state.
    n_micro_batches: into how many micro-batches a batch is cut to fit on the device.
    memory: what the model carries from sequence to sequence when each batch goes on where the last one ended, else
    None.
    """

    cursor: Cursor
    step: int = 0
    tokens: int = 0
    seconds_used: float = 0.0
    flops: float = 0.0
    n_nonfinite: int = 0
    n_nonfinite_in_row: int = 0
    ease: float = 1.0
    eased_until: int = 0
    n_micro_batches: int = 1
    memory: State | None = None

    def share(self, config: TrainConfig) -> float:
        """How much of the run is done, from 0: in steps if these are limited, else in tokens, FLOPs or seconds."""
        if config.steps is not None:
            return self.step / config.steps
        if config.tokens is not None:
            return self.tokens / config.tokens
        if config.flops is not None:
            return self.flops / config.flops
        return self.seconds_used / config.max_time if config.max_time is not None else 0.0

    def is_over(self, config: TrainConfig) -> bool:
        """Some limit is reached."""
        reached = (
            (self.step, config.steps),
            (self.tokens, config.tokens),
            (self.flops, config.flops),
            (self.seconds_used, config.max_time),
        )
        return any(limit is not None and used >= limit for used, limit in reached)

    def spent(self, flops: float) -> "Progress":
        """The same place after so many operations more."""
        return replace(self, flops=self.flops + flops)

    def easing(self) -> float:
        """The factor on the learning rate of the next step."""
        return self.ease if self.step < self.eased_until else 1.0

    def to_json(self) -> dict[str, object]:
        """The plain values; the memory is tensors and is saved beside them."""
        return {name: value for name, value in vars(self).items() if name not in ("cursor", "memory")}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], cursor: Cursor, memory: State | None) -> "Progress":
        return replace(cls(cursor=cursor, memory=memory), **values)
