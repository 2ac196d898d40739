"""When a slow level is read or written, learned from what was read so far (memory.md 6.6)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meristem.memory.state import State, full_precision
from meristem.nn.auxiliary import AUXILIARY
from meristem.nn.config import LevelsConfig
from meristem.nn.precision import KeepsFloat32
from meristem.nn.token_pooling import wide
from meristem.shapes import Hidden

BLOCK = 64
"""Tokens whose running means are one product; the work per token grows with it."""

GOLDEN = 2654435769
"""2^32 over the golden ratio: its multiples, modulo 2^32, are as evenly spread as numbers can be."""

PerLevel = Float[Tensor, "b t l"]
LevelRow = Float[Tensor, "b l"]


class Frequency(KeepsFloat32):
    """``a_l = 1[p_l > u]`` with ``p_l = sigmoid(w_l . mean(x) + b_l)`` for every level but the fastest, which has none.

    The mean runs over the tokens read so far and forgets them over one period. p begins at 1 / period. u is one point
    of an evenly spread sequence (the multiples of the golden ratio, modulo 1) per token, so that the level is on at a
    share p of the tokens, without a threshold to carry and the same however the text is cut. Backwards a is p: a level
    that helps, ``y_l = -dL/dy``, is turned on more often (Bengio et al. 1308.3432, straight through).

    Leaves ``budget * sum_l (mean p_l - 1 / period_l)^2`` in the state under the name of auxiliary losses.
    State: the running means of ``w_l . x`` and of p.
    """

    float32 = frozenset({"weight_ld", "bias_l"})

    def __init__(self, width: int, config: LevelsConfig) -> None:
        super().__init__()
        self.periods = config.all_periods[1:]
        self.anneal, self.budget = config.anneal, config.budget
        self.weight_ld = nn.Parameter(torch.zeros(len(self.periods), width))
        self.bias_l = nn.Parameter(torch.tensor([-math.log(period - 1) for period in self.periods]))

    def init_state(self, hidden_btd: Hidden) -> State:
        """The state of a reader that has read nothing: on budget."""
        rate_l = self._rate_l(hidden_btd)
        rate_bl = rate_l.expand(hidden_btd.shape[0], -1)
        return {"seen_bl": torch.zeros_like(rate_bl), "rate_bl": rate_bl, AUXILIARY: rate_bl[:, 0] * 0}

    def forward(self, hidden_btd: Hidden, state: State, count: int) -> tuple[PerLevel, State]:
        """1 where a level is on and 0 where it is not, and the state. count: tokens read before."""
        with full_precision(hidden_btd.device):
            rate_l = self._rate_l(hidden_btd)
            raw_btl = functional.linear(hidden_btd.to(rate_l.dtype), self.weight_ld.to(rate_l.dtype))
            seen_btl = running_mean(raw_btl, state["seen_bl"], rate_l)
            chance_btl = (seen_btl + self.bias_l).sigmoid()
            index_t = torch.arange(hidden_btd.shape[1], device=hidden_btd.device) + count
            on_btl = (chance_btl > self._spread_tl(index_t)).to(chance_btl.dtype) + (chance_btl - chance_btl.detach())
            on_btl = torch.where((index_t < self.anneal)[:, None], torch.ones_like(on_btl), on_btl)
            rate_bl = running_mean(chance_btl, state["rate_bl"], rate_l)[:, -1].clone()
            loss_b = self.budget * (rate_bl - rate_l).square().sum(dim=-1)
        return on_btl, {"seen_bl": seen_btl[:, -1].clone(), "rate_bl": rate_bl, AUXILIARY: loss_b}

    def _rate_l(self, like: Tensor) -> Tensor:
        return 1 / torch.tensor(self.periods, dtype=wide(like.dtype), device=like.device)

    def _spread_tl(self, index_t: Tensor) -> Tensor:
        """A point in [0, 1) for each token and level; other levels begin elsewhere in the sequence."""
        offset_l = torch.arange(len(self.periods), device=index_t.device) * (1 << 30)
        return ((index_t[:, None] + 1) * GOLDEN + offset_l) % (1 << 32) / float(1 << 32)


def running_mean(raw_btl: PerLevel, start_bl: LevelRow, rate_l: Float[Tensor, " l"]) -> PerLevel:
    """``m_t = m_(t-1) + rate (x_t - m_(t-1))`` from ``m_(-1) = start``, block by block."""
    start_bl = start_bl.to(raw_btl.dtype)
    means = []
    for raw_bsl in raw_btl.split(BLOCK, dim=1):
        index_t = torch.arange(raw_bsl.shape[1], device=raw_btl.device)
        since_ts = index_t[:, None] - index_t
        weight_lts = rate_l[:, None, None] * (1 - rate_l)[:, None, None] ** since_ts.clamp(min=0)
        kept_tl = (1 - rate_l) ** (index_t[:, None] + 1)
        arrived_btl = torch.einsum("lts,bsl->btl", weight_lts.tril(), raw_bsl)
        means.append(kept_tl * start_bl[:, None] + arrived_btl)
        start_bl = means[-1][:, -1]
    return torch.cat(means, dim=1)
