"""What the gates do, read off a forward pass."""

import copy

import pytest
import torch

from meristem.evaluate.memory import memory_figures
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig

TOKENS_BT = torch.randint(0, 256, (2, 19), generator=torch.Generator().manual_seed(0))
MODEL = ModelConfig(dim=12, n_layers=2, n_heads=2, sliding_window=5)


@pytest.mark.parametrize("half_life", [16.0, 512.0])
def test_fresh_gates_are_those_of_the_settings(half_life):
    """Half-life, momentum, and the write rate with its factor 1 - momentum."""
    model = build(MODEL, MemoryConfig(head_dim=4, half_life=half_life, write_rate=0.2, momentum=0.4), 256, 0)
    found = memory_figures(model, TOKENS_BT)
    assert found["half_life"] == pytest.approx(half_life, rel=1e-3)
    assert found["momentum"] == pytest.approx(0.4, rel=1e-5)
    assert found["write"] == pytest.approx(0.2 * 0.6, rel=1e-5)


def test_half_lives_are_a_spread():
    """The head that forgets first, the median, and the one that forgets last."""
    model = build(MODEL, MemoryConfig(head_dim=4, half_life=(16, 4096)), 256, 0)
    found = memory_figures(model, TOKENS_BT)
    spread = [found[name] for name in ("half_life_least", "half_life", "half_life_most")]
    assert spread == pytest.approx([16, 256, 4096], rel=5e-3)


def test_norm_is_that_of_the_memories_left_behind():
    """The mean over layers, rows and heads of the norm of the weights; momentum is not among them."""
    model = build(MODEL, MemoryConfig(head_dim=4), 256, 0)
    _, state = model(TOKENS_BT)
    norms = torch.stack([norms_bh(layer) for layer in state["layer"].values()])
    assert memory_figures(model, TOKENS_BT)["norm"] == pytest.approx(norms.mean().item(), rel=1e-5)


def norms_bh(state):
    """The norms of the one matrix memory inside the state of a layer."""
    if "matrix_bhkv" in state:
        return state["matrix_bhkv"].flatten(2).norm(dim=-1)
    found = [norms_bh(inner) for inner in state.values() if isinstance(inner, dict)]
    return next((norms for norms in found if norms is not None), None)


@pytest.mark.parametrize("part", [ModelConfig(name="charrnn", dim=7), MODEL.model_copy(update={"mixer": "attention"})])
def test_no_memory_no_figures(part):
    assert memory_figures(build(part, MemoryConfig(head_dim=4), 256, 0), TOKENS_BT) == {}


@pytest.mark.compiled
def test_compiled_blocks_are_heard_too():
    """Compiled code passes over hooks: the figures are read off the model as it is written."""
    model = build(MODEL, MemoryConfig(head_dim=4), 256, 0)
    before = memory_figures(model, TOKENS_BT)
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        model(TOKENS_BT)
    assert memory_figures(model, TOKENS_BT) == pytest.approx(before)


def test_looking_changes_nothing():
    """Neither parameters nor hooks stay behind."""
    model = build(MODEL, MemoryConfig(head_dim=4), 256, 0)
    before = copy.deepcopy(model.state_dict())
    memory_figures(model, TOKENS_BT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_chunks_say_how_far_they_overshoot():
    """Only a form with frozen chunks has the figure; higher write rates raise it, and a limit of 2 / chunk holds it."""
    settings = {"head_dim": 4, "rule": "delta", "chunk": 8, "half_life": 1e6}

    def figure(**more):
        model = build(MODEL, MemoryConfig.model_validate(settings | more), 256, 0)
        return memory_figures(model, torch.zeros(1, 19, dtype=torch.int64)).get("overshoot")

    assert figure() is None
    # One token again and again is nearly one key, but for the convolution's first tokens: the rates add up.
    assert figure(form="frozen_chunk", write_rate=0.5) == pytest.approx(4.0, rel=0.05)
    assert figure(form="frozen_chunk", write_rate=0.2, write_limit=0.25) < 2
    assert figure(form="frozen_chunk", write_rate=0.5, gates="channel") == pytest.approx(4.0, rel=0.05)
