"""From the hidden vector of a token to the gates of its memory."""

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from meristem.memory import Gates
from meristem.memory.value import full_precision
from meristem.shapes import Hidden


class GateMap(nn.Module):
    """Retain, write rate and momentum of every head, each a sigmoid of a linear map (memory.md 2.3).

    Weights start at 0, so that every token begins with the same gates: retain by its half-life H, ``2^(-1/H)``; write
    rate ``write``; momentum ``momentum``. With momentum the write rate carries the factor ``1 - momentum``: a key
    that returns is then written once, not ``1 / (1 - momentum)`` times, which keeps the rule stable.
    """

    no_decay: ClassVar = frozenset({"weight_hd", "bias_h"})

    def __init__(self, width: int, heads: int, *, half_life: float, write: float, momentum: float | None) -> None:
        super().__init__()
        first = [_logit(2 ** (-1 / half_life)), _logit(write)] + ([] if momentum is None else [_logit(momentum)])
        self.n_gates = len(first)
        self.weight_hd = nn.Parameter(torch.zeros(self.n_gates * heads, width))
        self.bias_h = nn.Parameter(torch.tensor(first).repeat_interleave(heads))

    def forward(self, hidden_btd: Hidden) -> Gates:
        """Gates in float32, whatever the autocast: a retain factor near 1 does not survive bfloat16."""
        with full_precision(hidden_btd.device):
            raw_bth = functional.linear(hidden_btd.to(self.weight_hd.dtype), self.weight_hd, self.bias_h)
            raw = raw_bth.chunk(self.n_gates, dim=-1)
            write_bth = raw[1].sigmoid()
            log_momentum_bth = None
            if self.n_gates == 3:
                log_momentum_bth = functional.logsigmoid(raw[2])
                write_bth = write_bth * (-raw[2]).sigmoid()
            return Gates.from_logs(functional.logsigmoid(raw[0]), write_bth, log_momentum_bth)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
