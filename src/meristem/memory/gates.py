"""What the gate layer gives a rule for each token."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meristem.shapes import Code, Gate, RateRows

LOG_FLOOR = -30.0
"""exp(-30) = 9e-14: small enough to count as 0, large enough that differences of cumulative logs stay finite."""


@dataclass(frozen=True)
class RowGates:
    """The gates of one token or of a chunk, with one row per token; a gate that the rule does not use is None."""

    retain_bhc: RateRows
    write_bhc: RateRows
    momentum_bhc: RateRows | None = None
    threshold_bhc: RateRows | None = None
    weight_bhc: RateRows | None = None
    code_bhcg: Tensor | None = None


@dataclass(frozen=True)
class Gates:
    """How much to keep, how strongly to write, and what else a rule takes for each token and head.

    retain_bth: factor in (0, 1] by which old memory is scaled; 1 retains all.
    write_bth: write rate, >= 0.
    momentum_bth: in [0, 1); None where the rule has no momentum, which is not the same as 0.
    threshold_bth: > 0, where a bias goes from quadratic to linear.
    weight_bth: how much the pair counts in the objectives of the tokens after it, for rules with a span.
    code_bthg: which slots a token addresses.
    log_retain_bth, log_momentum_bth: their logarithms, where the gate layer made those first; forms multiply many
    factors and so prefer them. Left out, they are taken from the factors. A factor below ``exp(LOG_FLOOR)`` counts as
    that and has the gradient 0: of the logit that it is the sigmoid of, the true gradient is below 1e-13 as well.
    """

    retain_bth: Gate
    write_bth: Gate
    momentum_bth: Gate | None = None
    threshold_bth: Gate | None = None
    weight_bth: Gate | None = None
    code_bthg: Code | None = None
    log_retain_bth: Gate | None = None
    log_momentum_bth: Gate | None = None

    @classmethod
    def from_logs(
        cls, log_retain_bth: Gate, write_bth: Gate, log_momentum_bth: Gate | None = None, **others: Any
    ) -> "Gates":
        """Gates whose factors are exactly the exponentials of the given logarithms."""
        return cls(
            retain_bth=log_retain_bth.exp(),
            write_bth=write_bth,
            momentum_bth=None if log_momentum_bth is None else log_momentum_bth.exp(),
            log_retain_bth=log_retain_bth,
            log_momentum_bth=log_momentum_bth,
            **others,
        )

    def at(self, index: int) -> RowGates:
        """The gates of the token at ``index``, as one row."""
        return self.rows(index, index + 1)

    def rows(self, start: int, stop: int) -> RowGates:
        """The gates of the tokens from ``start`` to ``stop``, heads before rows."""
        named = {"retain_bhc": self.retain_bth, "write_bhc": self.write_bth, "momentum_bhc": self.momentum_bth}
        named |= {"threshold_bhc": self.threshold_bth, "weight_bhc": self.weight_bth, "code_bhcg": self.code_bthg}
        cut = {name: gate[:, start:stop].movedim(1, 2) for name, gate in named.items() if gate is not None}
        return RowGates(**cut)

    def slice_time(self, start: int, stop: int) -> "Gates":
        """The gates of a slice of the sequence."""
        present = {name: gate for name, gate in vars(self).items() if gate is not None}
        return Gates(**{name: gate[:, start:stop] for name, gate in present.items()})

    def to(self, dtype: torch.dtype) -> "Gates":
        """The same gates in another dtype."""
        return replace(self, **{name: gate.to(dtype) for name, gate in vars(self).items() if gate is not None})

    def log_retain(self) -> Gate:
        """log retain, floored at LOG_FLOOR."""
        return _floored_log(self.retain_bth, self.log_retain_bth)

    def log_momentum(self) -> Gate | None:
        """log momentum, floored at LOG_FLOOR; None where the rule has no momentum."""
        if self.momentum_bth is None:
            return None
        return _floored_log(self.momentum_bth, self.log_momentum_bth)


def _floored_log(factor_bth: Gate, log_bth: Gate | None) -> Gate:
    if log_bth is None:
        # A factor of exactly 0 has no finite logarithm; the clamp sits before it so that its gradient stays finite.
        log_bth = factor_bth.clamp_min(torch.finfo(factor_bth.dtype).tiny).log()
    return log_bth.clamp_min(LOG_FLOOR)
