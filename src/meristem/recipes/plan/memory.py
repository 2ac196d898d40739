"""The memory of a planned model: its rule, the forms that take it, and which parts go together at all."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from torch import nn

from meristem.memory.bias import biases, squared
from meristem.memory.check import conflicts
from meristem.memory.forms import forms
from meristem.memory.retention import decay, retentions
from meristem.memory.rule import Rule
from meristem.memory.structure import matrix, structures
from meristem.memory.update import plain, updates
from meristem.nn.config import MemoryConfig
from meristem.nn.neural_memory import NeuralMemory
from meristem.plugins import Registry
from meristem.recipes.plan.report import Fit, FormRow, FormRun, MemoryFigures

NEUTRAL: Final = Rule(structure=matrix(), bias=squared(), retention=decay(), update=plain())
"""The parts that go with every other one: a pair is tried with these in the other places."""

PARTS: Final[dict[str, Registry[Callable[..., Any]]]] = {
    "structure": structures,
    "bias": biases,
    "retention": retentions,
    "update": updates,
}

EXAMPLE: Final = 3
"""For the choices that a part does not have by itself, such as the power of a bias; they do not change what fits."""


def memory_of(model: nn.Module, config: MemoryConfig, window: int) -> MemoryFigures | None:
    """The memory that ``model`` was built with; None where it has none. window: tokens of a training window."""
    recalls = {path: module for path, module in model.named_modules() if isinstance(module, NeuralMemory)}
    if not recalls:
        return None
    recall = next(iter(recalls.values()))
    rule = recall.rule
    return MemoryFigures(
        rule=config.rule,
        structure=rule.structure.kind,
        bias=rule.bias.name,
        retention=rule.retention.name,
        update=rule.update.name,
        form=config.form,
        runs=recall.form,
        chunk=config.chunk,
        memories=tuple(
            FormRun(path=path, form=each.form, is_exact=forms.get(each.form).is_exact) for path, each in recalls.items()
        ),
        forms=tuple(_forms(rule)),
        fits=tuple(fits()),
    )


def fits() -> Iterator[Fit]:
    """Every pair of a structure, bias, retention or update with another, and why the two make no rule."""
    made = {place: {name: _made(registry.get(name)) for name in registry.names()} for place, registry in PARTS.items()}
    places = list(PARTS)
    for index, first in enumerate(places):
        for second in places[index + 1 :]:
            for one, part in made[first].items():
                for other, beside in made[second].items():
                    reasons = tuple(conflicts(replace(NEUTRAL, **{first: part, second: beside})))
                    yield Fit(places=(first, second), parts=(one, other), reasons=reasons)


def _forms(rule: Rule) -> Iterator[FormRow]:
    for name in forms.names():
        form = forms.get(name)
        yield FormRow(name=name, is_exact=form.is_exact, refusals=tuple(form.refusals(rule)))


def _made(maker: Callable[..., Any]) -> Any:
    """The part with its own choices, and ``EXAMPLE`` where it has none."""
    parameters = inspect.signature(maker).parameters.items()
    return maker(**{name: EXAMPLE for name, parameter in parameters if parameter.default is parameter.empty})
