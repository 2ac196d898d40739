"""Seeds put into slots, blended in, and taken out (growth.md 11): each checked before anything is touched."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meristem.device.random import stream
from meristem.errors import BlendRefused, NonFinite, ShapeError, WrongValue
from meristem.events import Emit, Event, silent
from meristem.growth.attach import find_slot, slots_in
from meristem.growth.blend import Confidence, blends
from meristem.growth.course import Course
from meristem.growth.seed import Origin, Seed
from meristem.memory.state import size_bytes
from meristem.nn.slot import CHILD, Slot

STEP: Final = 0.02
"""The least way of a ramp: what is less is noise around where it stands."""


@dataclass(frozen=True)
class Cost:
    """What a seed costs: numbers that it learns, FLOPs of matrix products per token and forward pass (two for each
    product of numbers), bytes of its parameters and buffers, and bytes that its state takes for each reader.
    """

    n_parameters: int
    flops_per_token: float
    size_bytes: int
    state_bytes: int


def cost(
    blueprint: str, width: int | tuple[int, int], *, n_time: int = 64, blend: str = "residual", **settings: Any
) -> Cost:
    """The cost of a seed, in float32, counted of one that is built for it and thrown away.

    width: of the host, or those of what is read and of what is added to. n_time: the tokens of the sequence that FLOPs
    are counted over, which matter to a memory alone. Raises what ``graft`` raises for a blueprint and its settings.
    """
    widths = (width, width) if isinstance(width, int) else width
    seed = _built(Origin.of(blueprint, settings, blend=blend, random_seed=0), widths, "cost").requires_grad_(False)
    if isinstance(seed.blend, Confidence):
        seed.blend.bind(_Blank(widths[1]), widths[1])
    read, host = (torch.zeros(1, n_time, each) for each in widths)
    n_parameters = sum(each.numel() for each in seed.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        _, state = seed(host, read, None, None)
    held = [*seed.parameters(), *seed.buffers()]
    return Cost(
        n_parameters=n_parameters,
        flops_per_token=counter.get_total_flops() / n_time,
        size_bytes=sum(each.numel() * each.element_size() for each in held),
        state_bytes=size_bytes(state),
    )


def cost_in(model: nn.Module, place: Slot, origin: Origin) -> Cost:
    """The cost of a seed in a slot of the model, with what its blend reads out of the model for every token.

    Raises BlendRefused where it cannot be read out, and what ``cost`` raises.
    """
    found = cost(origin.blueprint, place.widths, blend=origin.blend, **origin.settings)
    blend = blends.get(origin.blend)(place.widths[1])
    if not isinstance(blend, Confidence):
        return found
    counter = FlopCounterMode(display=False)
    with counter:
        blend.bind(model, place.widths[1])
    return replace(found, flops_per_token=found.flops_per_token + counter.get_total_flops())


class _Blank(nn.Module):
    """A model that says nothing, and takes no product for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_parameter("blank_d", nn.Parameter(torch.zeros(width), requires_grad=False))

    def readout(self, hidden_btd: Tensor) -> Tensor:
        return hidden_btd.new_zeros(*hidden_btd.shape[:-1], 2)


def graft(
    model: nn.Module,
    slot: str,
    seed: str | Seed,
    *,
    blend: str = "residual",
    random_seed: int = 0,
    first_weights: Mapping[str, Tensor] | None = None,
    emit: Emit = silent,
    **settings: Any,
) -> Seed:
    """Put a seed into an empty slot; the model computes what it did, for all that our blueprints build adds zero.

    The seed is built on the device and in the dtype of its host, probed, and then put in, fully blended in. It learns
    from the first step on, by ``seed.parameters()``. Outputs are equal (``torch.equal``) in any dtype: to a hidden
    number -0.0 a zero is added, which makes it 0.0.

    seed: the name of a blueprint, or a seed that ``remove`` gave back. settings: those of the blueprint.
    blend: how what it gives enters (``growth.blend``). random_seed: of its first weights.
    first_weights: parameters of its layer that begin with these values and not with drawn ones, by their names, as
    ``growth.score`` finds them. What the seed adds has to be zero with them too.

    Raises WrongValue for a slot that is not there or not empty, or a name that is none; UnknownKey, WrongValue,
    ConflictingKeys and ShapeError for settings that are none, out of bounds, or do not fit the slot; BlendRefused for a
    blend that needs logits which the model does not give, with the event ``blend.refused``; NonFinite where the probe
    adds anything but zero. The model is untouched then. The event is ``graft.done``.
    """
    place = find_slot(model, slot)
    if place.seed is not None:
        raise WrongValue(
            f"slot '{slot}' holds a seed already. Fuse or remove it, or attach a slot elsewhere.", value=slot
        )
    if isinstance(seed, Seed):
        if settings or first_weights or seed.slot != slot:
            raise WrongValue(
                f"a seed of slot '{seed.slot}' with settings or first weights was found for '{slot}'. A seed that was "
                f"removed is put back into its own slot, as it was.",
                value=seed.slot,
            )
        if seed.widths != place.widths:
            raise ShapeError(
                f"a seed that reads the width {seed.widths[0]} and adds to {seed.widths[1]} was found for slot "
                f"'{slot}', which reads {place.widths[0]} and adds to {place.widths[1]}. Put it back into the model "
                f"that it was taken out of, or graft a new one.",
                found=seed.widths,
                expected=place.widths,
            )
        made = seed
        _bind(made, model, place)
    else:
        try:
            made = build(model, place, Origin.of(seed, settings, blend=blend, random_seed=random_seed))
        except BlendRefused as cause:
            emit(Event("blend.refused", {"slot": slot, "blend": blend, "reason": str(cause)}, "error"))
            raise
        _begin(made, first_weights or {})
        _probe(made, place)
    place.seed = made
    names = [f"{slot}.{CHILD}.seed.{name}" for name, _ in made.named_parameters()]
    n_parameters = sum(each.numel() for each in made.parameters())
    payload = {"slot": slot, "blueprint": made.origin.blueprint, "n_parameters": n_parameters, "names": names}
    emit(Event("graft.done", payload))
    return made


def build(model: nn.Module, place: Slot, origin: Origin) -> Seed:
    """A seed for a slot of the model, where its host is and in its dtype; not yet in the slot.

    Raises BlendRefused for a blend that needs what the model does not give.
    """
    host = model.get_submodule(place.name)
    seed = _built(origin, place.widths, place.name)
    like = next((each for each in chain(host.parameters(), model.parameters()) if each.is_floating_point()), None)
    if like is not None:
        seed.to(device=like.device, dtype=like.dtype)
    _bind(seed, model, place)
    return seed.train(host.training)


def _bind(seed: Seed, model: nn.Module, place: Slot) -> None:
    """Give a blend that reads the model out the model that it is in."""
    if isinstance(seed.blend, Confidence):
        seed.blend.bind(model, place.widths[1])


def _built(origin: Origin, widths: tuple[int, int], slot: str) -> Seed:
    if origin.described().is_square and widths[0] != widths[1]:
        raise ShapeError(
            f"slot '{slot}' reads the width {widths[0]} and adds to {widths[1]}, and the blueprint "
            f"'{origin.blueprint}' gives what it reads. Use low_rank there, or a slot that reads the output.",
            found=widths[0],
            expected=widths[1],
        )
    return Seed(origin, widths, slot)


@torch.no_grad()
def _begin(seed: Seed, weights: Mapping[str, Tensor]) -> None:
    """Give parameters of its layer their first values. Raises WrongValue and ShapeError for those that do not fit."""
    own = dict(seed.layer.named_parameters())
    for name, weight in weights.items():
        if name not in own:
            raise WrongValue(
                f"first weights '{name}' were found for a seed '{seed.origin.blueprint}'; expected some of "
                f"{', '.join(own)}.",
                value=name,
            )
        if weight.shape != own[name].shape:
            raise ShapeError(
                f"first weights '{name}' of shape {tuple(weight.shape)} were found for a seed of slot '{seed.slot}'; "
                f"expected {tuple(own[name].shape)}.",
                found=tuple(weight.shape),
                expected=tuple(own[name].shape),
            )
        own[name].copy_(weight)


def _probe(seed: Seed, place: Slot) -> None:
    """Raise NonFinite unless the seed adds zero to what it is given."""
    added = addition(seed, place)
    if added:
        raise NonFinite(
            f"a seed '{seed.origin.blueprint}' for slot '{place.name}' adds {added:.3g} to a probe; expected zero. A "
            f"blueprint has to begin with a last projection of zeros.",
            slot=place.name,
        )


@torch.no_grad()
def addition(seed: Seed, place: Slot) -> float:
    """The most that a seed adds to a hidden number of a probe, NaN where that is none; 0 of one without numbers."""
    like = next(seed.layer.parameters())
    if like.is_meta:
        return 0.0
    generator = stream(0, "growth.probe")
    drawn = [torch.randn(2, 5, width, generator=generator).to(like.device, like.dtype) for width in place.widths]
    host = drawn[0] if place.reads == "output" else drawn[1]
    after, _ = seed(host, drawn[0], None, None)
    return float((after - host).abs().max())


def remove(model: nn.Module, slot: str, *, emit: Emit = silent) -> Seed:
    """Take the seed out of a slot, which is empty then; the seed as it is, which ``graft`` puts back.

    Raises WrongValue where there is none. An optimizer that moves its parameters is to be changed too: ``forget`` or
    ``carry_on``. The event is ``graft.undone``.
    """
    place, seed = find_slot(model, slot), find_seed(model, slot)
    place.seed = None
    emit(Event("graft.undone", {"slot": slot, "blueprint": seed.origin.blueprint}))
    return seed


def seeds_in(model: nn.Module) -> dict[str, Seed]:
    """The seeds of a model by the names of their slots."""
    return {name: slot.seed for name, slot in slots_in(model).items() if isinstance(slot.seed, Seed)}


def find_seed(model: nn.Module, slot: str) -> Seed:
    """The seed in a slot. Raises WrongValue where there is no such slot, or nothing in it."""
    seed = find_slot(model, slot).seed
    if not isinstance(seed, Seed):
        full = ", ".join(seeds_in(model)) or "none"
        raise WrongValue(f"slot '{slot}' is empty; slots with a seed are: {full}. Graft one first.", value=slot)
    return seed


def set_blend(model: nn.Module, slot: str, weight: float, *, steps: int = 0, curve: str = "cosine") -> Course:
    """Bring the blend weight of a seed to ``weight``: at once, or over ``steps`` calls of ``advance``.

    At 0 the seed is not called, and the model is its host to the bit; at 1 all that the seed gives is added. A ramp
    begins where the weight stands and ends at ``weight`` exactly; where it stands is saved with the weights.

    curve: ``linear``, ``cosine``, ``sigmoid-6``, ``-12`` or ``-24``.
    Raises WrongValue for a weight outside of [0, 1], an unknown curve, and a ramp inside of another or too short.
    """
    seed = find_seed(model, slot)
    now = seed.way
    if steps and not now.is_done:
        raise WrongValue(
            f"the seed of '{slot}' is at step {now.step} of {now.steps} on its way to {now.target:g}. Let it arrive, "
            f"or hold it with steps=0 first.",
            value=now.step,
        )
    course = Course(now.weight if steps else weight, weight, steps, 0, curve)
    if steps and abs(course.target - course.start) < STEP:
        raise WrongValue(
            f"the seed of '{slot}' has the blend weight {course.start:g}, and a ramp to {weight:g} was found; expected "
            f"a way of at least {STEP:g}. Set it with steps=0.",
            value=weight,
        )
    seed.follow(course)
    return seed.way


def advance(model: nn.Module) -> dict[str, float]:
    """Take every ramp one step further, and the blend weights then, by slot: to be called once per optimizer step."""
    seeds = seeds_in(model)
    for seed in seeds.values():
        seed.follow(seed.way.advanced())
    return {name: seed.way.weight for name, seed in seeds.items()}
