"""What the gate layer tells a rule about each token."""

from dataclasses import dataclass, fields, replace

import torch

from meristem.shapes import Gate, Rate

LOG_FLOOR = -30.0
"""exp(-30) = 9e-14: low enough to mean nothing is kept, high enough that differences of cumulative logs stay finite."""


@dataclass(frozen=True)
class TokenGates:
    """The gates of one token; a gate that the rule does not use is None."""

    retain_bh: Rate
    write_bh: Rate
    momentum_bh: Rate | None = None


@dataclass(frozen=True)
class Gates:
    """How much to keep, how strongly to write, how much momentum to carry, per token and head.

    retain_bth: factor in (0, 1] by which old memory is kept; 1 keeps all.
    write_bth: write rate, >= 0.
    momentum_bth: in [0, 1); None where the rule has no momentum, which is not the same as 0.
    log_retain_bth, log_momentum_bth: their logarithms, where the gate layer made those first; forms multiply many
    factors and so prefer them. Left out, they are taken from the factors.
    """

    retain_bth: Gate
    write_bth: Gate
    momentum_bth: Gate | None = None
    log_retain_bth: Gate | None = None
    log_momentum_bth: Gate | None = None

    @classmethod
    def from_logs(cls, log_retain_bth: Gate, write_bth: Gate, log_momentum_bth: Gate | None = None) -> "Gates":
        """Gates whose factors are exactly the exponentials of the given logarithms."""
        return cls(
            retain_bth=log_retain_bth.exp(),
            write_bth=write_bth,
            momentum_bth=None if log_momentum_bth is None else log_momentum_bth.exp(),
            log_retain_bth=log_retain_bth,
            log_momentum_bth=log_momentum_bth,
        )

    def at(self, index: int) -> TokenGates:
        """The gates of the token at ``index``."""
        return TokenGates(
            retain_bh=self.retain_bth[:, index],
            write_bh=self.write_bth[:, index],
            momentum_bh=None if self.momentum_bth is None else self.momentum_bth[:, index],
        )

    def to(self, dtype: torch.dtype) -> "Gates":
        """The same gates in another dtype."""
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: gate.to(dtype) for name, gate in present.items() if gate is not None})

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
