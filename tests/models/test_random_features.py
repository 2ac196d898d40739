"""Random features are drawn once and saved: what a model answers does not hang on a draw made anew."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meristem.checkpoint import store
from meristem.config import dump_yaml
from meristem.data.tokenizer import byte_tokenizer
from meristem.memory.features import features
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.load import load
from meristem.nn.config import MemoryConfig
from meristem.nn.neural_memory import NeuralMemory
from meristem.plugins import spelled
from zoo import ids

RANDOM = ["fourier(n_features=12{})", "exponential(n_features=12{})"]
MODEL = ModelConfig(dim=16, n_layers=2, mixer="memory")

READS = """
import sys, torch
from meristem.models.load import load
torch.manual_seed(99)
logits_bto, _ = load(sys.argv[1]).model(torch.load(sys.argv[2]))
torch.save(logits_bto.detach(), sys.argv[3])
"""


def memory(spelling: str, seed: int) -> MemoryConfig:
    return MemoryConfig(rule="delta", head_dim=8, features=spelling.format(f", random_seed={seed}"))


def saved(place: Path, weights: dict[str, torch.Tensor], config: MemoryConfig) -> Path:
    settings = {"model": MODEL.model_dump(mode="json"), "memory": config.model_dump(mode="json")}
    files = {"config.yaml": dump_yaml(settings).encode(), "tokenizer.json": byte_tokenizer().to_bytes()}
    store.save(place / "checkpoints", step=7, trees={"model": weights}, values={}, files=files, header={})
    return place


@pytest.mark.parametrize("spelling", RANDOM)
def test_another_process_with_another_seed_answers_to_the_bit(tmp_path: Path, spelling: str) -> None:
    """Also where the seed in the configuration is another: what was drawn is what was saved."""
    model, tokens_bt = build(MODEL, memory(spelling, 0), 256, random_seed=3), ids(2)
    run = saved(tmp_path, model.state_dict(), memory(spelling, 1))
    torch.save(tokens_bt, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", READS, str(run), str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tokens_bt)[0])
    other_bto, _ = build(MODEL, memory(spelling, 1), 256, random_seed=3)(tokens_bt)
    assert not torch.equal(other_bto, model(tokens_bt)[0]), "the two seeds draw the same: the test shows nothing"


@pytest.mark.parametrize("spelling", RANDOM)
def test_weights_saved_without_their_random_map_take_that_of_their_seed(tmp_path: Path, spelling: str) -> None:
    """As e97c871 saved them: it drew the map anew from the seed whenever it was asked."""
    model = build(MODEL, memory(spelling, 2), 256, random_seed=3)
    weights = {name: x for name, x in model.state_dict().items() if "random_map" not in name}
    assert len(weights) < len(model.state_dict())
    loaded = load(saved(tmp_path, weights, memory(spelling, 2)))
    assert torch.equal(loaded.model(ids(2))[0], model(ids(2))[0])


@pytest.mark.parametrize("spelling", RANDOM)
def test_a_map_is_drawn_once(spelling: str) -> None:
    """A rule alone draws once for each width; a layer uses what it holds, and nothing of it is trained."""
    made = spelled(features, spelling.format(""))
    assert made.draw(8)["weight_kf"] is made.draw(8)["weight_kf"]
    recall = NeuralMemory.from_config(16, memory(spelling, 0))
    rows_bk = torch.randn(5, 8)
    torch.testing.assert_close(recall.rule.features.apply(rows_bk), made.apply(rows_bk))
    assert recall.random_map is not None and not list(recall.random_map.parameters())
    recall.random_map.weight_kf.zero_()
    assert not torch.allclose(recall.rule.features.apply(rows_bk), made.apply(rows_bk))
