"""A run computes its memories by what is faster at its sizes, says so, and keeps to it when it goes on."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from meristem.config import load
from meristem.memory.kernels.select import choose_form, fuses
from meristem.models.build import build
from meristem.native.library import core, library
from meristem.recipes.plan.dry_run import plan
from meristem.recipes.pretrain import pretrain
from meristem.runs import backend
from meristem.runs.backend import Backend, choose_backend, measured_gain
from meristem.runs.config import Config

CPU = torch.device("cpu")
SMALL = ["data.source=stdlib-docs", "data.seq_len=32", "data.batch_size=2", "model.dim=16", "model.n_layers=1"]
SMALL += ["memory.head_dim=8", "device.device=cpu", "device.dtype=fp32", "tokenizer.kind=byte"]

needs_core = pytest.mark.skipif(library() is None, reason=f"there is no native core: {core().said}")


def config(*more: str) -> Config:
    return load(Config, overrides=[*SMALL, *more]).tree


def chosen(*more: str, device: torch.device = CPU) -> Backend:
    tree = config(*more)
    return choose_backend(build(tree.model, tree.memory, 256, 0), tree, device, None)


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the measurement gives."""
    value = {"x": 2.5}
    monkeypatch.setattr(backend, "measured_gain", lambda *_: value["x"])
    return value


@needs_core
def test_the_faster_one_is_chosen(gain: dict[str, float]) -> None:
    assert chosen() == Backend("native", "the native core ran at 2.5 times the speed of tensor code", 2.5)
    gain["x"] = 0.9
    assert chosen().name == "native", "what wavers around 1 must not decide on the bits of a run"
    gain["x"] = 0.7
    assert chosen() == Backend("reference", "the native core ran at 0.7 times the speed of tensor code", 0.7)


def test_nothing_is_measured_where_nothing_would_go_through_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "measured_gain", None)
    assert chosen("memory.rule=titans_mlp").name == "auto"
    assert chosen("memory.form=scan").name == "auto"
    assert chosen(device=torch.device("cuda", 0)).why == "the device is cuda"
    monkeypatch.setattr(backend, "native_refusals", lambda *_: ["there is no native core: no compiler"])
    assert chosen() == Backend("reference", "there is no native core: no compiler")


@needs_core
def test_the_measurement_compares_the_two() -> None:
    """Both run forward and backward; that of a process is made once."""
    tree = config()
    module = next(m for m in build(tree.model, tree.memory, 256, 0).modules() if isinstance(m, backend.NeuralMemory))
    sizes = backend._sizes(module, tree)
    assert sizes == ((2, 32, 2, 8), (2, 32, 2, 8))
    found = measured_gain(module.rule.without_features(), sizes, 16)
    assert found > 0 and measured_gain(module.rule.without_features(), sizes, 16) == found


def test_a_choice_holds_inside_alone() -> None:
    keys = torch.empty(2, 9, 3, 16)
    before = choose_form(keys, keys)
    with Backend("reference", "").entered():
        assert choose_form(keys, keys) == "reference"
    for name in ("native", "auto"):
        with Backend(name, "").entered():
            assert choose_form(keys, keys) == before


@needs_core
def test_plan_says_which(gain: dict[str, float]) -> None:
    (part,) = [part for part in plan(config(), until="build").parts if part.name == "build"]
    assert part.message.endswith(
        "; memories by the native core: the native core ran at 2.5 times the speed of tensor code"
    )


@needs_core
def test_a_run_that_goes_on_keeps_what_it_began_with(
    gain: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a second measurement would say: its steps have the bits that they would have had."""
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n + 1} is {n * (n + 1)}.\n" for n in range(400)))
    small = [f"data.source={tmp_path / 'text.txt'}", "eval.n_windows_end=2", "eval.n_samples=0"]
    gain["x"] = 0.5
    pretrain(config(*small, "train.steps=1"), run_dir=tmp_path / "run")
    gain["x"] = 9.0
    pretrain(config(*small, "train.steps=2"), run_dir=tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.ndjson").read_text().splitlines()]
    said = [event["payload"] for event in events if event["name"] == "memory.backend"]
    assert [(each["name"], each["gain"]) for each in said] == [("reference", 0.5), ("reference", None)]
    assert said[1]["why"] == "the run began so"
    assert all(each["layers"] for each in said)


@needs_core
def test_a_run_from_before_the_core_had_layers_goes_on_without() -> None:
    """Its memories go through the core as they did, and what stands around them does not."""
    saved = {"dtype": "fp32", "memory": "native"}

    class Old:
        has = staticmethod(lambda name: name == "device")
        value = staticmethod(lambda name: saved)

    tree = config()
    for more, name in (({}, "native"), ({"memory": "auto"}, "auto"), ({"memory": "reference"}, "reference")):
        saved |= more
        model = nn.Linear(2, 2) if name == "auto" else build(tree.model, tree.memory, 256, 0)
        found = choose_backend(model, tree, CPU, Old)
        assert (found.name, found.layers) == (name, False)
        with found.entered():
            assert not fuses(torch.zeros(2, 3, 32), width=32)
    assert Backend("native", "").layers
    with Backend("native", "").entered():
        assert fuses(torch.zeros(2, 3, 32), width=32)
