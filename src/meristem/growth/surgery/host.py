"""What operators share: models of ours, names that move with their blocks, and parameters of another shape."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meristem.errors import CapabilityError, WrongValue
from meristem.growth.attach import slots_in
from meristem.growth.plan import Carry, Plan
from meristem.growth.seed import Seed
from meristem.memory.state import State
from meristem.models.lm import LM
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
    """The state of a reader for the model after a change: what blocks carry moves with them, and new ones begin."""
    moved = {name.split(".")[1]: carry.source.split(".")[1] for name, carry in plan.carries.items() if _in_block(name)}
    gone = {name.split(".")[1] for name in plan.removed if _in_block(name)} - set(moved)
    stays = {index: index for index in state["layer"] if index not in moved and index not in set(moved.values()) | gone}
    layers = {new: state["layer"][old] for new, old in (stays | moved).items() if old in state["layer"]}
    return state | {"layer": dict(sorted(layers.items(), key=lambda each: int(each[0])))}


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
