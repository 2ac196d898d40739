"""Which parameters the optimizer decays, when and by what it moves them, and the optimizer over them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from meristem.errors import ConflictingKeys, WrongValue
from meristem.optim.config import OptimConfig
from meristem.optim.kinds import KINDS, Group, Maker
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import FROM_THE_START, HOST, origin_of, origins


def build(model: nn.Module, config: OptimConfig) -> MultiPeriodOptimizer:
    """The optimizer over every trainable parameter: a group for each origin, period, decayed or not, and what moves it.

    A group has a ``name``, as ``level:8:no_decay`` with the period of its level, the ``param_names`` of what is in it,
    its ``origin``, and its highest ``rate``. The third word is ``matrix`` for what a matrix optimizer takes, which says
    its own speed. Matrix optimizers take what ``split`` decays, but for the head, whose rows are tokens and not
    directions. The groups of a seed have its origin before that name, and optimizers of their own. What came later into
    the host, in a module that says so by an attribute ``joined``, has groups of its own with that before their name and
    as ``joined``.
    """
    every_level = levels(model)
    _require_levels(config, every_level)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    joined = _joined(model)
    made: list[torch.optim.Optimizer] = []

    def whose(parameter: nn.Parameter) -> tuple[str, str | None]:
        origin = origin_of(names[id(parameter)])
        return origin, joined.get(id(parameter)) if origin == HOST else None

    for origin in origins(names[id(each)] for parameters in every_level.values() for each in parameters):
        filled: dict[Maker, list[Group]] = {}
        for part in dict.fromkeys([None, *joined.values()]):
            own = {
                period: [each for each in parameters if whose(each) == (origin, part)]
                for period, parameters in every_level.items()
            }
            for maker, groups in _grouped(model, config, own):
                found = [_described(group, origin, part, names) for group in groups if group["params"]]
                if maker and found:
                    filled.setdefault(maker, []).extend(found)
        made += [maker(groups, config) for maker, groups in filled.items()]
    settings = replace(FROM_THE_START, grad_clip=config.grad_clip)
    return MultiPeriodOptimizer(made, every_level, clip=config.grad_clip, settings=settings)


def _grouped(
    model: nn.Module, config: OptimConfig, every_level: Mapping[int, list[nn.Parameter]]
) -> Sequence[tuple[Maker | None, list[Group]]]:
    """The groups of one origin, by what moves them."""
    kind = KINDS[config.name]
    decayed = {id(parameter) for parameter in split(model)[0]}
    is_end = {id(parameter) for parameter in _head(model)} if kind.matrices else decayed
    matrices: list[Group] = []
    rest: list[Group] = []
    for period, parameters in every_level.items():
        orthogonalised = [each for each in parameters if id(each) in decayed - is_end]
        shrunk = [each for each in parameters if id(each) in decayed & is_end]
        plain = [each for each in parameters if id(each) not in decayed]
        rate = config.lr * config.level_rate(period)
        common = {"lr": rate, "rate": rate, "period": period}
        for speed, own in _by_speed(model, orthogonalised).items():
            group = common | {"name": f"level:{period}:matrix", "params": own, "weight_decay": config.weight_decay}
            of_speed = {"name": f"level:{period}:matrix:{speed}", "every": speed}
            matrices.append(group if speed is None else group | of_speed)
        decays = {"name": f"level:{period}:decay", "params": shrunk, "weight_decay": config.weight_decay}
        rest += [common | decays, common | {"name": f"level:{period}:no_decay", "params": plain, "weight_decay": 0.0}]
    return (kind.rest, rest), (kind.matrices, matrices)


def _described(group: Group, origin: str, part: str | None, names: Mapping[int, str]) -> Group:
    whose = part if origin == HOST else origin
    name = group["name"] if whose is None else f"{whose}:{group['name']}"
    own = [names[id(parameter)] for parameter in group["params"]]
    return group | {"name": name, "origin": origin, "param_names": own} | ({} if part is None else {"joined": part})


def _joined(model: nn.Module) -> dict[int, str]:
    """By the id of a parameter of the host, the part that it came with; a module says it by an attribute ``joined``."""
    found: dict[int, str] = {}
    for module in model.modules():
        part = getattr(module, "joined", None)
        if isinstance(part, str):
            found |= dict.fromkeys(map(id, module.parameters()), part)
    return found


def levels(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """Period to the trainable parameters that move once in so many steps, in the model's order; the fastest first.

    A module says its period by an attribute ``period``, for everything in it that has none of its own; without one a
    parameter moves every step. What two modules share moves as often as the faster of them.
    """
    period_of: dict[int, int] = {}
    for parameter, period in _with_periods(model, 1):
        period_of[id(parameter)] = min(period, period_of.get(id(parameter), period))
    found: dict[int, list[nn.Parameter]] = {period: [] for period in sorted(set(period_of.values()))}
    for parameter in model.parameters():
        if parameter.requires_grad:
            found[period_of[id(parameter)]].append(parameter)
    return {period: parameters for period, parameters in found.items() if parameters}


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters that decay and those that do not; each is in exactly one list.

    Only matrices decay: what a module names in ``matrices``, a set of names of parameters of its own or of its
    children. What no module names is none, whatever its shape: taps of convolutions, gains, biases, gates, first
    memories, and all of a module that says nothing. An embedding is none either, also where a head shares it.
    """
    matrices = {id(parameter) for module in model.modules() for parameter in _matrices(module)}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            matrices -= {id(parameter) for parameter in module.parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if id(parameter) in matrices]
    return decayed, [parameter for parameter in trainable if id(parameter) not in matrices]


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that this module declares to be matrices. Raises WrongValue for one of another shape."""
    declared: frozenset[str] = getattr(module, "matrices", frozenset())
    for name, parameter in module.named_parameters() if declared else ():
        if name not in declared:
            continue
        if parameter.dim() != 2:
            raise WrongValue(
                f"{type(module).__name__}.matrices names '{name}', of the shape {tuple(parameter.shape)}; a matrix has "
                "two axes. Take the name out.",
                value=name,
            )
        yield parameter


def _with_periods(module: nn.Module, inherited: int) -> Iterator[tuple[nn.Parameter, int]]:
    """Every parameter with the period of the nearest module around it that has one."""
    period = getattr(module, "period", inherited)
    if not isinstance(period, int) or period < 1:
        raise WrongValue(
            f"{type(module).__name__}.period is {period!r}; expected the whole number of steps, 1 or more, after which "
            "its parameters move.",
            value=period,
        )
    for parameter in module.parameters(recurse=False):
        yield parameter, period
    for child in module.children():
        yield from _with_periods(child, period)


def _by_speed(model: nn.Module, parameters: list[nn.Parameter]) -> dict[int | None, list[nn.Parameter]]:
    """The parameters by the speed of M3 that a module around them sets by ``m3_every``, or by none."""
    every_of: dict[int, int] = {}
    for module in model.modules():
        every = getattr(module, "m3_every", None)
        if every is not None:
            every_of |= dict.fromkeys(map(id, module.parameters()), every)
    found: dict[int | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(every_of.get(id(parameter)), []).append(parameter)
    return found


def _head(model: nn.Module) -> Iterator[nn.Parameter]:
    """What turns the last hidden vector into logits: the child ``head``, by which every model of ours calls it."""
    head = getattr(model, "head", None)
    if isinstance(head, nn.Module):
        yield from head.parameters()


def _require_levels(config: OptimConfig, every_level: Mapping[int, object]) -> None:
    """A setting for a period that no level has is read by nothing."""
    unread = [
        f"optim.{key}.{period}"
        for key in ("level_rates", "level_betas")
        for period in getattr(config, key)
        if period not in every_level
    ]
    if unread:
        raise ConflictingKeys(
            f"{', '.join(unread)}: no level of this model has such a period; there are "
            f"{', '.join(map(str, every_level))}. Remove the key, or name one of these.",
            path=unread[0],
        )
