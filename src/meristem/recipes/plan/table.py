"""The modules of a rehearsed model: shapes with the letters of their axes, parameters, work."""

import inspect
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from torch import nn

from meristem.recipes.plan.ledger import Shapes
from meristem.recipes.plan.measure import Measured, scale
from meristem.recipes.plan.rehearse import Rehearsal
from meristem.recipes.plan.report import ModuleRow

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Identity)


def rows(step: Measured, n_batches: int) -> Iterator[ModuleRow]:
    """Every module that ran, from the outside in; parameters and work include those of the modules inside.

    n_batches: forward and backward passes per optimizer step.
    """
    sample = step.longest
    for name, module in sample.model.named_modules():
        if name not in sample.ledger.spans.calls:
            continue
        parameters = list(module.parameters())
        reads, gives = (_shapes(step, name, side) for side in (0, 1))
        yield ModuleRow(
            name=name,
            kind=type(module).__name__,
            reads=tuple(_axes(_letters(module, is_result=False), step.window, sample.batch, reads)),
            gives=tuple(_axes(_letters(module, is_result=True), step.window, sample.batch, gives)),
            dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
            n_parameters=sum(p.numel() for p in parameters),
            n_trainable=sum(p.numel() for p in parameters if p.requires_grad),
            flops_forward=n_batches * work(step, name, ("forward", "loss")),
            flops_backward=n_batches * work(step, name, ("backward",)),
        )


def work(step: Measured, name: str, stages: tuple[str, ...]) -> int:
    """Operations of a module and those inside it, per forward and backward pass."""
    return sum(
        n
        for (stage, module), n in step.flops.items()
        if stage in stages and (not name or module == name or module.startswith(f"{name}."))
    )


def never_called(sample: Rehearsal) -> list[str]:
    """Modules that never ran, and whose parameters were not used in another way either."""
    silent = {name.rpartition(".")[0] for name in sample.without_gradient}
    return [
        name
        for name, module in sample.model.named_modules()
        if name not in sample.ledger.spans.calls
        and not isinstance(module, CONTAINERS)
        and (name in silent or not list(module.parameters()))
    ]


def _shapes(step: Measured, name: str, side: int) -> Shapes:
    found = {length: sample.ledger.spans.calls[name][side] for length, sample in step.samples.items()}
    n_shapes = min(len(shapes) for shapes in found.values())
    return [scale({length: shapes[i] for length, shapes in found.items()}, step.window) for i in range(n_shapes)]


def _letters(module: nn.Module, *, is_result: bool) -> list[str]:
    """The letters of the tensors in a forward's signature, one string per tensor; empty where it has none."""
    signature = inspect.signature(type(module).forward)
    if is_result:
        returned = signature.return_annotation
        annotations = get_args(returned) if get_origin(returned) is tuple else (returned,)
    else:
        annotations = tuple(parameter.annotation for parameter in signature.parameters.values())
    return [annotation.dim_str for annotation in annotations if hasattr(annotation, "dim_str")]


def _axes(letters: list[str], window: int, batch: int, shapes: Shapes) -> Iterator[str]:
    """``b8 t512 d128``: letters from the signature, or for torch's own modules b and t where the sizes say so."""
    for position, shape in enumerate(shapes):
        named: list[str] = letters[position].split() if position < len(letters) else []
        if len(named) != len(shape):
            named = [""] * len(shape)
            if shape[:2] == (batch, window):
                named[:2] = "bt"
        yield " ".join(f"{letter}{size}" for letter, size in zip(named, shape, strict=True))


def looked_up(model: nn.Module) -> int:
    """Parameters that are looked up and not multiplied: those of embeddings that no other module shares."""
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if all(isinstance(owner, nn.Embedding) for owner in owners[id(parameter)])
    )
