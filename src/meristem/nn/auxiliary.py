"""Losses that a layer has of its own: they leave in the state, for a forward pass writes nothing on its module."""

from typing import Final

import torch
from torch import Tensor

from meristem.memory.state import State, flatten

AUXILIARY: Final = "auxiliary_b"
"""The name under which a layer leaves a loss for each row, already weighted. It is a function of the rest of the state
that leaves with it, so that the cut of a text does not change it, and nobody reads it on the way in."""


def auxiliary(state: State) -> Tensor | None:
    """All auxiliary losses of a state, as one number to be added to the mean loss of a step; None where it has none."""
    rows = [leaf for path, leaf in flatten(state).items() if path.rpartition(".")[2] == AUXILIARY]
    losses = [leaf.mean() for leaf in rows if isinstance(leaf, Tensor)]
    return torch.stack(losses).sum() if losses else None
