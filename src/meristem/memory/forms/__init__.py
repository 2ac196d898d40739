"""The ways to run a rule over a sequence. ``scan`` is the meaning; the others say which rules they take and how exact
they are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from meristem.errors import ConflictingKeys
from meristem.memory.forms import associative, atlas, exact_chunk, frozen_chunk, lattice, tnt
from meristem.memory.forms.by_chunk import Inputs, finished
from meristem.memory.gates import Gates
from meristem.memory.rule import Rule, scan
from meristem.memory.state import Memory, full_precision, map_tensors
from meristem.memory.structure import Live
from meristem.memory.validate import require_window
from meristem.plugins import Registry
from meristem.shapes import Keys, Queries, Values


class RunWindow(Protocol):
    """Write and read a whole sequence."""

    def __call__(
        self,
        rule: Rule,
        memory: Memory,
        keys_bthk: Keys,
        values_bthv: Values,
        queries_bthk: Queries,
        gates: Gates,
        *,
        chunk: int,
    ) -> tuple[Values, Memory]: ...


def _read(rule: Rule, memory: Memory, queries_bthk: Queries) -> Values:
    return rule.structure.recall(Live(rule.weights(memory)), queries_bthk.movedim(1, 2)).movedim(1, 2)


@dataclass(frozen=True)
class Form:
    """One way to run a rule over a sequence.

    refusals: why the form cannot run a rule, as clauses about the rule; empty when it can.
    is_exact: reads and memory are those of ``scan``.
    approaches_scan: with chunks of one token they are; not so where more than the rule's own memory is read.
    read: what queries, mapped already, would each read as the next token of a memory that is not written.
    """

    run: RunWindow
    refusals: Callable[[Rule], list[str]]
    is_exact: bool
    approaches_scan: bool = True
    read: Callable[[Rule, Memory, Queries], Values] = _read


def _scan(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
    *,
    chunk: int,
) -> tuple[Values, Memory]:
    return scan(rule, memory, keys_bthk, values_bthv, queries_bthk, gates)


forms: Registry[Form] = Registry(
    "form",
    {
        "scan": Form(run=_scan, refusals=lambda rule: [], is_exact=True),
        "exact_chunk": Form(exact_chunk.exact_chunk, exact_chunk.refusals, is_exact=True),
        "associative": Form(associative.associative, associative.refusals, is_exact=True),
        "frozen_chunk": Form(frozen_chunk.frozen_chunk, frozen_chunk.refusals, False, read=frozen_chunk.read_next),
        "refined": Form(frozen_chunk.refined, frozen_chunk.refined_refusals, False, read=frozen_chunk.read_next),
        "lattice": Form(lattice.lattice, lattice.refusals, is_exact=False),
        "atlas": Form(atlas.atlas, atlas.refusals, is_exact=False),
        "tnt": Form(tnt.tnt, tnt.refusals, is_exact=False, approaches_scan=False, read=tnt.read),
    },
    accepts=lambda value: isinstance(value, Form),
)


UNFINISHED = ("frozen_chunk", "refined", "lattice", "atlas", "tnt")
"""Forms that may leave a chunk unfinished, and go on with it."""


def accepting(rule: Rule) -> list[str]:
    """Names of the forms that can run the rule."""
    return [name for name in forms.names() if not forms.get(name).refusals(rule)]


def require(rule: Rule, form: str) -> None:
    """Raises ConflictingKeys where the form of that name cannot run the rule; the message names the forms that can."""
    if form == "auto":
        return
    reasons = forms.get(form).refusals(rule)
    if reasons:
        raise ConflictingKeys(
            f"form '{form}' cannot run this rule: {'; '.join(reasons)}. Forms that can: {', '.join(accepting(rule))}.",
            form=form,
            reasons=reasons,
        )


def choose(rule: Rule) -> str:
    """What ``form="auto"`` runs: the exact form of many tokens at once where it takes the rule, else the form that the
    rule declares (``Rule.form``), and ``scan`` where that one does not take it, as after a change of its parts."""
    declared = ("exact_chunk", rule.form, "scan")
    return next(name for name in declared if not forms.get(name).refusals(rule))


def run(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
    *,
    form: str = "auto",
    chunk: int = 64,
) -> tuple[Values, Memory]:
    """Reads and the memory left behind, by the form of that name.

    Raises ConflictingKeys where the form cannot run the rule (the message names the forms that can) or its layer has to
    mix the values first, ShapeError for a memory of another rule or width, and WrongValue for what is not finite or out
    of range.
    """
    rule.require_given()
    name = choose(rule) if form == "auto" else form
    require(rule, name)
    if not torch.compiler.is_compiling():
        require_window(rule, memory, keys_bthk, values_bthv, queries_bthk, gates)
    return run_trusted(rule, memory, (keys_bthk, values_bthv, queries_bthk), gates, form=name, chunk=chunk)


def run_trusted(
    rule: Rule, memory: Memory, inputs: Inputs, gates: Gates, *, form: str, chunk: int
) -> tuple[Values, Memory]:
    """``run`` for a caller that made rule, memory and gates itself, mixed what the rule mixes, and chose a form that
    takes them.

    The memory is float32, or float64 where the caller chose that, and everything that touches it is computed in that,
    whatever the autocast around this call. A narrower memory, as an old file may hold, is widened.
    """
    keys_bthk, values_bthv, queries_bthk = inputs
    if memory[rule.structure.weights[0]].dtype in (torch.bfloat16, torch.float16):
        memory = map_tensors(lambda x: x.float() if x.is_floating_point() else x, memory)
    like = memory[rule.structure.weights[0]]
    with full_precision(like.device):
        keys_bthk, queries_bthk = (rule.features.apply(x.to(like.dtype)) for x in (keys_bthk, queries_bthk))
        return forms.get(form).run(
            rule.without_features(),
            memory if form in UNFINISHED else finished(memory),
            keys_bthk,
            values_bthv.to(like.dtype),
            queries_bthk,
            gates.to(like.dtype),
            chunk=chunk,
        )


def read_trusted(rule: Rule, memory: Memory, queries_bthk: Queries, *, form: str) -> Values:
    """What each query would read as the next token, if that were not written; in the memory's own dtype."""
    like = memory[rule.structure.weights[0]]
    with full_precision(like.device):
        queries_bthk = rule.features.apply(queries_bthk.to(like.dtype))
        return forms.get(form).read(rule.without_features(), memory, queries_bthk)
