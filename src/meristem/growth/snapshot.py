"""All of a model and of its optimizer that a change of structure may touch, to be put back to the bit."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Held:
    """A tensor, what it held, and its numbers where they may be written over."""

    tensor: Tensor
    data: Tensor
    requires_grad: bool
    numbers: Tensor | None


@dataclass(frozen=True)
class ModelSnapshot:
    """Every module's class and attributes, and every tensor; numbers are copied of those alone that may change."""

    modules: list[tuple[nn.Module, type, dict[str, Any]]]
    held: list[Held]

    @classmethod
    def of(cls, model: nn.Module, written: Iterable[Tensor]) -> Self:
        """written: the tensors whose numbers may change in place."""
        ids = {id(tensor) for tensor in written}
        modules = [(module, type(module), _attributes(module)) for module in model.modules()]
        held = [
            Held(tensor, tensor.data, tensor.requires_grad, tensor.detach().clone() if id(tensor) in ids else None)
            for tensor in (*model.parameters(), *model.buffers())
        ]
        return cls(modules, held)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the modules what they were."""
        for module, cls, attributes in self.modules:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes | {name: dict(attributes[name]) for name in TABLES})
        for each in self.held:
            each.tensor.data = each.data
            if each.numbers is not None:
                each.tensor.copy_(each.numbers)
            each.tensor.requires_grad_(each.requires_grad)


@dataclass(frozen=True)
class OptimizerSnapshot:
    """Groups and state of an optimizer that is changed in place; moments are not copied, for none is written."""

    optimizer: torch.optim.Optimizer
    groups: list[tuple[dict[str, Any], dict[str, Any]]]
    state: dict[Tensor, dict[str, Any]]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> Self:
        groups = [(group, _copied(group)) for group in optimizer.param_groups]
        return cls(optimizer, groups, {parameter: dict(state) for parameter, state in optimizer.state.items()})

    def put_back(self) -> None:
        """Make the optimizer what it was."""
        for group, saved in self.groups:
            group.clear()
            group.update(_copied(saved))
        self.optimizer.param_groups[:] = [group for group, _ in self.groups]
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), **{name: dict(vars(module)[name]) for name in TABLES}}


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    return {key: [*value] if isinstance(value, list) else value for key, value in group.items()}
