"""A chunk that a window leaves unfinished carries two copies and a count, and no token (memory.md 4.4)."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memory.inputs import Window, named, variants, window
from meristem.errors import ShapeError
from meristem.memory import Rule, run
from meristem.memory.check import conflicts
from meristem.memory.forms import UNFINISHED, accepting, forms
from meristem.memory.forms.by_chunk import finished
from meristem.memory.forms.replay import replayed
from meristem.memory.named import rules
from meristem.memory.retention import retentions
from meristem.memory.rule import scan
from meristem.memory.state import Memory, State, flatten
from meristem.memory.structure import mlp

CUT = [(name, form) for name in rules.names() for form in accepting(named(name)) if form in UNFINISHED]
RETAINED = sorted(set(retentions.names()) - {"sphere"})
N_TIME, CHUNK = 11, 4


def leaf_names(state: State) -> list[str]:
    return sorted(flatten(state))


@pytest.mark.parametrize("name, form", CUT)
def test_an_unfinished_chunk_holds_no_token(name: str, form: str) -> None:
    """However many tokens of it were read, what it carries is as large."""
    rule = named(name)
    inputs = window(rule, 7)
    carried = []
    for n_time in (5, 6, 7):
        _, memory = run(rule, *inputs.cut(0, n_time).arguments(), form=form, chunk=CHUNK)
        flat = flatten(memory)
        assert flat["unfinished.n_tokens"] == n_time - CHUNK
        carried.append({path: leaf.shape for path, leaf in flat.items() if isinstance(leaf, Tensor)})
    assert carried[0] == carried[1] == carried[2]
    assert not any("keys_bthk" in path for path in carried[0])


def cut_outcome(rule: Rule, inputs: Window, form: str, cuts: list[int]) -> dict[str, Tensor]:
    """Reads and memory of a window cut there, and the gradients of a loss that weighs them all differently."""
    inputs = inputs.tracked()
    memory, reads = inputs.memory, []
    for start, stop in pairwise([0, *cuts, N_TIME]):
        read_bthv, memory = run(rule, *inputs.cut(start, stop, memory).arguments(), form=form, chunk=CHUNK)
        reads.append(read_bthv)
    results = {"read": torch.cat(reads, dim=1)} | {
        path: leaf for path, leaf in flatten(memory).items() if isinstance(leaf, Tensor)
    }
    loss = sum(
        (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x).add(0.1 * index)).sum()
        for index, x in enumerate(results.values())
    )
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    found = {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()} | found


@pytest.mark.parametrize("name, form", CUT)
def test_gradients_do_not_depend_on_where_a_window_is_cut(name: str, form: str) -> None:
    """Law 3, with gradients: token by token, and inside chunks by several tokens, in every order of a rule."""
    for rule in variants(named(name)):
        if forms.get(form).refusals(rule):
            continue
        inputs = window(rule, N_TIME)
        whole = cut_outcome(rule, inputs, form, [])
        for cuts in ([*range(1, N_TIME)], [2, 3, 6]):
            torch.testing.assert_close(cut_outcome(rule, inputs, form, cuts), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("retention", RETAINED)
@pytest.mark.parametrize("name", ["delta", "titans_mlp"])
def test_every_retention_goes_on_inside_a_chunk(name: str, retention: str) -> None:
    """What a retention applies once to a chunk is applied once, wherever the chunk was cut."""
    rule = replace(named(name), retention=retentions.get(retention)())
    if conflicts(rule):
        rule = replace(rule, structure=mlp())
    inputs = window(rule, N_TIME)
    whole = cut_outcome(rule, inputs, "frozen_chunk", [])
    for cuts in ([*range(1, N_TIME)], [2, 3, 6]):
        # Some gradients are in the hundreds.
        torch.testing.assert_close(cut_outcome(rule, inputs, "frozen_chunk", cuts), whole, rtol=1e-11, atol=1e-10)


class Count(TorchDispatchMode):
    """Counts the operations that run inside it."""

    n_operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.n_operations += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name, form in CUT if form == "frozen_chunk"])
def test_a_token_inside_a_frozen_chunk_costs_as_much_as_a_token_of_scan(name: str) -> None:
    """In operations, at any place in the chunk; up to a third more where a retention is applied once to a chunk."""
    rule = named(name)
    inputs, counts = window(rule, 32), []
    with torch.no_grad():
        for n_before in (1, 17, 30):
            _, memory = run(rule, *inputs.cut(0, n_before).arguments(), form="frozen_chunk", chunk=32)
            token = inputs.cut(n_before, n_before + 1, memory)
            with Count() as frozen:
                forms.get("frozen_chunk").run(rule, *token.arguments(), chunk=32)
            with Count() as plain:
                scan(rule, finished(memory), *token.arguments()[1:])
            counts.append((frozen.n_operations, plain.n_operations))
    for n_frozen, n_plain in counts:
        assert n_frozen <= (n_plain if rule.retention.is_linear else 4 * n_plain // 3) + 2, counts


def test_a_chunk_of_another_form_is_refused() -> None:
    """What it carries says nothing to this form."""
    rule = named("delta")
    inputs = window(rule, 6)
    _, memory = run(rule, *inputs.cut(0, 5).arguments(), form="frozen_chunk", chunk=4)
    with pytest.raises(ShapeError, match="carries n_tokens, start; this form goes on from n_tokens, passes, start"):
        run(rule, *inputs.cut(5, 6, memory).arguments(), form="refined", chunk=4)


def old(rule: Rule, inputs: Window, form: str, n_time: int, chunk: int) -> Memory:
    """The memory that e97c871 left behind: a buffer of the tokens of the unfinished chunk."""
    at = n_time // chunk * chunk
    start = finished(run(rule, *inputs.cut(0, at).arguments(), form=form, chunk=chunk)[1]) if at else inputs.memory
    _, memory = run(rule, *inputs.cut(0, n_time).arguments(), form=form, chunk=chunk)
    part = inputs.cut(at, n_time)
    kept = {name: gate for name, gate in vars(part.gates).items() if gate is not None}
    tokens = {"keys_bthk": rule.features.apply(part.keys_bthk), "values_bthv": part.values_bthv}
    carried: State = {"start": start, "gates": kept, **tokens}
    return finished(memory) | {"unfinished": carried}  # type: ignore[dict-item]


@pytest.mark.parametrize("name, form", [(name, form) for name, form in CUT if form != "tnt"])
def test_tokens_that_an_earlier_version_kept_are_written_again(name: str, form: str) -> None:
    """A memory saved by e97c871 inside a chunk is the one that today's form leaves there."""
    rule = named(name)
    inputs = window(rule, N_TIME)
    saved = old(rule, inputs, form, 7, CHUNK)
    _, today = run(rule, *inputs.cut(0, 7).arguments(), form=form, chunk=CHUNK)
    state = {"layer": {"0": {"memory": saved}}, "count": 7}
    found = replayed(state, rule, form=form, chunk=CHUNK)["layer"]["0"]["memory"]
    torch.testing.assert_close(flatten(found), flatten(today), rtol=0, atol=1e-10)
    assert all(found[path] is leaf for path, leaf in finished(saved).items())
    again = replayed(found, rule, form=form, chunk=CHUNK)
    assert leaf_names(again) == leaf_names(found)


def test_a_local_memory_that_an_earlier_version_left_inside_a_chunk_goes_on() -> None:
    """The form ``tnt``, whose local memory had a buffer of its own."""
    rule = named("titans")
    inputs = window(rule, N_TIME)
    _, today = run(rule, *inputs.cut(0, 7).arguments(), form="tnt", chunk=32)
    carried: State = dict(today["unfinished"])  # type: ignore[arg-type]
    first = {name: inputs.memory[name] for name in rule.structure.weights}
    part = inputs.cut(0, 7)
    kept = {name: gate for name, gate in vars(part.gates).items() if gate is not None}
    tokens = {"keys_bthk": part.keys_bthk, "values_bthv": part.values_bthv, "gates": kept}
    local = finished(carried["local"]) | {"unfinished": tokens | {"start": first | rule.update.carry(first)}}
    saved: State = dict(today) | {"unfinished": carried | {"start": inputs.memory, "local": local}}
    found = replayed(saved, rule, form="tnt", chunk=32)
    torch.testing.assert_close(flatten(found), flatten(today), rtol=0, atol=1e-10)
