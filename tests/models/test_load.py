"""A checkpoint gives back the model that was saved, or says everything that does not fit."""

import pytest
import torch

import meristem
from meristem.checkpoint import store
from meristem.config import dump_yaml
from meristem.data.tokenizer import byte_tokenizer
from meristem.errors import CheckpointMismatch, NoCheckpoint
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.load import load
from meristem.nn.config import MemoryConfig
from zoo import ZOO, ids


def saved(place, model_part, memory_part, weights, settings=None):
    """A run directory with one checkpoint."""
    settings = settings or {"model": model_part.model_dump(mode="json"), "memory": memory_part.model_dump(mode="json")}
    files = {"config.yaml": dump_yaml(settings).encode(), "tokenizer.json": byte_tokenizer().to_bytes()}
    store.save(place / "checkpoints", step=7, trees={"model": weights}, values={}, files=files, header={})
    return place


@pytest.mark.parametrize("name", ZOO)
def test_a_loaded_model_is_the_one_that_was_saved(tmp_path, name):
    model = build(*ZOO[name], 256, random_seed=3)
    loaded = load(saved(tmp_path, *ZOO[name], model.state_dict()))
    assert loaded.tokenizer.fingerprint == byte_tokenizer().fingerprint
    assert torch.equal(loaded.model(ids(2))[0], model(ids(2))[0])


def test_a_loaded_model_keeps_its_precision_and_needs_no_file(tmp_path):
    model = build(*ZOO["preset-charformer"], 256, random_seed=3).double()
    loaded = meristem.load(saved(tmp_path, *ZOO["preset-charformer"], model.state_dict()))
    for path in (tmp_path / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(b"")
    assert torch.equal(loaded.model(ids(2))[0], model(ids(2))[0])


def test_every_weight_that_does_not_fit_is_listed(tmp_path):
    """A8.4."""
    model_part, memory_part = ModelConfig(name="charrnn", dim=12, n_layers=2), MemoryConfig()
    weights = build(model_part, memory_part, 256, random_seed=3).state_dict()
    weights["extra.weight"] = weights.pop("head.bias")
    weights["embedding.weight"] = weights["embedding.weight"][:, :5].clone()
    with pytest.raises(CheckpointMismatch, match="do not fit the model of its config.yaml") as caught:
        load(saved(tmp_path, model_part, memory_part, weights))
    assert caught.value.fields["differences"] == [
        "embedding.weight: saved (256, 5), expected (256, 12)",
        "extra.weight: saved (256,), expected nothing",
        "head.bias: saved not at all, expected (256,)",
    ]


def test_settings_that_this_version_does_not_know_are_a_mismatch(tmp_path):
    model_part, memory_part = ModelConfig(name="charrnn", dim=12, n_layers=2), MemoryConfig()
    weights = build(model_part, memory_part, 256, random_seed=3).state_dict()
    settings = {"model": {"name": "charrnn", "wings": 2}}
    with pytest.raises(CheckpointMismatch, match="a model that this version does not know .wings: Extra inputs"):
        load(saved(tmp_path, model_part, memory_part, weights, settings))


def test_where_nothing_was_saved_there_is_no_model(tmp_path):
    with pytest.raises(NoCheckpoint):
        load(tmp_path)
