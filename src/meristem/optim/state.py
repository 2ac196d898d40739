"""What an optimizer has gathered, as one flat tree of named tensors."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from meristem.errors import CheckpointMismatch
from meristem.optim.clock import Clock
from meristem.optim.outer import Outer

PENDING: Final = "pending"
NOTHING: Final = "nothing"
COUNT: Final = "clock/count"
PERIODS: Final = "clock/periods"


def tensors(model: nn.Module, optimizer: Outer) -> dict[str, Tensor]:
    """Moments, step counters and pending gradients under ``<parameter>/<tensor>``, and the clock.

    By name, so that neither order nor grouping matters. Counters that the host holds become whole numbers without axes.
    A parameter of which nothing was gathered while something was of others, as in a grown level, says so.
    """
    held: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        gathered = optimizer.state.get(parameter, {})
        for key, value in gathered.items():
            held[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        if optimizer.state and parameter.requires_grad and not gathered:
            held[f"{name}/{NOTHING}"] = torch.tensor(1)
        if parameter in optimizer.pending:
            held[f"{name}/{PENDING}"] = optimizer.pending[parameter]
    clock = {COUNT: torch.tensor(optimizer.clock.count), PERIODS: torch.tensor(optimizer.clock.periods)}
    return held | clock


def restore(model: nn.Module, optimizer: Outer, saved: Mapping[str, Tensor]) -> None:
    """Put saved moments, counters, pending gradients and the clock back.

    They must fit the model and the optimizer's levels exactly, or nothing is changed.
    """
    clock = _clock(optimizer, saved)
    parameters = dict(model.named_parameters())
    restored: dict[Tensor, dict[str, Any]] = {}
    pending: dict[Tensor, Tensor] = {}
    known: set[str] = set()
    for path, value in saved.items():
        if path in (COUNT, PERIODS):
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
        copied = value.detach().to(parameter.device, copy=True)
        known.add(name)
        if key == PENDING:
            pending[parameter] = copied
        elif key != NOTHING:
            restored.setdefault(parameter, {})[key] = copied if value.is_floating_point() else int(value)
    missing = {name for name, parameter in parameters.items() if parameter.requires_grad and name not in known}
    if restored and missing:
        raise CheckpointMismatch(
            f"the saved optimizer holds nothing for {sorted(missing)[:3]} ({len(missing)} parameters in all). "
            "Resume with the configuration that the run was started with.",
            tensors=sorted(missing),
        )
    optimizer.state.clear()
    optimizer.state.update(restored)
    optimizer.pending.clear()
    optimizer.pending.update(pending)
    optimizer.clock = clock


def _clock(optimizer: Outer, saved: Mapping[str, Tensor]) -> Clock:
    """The saved clock; refused unless it counts for the levels that there are."""
    periods = tuple(saved[PERIODS].tolist()) if PERIODS in saved else (1,)
    if periods != optimizer.clock.periods:
        raise CheckpointMismatch(
            f"the saved optimizer has levels of the periods {periods}; this model has {optimizer.clock.periods}. "
            "Resume with the configuration that the run was started with.",
            expected=periods,
            found=optimizer.clock.periods,
        )
    return Clock(int(saved[COUNT]) if COUNT in saved else 0, periods, "steps")
