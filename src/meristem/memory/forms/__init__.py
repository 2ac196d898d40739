"""The ways to run a rule over a window. ``scan`` is the meaning; the others say which rules they take and how exact
they are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from meristem.errors import ConflictingKeys
from meristem.memory.forms.exact_chunk import exact_chunk, refusals
from meristem.memory.gates import Gates
from meristem.memory.rule import Rule, scan
from meristem.memory.value import Memory, full_precision
from meristem.plugins import Registry
from meristem.shapes import Keys, Queries, Values


class RunWindow(Protocol):
    """Write and read a whole window."""

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


@dataclass(frozen=True)
class Form:
    """One way to run a rule over a window.

    refusals: why the form cannot run a rule, as clauses about the rule; empty when it can.
    is_exact: reads and memory are those of ``scan``.
    """

    run: RunWindow
    refusals: Callable[[Rule], list[str]]
    is_exact: bool


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
        "exact_chunk": Form(run=exact_chunk, refusals=refusals, is_exact=True),
    },
    accepts=lambda value: isinstance(value, Form),
)


def accepting(rule: Rule) -> list[str]:
    """Names of the forms that can run the rule."""
    return [name for name in forms.names() if not forms.get(name).refusals(rule)]


def choose(rule: Rule, n_time: int) -> str:
    """The fastest exact form for a window of ``n_time`` tokens: what ``form="auto"`` runs."""
    return "scan" if n_time == 1 or refusals(rule) else "exact_chunk"


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

    The memory keeps its own dtype, float32 unless the caller chose otherwise, and everything that touches it is
    computed in it, whatever the autocast around this call.

    Raises ConflictingKeys where the form cannot run the rule; the message names the forms that can.
    """
    name = choose(rule, keys_bthk.shape[1]) if form == "auto" else form
    chosen = forms.get(name)
    reasons = chosen.refusals(rule)
    if reasons:
        raise ConflictingKeys(
            f"form '{name}' cannot run this rule: {'; '.join(reasons)}. Forms that can: {', '.join(accepting(rule))}.",
            form=name,
            reasons=reasons,
        )
    like = next(iter(memory.values()))
    with full_precision(like.device):
        return chosen.run(
            rule,
            memory,
            keys_bthk.to(like.dtype),
            values_bthv.to(like.dtype),
            queries_bthk.to(like.dtype),
            gates.to(like.dtype),
            chunk=chunk,
        )
