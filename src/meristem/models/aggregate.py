"""How layers that stand side by side, each with a clock of its own, become one model."""

import math
from collections.abc import Callable
from typing import ClassVar, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meristem.shapes import Hidden

PerLayer = Float[Tensor, "n b t d"]


class Sum(nn.Module):
    """All layers add up."""

    def __init__(self, width: int, n_layers: int) -> None:
        super().__init__()

    def forward(self, layers_nbtd: PerLayer) -> Hidden:
        return layers_nbtd.sum(dim=0)


class Concat(nn.Module):
    """A learned projection of all layers, joined by channels."""

    matrices: ClassVar = frozenset({"out.weight"})

    def __init__(self, width: int, n_layers: int) -> None:
        super().__init__()
        self.out = nn.Linear(n_layers * width, width, bias=False)
        nn.init.normal_(self.out.weight, std=1 / math.sqrt(n_layers * width))

    def forward(self, layers_nbtd: PerLayer) -> Hidden:
        return self.out(torch.cat(tuple(layers_nbtd), dim=-1))


class AttentionMix(nn.Module):
    """``sum_n softmax_n(<query, x_n> / sqrt(width)) x_n`` for every token; the query is learned and starts small."""

    def __init__(self, width: int, n_layers: int) -> None:
        super().__init__()
        self.query_d = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, layers_nbtd: PerLayer) -> Hidden:
        score_nbt = torch.einsum("nbtd,d->nbt", layers_nbtd, self.query_d) / math.sqrt(layers_nbtd.shape[-1])
        return torch.einsum("nbt,nbtd->btd", score_nbt.softmax(0), layers_nbtd)


JOINS: Final[dict[str, Callable[[int, int], nn.Module]]] = {"sum": Sum, "concat": Concat, "attention": AttentionMix}
"""Name to maker: ``(width, number of layers)`` to a module from all outputs to one."""
