"""What operators share: models of ours, names that move with their blocks, and parameters of another shape."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meristem.errors import CapabilityError, WrongValue
from meristem.growth.attach import slots_in
from meristem.growth.blend import Channel, Residual
from meristem.growth.plan import Carry, Plan
from meristem.growth.seed import Seed
from meristem.memory.state import LENGTHS, State
from meristem.models.lm import LM
from meristem.nn.slot import CHILD, Slot
from meristem.optim.surgery import Places, placed

BLOCKS = "blocks"


def require_lm(model: nn.Module, operation: str) -> LM:
    """Raises CapabilityError for anything but a stack of blocks of ours."""
    if not isinstance(model, LM):
        raise refused(operation, f"it is a {type(model).__name__}, and only the blocks of model.name=lm are known")
    if model.join is not None:
        raise refused(operation, "its blocks stand side by side, so that another one changes what all of them give")
    return model


def refused(operation: str, reason: str) -> CapabilityError:
    """The error of an operator that cannot be applied."""
    return CapabilityError(
        f"'{operation}' cannot be applied to this model: {reason}. Graft a seed in a slot instead, or take another "
        f"operator.",
        operation=operation,
        reason=reason,
    )


def require_place(at: int, n_places: int, what: str) -> None:
    """Raises WrongValue for a number beyond ``n_places``."""
    if not 0 <= at < n_places:
        raise WrongValue(f"{what} {at} was found; expected a number from 0 to {n_places - 1}.", value=at)


def saved_names(module: nn.Module, prefix: str) -> list[str]:
    """Names of all that is saved of a module."""
    return [f"{prefix}.{name}" for name in module.state_dict(keep_vars=True)]


def moved_names(model: LM, moves: Mapping[int, Sequence[int]]) -> dict[str, Carry]:
    """What became of the parameters of blocks: by the number before, the numbers after.

    To be called before the blocks are moved.
    """
    carries: dict[str, Carry] = {}
    for old, news in moves.items():
        for name in saved_names(model.blocks[old], f"{BLOCKS}.{old}"):
            rest = name.split(".", 2)[2]
            carries |= {f"{BLOCKS}.{new}.{rest}": Carry(name) for new in news}
    return carries


def rename_slots(model: nn.Module) -> None:
    """Slots and seeds are called as the modules that they stand at are now."""
    for name, slot in slots_in(model).items():
        slot.name = name
        for _, part in slot.parts:
            if isinstance(part, Seed):
                part.slot = name


def carry_state(plan: Plan, state: State) -> State:
    """The state of a reader for the model after a change: what blocks carry moves with them, and new ones begin; heads
    of attention that were a seed's keep what it has read, and others have read nothing but zeros."""
    moved = {name.split(".")[1]: carry.source.split(".")[1] for name, carry in plan.carries.items() if _in_block(name)}
    gone = {name.split(".")[1] for name in plan.removed if _in_block(name)} - set(moved)
    stays = {index: index for index in state["layer"] if index not in moved and index not in set(moved.values()) | gone}
    layers = {new: state["layer"][old] for new, old in (stays | moved).items() if old in state["layer"]}
    block = str(plan.fields.get("block", ""))
    if "n_heads" in plan.fields and block in layers:
        layers[block] = _with_heads(layers[block], plan.fields["n_heads"], plan.fields.get("entry", ""))
    return state | {"layer": dict(sorted(layers.items(), key=lambda each: int(each[0])))}


def _with_heads(held: State, n_heads: int, entry: str) -> State:
    """The state of attention that has got more heads: those of the seed under ``entry`` where there was one, else keys
    and values of zeros."""
    seed: State = held.get(entry, {})
    after = {name: leaf for name, leaf in held.items() if name != entry}
    for name, leaf in held.items():
        if name.startswith(LENGTHS) or not isinstance(leaf, Tensor) or leaf.dim() != 4:
            continue
        fresh_bshk = seed.get(name, leaf[:, :0, :n_heads])
        if fresh_bshk.shape[2] != n_heads:
            fresh_bshk = leaf.new_zeros(len(leaf), 0, n_heads, leaf.shape[-1])
        n_missing = leaf.shape[1] - fresh_bshk.shape[1]
        fresh_bshk = F.pad(fresh_bshk, (0, 0, 0, 0, max(n_missing, 0), 0))[:, max(-n_missing, 0) :]
        after[name] = torch.cat([leaf, fresh_bshk], dim=2)
    return after


def _in_block(name: str) -> bool:
    return name.startswith(f"{BLOCKS}.")


@torch.no_grad()
def resize(module: nn.Module, name: str, places: Places, *, std: float = 0.0, fill: float = 0.0) -> None:
    """Give a module a parameter of another shape: old entries at their places, fresh ones drawn or filled.

    It is a new tensor, so that the old one can be put back.
    """
    old: Any = module.get_parameter(name)
    value = placed(old.detach(), places, fill)
    if std:
        is_old = placed(torch.ones_like(old), places, 0.0).bool()
        drawn = (torch.randn(value.shape, device="cpu") * std).to(device=value.device, dtype=value.dtype)
        value = torch.where(is_old, value, drawn)
    owner, _, own_name = name.rpartition(".")
    fresh = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    holder = module.get_submodule(owner)
    holder.register_parameter(own_name, fresh)
    _say_size(holder, fresh)


def _say_size(module: nn.Module, weight: Tensor) -> None:
    """A layer of torch says how wide it is."""
    if isinstance(module, nn.Linear) and weight.dim() == 2:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


def with_moments(slot: str, name: str, carry: Carry, *, is_plain: bool) -> Carry:
    """A parameter of the host, whose fresh entries have the moments of the seed in that slot.

    is_plain: nothing multiplies what the seed gives, and the moments of its last projection stay right.
    """
    own = name.removeprefix(f"{slot}.")
    if own == "out.weight" and not is_plain:
        return carry
    places: Places = tuple(None if place is None else _counted(place) for place in carry.places)
    return replace(carry, beside={f"{slot}.{CHILD}.seed.layer.{own}": places})


def _counted(place: Tensor) -> Tensor:
    """The fresh places of an axis in order, -1 elsewhere."""
    is_fresh = place < 0
    return torch.where(is_fresh, is_fresh.long().cumsum(0) - 1, -1)


def is_apart(place: Slot) -> bool:
    """Whether what the seed of a slot adds depends on nothing but the input of the module and is used for nothing
    else: so it can become part of that module."""
    blends = [cast(Seed, part).blend for _, part in place.parts]
    return place.reads == "input" and all(isinstance(blend, Residual | Channel) for blend in blends)
