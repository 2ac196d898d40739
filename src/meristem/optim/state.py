"""What an optimizer has gathered, as one flat tree of named tensors."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from meristem.errors import CheckpointMismatch
from meristem.events import Emit, Event, silent
from meristem.optim.adamuon import AdaMuon
from meristem.optim.m3 import M3, EmaM3
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import SeedSettings
from meristem.optim.period_clock import Clock

PENDING: Final = "pending"
NOTHING: Final = "nothing"
COUNT: Final = "clock/count"
PERIODS: Final = "clock/periods"
SCALE: Final = "loss_scale/scale"
N_GOOD: Final = "loss_scale/n_good"
SETTINGS: Final = "settings"
N_DROPPED: Final = "n_dropped"

SIGNS: Final[dict[type, str]] = {
    torch.optim.AdamW: "exp_avg",
    torch.optim.SGD: "momentum_buffer",
    torch.optim.Muon: "momentum_buffer",
    AdaMuon: "square",
    M3: "fast",
    EmaM3: "mean_0",
}
"""What each optimizer gathers under a name that tells it from the one beside it."""

MOMENTS: Final[dict[type, int]] = {torch.optim.AdamW: 2, torch.optim.SGD: 1, torch.optim.Muon: 1}
"""How many tensors of its own size an optimizer gathers for a parameter."""

LARGEST_MOMENTS: Final = 5
"""That of any other that there is."""

ALIGNED_BYTES: Final = 64
"""What a tensor may take up beyond its own bytes."""


def tensors(model: nn.Module, optimizer: MultiPeriodOptimizer) -> dict[str, Tensor]:
    """Moments, step counters and pending gradients under ``<parameter>/<tensor>``, what each seed, and each part of the
    host that came later, is set to and how many of a seed's gradients were dropped under ``<origin>/<tensor>``, and the
    clock.

    By name, so that neither order nor grouping matters. Counters that the host holds become whole numbers without axes.
    A parameter of which nothing was gathered while something was of others, as in a grown level, says so.
    """
    held: dict[str, Tensor] = {}
    moved = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for name, parameter in model.named_parameters():
        gathered = optimizer.state.get(parameter, {})
        for key, value in gathered.items():
            held[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        if optimizer.state and id(parameter) in moved and not gathered:
            held[f"{name}/{NOTHING}"] = torch.tensor(1)
        if parameter in optimizer.pending:
            held[f"{name}/{PENDING}"] = optimizer.pending[parameter]
    for origin, settings in (optimizer.settings | optimizer.joined).items():
        held[f"{origin}/{SETTINGS}"] = settings.to_tensor()
    held |= {f"{origin}/{N_DROPPED}": torch.tensor(count) for origin, count in optimizer.n_dropped().items() if count}
    clock = {COUNT: torch.tensor(optimizer.clock.count), PERIODS: torch.tensor(optimizer.clock.periods)}
    if optimizer.loss_scale is not None:
        clock |= {SCALE: optimizer.loss_scale.scale, N_GOOD: optimizer.loss_scale.n_good}
    return held | clock


def restore(
    model: nn.Module, optimizer: MultiPeriodOptimizer, saved: Mapping[str, Tensor], emit: Emit = silent
) -> None:
    """Put saved moments, counters, pending gradients and the clock back.

    They must fit the model and the optimizer's levels exactly, or nothing is changed. Tensors that are there already
    are written into and keep their place in memory: a rollback must not need room for a second set of moments.

    A parameter that another optimizer moved when it was saved, as Muon did the taps of convolutions, has its moments
    begin at zero, and keeps what waits for it. The event ``optimizer.begun_afresh`` names those. Seeds of which no
    settings were saved have those that the optimizer was made with.
    """
    clock = _clock(optimizer, saved)
    told = [f"{origin}/{what}" for origin in optimizer.settings for what in (SETTINGS, N_DROPPED)]
    seeds = {*told, *(f"{part}/{SETTINGS}" for part in optimizer.joined)} & saved.keys()
    parameters = dict(model.named_parameters())
    found: dict[Tensor, dict[str, Tensor]] = {}
    known: set[str] = set()
    for path, value in saved.items():
        if path in (COUNT, PERIODS, SCALE, N_GOOD) or path in seeds:
            continue
        name, key = path.rsplit("/", 1)
        parameter = parameters.get(name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size()):
            expected = "no such parameter" if parameter is None else f"a parameter of {tuple(parameter.shape)}"
            raise CheckpointMismatch(
                f"the saved optimizer holds '{path}' of shape {tuple(value.shape)}; this model has {expected}. "
                "Resume with the configuration that the run was started with.",
                tensor=path,
            )
        known.add(name)
        if key != NOTHING:
            found.setdefault(parameter, {})[key] = value.detach()
    missing = {name for name, parameter in parameters.items() if parameter.requires_grad and name not in known}
    if missing and any(found[parameter].keys() - {PENDING} for parameter in found):
        raise CheckpointMismatch(
            f"the saved optimizer holds nothing for {sorted(missing)[:3]} ({len(missing)} parameters in all). "
            "Resume with the configuration that the run was started with.",
            tensors=sorted(missing),
        )
    afresh = _moved_by_another(optimizer, found)
    for owner in afresh:
        found[owner] = {key: value for key, value in found[owner].items() if key == PENDING}
    if afresh:
        emit(Event("optimizer.begun_afresh", {"parameters": [n for n, p in parameters.items() if p in afresh]}))
    state: dict[Tensor, dict[str, Any]] = {}
    pending: dict[Tensor, Tensor] = {}
    for owner, values in found.items():
        gathered = optimizer.state.get(owner, {})
        for key, value in values.items():
            if key == PENDING:
                pending[owner] = _written(value, optimizer.pending.get(owner), owner)
            elif value.is_floating_point():
                state.setdefault(owner, {})[key] = _written(value, gathered.get(key), owner)
            else:
                state.setdefault(owner, {})[key] = int(value)
    optimizer.state.clear()
    optimizer.state.update(state)
    optimizer.pending.clear()
    optimizer.pending.update(pending)
    optimizer.clock = clock
    for held in (optimizer.settings, optimizer.joined):
        held |= {
            origin: SeedSettings.from_tensor(saved[f"{origin}/{SETTINGS}"])
            for origin in held
            if f"{origin}/{SETTINGS}" in seeds
        }
    optimizer.count_dropped(
        {origin: int(saved[path]) for origin in optimizer.settings if (path := f"{origin}/{N_DROPPED}") in seeds}
    )
    if optimizer.loss_scale is not None and SCALE in saved:
        optimizer.loss_scale.scale.copy_(saved[SCALE])
        optimizer.loss_scale.n_good.copy_(saved[N_GOOD])


def _moved_by_another(optimizer: MultiPeriodOptimizer, found: Mapping[Tensor, Mapping[str, Tensor]]) -> set[Tensor]:
    """The parameters of which something was saved that is not what their optimizer gathers."""
    signs = {
        parameter: SIGNS.get(type(part))
        for part in optimizer.parts
        for group in part.param_groups
        for parameter in group["params"]
    }
    return {
        parameter
        for parameter, values in found.items()
        if (sign := signs.get(parameter)) and values.keys() - {PENDING} and sign not in values
    }


def _written(value: Tensor, there: object, owner: Tensor) -> Tensor:
    """``there`` with the saved value in it where it can hold that, else a copy beside its parameter, in float32 or
    better."""
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(there, Tensor) and there.shape == value.shape and there.dtype == value.dtype:
        return there.copy_(value)
    return value.to(owner.device, copy=True)


def _clock(optimizer: MultiPeriodOptimizer, saved: Mapping[str, Tensor]) -> Clock:
    """The saved clock; refused unless it counts for the levels that there are."""
    periods = tuple(saved[PERIODS].tolist()) if PERIODS in saved else optimizer.clock.periods
    if periods != optimizer.clock.periods:
        raise CheckpointMismatch(
            f"the saved optimizer has levels of the periods {periods}; this model has {optimizer.clock.periods}. "
            "Resume with the configuration that the run was started with.",
            expected=periods,
            found=optimizer.clock.periods,
        )
    return Clock(int(saved[COUNT]) if COUNT in saved else 0, periods, "steps")


def expected_bytes(optimizer: MultiPeriodOptimizer) -> int:
    """At most how much an optimizer will have gathered once every parameter has moved: moments, counters, sums."""
    n_bytes = 0
    for part in optimizer.parts:
        n_moments = MOMENTS.get(type(part), LARGEST_MOMENTS)
        for group in part.param_groups:
            n_bytes += sum(n_moments * (_wide_bytes(each) + ALIGNED_BYTES) + ALIGNED_BYTES for each in group["params"])
    slow = [each for period, level in optimizer.levels.items() if period > 1 for each in level]
    return n_bytes + sum(4 * each.numel() + ALIGNED_BYTES for each in slow)


def _wide_bytes(parameter: Tensor) -> int:
    """Bytes of it, in float32 or better, in this process, which may hold a part."""
    to_local = getattr(parameter, "to_local", None)
    held: Tensor = parameter if to_local is None else to_local()
    return held.numel() * max(4, held.element_size())
