"""What the gates need to know of a model and its seeds: nothing that is measured here leaves a trace (growth.md 13)."""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, cast

import torch
from torch import Tensor, nn

from meristem.growth.blend import Blend
from meristem.growth.contribution import switched
from meristem.growth.graft import find_seed, seeds_in
from meristem.growth.observe import HeldOut
from meristem.growth.topology import topology
from meristem.models.topology import to_json
from meristem.nn.slot import CHILD

Loss: TypeAlias = Callable[[nn.Module], Tensor]
"""The loss of a model on a probe batch, always the same one, with its graph; the caller's."""

SPAN: tuple[int, int] = (3, 20)
"""Evaluations through which a line is drawn to the next: at least, at most."""


@torch.no_grad()
def largest_change(model: nn.Module, slot: str, logits: Callable[[nn.Module], Tensor]) -> float:
    """The most by which a logit of a probe differs with the seed of a slot fully live and without it."""
    with switched(model, {slot: 1.0}):
        live = logits(model)
    with switched(model, {slot: 0.0}):
        off = logits(model)
    return float((live - off).abs().max())


@dataclass(frozen=True)
class Gradients:
    """Of one probe batch with a seed fully live. ratio: size of a number of the seed's gradient in the square mean, by
    the host's. n_reached: tensors of the seed that a finite gradient reaches, not all zero."""

    ratio: float | None
    n_reached: int

    @classmethod
    def of(cls, model: nn.Module, slot: str, loss: Loss) -> Self:
        """Taken apart from the gradients that parameters have, which stay."""
        own = [each for each in find_seed(model, slot).parameters() if each.requires_grad]
        ids = {id(each) for each in own}
        host = [
            each
            for name, each in model.named_parameters()
            if each.requires_grad and id(each) not in ids and f".{CHILD}." not in f".{name}."
        ]
        with switched(model, {slot: 1.0}), torch.enable_grad():
            found = torch.autograd.grad(loss(model), [*own, *host], allow_unused=True)
        seed_grads, host_grads = (
            [each for each in part if each is not None] for part in (found[: len(own)], found[len(own) :])
        )
        n_reached = sum(bool(each.isfinite().all()) and bool(each.any()) for each in seed_grads)
        size, host_size = _size(seed_grads), _size(host_grads)
        return cls(size / host_size if size is not None and host_size else None, n_reached)


def _size(tensors: Sequence[Tensor]) -> float | None:
    """In the square mean over all numbers."""
    n = sum(each.numel() for each in tensors)
    return None if n == 0 else math.sqrt(sum(float(each.double().pow(2).sum()) for each in tensors) / n)


@torch.no_grad()
def size_ratio(model: nn.Module, slot: str, run: Callable[[nn.Module], Any]) -> float | None:
    """Size of what a slot gives, by what its module gives, in the square mean while ``run`` calls the model."""
    sizes: list[tuple[float, float]] = []

    def look(_: nn.Module, given: tuple[Any, ...], found: tuple[Tensor, Any]) -> None:
        sizes.append((float(found[0].double().pow(2).sum()), float(given[0].double().pow(2).sum())))

    handle = find_seed(model, slot).register_forward_hook(look)
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled block would not notice
            run(model)
    finally:
        handle.remove()
    after, before = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0.0, 0.0)
    return math.sqrt(after / before) if before else None


@dataclass(frozen=True)
class BlendReport:
    """How a seed enters its host on a probe batch: ``a = weight * g`` over all hidden numbers (``growth.blend``).

    weight_p95: 95 of 100 a are not above it. sparsity: share of a below 1e-3. factor_mean: of g. seconds: of one call
    of the blend.
    """

    blend: str
    weight_mean: float
    weight_p95: float
    sparsity: float
    factor_mean: float
    seconds: float


@torch.no_grad()
def blend_report(model: nn.Module, slot: str, run: Callable[[nn.Module], Any]) -> BlendReport | None:
    """What the blend of a seed does while ``run`` calls the model; None of a seed that is switched off."""
    seed, seen = find_seed(model, slot), []
    blend = cast(Blend, seed.blend)

    def look(_: nn.Module, given: tuple[Tensor, Tensor, Tensor], found: Tensor) -> None:
        seen.append(given)

    handle = seed.blend.register_forward_hook(look)
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled block would not notice
            run(model)
    finally:
        handle.remove()
    if not seen:
        return None
    begun_s = time.perf_counter()
    blend(*seen[0])
    seconds = time.perf_counter() - begun_s
    factors = torch.cat([blend.factor(host).float().flatten() for host, *_ in seen])
    weights = factors * seed.way.weight
    return BlendReport(
        blend=seed.origin.blend,
        weight_mean=float(weights.mean()),
        weight_p95=float(weights.kthvalue(math.ceil(0.95 * len(weights))).values),
        sparsity=float((weights < 1e-3).float().mean()),
        factor_mean=float(factors.mean()),
        seconds=seconds,
    )


def n_host_parameters(model: nn.Module) -> int:
    """Numbers that a model learns outside of its slots."""
    return sum(each.numel() for name, each in model.named_parameters() if f".{CHILD}." not in f".{name}")


def host_digest(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and bytes of all that a model holds outside of its slots."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if f".{CHILD}." not in f".{name}":
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def structure_digest(model: nn.Module) -> str:
    """SHA-256 of what a model has grown to, of where its blend weights stand, and of the names that learn."""
    courses = {slot: vars(seed.way) for slot, seed in seeds_in(model).items()}
    learning = [name for name, each in model.named_parameters() if each.requires_grad]
    said = json.dumps([to_json(topology(model)), courses, learning], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def n_left(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> int:
    """How many of these an optimizer still has in a group or a state for."""
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    held |= {id(each) for each in optimizer.state}
    return sum(id(each) in held for each in parameters)


def is_grouped(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether each of these is in one group of an optimizer, and in no other."""
    held = [id(each) for group in optimizer.param_groups for each in group["params"]]
    return all(held.count(id(each)) == 1 for each in parameters)


def expected(held_out: Sequence[HeldOut], *, born: int, tokens: int) -> tuple[float, float] | None:
    """Loss that the run would have at ``tokens`` without a seed, and how far that may be off; None of too few points.

    ``a + b ln tokens`` by least squares through the last evaluations up to the step ``born``; the second number is
    1.65 times the error of a single prediction.
    """
    least, most = SPAN
    points = [(math.log(at), nats) for step, at, _, nats in held_out if step <= born and at > 0][-most:]
    n = len(points)
    if n < least:
        return None
    mean_x, mean_y = (sum(column) / n for column in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread == 0:
        return None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    squares = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    away = math.log(tokens) - mean_x
    error = math.sqrt(squares / (n - 2) * (1 + 1 / n + away**2 / spread))
    return mean_y + slope * away, 1.65 * error


def spread(losses: Sequence[float]) -> float | None:
    """Standard deviation of losses around their line; None of fewer than three."""
    n = len(losses)
    if n < 3:
        return None
    mean_x, mean_y = (n - 1) / 2, sum(losses) / n
    slope = sum((x - mean_x) * (y - mean_y) for x, y in enumerate(losses)) / sum((x - mean_x) ** 2 for x in range(n))
    squares = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in enumerate(losses))
    return math.sqrt(squares / (n - 2))


def calm(losses: Sequence[float], norms: Sequence[float]) -> dict[str, float | None]:
    """How quiet a training is, by the names that risk has for it; None of too few steps.

    losses: of the last steps, in nats. norms: of their gradients, before clipping.
    """
    away, middle = spread(losses), statistics.fmean(losses) if losses else 0.0
    mean = statistics.fmean(norms) if norms else 0.0
    return {
        "loss_volatility": None if away is None or not middle else away / middle,
        "gradient_norm": statistics.median(norms) if norms else None,
        "gradient_variance": statistics.variance(norms) / mean**2 if len(norms) > 1 and mean else None,
    }
