"""Parts meet parts: whatever ``check`` lets through is a rule that keeps the laws, and what it stops it explains.

Rules are drawn from the registries (memory.md 2.8 and 12), so a new part is tested with all others by being registered.
"""

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor

from memory.inputs import Window, window
from meristem.errors import ConflictingKeys
from meristem.memory import Gates, Rule, run, scan
from meristem.memory.bias import absolute, biases, dot, huber_switch, kl, squared
from meristem.memory.check import check, conflicts
from meristem.memory.forms import accepting, forms
from meristem.memory.forms.by_chunk import finished
from meristem.memory.retention import decay, f_divergence, retentions, simplex, sphere
from meristem.memory.state import State, clone, flatten, unflatten
from meristem.memory.structure import Structure, matrix, mlp, slots, structures, two_slots
from meristem.memory.update import implicit, leader, orthogonal_momentum, plain, updates

SMALL: dict[str, list[Structure]] = {
    "mlp": [mlp(2, 2), mlp(3, 2, is_normed=True), mlp(2, 2, is_gated=True, is_normed=True)],
    "slots": [slots(4), slots(4, "encode")],
    "two_slots": [two_slots(4, squash) for squash in ("silu", "l2_silu", "ln_silu", "identity")],
}
"""Structures in sizes for tests; those not named here are taken as they are registered."""
CHOICES: dict[str, dict[str, float]] = {"power": {"p": 1.5}}
"""What a part cannot do without."""
STRUCTURES = [made for name in structures.names() for made in SMALL.get(name, [structures.get(name)()])]
ORDERS = list(itertools.product(("after", "before"), ("cold", "warm"), (1, 3)))
CHUNK = 3


def made_of(structure: Structure, bias: str, retention: str, update: str) -> list[Rule]:
    """The rules of these parts, in every order of reading and probing, with one pair or with three."""
    parts = structure, biases.get(bias)(**CHOICES.get(bias, {})), retentions.get(retention)(), updates.get(update)()
    return [Rule(*parts, reads=reads, probe=probe, span=span) for reads, probe, span in ORDERS]


def is_wild(rule: Rule) -> bool:
    """Delta momentum subtracts the square of the surprise, which a vector, whose every key is 1, cannot make small."""
    return rule.update.name == "delta_momentum" and rule.structure.kind == "vector"


@st.composite
def any_rule(draw: st.DrawFn) -> Rule:
    """Parts that may or may not go together."""
    names = (draw(st.sampled_from(registry.names())) for registry in (biases, retentions, updates))
    return draw(st.sampled_from(made_of(draw(st.sampled_from(STRUCTURES)), *names)))


@st.composite
def valid_rule(draw: st.DrawFn) -> Rule:
    """Parts that go together: the update and the orders are drawn among those that suit the rest."""
    structure = draw(st.sampled_from(STRUCTURES))
    bias, retention = (draw(st.sampled_from(registry.names())) for registry in (biases, retentions))
    found = [rule for update in updates.names() for rule in made_of(structure, bias, retention, update)]
    suiting = [rule for rule in found if not conflicts(rule) and not is_wild(rule)]
    assume(suiting)
    return draw(st.sampled_from(suiting))


def some(n_examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=n_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def gentle(rule: Rule, n_time: int, batch: int = 2) -> Window:
    """Small rates and values: away from the limits of stability, which differ from part to part.

    Delta momentum subtracts the square of the surprise, at no rate; it grows without end where that is above
    1 + momentum, and so gets small pairs (memory.md 2.7).
    """
    inputs = window(rule, n_time, batch=batch)
    size = 0.1 if rule.update.name == "delta_momentum" else 1.0
    code_bthg = None if inputs.gates.code_bthg is None else size * inputs.gates.code_bthg
    gates = replace(inputs.gates, write_bth=0.05 * inputs.gates.write_bth, code_bthg=code_bthg)
    keys_bthk, values_bthv = size * inputs.keys_bthk, 0.5 * size * inputs.values_bthv
    return replace(inputs, keys_bthk=keys_bthk, values_bthv=values_bthv, gates=gates)


def close(found: Tensor | State, expected: Tensor | State) -> None:
    """To 1e-10, of the number itself where it is larger than 1."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def row(inputs: Window, index: int) -> Window:
    """One row of the batch, alone."""
    alone = {name: x[index : index + 1] for name, x in inputs.leaves().items()}
    return Window(
        memory={name: alone[name] for name in inputs.memory},
        keys_bthk=alone["keys"],
        values_bthv=alone["values"],
        queries_bthk=alone["queries"],
        gates=Gates(**{name: alone.get(name) for name in vars(inputs.gates)}),
    )


@given(valid_rule())
@some(120)
def test_a_valid_rule_is_finite(rule: Rule) -> None:
    """S3-M1, S3b-M2: every valid choice of parts reads and leaves finite numbers, in the dtype it was given."""
    inputs = gentle(rule, 9)
    read_bthv, memory = scan(check(rule), *inputs.arguments())
    for x in (read_bthv, *memory.values()):
        assert x.isfinite().all() and x.dtype == torch.float64
    assert memory.keys() == inputs.memory.keys()


@given(valid_rule())
@some(60)
def test_rows_of_a_batch_never_meet(rule: Rule) -> None:
    """Law 8: a row alone reads and leaves what it does among others, in every form."""
    inputs = gentle(rule, 5)
    for form in accepting(rule):
        read_bthv, memory = run(rule, *inputs.arguments(), form=form, chunk=CHUNK)
        alone_bthv, alone = run(rule, *row(inputs, 1).arguments(), form=form, chunk=CHUNK)
        close(alone_bthv, read_bthv[1:])
        lasts = {name: x[1:] if isinstance(x, Tensor) else x for name, x in flatten(memory).items()}
        close(flatten(alone), lasts)


@given(valid_rule(), st.integers(1, 7))
@some(80)
def test_a_window_may_be_cut_anywhere(rule: Rule, cut: int) -> None:
    """Law 3: in every form, the memory saved and restored at the cut, where a chunk may be unfinished."""
    inputs = gentle(rule, 8)
    for form in accepting(rule):
        read_bthv, memory = run(rule, *inputs.arguments(), form=form, chunk=CHUNK)
        first_bthv, halfway = run(rule, *inputs.cut(0, cut).arguments(), form=form, chunk=CHUNK)
        restored = unflatten(flatten(clone(halfway)))
        last_bthv, after = run(rule, *inputs.cut(cut, 8, restored).arguments(), form=form, chunk=CHUNK)
        close(torch.cat([first_bthv, last_bthv], dim=1), read_bthv)
        close(flatten(after), flatten(memory))


@given(valid_rule())
@some(80)
def test_a_form_that_accepts_a_rule_runs_it(rule: Rule) -> None:
    """S1-M17: exact forms are scan at any chunk; rough ones are where nothing is frozen, in chunks of one token.

    Left out are forms that are another memory: TNT reads a second one beside the first.
    """
    inputs = gentle(rule, 7)
    read_bthv, memory = scan(rule, *inputs.arguments())
    for name in accepting(rule):
        if not forms.get(name).approaches_scan:
            continue
        chunk = CHUNK if forms.get(name).is_exact else 1
        found_bthv, found = run(rule, *inputs.arguments(), form=name, chunk=chunk)
        close(found_bthv, read_bthv)
        close(found, memory)


def one_token(rule: Rule, form: str) -> tuple[State, State]:
    """What a form leaves after the first token of a chunk, and what scan leaves."""
    inputs = gentle(rule, 1)
    _, memory = run(rule, *inputs.arguments(), form=form, chunk=CHUNK)
    return finished(memory), scan(rule, *inputs.arguments())[1]


@given(valid_rule())
@some(80)
def test_the_first_token_of_a_chunk_meets_nothing_stale(rule: Rule) -> None:
    """4.4: what is frozen at the start of a chunk is what its first token would have met anyway.

    The form of slots is left out: it takes every step along the slot's own direction, to second order (4.8).
    """
    for form in accepting(rule):
        if forms.get(form).approaches_scan and form != "lattice":
            close(*one_token(rule, form))


@given(valid_rule())
@some(40)
def test_a_memory_survives_being_written_down(rule: Rule) -> None:
    """S4-M1: one level of names and back, whatever a rule carries and wherever its chunk was cut."""
    inputs = gentle(rule, CHUNK + 1)
    for form in accepting(rule):
        _, memory = run(rule, *inputs.arguments(), form=form, chunk=CHUNK)
        flat = flatten(memory)
        assert unflatten(flat) == memory and not any(isinstance(leaf, dict) for leaf in flat.values())


@given(any_rule())
@some(150)
def test_an_invalid_rule_is_refused_with_every_reason(rule: Rule) -> None:
    """S3-M1, 2.8: one error that lists all violations."""
    reasons = conflicts(rule)
    assume(reasons)
    with pytest.raises(ConflictingKeys, match="^these parts make no rule: ") as caught:
        check(rule)
    assert all(reason in str(caught.value) for reason in reasons)
    assert len(set(reasons)) == len(reasons)


MENDED = [
    ("frozen_chunk", Rule(slots(4), squared(), sphere(), plain())),
    ("frozen_chunk", Rule(matrix(), squared(), f_divergence(), plain())),
    ("atlas", Rule(slots(4), squared(), decay(), orthogonal_momentum())),
    ("atlas", Rule(matrix(), huber_switch(), decay(), orthogonal_momentum())),
]


@pytest.mark.parametrize("form, rule", MENDED, ids=range(len(MENDED)))
def test_what_once_went_wrong(form: str, rule: Rule) -> None:
    """A change that was settled as if it were weights; codes and thresholds that a form dropped."""
    run(rule, *gentle(rule, 7).arguments(), form=form, chunk=CHUNK)
    close(*one_token(rule, form))


PLAIN = Rule(matrix(), squared(), decay(), plain())
REASONS: list[tuple[dict[str, Any], str]] = [
    ({"structure": slots(4), "retention": simplex()}, "'simplex' keeps weights positive, and slots point anywhere"),
    ({"structure": mlp(2, 2), "retention": sphere()}, "'sphere' would fix the length of every row of an MLP"),
    ({"retention": sphere(), "bias": kl()}, "'sphere' bounds what is recalled, and the bias 'kl' needs logits"),
    ({"structure": mlp(2, 2), "bias": kl()}, "'kl' is not meant for an MLP"),
    ({"structure": mlp(2, 2), "bias": dot()}, "'dot' does not depend on the output of an MLP"),
    ({"structure": slots(4), "update": implicit()}, "'implicit' solves one linear recall exactly"),
    ({"bias": absolute(), "update": implicit()}, "'implicit' is the exact step of the bias 'squared'"),
    ({"retention": simplex(), "probe": "warm"}, "the retention 'simplex' stores something else"),
    ({"update": leader(), "probe": "warm"}, "the probe 'warm' has no meaning for the update 'leader'"),
    ({"structure": slots(4), "span": 2}, "'slots' writes codes, which a span does not remember"),
    ({"bias": huber_switch(), "span": 2}, "'huber_switch' has one threshold per token, a span several pairs"),
    ({"update": implicit(), "span": 2}, "'implicit' takes one pair at a time"),
    ({"span": 0}, "the span is below 1"),
]


@pytest.mark.parametrize("parts, reason", REASONS, ids=[reason for _, reason in REASONS])
def test_every_reason_can_occur_alone(parts: dict[str, Any], reason: str) -> None:
    """S3-M1, 2.8: and it offers another choice, which is one."""
    (found,) = conflicts(replace(PLAIN, **parts))
    assert reason in found
    assert re.search(r": take ", found)
    assert conflicts(PLAIN) == []


def test_no_reason_is_left_out() -> None:
    """The list above has as many entries as the table in ``check.py``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(conflicts)))
    (table,) = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    assert len(table.keys) == len(REASONS)
