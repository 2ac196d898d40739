"""A seed made part of the weights of its host, where that is exact (growth.md 11.3)."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from meristem.device.random import stream
from meristem.errors import CapabilityError, NonFinite
from meristem.events import Emit, Event, silent
from meristem.growth.attach import find_slot
from meristem.growth.blend import Channel, Residual
from meristem.growth.graft import find_seed, graft, remove
from meristem.growth.layers import LowRank
from meristem.growth.seed import Seed

BOUND: Final = 8
"""Largest change of the output by fusing, in units of the rounding of the dtype and relative to its norm: 1e-6 in
float32."""


@dataclass(frozen=True)
class Fused:
    """What ``fuse`` replaced: the seed, and the weight and bias of its host before, for ``unfuse``."""

    seed: Seed
    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def fuse(model: nn.Module, slot: str, *, emit: Emit = silent) -> Fused:
    """Add a low-rank seed to the weight of the linear layer that it stands at; the slot is empty then.

    A seed that reads the input: ``W <- W + alpha diag(v) B A``; one that reads the output: ``W <- W + alpha diag(v) B A
    W`` and ``b <- b + alpha diag(v) B A b``, where v is 1, or that of a channel blend. Products are taken in float64.
    The output changes by rounding alone: at most 8 units of the dtype relative to its norm, measured on a probe.

    Raises CapabilityError where that is not exact: another seed, blend or host, or a weight that other modules use too;
    NonFinite where the probe differs by more. The model is untouched then, to the bit. The event is ``seed.fused``.
    """
    seed = find_seed(model, slot)
    host: Any = model.get_submodule(slot)
    reason = why_not(model, host, seed)
    if reason:
        raise CapabilityError(
            f"the seed of '{slot}' cannot be fused: {reason}. Keep it in its slot, or remove it.",
            operation="fuse",
            reason=reason,
        )
    before = Fused(seed, host.weight.detach().clone(), None if host.bias is None else host.bias.detach().clone())
    probe = torch.randn(7, 3, host.in_features, generator=stream(0, "growth.fuse")).to(host.weight)
    wanted = host(probe)
    matrix, reads = _matrix(seed), find_slot(model, slot).reads
    for tensor in (host.weight, host.bias):
        if tensor is None or (reads == "input" and tensor is host.bias):
            continue
        wide = tensor.double()
        tensor.copy_(wide + (matrix @ wide if reads == "output" else matrix))
    remove(model, slot)
    change = float((host(probe) - wanted).double().norm() / wanted.double().norm().clamp_min(1e-300))
    if not change <= BOUND * torch.finfo(host.weight.dtype).eps:
        unfuse(model, slot, before)
        raise NonFinite(
            f"fusing the seed of '{slot}' changes the output of a probe by {change:.3g} of its norm; expected at most "
            f"{BOUND * torch.finfo(host.weight.dtype).eps:.3g}. Nothing was changed: keep the seed in its slot.",
            change=change,
        )
    emit(Event("seed.fused", {"slot": slot, "blueprint": seed.origin.blueprint, "relative_change": change}))
    return before


@torch.no_grad()
def unfuse(model: nn.Module, slot: str, fused: Fused) -> Seed:
    """Put back what ``fuse`` gave: the weights of the host to the bit, and the seed into its slot."""
    host: Any = model.get_submodule(slot)
    seed = graft(model, slot, fused.seed)
    host.weight.copy_(fused.weight)
    if fused.bias is not None:
        host.bias.copy_(fused.bias)
    return seed


def _matrix(seed: Seed) -> Tensor:
    """``alpha diag(v) B A`` in float64."""
    layer: Any = seed.layer
    matrix: Tensor = layer.out.weight.double() @ layer.down.weight.double()
    if isinstance(seed.blend, Channel):
        matrix = seed.blend.logit_d.double().sigmoid()[:, None] * matrix
    return seed.way.weight * matrix


def why_not(model: nn.Module, host: Any, seed: Seed) -> str:
    """Why a seed cannot be added to the weight of its host, or nothing."""
    cls = type(host).unslotted
    if not isinstance(seed.layer, LowRank):
        return f"a '{seed.origin.blueprint}' is no linear map; only low_rank is"
    if not isinstance(seed.blend, Residual | Channel):
        return f"the blend '{seed.origin.blend}' depends on the hidden vectors; residual and channel do not"
    if cls.forward is not nn.Linear.forward:
        return f"its host, of the class {cls.__name__}, is no linear layer"
    if is_parametrized(host):
        return "the weight of its host is computed from others by a parametrization"
    for own in (host.weight, host.bias):
        others = [name for name, each in model.named_parameters(remove_duplicate=False) if shares(each, own)]
        if own is not None and len(others) > 1:
            return f"the weight of its host is shared by {' and '.join(others)}, which would change too"
    return ""


def shares(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are held in the same place."""
    return other is not None and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
