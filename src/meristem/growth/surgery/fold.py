"""Seeds that become part of their host for good, each in the simplest way that is exact (growth.md 11.3)."""

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meristem.errors import CapabilityError
from meristem.growth.attach import find_slot
from meristem.growth.blend import Channel, Residual
from meristem.growth.fuse import fuse, why_not
from meristem.growth.graft import find_seed, remove
from meristem.growth.plan import Applied, Carry, Plan, Preserves, draft, flops_of
from meristem.growth.seed import Seed
from meristem.growth.settle import require_arrived, settle, unsettle
from meristem.growth.surgery.heads import can_join_heads, joined_heads
from meristem.growth.surgery.host import is_apart, resize, saved_names, with_moments
from meristem.models.lm import LM
from meristem.models.topology import Change, changes, record
from meristem.nn.attention import Attention
from meristem.nn.mlp import Feedforward, SwiGLU
from meristem.nn.slot import CHILD
from meristem.optim.surgery import Places, appended

CONCATENATE: Final = "widen_feedforward"

How = Literal["folded", "concatenated", "settled"]


def plan_fossilize(model: nn.Module, slot: str) -> Plan:
    """Make the seed of a slot part of the host for good; the slot is empty then. How is in ``fields``:

    folded: a low-rank seed at a linear layer is added to its weight (``growth.fuse``). concatenated: a seed without a
    norm becomes part of the layer of a model of ours whose input it reads, hidden channels of a feed-forward layer of
    its kind, heads of attention with the same key width, window and positions. settled: any other stays in its slot
    under the name ``settled``, its blend held.

    The first two change outputs by rounding, the last not at all. Raises WrongValue for an empty slot, and a seed of
    the last two that is on its way or switched off.
    """
    seed = find_seed(model, slot)
    host: Any = model.get_submodule(slot)
    fields = {"slot": slot, "blueprint": seed.origin.blueprint}
    if not why_not(model, host, seed):
        return _plan(model, "fuse", fields, "folded", _folded(slot), shapes=_removed(slot), writes={"weight", "bias"})
    require_arrived(seed)
    is_plain = isinstance(seed.blend, Residual) and seed.way.weight == 1
    if can_join_heads(model, slot, seed):
        heads, place = cast(Attention, seed.layer), find_slot(model, slot)
        more = fields | {"block": int(slot.split(".")[1]), "n_heads": heads.heads, "entry": place.parts[-1][0]}
        return _plan(model, "fuse", more, "concatenated", joined_heads(slot, is_plain=is_plain), writes=set())
    if _can_join(model, slot, seed):
        hidden = host.out.weight.shape[1]
        apply = _concatenated(slot, hidden, is_plain=is_plain)
        return _plan(model, "fuse", fields, "concatenated", apply, writes={"out.bias"})
    return _plan(model, "fuse", fields, "settled", _settled(slot), writes=set())


def plan_unsettle(model: nn.Module, slot: str) -> Plan:
    """Make the seed that settled last in a slot the open one again: exact."""

    def apply(host: nn.Module) -> Applied:
        index = len(find_slot(host, slot).settled) - 1
        seed = unsettle(host, slot)
        return Applied(host, _renamed(seed, f"{slot}.{CHILD}.settled.{index}", f"{slot}.{CHILD}.seed"))

    return draft(model, "unsettle", {"slot": slot}, apply, preserves="exact", flops_per_token=0.0, writes=frozenset())


def _plan(
    model: nn.Module,
    operation: str,
    fields: Mapping[str, Any],
    how: How,
    apply: Callable[[nn.Module], Applied],
    *,
    shapes: Callable[[nn.Module], Applied] | None = None,
    writes: set[str],
) -> Plan:
    preserves: Preserves = "exact" if how == "settled" else "rounding"
    written = frozenset(f"{fields['slot']}.{name}" for name in writes)
    own_flops = -flops_of(model, fields["slot"], find_seed(model, fields["slot"])) if how == "folded" else 0.0
    own = dict(fields) | {"how": how}
    return draft(
        model, operation, own, apply, preserves=preserves, shapes=shapes, flops_per_token=own_flops, writes=written
    )


def _folded(slot: str) -> Callable[[nn.Module], Applied]:
    def apply(model: nn.Module) -> Applied:
        fuse(model, slot)
        return Applied(model)

    return apply


def _removed(slot: str) -> Callable[[nn.Module], Applied]:
    def apply(model: nn.Module) -> Applied:
        remove(model, slot)
        return Applied(model)

    return apply


def _settled(slot: str) -> Callable[[nn.Module], Applied]:
    def apply(model: nn.Module) -> Applied:
        seed = settle(model, slot)
        index = len(find_slot(model, slot).settled) - 1
        return Applied(model, _renamed(seed, f"{slot}.{CHILD}.seed", f"{slot}.{CHILD}.settled.{index}"))

    return apply


def _renamed(seed: Seed, before: str, after: str) -> dict[str, Carry]:
    return {f"{after}{name}": Carry(f"{before}{name}") for name in saved_names(seed, "")}


def _can_join(model: nn.Module, slot: str, seed: Seed) -> bool:
    """Whether a seed is more of the feed-forward layer that it stands beside."""
    host, layer = model.get_submodule(slot), seed.layer
    is_alike = isinstance(host, SwiGLU) and isinstance(layer, SwiGLU)
    if isinstance(host, Feedforward) and isinstance(layer, Feedforward):
        is_alike = host.activation is layer.activation is F.gelu
    return isinstance(model, LM) and is_alike and is_apart(find_slot(model, slot))


def _concatenated(slot: str, hidden: int, *, is_plain: bool) -> Callable[[nn.Module], Applied]:
    """is_plain: nothing multiplies what the seed gives, and the moments of its last projection stay right."""

    @torch.no_grad()
    def apply(model: nn.Module) -> Applied:
        seed = remove(model, slot)
        layer: Any = seed.layer
        fields = {"module": slot, "hidden": layer.out.weight.shape[1]}
        found = _widen(model, fields)
        host: Any = model.get_submodule(slot)
        scale_d = seed.blend_weight.to(layer.out.weight)
        if isinstance(seed.blend, Channel):
            scale_d = scale_d * seed.blend.logit_d.sigmoid()
        host.out.weight[:, hidden:] = scale_d.reshape(-1, 1) * layer.out.weight
        if isinstance(host, SwiGLU):
            rows = _gate_up(hidden, fields["hidden"])
            host.gate_up.weight[(rows < 0).nonzero().flatten().to(host.gate_up.weight.device)] = layer.gate_up.weight
        else:
            host.up.weight[hidden:], host.up.bias[hidden:] = layer.up.weight, layer.up.bias
            host.out.bias.add_(scale_d * layer.out.bias)
        carries = {name: with_moments(slot, name, carry, is_plain=is_plain) for name, carry in found.carries.items()}
        return Applied(found.model, carries)

    return apply


def _widen(model: nn.Module, fields: Mapping[str, Any]) -> Applied:
    """Room for more hidden channels in a feed-forward layer."""
    name, more = fields["module"], fields["hidden"]
    host: Any = model.get_submodule(name)
    hidden = host.out.weight.shape[1]
    resized: dict[str, Places] = {"out.weight": (None, appended(hidden, hidden + more))}
    if isinstance(host, SwiGLU):
        resized["gate_up.weight"] = (_gate_up(hidden, more), None)
    elif isinstance(host, Feedforward):
        resized |= {"up.weight": (appended(hidden, hidden + more), None), "up.bias": (appended(hidden, hidden + more),)}
    else:
        raise CapabilityError(
            f"'{name}' is a {type(host).__name__}, and the log widens a feed-forward layer. Use the model that the log "
            f"belongs to.",
            operation=CONCATENATE,
            reason="no feed-forward layer",
        )
    for own, places in resized.items():
        resize(host, own, places)
    carries = {f"{name}.{own}": Carry(f"{name}.{own}", places) for own, places in resized.items()}
    return Applied(record(model, Change(CONCATENATE, dict(fields))), carries)


def _gate_up(hidden: int, more: int) -> Tensor:
    """Where the rows of gates and of what they act on were, once there are more of both."""
    first = appended(hidden, hidden + more)
    return torch.cat([first, torch.where(first < 0, first, first + hidden)])


changes.register(CONCATENATE, lambda model, fields: _widen(model, fields).model)
