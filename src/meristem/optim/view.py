"""The groups of an optimizer as others may see them, and the one way to change one while a run goes on.
A part for growth: nothing calls it yet.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from meristem.config.mistakes import nearest_words
from meristem.errors import WrongValue
from meristem.events import Emit, Event
from meristem.optim.kinds import Group
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import HOST
from meristem.optim.schedule import rate_of


@dataclass(frozen=True)
class GroupRecord:
    """What a group is set to.

    origin: ``host``, or that of a seed, as ``seed:blocks.1``. rate: the highest, before the scale of a seed; rate_now:
    what the last step that was scheduled went by. betas: None where what moves the group has none. n_parameters:
    numbers in its tensors.
    """

    name: str
    period: int
    rate: float
    rate_now: float
    weight_decay: float
    betas: tuple[float, ...] | None
    n_parameters: int
    origin: str = HOST


def view(optimizer: MultiPeriodOptimizer) -> Mapping[str, GroupRecord]:
    """Every group by its name, as it stands now: read-only.

    Neither the mapping nor a record can be assigned to, and nothing in them leads back to the optimizer.
    """
    return MappingProxyType({group["name"]: _record(group) for group in optimizer.param_groups})


def edit(
    optimizer: MultiPeriodOptimizer,
    name: str,
    emit: Emit,
    *,
    rate: float | None = None,
    weight_decay: float | None = None,
    betas: tuple[float, ...] | None = None,
) -> GroupRecord:
    """Set what is given of one group, say so with the event ``optimizer.edited``, and give the group as it is then.

    rate: the highest of the group; the rate that the next step goes by changes in the same ratio. Raises WrongValue,
    with nothing changed, for a group that is not there, for what it has not, and for values that no optimizer takes.
    """
    groups = {group["name"]: group for group in optimizer.param_groups}
    if name not in groups:
        nearest = ", ".join(nearest_words(name, groups))
        raise WrongValue(f"no group of the optimizer is called '{name}'. Nearest: {nearest}.", value=name)
    group, before = groups[name], _record(groups[name])
    given: dict[str, Any] = {"rate": rate, "weight_decay": weight_decay, "betas": betas}
    given = {key: value for key, value in given.items() if value is not None}
    reasons = _wrong(before, **given)
    if reasons:
        raise WrongValue(f"group {name} of the optimizer stays as it is: {'; '.join(reasons)}.", group=name)
    group |= given
    group["lr"] = before.rate_now * (group["rate"] / before.rate)
    changed = {key: [_plain(getattr(before, key)), _plain(value)] for key, value in given.items()}
    emit(Event("optimizer.edited", {"group": name, "changed": changed}))
    return _record(group)


def _record(group: Group) -> GroupRecord:
    return GroupRecord(
        name=group["name"],
        period=group["period"],
        rate=rate_of(group),
        rate_now=group["lr"],
        weight_decay=group["weight_decay"],
        betas=tuple(group["betas"]) if "betas" in group else None,
        n_parameters=sum(parameter.numel() for parameter in group["params"]),
        origin=group["origin"],
    )


def _wrong(
    before: GroupRecord,
    rate: float | None = None,
    weight_decay: float | None = None,
    betas: tuple[float, ...] | None = None,
) -> list[str]:
    reasons = []
    if rate is not None and not 0 < rate < math.inf:
        reasons.append(f"rate is {rate}; expected a number above 0")
    if weight_decay is not None and not 0 <= weight_decay < math.inf:
        reasons.append(f"weight_decay is {weight_decay}; expected a number of at least 0")
    if betas is not None and before.betas is None:
        reasons.append(f"betas are {betas}, but what moves it has none; leave them out")
    elif betas is not None and not (len(betas) == len(before.betas or ()) and all(0 <= beta < 1 for beta in betas)):
        reasons.append(f"betas are {betas}; expected {len(before.betas or ())} numbers in [0, 1)")
    return reasons


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
