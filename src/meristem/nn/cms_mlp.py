"""Feed-forward layers on each other whose weights are stepped at different speeds (Nested Learning 2512.24695)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from meristem.memory.state import State, rows_apart
from meristem.nn.config import CMSConfig
from meristem.nn.mlp import Feedforward
from meristem.nn.norm import RMSNorm
from meristem.nn.token_pooling import group_means, hold, wide
from meristem.shapes import Hidden


class CMSMLPLevel(nn.Module):
    """``MLP_l(norm_l(x))``. ``period``: optimizer steps from one update of these weights to the next."""

    def __init__(self, norm: nn.Module, feedforward: nn.Module, period: int) -> None:
        super().__init__()
        self.norm, self.feedforward, self.period = norm, feedforward, period

    def forward(self, hidden_btd: Hidden) -> Hidden:
        return cast(Tensor, self.feedforward(self.norm(hidden_btd)))


class CMSMLP(nn.Module):
    """What all levels together add to the hidden vector x, which is given as it is, not normed (memory.md 6.2).

    chained, eq. 70: ``x_(l+1) = x_l + MLP_l(norm_l(x_l))``; the output is ``x_L - x_0``.
    independent, eq. 74: ``sum_l w_l MLP_l(norm_l(x))`` with learned w, 1 / sqrt(L) at the start.

    With pooled tokens level l reads the mean of every C_l tokens, and the tokens of the next C_l get its output;
    those of the first get 0. State: nothing, or the number of tokens read and, for each slow level, the sum over
    its unfinished group and its last output.
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, nn.Module]], config: CMSConfig) -> None:
        """layers: norm and feed-forward of every level, the fastest first."""
        super().__init__()
        self.config = config
        periods = config.all_periods
        self.level = nn.ModuleList(CMSMLPLevel(*layer, period) for layer, period in zip(layers, periods, strict=True))
        is_mixed = config.variant == "independent"
        self.mix_l = nn.Parameter(torch.full((config.count,), 1 / math.sqrt(config.count))) if is_mixed else None

    @property
    def outs(self) -> list[nn.Linear]:
        """The last projection of every level."""
        return [cast(nn.Linear, level.feedforward.out) for _, level in self._ordered()]

    @property
    def is_carrying(self) -> bool:
        """Whether a level reads means of tokens, so that there is a state."""
        return self.config.tokens != "each"

    def init_state(self, hidden_btd: Hidden) -> State:
        """The state of a reader that has read nothing; ``hidden_btd`` gives batch, dtype and device."""
        if not self.is_carrying:
            return {}
        batch, _, width = hidden_btd.shape
        zeros_bd = hidden_btd.new_zeros(batch, width, dtype=wide(hidden_btd.dtype))
        slow = {str(index): {"sum_bd": zeros_bd, "last_bd": zeros_bd} for index in range(1, self.config.count)}
        return {"count": 0, "level": slow}

    @rows_apart
    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        state = self.init_state(hidden_btd) if state is None else state
        after: State = {"count": state["count"] + hidden_btd.shape[1], "level": {}} if state else {}
        now_btd, added_btd = hidden_btd, torch.zeros_like(hidden_btd)
        for index, level in self._ordered():
            output_btd, group = self._answer(index, level, now_btd, state)
            if group:
                after["level"][str(index)] = group
            if self.mix_l is None:
                now_btd = now_btd + output_btd
            else:
                output_btd = self.mix_l[index].to(output_btd.dtype) * output_btd
            added_btd = added_btd + output_btd
        return added_btd, after

    def _ordered(self) -> Iterator[tuple[int, CMSMLPLevel]]:
        """The levels with their numbers, in the order in which the hidden vector goes through them."""
        numbered = list(enumerate(cast(Iterable[CMSMLPLevel], self.level)))
        yield from numbered if self.config.order == "fastest" else reversed(numbered)

    def _answer(self, index: int, level: CMSMLPLevel, hidden_btd: Hidden, state: State) -> tuple[Hidden, State]:
        """What one level gives to every token, and what it carries."""
        if not state or index == 0:
            return level(hidden_btd), {}
        group, n_time = state["level"][str(index)], hidden_btd.shape[1]
        n_begun = state["count"] % level.period
        mean_bnd, sum_bd = group_means(hidden_btd, group["sum_bd"], period=level.period, n_begun=n_begun)
        output_bnd = level(mean_bnd.to(hidden_btd.dtype)).to(sum_bd.dtype) if mean_bnd.shape[1] else mean_bnd
        held_btd, last_bd = hold(output_bnd, group["last_bd"], period=level.period, n_begun=n_begun, n_time=n_time)
        return held_btd.to(hidden_btd.dtype), {"sum_bd": sum_bd, "last_bd": last_bd}


def build_cms_mlp(width: int, hidden: int, config: CMSConfig) -> CMSMLP:
    """A fresh chain; each level is pre-norm, expand, GELU, project."""
    return CMSMLP([(RMSNorm(width), Feedforward(width, hidden, functional.gelu)) for _ in range(config.count)], config)
