"""Seeds that stay in their slots for good, so that another one can be grafted (growth.md 11.3)."""

from typing import cast

from torch import nn

from meristem.errors import WrongValue
from meristem.growth.attach import find_slot, slots_in
from meristem.growth.graft import find_seed
from meristem.growth.seed import Seed


def settle(model: nn.Module, slot: str) -> Seed:
    """Make the seed in a slot part of the host as it is; the slot is empty then, and the model computes what it did.

    Its blend weight is held and its blend learns no more; its layer learns as the host does. Raises WrongValue for an
    empty slot, and a seed that is on its way or switched off.
    """
    place, seed = find_slot(model, slot), find_seed(model, slot)
    require_arrived(seed)
    place.seed = None
    place.settled.append(seed.requires_grad_(True))
    seed.blend.requires_grad_(False)
    return seed


def require_arrived(seed: Seed) -> None:
    """Raise WrongValue for a seed that is on its way, or switched off; in shapes only there is none."""
    if seed.blend_weight.is_meta or (seed.way.is_done and seed.way.weight > 0):
        return
    raise WrongValue(
        f"the seed of '{seed.slot}' has the blend weight {seed.way.weight:g} on its way to {seed.way.target:g}; one "
        f"that settles has arrived above 0. Let it arrive, or remove it.",
        value=seed.way.weight,
    )


def unsettle(model: nn.Module, slot: str) -> Seed:
    """Make the seed that settled last the one in the slot again. Raises WrongValue where there is none, or no room."""
    place = find_slot(model, slot)
    if place.seed is not None or not len(place.settled):
        raise WrongValue(
            f"slot '{slot}' has {len(place.settled)} settled seeds and {'an' if place.seed else 'no'} open one; only "
            f"into an empty slot can one come back.",
            value=slot,
        )
    seed = cast(Seed, place.settled[-1])
    del place.settled[-1]
    seed.blend.requires_grad_(True)
    place.seed = seed
    return seed


def settled_in(model: nn.Module) -> dict[str, list[Seed]]:
    """The settled seeds of a model by the names of their slots, the first one first."""
    return {name: [cast(Seed, each) for each in slot.settled] for name, slot in slots_in(model).items()}
