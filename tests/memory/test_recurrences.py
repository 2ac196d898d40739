"""A form that is not exact is its own recurrence (memory.md 4.4 to 4.10), written here token by token.

Nothing of the forms, and no gradient of the package, is used: recall, loss, retention and update are written out, and
the surprise is autograd's. A form or a part that has no recurrence here fails.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memory.inputs import Window, named, variants, window
from meristem.memory import Gates, Rule, run
from meristem.memory.forms import accepting, forms
from meristem.memory.forms.by_chunk import finished
from meristem.memory.named import rules
from meristem.memory.rule import LONGEST
from meristem.memory.state import Memory, beside

ROUGH = [(name, form) for name in rules.names() for form in accepting(named(name)) if not forms.get(form).is_exact]
EXACT = [(name, form) for name in rules.names() for form in accepting(named(name)) if forms.get(form).is_exact]
FACTORS = ("retain_bth", "momentum_bth")
Outcome: TypeAlias = tuple[Tensor, Memory]


@dataclass(frozen=True)
class Token:
    """One token: every tensor is ``b h`` and its own axis, if it has one."""

    key: Tensor
    value: Tensor
    query: Tensor
    retain: Tensor
    write: Tensor
    momentum: Tensor | None
    threshold: Tensor | None
    weight: Tensor | None
    code: Tensor | None


def tokens_of(rule: Rule, inputs: Window) -> list[Token]:
    """The tokens of a window, their keys and queries mapped."""
    gates = inputs.gates
    keys, queries = polynomial(rule, inputs.keys_bthk), polynomial(rule, inputs.queries_bthk)
    optional = gates.momentum_bth, gates.threshold_bth, gates.weight_bth, gates.code_bthg
    given = (keys, inputs.values_bthv, queries, gates.retain_bth, gates.write_bth)
    rows = [[None if x is None else x[:, t] for x in (*given, *optional)] for t in range(keys.shape[1])]
    return [Token(*row) for row in rows]


def polynomial(rule: Rule, rows: Tensor) -> Tensor:
    """2.9: x joined with its products of two, so that inner products are ``a + a^2 / 2``."""
    if rule.features.name == "identity":
        return rows
    assert rule.features.name == "polynomial"
    width = rows.shape[-1]
    pairs = [(i, j) for i in range(width) for j in range(i, width)]
    squares = [rows[..., i] * rows[..., j] * (0.5**0.5 if i == j else 1.0) for i, j in pairs]
    return torch.cat([rows, torch.stack(squares, dim=-1)], dim=-1)


def times(row: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("bhi,bhij->bhj", row, matrix)


def against(row: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("bhj,bhij->bhi", row, matrix)


def recalled(rule: Rule, weights: Memory, query: Tensor) -> Tensor:
    """2.1, 3.7, 3.9: what a query meets."""
    if rule.structure.kind == "matrix":
        return times(query, weights["matrix_bhkv"])
    if rule.structure.kind == "slots":
        return times(against(query, weights["slots_bhgk"]).softmax(-1), weights["slots_bhgk"])
    if rule.structure.kind == "two_slots":
        reached = functional.silu(against(query, weights["key_slots_bhgk"]))
        return functional.silu(times(functional.layer_norm(reached, reached.shape[-1:]), weights["value_slots_bhgv"]))
    assert rule.structure.kind == "mlp" and set(weights) == {"in_bhkf", "out_bhfv"}
    added = times(functional.gelu(times(query, weights["in_bhkf"])), weights["out_bhfv"])
    added = functional.layer_norm(added, added.shape[-1:]) if rule.structure.is_normed else added
    return added + query if added.shape == query.shape else added


def pull_of(rule: Rule, token: Token, given: Tensor, target: Tensor) -> Tensor:
    """2.5: the gradient of the loss at what the memory gave."""
    wrong = given - target
    if rule.bias.name == "dot":
        return -target
    if rule.bias.name == "squared":
        return wrong
    if rule.bias.name == "power":
        return 3 * (10 * wrong).tanh() * (wrong.square() + 1e-6)
    assert rule.bias.name == "huber_switch" and token.threshold is not None
    limit = token.threshold[..., None]
    return torch.where(wrong.norm(dim=-1, keepdim=True) <= limit, wrong, limit * (10 * wrong).tanh())


def surprise(rule: Rule, weights: Memory, token: Token) -> Memory:
    """The gradient of the token's loss with respect to every weight, by autograd through what is recalled."""
    pairs = []
    if rule.structure.kind in ("matrix", "mlp"):
        pairs.append((recalled(rule, weights, token.key), token.value))
    elif rule.structure.kind == "slots" and rule.structure.written == "decode":
        pairs.append((times(token.code, weights["slots_bhgk"]), token.value))
    elif rule.structure.kind == "slots":
        pairs.append((against(token.key, weights["slots_bhgk"]), token.code))
    else:
        assert rule.structure.kind == "two_slots"
        pairs.append((functional.silu(against(token.key, weights["key_slots_bhgk"])), token.code))
        pairs.append((functional.silu(against(token.value, weights["value_slots_bhgv"])), token.code))
    given = [pair[0] for pair in pairs]
    pulls = [pull_of(rule, token, *pair) for pair in pairs]
    gradients = torch.autograd.grad(given, list(weights.values()), pulls, create_graph=True)
    gradients = dict(zip(weights, gradients, strict=True))
    if rule.update.name == "delta_descent":
        # 2.7: the old value is erased along the key, beside the surprise.
        erased = torch.einsum("bhk,bhv->bhkv", token.key, times(token.key, weights["matrix_bhkv"]))
        return {name: gradient + erased for name, gradient in gradients.items()}
    if is_linear(rule) or rule.retention.name in ("power_norm", "simplex", "sphere"):
        return gradients
    # 2.5: clipped at the norm over all weights, straight-through.
    square = sum(gradient.detach().square().sum(dim=(-2, -1), keepdim=True) for gradient in gradients.values())
    share = (LONGEST / square.sqrt()).clamp(max=1.0)
    return {name: share * gradient for name, gradient in gradients.items()}


def is_linear(rule: Rule) -> bool:
    """3.1: one matrix, one pair, a loss that is squared or linear, and plain decay."""
    is_affine = rule.structure.kind == "matrix" and rule.span == 1 and rule.retention.name == "decay"
    return is_affine and rule.bias.name in ("dot", "squared")


def rate(rule: Rule, token: Token) -> Tensor:
    """2.7: the write rate in effect."""
    if rule.update.name in ("implicit", "delta_descent"):
        return token.write / (1 + token.write * token.key.square().sum(-1))
    assert rule.update.name in ("plain", "momentum", "leader", "orthogonal_momentum")
    return token.write


def retain(rule: Rule, token: Token) -> Tensor:
    """Old memory does not fade under the sphere, nor where a leader is followed without a discount."""
    keeps_all = rule.retention.name == "sphere" or (rule.update.name == "leader" and not rule.update.is_discounted)
    return torch.ones_like(token.retain) if keeps_all else token.retain


def floored(factor: Tensor | None) -> Tensor:
    """2.3: forms multiply logarithms, and these are floored at -30."""
    assert factor is not None
    return factor.clamp_min(math.exp(-30))


def unit(rows: Tensor) -> Tensor:
    return rows / (rows.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()


def read_of(rule: Rule, stored: Tensor) -> Tensor:
    """2.6: the weight that is read, of what is stored."""
    if rule.retention.name == "power_norm":
        return stored / ((stored**4).sum(dim=(-2, -1), keepdim=True) + 1e-12) ** 0.5
    if rule.retention.name == "simplex":
        return stored.exp()
    if rule.retention.name == "elastic_leader":
        sparse = stored.sign() * (stored.abs() - 0.05).clamp(min=0.0)
        return stored + (sparse - stored).detach()
    assert rule.retention.name in ("decay", "local", "sphere")
    return stored


def ended(rule: Rule, memory: Memory, start: Memory, live: Memory, kept: Tensor) -> Memory:
    """What a chunk leaves: live, or where a retention maps, projects or pulls, what it makes of it once."""
    if rule.retention.name == "simplex":
        return {name: x.log_softmax(dim=-2) for name, x in live.items()}
    if rule.retention.name == "sphere":
        moved = {name: x - start[name] for name, x in live.items()}
        along = {name: start[name] * (start[name] * x).sum(dim=-1, keepdim=True) for name, x in moved.items()}
        return {name: unit(start[name] + moved[name] - along[name]) for name in live}
    if rule.retention.name != "local":
        return live
    after: Memory = {"anchor_age_b": (memory["anchor_age_b"] + 1) % 16}
    for name, x in live.items():
        anchor = start[name] if bool((memory["anchor_age_b"] == 0).all()) else memory[beside(name, "anchor")]
        moved = x - start[name]
        after[name] = kept[..., None, None] * start[name] + moved - 0.01 * (start[name] - anchor)
        after[beside(name, "anchor")] = anchor
    return after


def per_matrix(gate: Tensor | None) -> Tensor:
    assert gate is not None
    return gate[..., None, None]


class Span:
    """3.8: the pairs that a surprise is about, the present one last; without a span, that one alone."""

    def __init__(self, rule: Rule, memory: Memory) -> None:
        self.rule = rule
        names = ("span_keys_bhck", "span_values_bhcv", "span_weights_bhc")
        self.pairs = list(zip(*(memory[name].unbind(2) for name in names), strict=True)) if rule.span > 1 else []

    def surprise(self, weights: Memory, token: Token) -> Memory:
        if self.rule.span == 1:
            return surprise(self.rule, weights, token)
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for key, value, weight in [*self.pairs, (token.key, token.value, token.weight)]:
            each = surprise(self.rule, weights, replace(token, key=key, value=value))
            total = {name: x + per_matrix(weight) * each[name] for name, x in total.items()}
        return total

    def goes_on(self, token: Token) -> None:
        if self.rule.span > 1:
            self.pairs = [*self.pairs[1:], (token.key, token.value, token.weight)]

    def carried(self) -> Memory:
        if self.rule.span == 1:
            return {}
        keys, values, weights = (torch.stack(parts, dim=2) for parts in zip(*self.pairs, strict=True))
        return {"span_keys_bhck": keys, "span_values_bhcv": values, "span_weights_bhc": weights}


def frozen(
    rule: Rule, memory: Memory, tokens: list[Token], chunk: int, *, n_passes: int = 0, is_stale: bool = False
) -> Outcome:
    """4.4, 4.10: all surprises of a chunk at its start, ``S <- mu S - rate g``, ``A <- retain A + S``.

    n_passes: the recurrence of the chunk is run anew as often, each token's surprise at what it met the time before.
    is_stale: reads meet the chunk's start.
    """
    reads, names = [], rule.structure.weights
    is_at_the_end = rule.retention.name in ("local", "sphere")
    is_stale = is_stale or rule.retention.name != "decay"
    for begin in range(0, len(tokens), chunk):
        part = tokens[begin : begin + chunk]
        start = {name: memory[name] for name in names}
        met = [start] * len(part)
        for _ in range(n_passes + 1):
            live, before, after, span = start, [], [], Span(rule, memory)
            moving = {name: memory.get(beside(name, "momentum")) for name in names}
            kept = torch.ones_like(part[0].retain)
            for token, at in zip(part, met, strict=True):
                before.append(live)
                probed = {name: read_of(rule, x) for name, x in at.items()}
                if rule.probe == "warm":
                    probed = {name: per_matrix(token.retain) * x for name, x in probed.items()}
                found = span.surprise(probed, token)
                step = {name: -per_matrix(rate(rule, token)) * x for name, x in found.items()}
                if rule.update.name == "momentum":
                    step = {name: per_matrix(floored(token.momentum)) * moving[name] + x for name, x in step.items()}
                    moving = step
                factor = torch.ones_like(kept) if is_at_the_end else floored(retain(rule, token))
                kept = kept * retain(rule, token)
                live = {name: per_matrix(factor) * live[name] + step[name] for name in names}
                after.append(live)
                span.goes_on(token)
            met = before
        seen = [start] * len(part) if is_stale else after if rule.reads == "after" else before
        for token, stored in zip(part, seen, strict=True):
            reads.append(recalled(rule, {name: read_of(rule, x) for name, x in stored.items()}, token.query))
        momenta = {beside(name, "momentum"): x for name, x in moving.items() if x is not None}
        memory = memory | ended(rule, memory, start, live, kept) | momenta | span.carried()
    return torch.stack(reads, dim=1), memory


def refined(rule: Rule, memory: Memory, tokens: list[Token], chunk: int) -> Outcome:
    return frozen(rule, memory, tokens, chunk, n_passes=2)


def atlas(rule: Rule, memory: Memory, tokens: list[Token], chunk: int) -> Outcome:
    """4.9: ``S <- mu S + g`` with g at the chunk's start, ``M <- retain M - write NS(S)``."""
    reads, name = [], "matrix_bhkv"
    moving, live, span = memory["matrix_momentum_bhkv"], memory[name], Span(rule, memory)
    start = live
    for index, token in enumerate(tokens):
        before, start = live, live if index % chunk == 0 else start
        moving = per_matrix(floored(token.momentum)) * moving + span.surprise({name: start}, token)[name]
        rotated = moving / (moving.square().sum(dim=(-2, -1), keepdim=True) + 1e-30).sqrt()
        for _ in range(5):
            square = rotated @ rotated.mT
            rotated = 3.4445 * rotated - 4.7750 * square @ rotated + 2.0315 * square @ square @ rotated
        live = per_matrix(floored(token.retain)) * live - per_matrix(token.write) * rotated
        span.goes_on(token)
        reads.append(recalled(rule, {name: before if rule.reads == "before" else live}, token.query))
    return torch.stack(reads, dim=1), {name: live, "matrix_momentum_bhkv": moving} | span.carried()


def tnt(rule: Rule, memory: Memory, tokens: list[Token], chunk: int) -> Outcome:
    """4.7: the global memory as it entered the chunk, and a local one, restarted there, asked by the query turned
    ``sum k (k q)`` over the keys of the chunk so far; its own chunks are of 16 tokens."""
    names = rule.structure.weights
    first = {name: memory[name] for name in names}
    reads, memory = [], memory | {beside(name, "reset"): weight for name, weight in first.items()}
    for begin in range(0, len(tokens), chunk):
        part, rotated = tokens[begin : begin + chunk], []
        for index, token in enumerate(part):
            shown = [x.key * (x.key * token.query).sum(dim=-1, keepdim=True) for x in part[: index + 1]]
            rotated.append(replace(token, query=torch.stack(shown).sum(dim=0)))
        momenta = {beside(name, "momentum"): torch.zeros_like(weight) for name, weight in first.items()}
        local = first | (momenta if rule.update.name == "momentum" else {})
        read_locally, _ = frozen(rule, local, rotated, 16)
        read_globally, memory = frozen(rule, memory, part, chunk, is_stale=True)
        reads.append(read_globally + read_locally)
    return torch.cat(reads, dim=1), memory


def moved(rule: Rule, start: Tensor, live: Tensor, token: Token) -> tuple[Tensor, Tensor]:
    """4.8, 3.7: the slots after a token, before they are brought to unit length, and the factors of the old ones."""
    assert token.code is not None
    if rule.structure.written == "decode":
        amount = token.code
        inward = (token.value - times(token.code, start))[..., None, :]
    else:
        amount = token.code if rule.bias.name == "dot" else token.code - against(token.key, start)
        inward = token.key[..., None, :]
    scale = (token.write[..., None] * amount)[..., None].clamp(max=1.0)
    factor = 1 - scale * (start * inward).sum(dim=-1, keepdim=True)
    return factor * live + scale * inward, factor


def lattice(
    rule: Rule, memory: Memory, tokens: list[Token], chunk: int, factors: list[Tensor] | None = None
) -> Outcome:
    """4.8: ``s <- (1 - scale (s_0 in)) s + scale in``, scale and in at the chunk's start; unit length at its end and
    in what is read. factors: gathers those of the old slots."""
    reads, slots = [], memory["slots_bhgk"]
    for begin in range(0, len(tokens), chunk):
        start = live = slots
        for token in tokens[begin : begin + chunk]:
            before = slots
            live, factor = moved(rule, start, live, token)
            slots = unit(live)
            reads.append(recalled(rule, {"slots_bhgk": before if rule.reads == "before" else slots}, token.query))
            if factors is not None:
                factors.append(factor.detach())
    return torch.stack(reads, dim=1), {"slots_bhgk": slots}


RECURRENCES: dict[str, Callable[[Rule, Memory, list[Token], int], Outcome]] = {
    "frozen_chunk": frozen,
    "refined": refined,
    "atlas": atlas,
    "tnt": tnt,
    "lattice": lattice,
}


def at_the_ends(inputs: Window) -> Window:
    """The same window with tokens whose gates are 0, and others whose gates are 1."""
    ends = {"retain_bth": (1, 2), "momentum_bth": (2, 4), "write_bth": (3, 5), "weight_bth": (1, 2)}
    ends |= {"threshold_bth": (1, 2), "code_bthg": (4, 5)}
    gates = {name: None if x is None else x.clone() for name, x in vars(inputs.gates).items()}
    for name, (at_zero, at_one) in ends.items():
        gate = gates[name]
        if gate is not None:
            gate[:, at_zero], gate[:, at_one] = 0.0, 1.0
    return replace(inputs, gates=Gates(**gates))


def compared(inputs: Window, answers: list[Callable[[Window], Outcome]]) -> None:
    """Reads, memory and gradients of two ways are equal."""
    results = []
    for answer in answers:
        fresh = inputs.tracked()
        read_bthv, memory = answer(fresh)
        outputs = {"read": read_bthv} | dict(sorted(memory.items()))
        numbers = torch.cat([x.flatten() for x in outputs.values() if x.requires_grad])
        loss = (numbers * torch.linspace(-1, 1, len(numbers), dtype=numbers.dtype)).sum()
        leaves = fresh.leaves()
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
        gradients = {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}
        results.append({name: x.detach() for name, x in outputs.items()} | gradients)
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


def test_every_form_that_is_not_exact_has_a_recurrence() -> None:
    assert set(RECURRENCES) == {name for name in forms.names() if not forms.get(name).is_exact}


@pytest.mark.parametrize("widths", [(3, 5), (3, 3)])
@pytest.mark.parametrize("name, form", ROUGH)
def test_a_form_that_is_not_exact_is_its_recurrence(name: str, form: str, widths: tuple[int, int]) -> None:
    """S1-M5, S1-M9, S1-M11, S1-M17, S1-M19, S1-M20, S1-M21, S3b-S7: in every order, gates over all of their range."""
    n_time, chunk = (21, 18) if form == "tnt" else (7, 4)
    for rule in variants(named(name)):
        if forms.get(form).refusals(rule):
            continue
        compared(
            at_the_ends(window(rule, n_time, batch=1, heads=2, widths=widths)),
            [partial(outcome_of, rule, form=form, chunk=chunk), partial(by_token, rule, form=form, chunk=chunk)],
        )


@pytest.mark.parametrize("name, form", [pair for pair in ROUGH if named(pair[0]).is_limited])
def test_a_form_limits_every_token_as_its_recurrence_does(name: str, form: str) -> None:
    """Values so far off that each surprise, but for those of every third token, is longer than LONGEST."""
    for rule in variants(named(name)):
        if forms.get(form).refusals(rule):
            continue
        inputs = at_the_ends(window(rule, 7, batch=1, heads=2))
        far_bthv = inputs.values_bthv.clone()
        far_bthv[:, torch.arange(7) % 3 > 0] *= 1e5
        threshold_bth = None if inputs.gates.threshold_bth is None else 1e7 * inputs.gates.threshold_bth
        inputs = replace(inputs, values_bthv=far_bthv, gates=replace(inputs.gates, threshold_bth=threshold_bth))
        ways = [partial(outcome_of, rule, form=form, chunk=4), partial(by_token, rule, form=form, chunk=4)]
        compared(inputs, ways)


def outcome_of(rule: Rule, inputs: Window, *, form: str, chunk: int) -> Outcome:
    read_bthv, memory = run(rule, *inputs.arguments(), form=form, chunk=chunk)
    return read_bthv, finished(memory)


def by_token(rule: Rule, inputs: Window, *, form: str, chunk: int) -> Outcome:
    return RECURRENCES[form](rule, inputs.memory, tokens_of(rule, inputs), chunk)


@pytest.mark.parametrize("name, form", [(name, form) for name, form in EXACT if form != "scan"])
def test_an_exact_form_is_scan_with_gates_at_their_ends(name: str, form: str) -> None:
    """2.3: a factor of 0 has no logarithm; with the floor, values and the gradients of what made the factor are right,
    for a sigmoid is as flat there as the floor."""
    for rule in variants(named(name)):
        if forms.get(form).refusals(rule):
            continue
        inputs = at_the_ends(window(rule, 7, batch=1, heads=2))
        logits = {key: gate.logit() for key in FACTORS if (gate := getattr(inputs.gates, key)) is not None}
        ways = [partial(of_logits, rule, form=each) for each in (form, "scan")]
        compared(replace(inputs, gates=replace(inputs.gates, **logits)), ways)


def of_logits(rule: Rule, inputs: Window, *, form: str) -> Outcome:
    factors = {key: gate.sigmoid() for key in FACTORS if (gate := getattr(inputs.gates, key)) is not None}
    return outcome_of(rule, replace(inputs, gates=replace(inputs.gates, **factors)), form=form, chunk=4)


@pytest.mark.parametrize("reads", ["after", "before"])
@pytest.mark.parametrize("name", [name for name, form in ROUGH if form == "lattice"])
@pytest.mark.parametrize("write", [0.0, 0.3, 2.0, 30.0])
def test_slots_follow_factors_of_any_sign(name: str, reads: str, write: float) -> None:
    """S1-M20: 0, negative, 1 and above 1, and their products."""
    rule = replace(named(name), reads=reads)
    inputs = window(rule, 7, batch=1)
    for x in (inputs.memory["slots_bhgk"][:, :, 0], inputs.keys_bthk[:, 1], inputs.values_bthv[:, 1]):
        x.zero_()[..., 0] = 1.0
    # Of the first slot nothing is kept: it is what is written to it, at a scale of 1.
    inputs.values_bthv[:, 1] *= 3.5
    inputs.gates.code_bthg[:, 1] = 0.0
    inputs.gates.code_bthg[:, 1, :, 0] = 2.5
    inputs.gates.write_bth.fill_(write)
    factors: list[Tensor] = []

    def by_token(inputs: Window) -> Outcome:
        return lattice(rule, inputs.memory, tokens_of(rule, inputs), 4, factors)

    compared(inputs, [partial(outcome_of, rule, form="lattice", chunk=4), by_token])
    found = torch.stack(factors)
    assert bool((found == 0).any()) == (write >= 2)
    assert bool((found > 1).any()) == (write > 0)
    assert (found < 0).any() or write < 30
