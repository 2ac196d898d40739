"""One gradient out of the gradients of several losses on the same parameters, and how far these disagree.

Growth.md section 21. What is compared is always one parameter under two losses: gradients of different parameters have
nothing to disagree about (section 2).

A step gathers the gradients of each loss over all of its batches, and settles them once: a conflict is one between
the gradients of the whole step, whatever pieces it was made in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from meristem.errors import ShapeError
from meristem.events import Event
from meristem.train.config import AggregateConfig

Gradients = Sequence[Tensor | None]
"""One for each parameter, None where the loss does not reach it."""

WARN: Final = 0.5
HIGH: Final = 0.75
"""Conflict rates above which a report says so."""

JUMP: Final = 0.3
"""By how much the share of a source may change from one report to the next before that is an event."""


@dataclass(frozen=True)
class Report:
    """How far the sources of a step agree, in plain numbers.

    cosines: of each pair, over the parameters that both reach; None where one of the two gradients is 0 there.
    rate: of all pairs at all parameters that both have gradients for, the share in which the two point away from each
    other.
    shares: the norm of each weighted gradient as a share of the sum of these norms.
    worst: up to three parameters at which the sources lose most against each other, the worst first.
    is_idle: no parameter is reached by two sources, so that there was nothing to settle.
    """

    cosines: dict[str, float | None]
    rate: float
    shares: dict[str, float]
    worst: tuple[str, ...]
    is_idle: bool

    @property
    def level(self) -> Literal["ok", "warn", "high"]:
        """What the conflict rate amounts to."""
        return "high" if self.rate > HIGH else "warn" if self.rate > WARN else "ok"

    def to_json(self) -> dict[str, object]:
        """The plain values, as for the payload of an event."""
        return vars(self) | {"level": self.level, "worst": list(self.worst)}


@dataclass(frozen=True)
class Conflict:
    """The inner products between the sources of a step, left on the device until the report is read.

    products: by parameter, source and source; unweighted, in float32 or better, 0 where a source does not reach.
    reached: by parameter and source, 1 where the loss depends on the parameter, else 0. The host knows it.
    """

    sources: tuple[str, ...]
    parameters: tuple[str, ...]
    weights: tuple[float, ...]
    products: Tensor
    reached: Tensor

    @property
    def is_idle(self) -> bool:
        """No parameter is reached by two sources; asking does not make the host wait."""
        return not bool((self.reached.sum(1) > 1).any())

    def report(self) -> Report:
        """The numbers of the step. The host waits for them, once."""
        products, weights = self.products.cpu().double(), torch.tensor(self.weights).double()
        shared = self.reached[:, :, None] * self.reached[:, None, :]
        squares = (products.diagonal(dim1=1, dim2=2)[:, :, None] * shared).sum(0)
        scales, sums = (squares * squares.T).sqrt(), products.sum(0)
        pairs = list(combinations(range(len(self.sources)), 2))
        n_shared = sum(int(shared[:, i, j].sum()) for i, j in pairs)
        n_against = sum(int((products[:, i, j] < 0).sum()) for i, j in pairs)
        # Each pair stands in the table twice, which does not change the order.
        lost = (products.clamp(max=0) * weights[:, None] * weights).sum((1, 2))
        norms = (sums.diagonal().sqrt() * weights).tolist()
        return Report(
            cosines={
                f"{self.sources[i]}/{self.sources[j]}": float(sums[i, j] / scales[i, j]) if scales[i, j] else None
                for i, j in pairs
            },
            rate=n_against / n_shared if n_shared else 0.0,
            shares=dict(zip(self.sources, (norm / (sum(norms) or 1.0) for norm in norms), strict=True)),
            worst=tuple(self.parameters[p] for p in lost.argsort(stable=True)[:3].tolist() if lost[p] < 0),
            is_idle=self.is_idle,
        )


def total(losses: Mapping[str, Tensor], config: AggregateConfig) -> Tensor:
    """The weighted sum of the losses, whose gradient ``mean`` takes; with all weights 1 the plain sum, to the bit."""
    weights = config.weights.model_dump()
    weighted = [loss if weights.get(name, 1.0) == 1 else weights[name] * loss for name, loss in losses.items()]
    return sum(weighted[1:], start=weighted[0])


def keep_graphs() -> None:
    """Have compiled blocks keep what their backward reads: with several losses it is read several times.

    For the whole process, and to be called before the first forward: a block that was compiled without it, and had one
    backward of a single loss, refuses those of several.
    """
    functorch_config.donated_buffer = False


def gather(
    model: nn.Module, before: Mapping[str, Gradients], losses: Mapping[str, Tensor]
) -> dict[str, list[Tensor | None]]:
    """What was gathered ``before``, each source with the gradient of its loss added; nothing is put on the parameters.

    losses: of one batch or a part of it, each divided by the targets of the whole step. Their graph is used up.
    """
    parameters = [parameter for _, parameter in _trained(model)]
    gathered = {name: list(gradients) for name, gradients in before.items()}
    last = [name for name, loss in losses.items() if loss.requires_grad][-1:]
    for name, loss in losses.items():
        found: Gradients = [None] * len(parameters)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, parameters, retain_graph=name not in last, allow_unused=True)
        # Never in place: two parameters that are added to each other may be given one and the same gradient.
        had = gathered.get(name, [None] * len(parameters))
        gathered[name] = [_sum(old, new) for old, new in zip(had, found, strict=True)]
    return gathered


@torch.no_grad()
def settle(
    model: nn.Module, gathered: Mapping[str, Gradients], config: AggregateConfig, generator: torch.Generator
) -> Conflict:
    """Add to the gradients of the model what ``part`` makes of the gathered ones; once a step, before it is clipped."""
    names, parameters = zip(*_trained(model), strict=True)
    weights = config.weights.model_dump()
    combined, conflict = combine(gathered, names, how=config.how, per=config.per, weights=weights, generator=generator)
    for parameter, gradient in zip(parameters, combined, strict=True):
        parameter.grad = _sum(parameter.grad, gradient)
    return conflict


def combine(
    sources: Mapping[str, Gradients],
    parameters: Sequence[str],
    *,
    how: Literal["mean", "pcgrad"],
    per: Literal["all", "layer"] = "all",
    weights: Mapping[str, float] | None = None,
    generator: torch.Generator,
) -> tuple[list[Tensor | None], Conflict]:
    """The gradient to use, and how far the sources disagree. The gradients that are given stay as they are.

    ``mean`` is the weighted sum. ``pcgrad`` takes from each g_i, before they are summed, what points against another:
    for all j != i in random order, where g_i . g_j < 0, g_i <- g_i - (g_i . g_j / |g_j|^2) g_j with the g_j that came
    in. Only parameters that both have gradients for are read and changed. Where nothing is in conflict both are the
    plain sum, bit for bit.

    sources: name to a gradient for each of ``parameters``; all of them means over the same step.
    per: take the products over all parameters, or for every parameter by itself.
    weights: by name, 1 where none is given; they change the sum and not what counts as a conflict.
    generator: draws the order, on the CPU; with two sources there is only one.
    Raises ShapeError for a source with another number of gradients than there are parameters.
    Source: Yu et al. 2020, Gradient Surgery for Multi-Task Learning, arXiv 2001.06782, algorithm 1.
    """
    for name, gradients in sources.items():
        if len(gradients) != len(parameters):
            raise ShapeError(
                f"source '{name}' has {len(gradients)} gradients for {len(parameters)} parameters. Give one for each, "
                "None where the loss does not reach the parameter.",
                found=len(gradients),
                expected=len(parameters),
            )
    scales = tuple(float((weights or {}).get(name, 1.0)) for name in sources)
    conflict = _compared(sources, tuple(parameters), scales)
    shares = _HOW[how](conflict, per == "layer", generator)
    combined: list[Tensor | None] = []
    for p, gradients in enumerate(_rows(sources, len(parameters))):
        one: Tensor | None = None
        for i, gradient in enumerate(gradients):
            one = _sum(one, None if gradient is None else gradient * shares[p, i])
        combined.append(one)
    return combined, conflict


def changes(before: Report | None, now: Report) -> list[Event]:
    """What is worth saying of a report after the one before it, None for the first: news only, no state of affairs."""
    events = []
    if now.level != (before.level if before else "ok"):
        events.append(Event("aggregate.conflict", now.to_json(), "info" if now.level == "ok" else "warning"))
    if now.is_idle and not (before and before.is_idle):
        events.append(Event("aggregate.idle", {"sources": list(now.shares)}, "warning"))
    for name, share in now.shares.items() if before else ():
        was = before.shares.get(name, 0.0) if before else 0.0
        if abs(share - was) > JUMP:
            events.append(Event("aggregate.share_jumped", {"source": name, "was": was, "is": share}, "warning"))
    return events


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return right if left is None else left if right is None else left + right


def _rows(sources: Mapping[str, Gradients], n_parameters: int) -> list[tuple[Tensor | None, ...]]:
    """By parameter, what each source has for it."""
    return list(zip(*sources.values(), strict=True)) if sources else [()] * n_parameters


def _compared(sources: Mapping[str, Gradients], parameters: tuple[str, ...], weights: tuple[float, ...]) -> Conflict:
    """All inner products, tensor by tensor: no gradient is copied into one long vector."""
    rows = _rows(sources, len(parameters))
    present = [gradient for row in rows for gradient in row if gradient is not None]
    dtype, device = torch.float32, torch.device("cpu")
    for gradient in present:
        dtype, device = torch.promote_types(dtype, gradient.dtype), gradient.device
    n = len(sources)
    products = torch.zeros(len(rows), n, n, dtype=dtype, device=device)
    for p, row in enumerate(rows):
        flat = {i: gradient.flatten().to(dtype) for i, gradient in enumerate(row) if gradient is not None}
        for i, j in combinations_with_replacement(flat, 2):
            products[p, i, j] = products[p, j, i] = torch.dot(flat[i], flat[j])
    reached = torch.tensor([[float(gradient is not None) for gradient in row] for row in rows])
    return Conflict(
        sources=tuple(sources),
        parameters=parameters,
        weights=weights,
        products=products,
        reached=reached.reshape(len(rows), n),
    )


def _weighted(conflict: Conflict, is_per_layer: bool, generator: torch.Generator) -> Tensor:
    """By parameter and source, how often the gradient enters the sum: the plain weights."""
    return torch.tensor(conflict.weights).expand(len(conflict.parameters), -1).to(conflict.products, non_blocking=True)


def _without_conflict(conflict: Conflict, is_per_layer: bool, generator: torch.Generator) -> Tensor:
    """The same, after every source has given up what points against another.

    A projected gradient is a mixture of the gradients that came in, so that its products with them follow from theirs:
    the projections are made on a few numbers, on the device, and no gradient is touched before the sum.
    """
    products, n = conflict.products, len(conflict.sources)
    reached = conflict.reached.to(products, non_blocking=True)
    mixed = torch.diag_embed(reached)
    for i in range(n):
        for j in torch.randperm(n, generator=generator).tolist():
            if i == j:
                continue
            is_shared = reached[:, i] * reached[:, j]
            against = (mixed[:, i] * products[:, :, j]).sum(1) * is_shared
            square = products[:, j, j] * is_shared
            if not is_per_layer:
                against, square = against.sum(), square.sum()
            given_up = torch.where((against < 0) & (square > 0), against / square, 0.0)
            mixed[:, i, j] -= given_up * is_shared
    weights = torch.tensor(conflict.weights).to(products, non_blocking=True)
    return (mixed * weights[:, None]).sum(1)


_HOW: Final[dict[str, Callable[[Conflict, bool, torch.Generator], Tensor]]] = {
    "mean": _weighted,
    "pcgrad": _without_conflict,
}
