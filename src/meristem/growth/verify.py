"""Whether a model and its optimizer after a change of structure are what the plan says (growth.md 11.1)."""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from meristem.device.random import stream
from meristem.errors import GrowthError, NonFinite, ShapeError
from meristem.growth.attach import slots_in
from meristem.growth.plan import Plan, shapes_of
from meristem.growth.topology import topology

Probe: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]

ROUNDING: Final = {torch.float64: 1e-11, torch.float32: 1e-4}
"""By how much outputs may differ where a change is exact but for rounding, and where they depend on no later token,
relative to the largest: a memory makes more of the last bits of its inputs. In half precision ``HALF``."""
HALF: Final = 0.05
NUDGE: Final = 0.1
"""Deviation of what is added to new parameters for the probe of causality: from zeros nothing could leak."""


def said(model: nn.Module, probe: Probe) -> Tensor:
    """What a model gives for a probe, in the way of inference: a tensor, or the first one or the logits of more.

    Raises ShapeError where there is no tensor of floats in it.
    """
    with torch.no_grad(), _inferring(model):
        if isinstance(probe, Mapping):
            found = model(**probe)
        else:
            found = model(*probe) if isinstance(probe, tuple) else model(probe)
    first = getattr(found, "logits", None)
    if not isinstance(first, Tensor):
        first = found[0] if isinstance(found, Sequence) else found
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise ShapeError(
            f"the model gave a {type(found).__name__} for the probe; expected a tensor of floats, alone, first, or "
            f"called logits.",
            found=type(found).__name__,
        )
    return first


def verify(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    plan: Plan,
    probe: Probe,
    *,
    wanted: Tensor,
    untouched: Sequence[tuple[str, Tensor, int]],
    moved: Set[str],
    is_causal: bool,
) -> float:
    """The largest change of an output, as a share of the largest; raises where anything is not as planned.

    wanted: what the model gave before. untouched: by the old name, tensors that may not have been replaced or written,
    and how often each had been written. moved: the old names of what the optimizer moved.
    """
    _require_shapes(model, plan)
    _require_untouched(model, untouched)
    _require_finite(model, plan)
    if optimizer is not None:
        sources = plan.sources
        _require_moved_once(model, optimizer, {n for n in plan.after if n not in sources or sources[n].source in moved})
    error = _function_error(said(model, probe), wanted, plan)
    if is_causal and (plan.added or plan.resized):
        _require_causal(model, plan, probe)
    return error


def _require_shapes(model: nn.Module, plan: Plan) -> None:
    found = shapes_of(model)
    odd = sorted(name for name in found.keys() | plan.after.keys() if found.get(name) != plan.after.get(name))
    if odd:
        raise ShapeError(
            f"after the change {odd[0]} is {found.get(odd[0], 'not there')}, and the plan has "
            f"{plan.after.get(odd[0], 'nothing')} ({len(odd)} differences in all).",
            found=odd,
        )
    if topology(model) != plan.topology:
        raise GrowthError("the log of the model after the change is not the one that was planned.")
    sources = plan.sources
    named: dict[str, Tensor] = model.state_dict(keep_vars=True)
    known = {(named[name].dtype, named[name].device) for name in sources}
    known |= {(torch.float32, device) for _, device in known}
    strange = [name for name in plan.added if known and (named[name].dtype, named[name].device) not in known]
    if strange:
        where = named[strange[0]]
        raise ShapeError(
            f"{strange[0]} came in {where.dtype} on {where.device}, where nothing else of the model is.", found=strange
        )


def _require_untouched(model: nn.Module, untouched: Sequence[tuple[str, Tensor, int]]) -> None:
    there = {id(each) for each in model.state_dict(keep_vars=True).values()}
    for name, tensor, version in untouched:
        if id(tensor) not in there or tensor._version != version:
            what = "replaced" if id(tensor) not in there else "written into"
            raise GrowthError(f"{name} was {what}, which the plan does not say.")


def _require_finite(model: nn.Module, plan: Plan) -> None:
    named: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name in {*plan.added, *plan.resized, *(plan.writes & named.keys())}:
        if not bool(named[name].isfinite().all()):
            raise NonFinite(f"{name} is not finite after the change.", tensor=name)


def _require_moved_once(model: nn.Module, optimizer: torch.optim.Optimizer, must_move: Set[str]) -> None:
    """Every parameter that was moved or is new is in one group, under its own name where groups have names, and none is
    in two."""
    names = {id(each): name for name, each in model.named_parameters()}
    seen: dict[int, int] = {}
    for group in optimizer.param_groups:
        for index, each in enumerate(group["params"]):
            seen[id(each)] = seen.get(id(each), 0) + 1
            if id(each) not in names:
                raise GrowthError("the optimizer moves a parameter that the model does not have any more.")
            if "param_names" in group and group["param_names"][index] != names[id(each)]:
                raise GrowthError(f"the optimizer calls {names[id(each)]} {group['param_names'][index]}.")
    counts = {name: seen.get(id(each), 0) for name, each in model.named_parameters()}
    wanted = {name for name, each in model.named_parameters() if each.requires_grad and name in must_move}
    wrong = [name for name, count in counts.items() if count > 1 or (name in wanted and not count)]
    if wrong:
        raise GrowthError(f"{wrong[0]} is in {counts[wrong[0]]} groups of the optimizer; expected one.")
    orphans = [each for each in optimizer.state if id(each) not in seen]
    if orphans:
        raise GrowthError(f"the optimizer has gathered for {len(orphans)} parameters that it does not move any more.")


def _function_error(found: Tensor, wanted: Tensor, plan: Plan) -> float:
    """Outputs that are new or taken away, as tokens that are not in use, have to be out of play."""
    width = min(found.shape[-1], wanted.shape[-1])
    beyond = [each[..., width:] for each in (found, wanted)]
    is_out = all(bool((each == torch.finfo(each.dtype).min).all()) for each in beyond)
    found, wanted = found[..., :width], wanted[..., :width]
    is_used = wanted > torch.finfo(wanted.dtype).min
    in_play = wanted[is_used]
    if found.shape != wanted.shape:
        raise ShapeError(f"the model gives {tuple(found.shape)} for the probe, and gave {tuple(wanted.shape)}.")
    if not bool(found.isfinite().all()):
        raise NonFinite("the model gives numbers for the probe that are not finite.")
    if not in_play.numel():
        raise ShapeError("the model says nothing for the probe. Pass a probe of at least one token.")
    largest = max(float(in_play.abs().max()), torch.finfo(wanted.dtype).tiny)
    error = float((found[is_used] - in_play).abs().max()) / largest
    is_out = is_out and torch.equal(found[~is_used], wanted[~is_used])
    bound = 0.0 if plan.preserves == "exact" else ROUNDING.get(wanted.dtype, HALF)
    if plan.preserves != "nothing" and (error > bound or not is_out):
        raise NonFinite(
            f"the model gives something else for the probe: outputs differ by {error:.3g} of the largest, expected at "
            f"most {bound:.3g}.",
            error=error,
        )
    return error


@torch.no_grad()
def _require_causal(model: nn.Module, plan: Plan, probe: Probe) -> None:
    """Later tokens change no earlier output, with everything new moved off its first values."""
    named: dict[str, Any] = model.state_dict(keep_vars=True)
    fresh = [named[name] for name in (*plan.added, *plan.resized) if isinstance(named[name], nn.Parameter)]
    kept = [each.detach().clone() for each in fresh]
    generator = stream(0, "growth.nudge")
    try:
        for each in fresh:
            each.add_(NUDGE * torch.randn(each.shape, generator=generator).to(each))
        axis = 1 if not any(slot.layout == "tbd" for slot in slots_in(model).values()) else 0
        later, cut = _with_other_end(probe, axis)
        one, other = said(model, probe), said(model, later)
    finally:
        for each, value in zip(fresh, kept, strict=True):
            each.copy_(value)
    if one.dim() < 3 or one.shape[axis] <= cut:
        raise ShapeError(
            f"the model gives {tuple(one.shape)}, nothing for every token, so that it cannot be seen whether it is "
            f"causal. Pass limits=Limits(is_causal=False) for a model that is not.",
            found=tuple(one.shape),
        )
    one, other = one.narrow(axis, 0, cut), other.narrow(axis, 0, cut)
    is_used = one > torch.finfo(one.dtype).min
    one, other = one[is_used], other[is_used]
    change = float((one - other).abs().max()) / max(float(one.abs().max()), torch.finfo(one.dtype).tiny)
    if not change <= ROUNDING.get(one.dtype, HALF):
        raise GrowthError(
            f"outputs for earlier tokens change by {change:.3g} of the largest with a later token: the model after the "
            f"change is not causal. For one that never was, pass limits=Limits(is_causal=False).",
            change=change,
        )


def _with_other_end(probe: Probe, axis: int) -> tuple[Probe, int]:
    """The probe with its last quarter changed, and where that begins."""
    if isinstance(probe, Tensor):
        n_time = probe.shape[axis]
        cut = n_time - max(1, n_time // 4)
        rolled = probe.roll(1, axis) if not probe.is_floating_point() else probe.neg() + 0.5
        return torch.cat([probe.narrow(axis, 0, cut), rolled.narrow(axis, cut, n_time - cut)], axis), cut
    if isinstance(probe, Mapping):
        name = next(name for name, each in probe.items() if isinstance(each, Tensor) and each.dim() > 1)
        later, cut = _with_other_end(probe[name], axis)
        return {**probe, name: later}, cut
    later, cut = _with_other_end(probe[0], axis)
    return (later, *probe[1:]), cut


@contextmanager
def _inferring(model: nn.Module) -> Iterator[None]:
    """Inside, no module is training; afterwards each is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
