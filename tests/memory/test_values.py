"""What a memory looks like from outside: names, shapes and dtypes are a promise to every checkpoint (memory.md, 9.3).

``fixtures/values.json`` holds them for every rule of the catalogue. Where a change of it is meant, say in the commit
how an older memory becomes a newer one, and write it anew: ``python -m pytest tests/memory/test_values.py -n0`` with
``REWRITE_VALUES=1`` in the environment.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memory.inputs import BATCH, HEADS, KEY_WIDTH, VALUE_WIDTH, named, window
from meristem.checkpoint.store import open_checkpoint, save
from meristem.memory import run
from meristem.memory.forms import UNFINISHED, accepting
from meristem.memory.named import rules
from meristem.memory.state import State, flatten, unflatten

FIXTURE = Path(__file__).with_name("fixtures") / "values.json"
OURS = rules.names()
CUT = [(name, form) for name in OURS for form in accepting(named(name)) if form in UNFINISHED]
SIZES = {"batch": BATCH, "heads": HEADS, "key_width": KEY_WIDTH, "value_width": VALUE_WIDTH}


def described(state: State) -> dict[str, str]:
    """Every leaf by its full name: dtype and axes, or the type of a host value."""
    flat = flatten(state)
    return {name: _leaf(flat[name]) for name in sorted(flat)}


def _leaf(leaf: Tensor | int) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{str(leaf.dtype).removeprefix('torch.')} {' '.join(map(str, leaf.shape))}"


def fresh(name: str) -> State:
    """What the rule starts with; unit slots hold keys and values of one width."""
    rule = named(name)
    key_width = VALUE_WIDTH if rule.structure.kind == "slots" else KEY_WIDTH
    return rule.init(BATCH, HEADS, key_width, VALUE_WIDTH)


def left(name: str, form: str) -> State:
    """What a form leaves behind after 5 tokens of a chunk of 3."""
    rule = named(name)
    return run(rule, *window(rule, 5, dtype=torch.float32).arguments(), form=form, chunk=3)[1]


def found() -> dict[str, object]:
    values = {name: described(fresh(name)) for name in OURS}
    cut = {f"{name} by {form}": described(left(name, form)) for name, form in CUT}
    return {"sizes": SIZES, "fresh": values, "cut inside a chunk": cut}


@pytest.fixture(scope="module")
def promised() -> dict[str, dict[str, dict[str, str]]]:
    if os.environ.get("REWRITE_VALUES"):
        FIXTURE.write_text(json.dumps(found(), indent=1) + "\n")
    return json.loads(FIXTURE.read_text())


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    names = sorted(old.keys() | new.keys())
    return [f"{n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]


TOLD = "a memory saved before would no longer fit. If this is meant, see the head of this file."


@pytest.mark.parametrize("name", OURS)
def test_a_memory_has_the_names_and_shapes_that_were_promised(promised, name: str) -> None:
    """Section 12, schema: of every rule that ours is, fresh."""
    assert promised["sizes"] == SIZES
    assert differences(promised["fresh"][name], described(fresh(name))) == [], TOLD


@pytest.mark.parametrize("name, form", CUT)
def test_an_unfinished_chunk_is_kept_under_the_names_that_were_promised(promised, name: str, form: str) -> None:
    """Section 12, schema: of every form that may leave one."""
    old = promised["cut inside a chunk"][f"{name} by {form}"]
    assert differences(old, described(left(name, form))) == [], TOLD


def test_nothing_is_promised_that_is_no_more(promised) -> None:
    assert set(promised["fresh"]) == set(OURS)
    assert set(promised["cut inside a chunk"]) == {f"{name} by {form}" for name, form in CUT}


@pytest.mark.parametrize("name", OURS)
def test_names_of_tensors_say_their_axes(name: str) -> None:
    """2.1: one letter for each axis, rows of the batch first; float32."""
    for path, leaf in fresh(name).items():
        letters = path.rsplit("_", 1)[1]
        assert letters.startswith("b") and len(letters) == leaf.dim() and leaf.shape[0] == BATCH
        assert leaf.dtype == torch.float32


@pytest.mark.parametrize("name", OURS)
def test_a_memory_goes_on_from_a_checkpoint_to_the_bit(tmp_path: Path, name: str) -> None:
    """S4-M1: saved by the store inside a chunk and opened again, in every form; reads and memory are the same."""
    rule = named(name)
    inputs = window(rule, 9, dtype=torch.float32)
    for step, form in enumerate(accepting(rule)):
        _, halfway = run(rule, *inputs.cut(0, 5).arguments(), form=form, chunk=3)
        flat = flatten(halfway)
        tensors = {path: leaf.contiguous() for path, leaf in flat.items() if isinstance(leaf, Tensor)}
        counts = {path: leaf for path, leaf in flat.items() if not isinstance(leaf, Tensor)}
        saved = save(tmp_path, step=step, trees={"memory": tensors}, values={"counts": counts}, files={}, header={})
        opened = open_checkpoint(saved)
        # The order of names in a file is its own.
        held = opened.tree("memory") | opened.value("counts")
        restored = unflatten({path: held[path] for path in flat})
        expected_bthv, expected = run(rule, *inputs.cut(5, 9, halfway).arguments(), form=form, chunk=3)
        read_bthv, after = run(rule, *inputs.cut(5, 9, restored).arguments(), form=form, chunk=3)
        assert torch.equal(read_bthv, expected_bthv), form
        torch.testing.assert_close(flatten(after), flatten(expected), rtol=0, atol=0)
