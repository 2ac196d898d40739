"""What an optimizer has gathered for a model, given to one over the model that has grown out of it (memory.md 6.7)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from meristem.errors import WrongValue
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import SeedSettings, origin_of

Places: TypeAlias = tuple[Tensor | None, ...]
"""For each axis of a tensor that was resized, which entry of the old one stands at each place, -1 where it is fresh;
None for an axis that is as it was."""

SQUARES: Final = frozenset({"exp_avg_sq", "square", "max_exp_avg_sq"})
"""Means of squared gradients. Fresh entries begin at the mean of the old ones: at 0, their first steps would be several
times too large (growth.md 2)."""

NOT_KEPT: Final = frozenset({"params", "param_names"})
"""What a group is about and not how it is set."""


def carried(
    before: MultiPeriodOptimizer,
    *,
    old: nn.Module,
    model: nn.Module,
    names: Mapping[str, str],
    config: OptimConfig,
    joining: SeedSettings | None = None,
) -> MultiPeriodOptimizer:
    """An optimizer over ``model`` that goes on where ``before``, that of ``old``, stands.

    A parameter whose name leads to one of the same shape, moved by the same kind of optimizer, has copies of that one's
    moments, step counter and pending sum; every other begins with nothing. The clock counts on, also for periods that
    are new. ``before`` and ``old`` are as they were, so that the growth can be undone.

    Moments are as the old period left them: a level that now waits longer meets larger sums than its moments know of.
    Leave its names out to have them begin afresh.

    names: of a parameter of ``model``, to its name in ``old``. joining: how seeds of which nothing goes on are moved,
    from this step on; None leaves that to ``config``, without a warm-up. Raises WrongValue where one of them is not
    there, and where a sum would wait for ever, since its parameter now moves at every step.
    """
    sources = _sources(dict(model.named_parameters()), dict(old.named_parameters()), names)
    after = build(model, config)
    joining = joining and replace(joining, since=before.clock.count)
    after.settings = {origin: joining or settings for origin, settings in after.settings.items()}
    stranded = transferred(before, after, sources).stranded
    if stranded:
        raise WrongValue(
            f"gradients wait for {', '.join(stranded[:3])} ({len(stranded)} parameters in all), which now move at "
            f"every step and would never use them. Call flush() of the old optimizer first.",
            value=stranded,
        )
    return after


class Leftover(NamedTuple):
    """What could not be given: by name why, and the names of those whose gradients would wait for ever."""

    unfit: dict[str, str]
    stranded: list[str]


def transferred(
    before: MultiPeriodOptimizer,
    after: MultiPeriodOptimizer,
    sources: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
    resized: Mapping[str, Places] | None = None,
) -> Leftover:
    """Give ``after`` copies of what ``before`` has gathered; what could not be given.

    How many steps there were, how several processes sum and the scale of the loss are handed on too, and to a seed of
    which something goes on what it is set to.

    sources: by name, a parameter of ``after`` and the one of ``before`` that it goes on from.
    resized: by name, how those of another shape came out of the old ones (``placed``).
    """
    makers, old_makers = _makers(after), _makers(before)
    always = {id(parameter) for parameter in after.levels.get(1, [])}
    left = Leftover({}, [])
    for name, (parameter, source) in sources.items():
        maker, old_maker = makers.get(id(parameter)), old_makers.get(id(source))
        if maker is None or maker is not old_maker:
            left.unfit[name] = f"was moved by {_called(old_maker)} and is now moved by {_called(maker)}"
            continue
        places = (resized or {}).get(name, ())
        if parameter.shape != source.shape and not places:
            left.unfit[name] = f"was {tuple(source.shape)} and is now {tuple(parameter.shape)}"
            continue
        if source in before.state:
            after.state[parameter] = state_of(before.state[source], parameter, places)
        if source in before.pending and id(parameter) not in always:
            after.pending[parameter] = _copied(placed(before.pending[source], places), parameter)
        elif source in before.pending and before.pending[source].any():
            left.stranded.append(name)
    goes_on = {origin_of(name) for name in sources} & before.settings.keys() & after.settings.keys()
    after.settings |= {origin: before.settings[origin] for origin in goes_on}
    after.joined |= {part: before.joined[part] for part in before.joined.keys() & after.joined.keys()}
    after.count_dropped({origin: count for origin, count in before.n_dropped().items() if origin in goes_on})
    after.clock = replace(after.clock, count=before.clock.count)
    after.reduce, after.loss_scale = before.reduce, before.loss_scale
    return left


def keep_settings(before: MultiPeriodOptimizer, after: MultiPeriodOptimizer) -> None:
    """Set the groups of ``after`` as those of the same name in ``before`` are, and the norm of clipping."""
    settings = {group["name"]: group for group in before.param_groups}
    for group in after.param_groups:
        group |= {key: value for key, value in settings.get(group["name"], {}).items() if key not in NOT_KEPT}
    after.clip = before.clip


def state_of(gathered: Mapping[str, Any], parameter: Tensor, places: Places = ()) -> dict[str, Any]:
    """Copies of moments and counters for the parameter that goes on from another, resized where that was."""
    found = {}
    for key, value in gathered.items():
        if places and isinstance(value, Tensor) and value.dim() == len(places):
            value = placed(value, places, fill=float(value.mean()) if key in SQUARES else 0.0)
        found[key] = _copied(value, parameter)
    return found


def lay_beside(gathered: Mapping[str, Any], other: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Moments in which those of another parameter stand where its entries went; the larger of two counters."""
    found = dict(gathered)
    for key in gathered.keys() & other.keys():
        mine, theirs = gathered[key], other[key]
        if isinstance(mine, Tensor) and mine.dim() == len(places):
            is_theirs = placed(torch.ones_like(theirs), places).bool()
            found[key] = torch.where(is_theirs, placed(theirs, places), mine)
        else:
            found[key] = torch.maximum(mine, theirs.to(mine)) if isinstance(mine, Tensor) else max(mine, theirs)
    return found


def placed(value: Tensor, places: Places, fill: float = 0.0) -> Tensor:
    """A tensor whose entries are those of ``value`` at the old places, and ``fill`` where they are fresh."""
    for axis, place in enumerate(places):
        if place is None:
            continue
        fresh = (place < 0).nonzero().flatten()
        value = value.index_select(axis, place.clamp_min(0).to(value.device))
        if len(fresh):
            value = value.index_fill(axis, fresh.to(value.device), fill)
    return value


def appended(n_old: int, n_new: int) -> Tensor:
    """An axis of ``n_old`` entries, behind which there are fresh ones up to ``n_new``."""
    index = torch.arange(n_new, device="cpu")
    return torch.where(index < n_old, index, -1)


def _sources(
    now: Mapping[str, nn.Parameter], was: Mapping[str, nn.Parameter], names: Mapping[str, str]
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """By new name, the new parameter and the old one that it comes from."""
    unknown = [new for new in names if new not in now] + [name for name in names.values() if name not in was]
    if unknown:
        raise WrongValue(
            f"no parameter is called {', '.join(unknown[:3])} ({len(unknown)} names in all). Expected names of the new "
            f"model, each with the name in the old one that it goes on from.",
            value=unknown,
        )
    return {new: (now[new], was[name]) for new, name in names.items()}


def _makers(optimizer: MultiPeriodOptimizer) -> dict[int, type]:
    """What moves each parameter, by the parameter's id."""
    return {
        id(parameter): type(each)
        for each in optimizer.parts
        for group in each.param_groups
        for parameter in group["params"]
    }


def _called(maker: type | None) -> str:
    return maker.__name__ if maker else "nothing"


def _copied(value: Any, like: Tensor) -> Any:
    """A counter of the host is a value already."""
    return value.detach().to(like.device, copy=True) if isinstance(value, Tensor) else value
