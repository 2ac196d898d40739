"""A small model with levels, and what the tests of its optimizer do with it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from meristem.optim.multi_period import MultiPeriodOptimizer, Update


class Levelled(nn.Module):
    """Two vectors that are always on, around a chain of one residual layer for each period."""

    def __init__(self, *periods: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(5))
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in periods)
        for layer, period in zip(self.layers, periods, strict=True):
            layer.period = period
        self.norm = nn.LayerNorm(5)
        self.matrices = {f"layers.{index}.weight" for index in range(len(periods))}

    def forward(self, hidden_bd: Tensor) -> Tensor:
        hidden_bd = hidden_bd * self.scale
        for layer in self.layers:
            hidden_bd = hidden_bd + layer(hidden_bd).tanh()
        return self.norm(hidden_bd)


def loss_at(model: nn.Module, index: int) -> Tensor:
    """A loss that is another one at every index."""
    generator = torch.Generator().manual_seed(index)
    inputs_bd, targets_bd = (torch.randn(3, 5, generator=generator) for _ in range(2))
    return (model(inputs_bd) - targets_bd).square().mean()


def train(
    model: nn.Module, optimizer: MultiPeriodOptimizer, indices: range, spoil: Callable[[int], float] = lambda _: 1.0
) -> None:
    for index in indices:
        step(model, optimizer, index, spoil(index))


def step(model: nn.Module, optimizer: MultiPeriodOptimizer, index: int, factor: float = 1.0) -> Update:
    """One step on the loss of an index, multiplied by a factor that may spoil it."""
    loss = loss_at(model, index) * factor
    loss.backward()
    update = optimizer.step(loss.detach())
    optimizer.zero_grad()
    return update


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
