"""What the benchmark of whole models trains and lets speak is what it says that it does."""

import pytest
import torch

from meristem.bench import compositions as bench
from meristem.bench import trained
from meristem.bench.measure import Row
from meristem.memory.state import flatten
from meristem.models.decoding import Decoding


@pytest.fixture
def made(monkeypatch):
    """Models as they are built, on windows short enough for a test."""
    models = []
    build = trained.build
    monkeypatch.setattr(trained, "N_TIME", 13)
    monkeypatch.setattr(trained, "build", lambda *given: models.append(build(*given)) or models[-1])
    return models


def test_a_training_step_moves_every_parameter(made):
    """The whole of it: with a loss, a gradient for everything, and the optimizer."""
    step = trained.training_step(trained.sized("hope", 32, "model.mlp_dim=64"), batch=2)
    before = [parameter.detach().clone() for parameter in made[0].parameters()]
    for _ in range(3):
        step()
    still = [
        name
        for (name, now), then in zip(made[0].named_parameters(), before, strict=True)
        if torch.equal(now, then) and "embedding" not in name
    ]
    assert still == []


def test_speaking_writes_the_memory(monkeypatch):
    """Every call goes on where the one before ended, and its tokens are in the memories."""
    texts = []
    monkeypatch.setattr(trained, "Decoding", lambda *given: texts.append(Decoding(*given)) or texts[-1])
    step = trained.decoding(trained.sized("hope", 32, "model.mlp_dim=64"), n_tokens=5)
    seen = [flatten(texts[0].state)]
    for _ in range(2):
        step()
        seen.append(flatten(texts[0].state))
    assert [state["layer.0.memory.n_tokens"] for state in seen] == [1, 6, 11]
    live = [state["layer.1.memory.asked.live.matrix_bhkv"] for state in seen]
    assert all(not torch.equal(*pair) for pair in zip(live, live[1:], strict=False))


def test_losses_of_layers_are_taught(made):
    """As the loop of training does."""
    gates = ("memory.levels.count=2", "memory.levels.frequency=output", "memory.levels.budget=100.0")
    step = trained.training_step(trained.sized("lmm", 32, *gates), batch=1)
    frequency = made[0].get_submodule("blocks.0.mixer.recall.frequency")
    torch.nn.init.zeros_(frequency.get_parameter("bias_l"))
    heard = []
    frequency.get_parameter("bias_l").register_hook(heard.append)
    step()
    assert heard[0].abs().max() > 1


@pytest.mark.parametrize("section", [bench.compositions, bench.hope, bench.levels])
def test_targets_are_those_of_the_issue(monkeypatch, section):
    """Each width, batch and case once, with candidates that take turns; what is asked stands beside what is found."""

    def found(candidates, *, n_repeats):
        assert len(candidates) > 1 and n_repeats == 7
        return {name: 2.0 if name == "4" else 1.0 for name in candidates}

    monkeypatch.setattr(bench, "training_step", lambda config, batch: lambda: None)
    monkeypatch.setattr(bench, "medians", found)
    rows: list[Row] = list(section(7))
    assert len({row.name for row in rows}) == len(rows)
    asked = {(row.name.split(":")[0], row.target) for row in rows if row.target is not None}
    if section is bench.hope:
        assert {target for _, target in asked} == {5000, 3000, 1000}
    elif section is bench.levels:
        assert {row.measured for row in rows} == {2.0} and {target for _, target in asked} == {1.3}
    else:
        assert {target for _, target in asked} == {20_000, 12_000, 5_000, 0.45}
        assert {row.measured for row in rows if row.unit == "x"} == {1.0}


def test_decoding_is_on_one_thread(monkeypatch):
    """As a session decodes; afterwards there are as many as before."""
    threads = []
    monkeypatch.setattr(bench, "decoding", lambda *given, **how: lambda: threads.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    rows = list(bench.hope_decoding(1))
    assert set(threads) == {1} and torch.get_num_threads() == before
    assert [row.target for row in rows if row.target] == [3000, 2500, 1500]


def test_the_transformer_sees_everything():
    """No memory, no span, no vectors in front: what can be fused is fused."""
    whole = trained.sized("attention", 64, "model.sliding_window=null", "model.n_heads=4").model
    mac = trained.sized("titans-mac", 64).model
    assert (whole.sliding_window, whole.n_persistent_tokens) == (None, 0)
    assert (whole.dim, whole.n_layers, whole.n_heads, whole.mlp) == (mac.dim, mac.n_layers, mac.n_heads, mac.mlp)
