"""A run as training leaves it: two checkpoints of a tiny model, its manifest, settings and records."""

import json
from pathlib import Path

import pytest

from meristem.checkpoint import store
from meristem.checkpoint.run import RunManifest
from meristem.cli import run
from meristem.config import dump_yaml
from meristem.data.tokenizer import byte_tokenizer
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.sinks.records import Records

MODEL = ModelConfig(dim=12, n_layers=2, n_heads=2, sliding_window=5)
MEMORY = MemoryConfig(head_dim=6, chunk=7)


def _make_run(place: Path, name: str, chunk: int = 7) -> Path:
    """A finished run called ``name``."""
    directory = place / name
    manifest = RunManifest.create(directory, name=name, best={"metric": "val/bits_per_byte", "value": 2.5, "step": 20})
    settings = {"model": MODEL.model_dump(), "memory": {**MEMORY.model_dump(), "chunk": chunk}}
    (directory / "config.yaml").write_text(dump_yaml(settings))
    records = Records(directory, manifest.content["id"])
    for step in (10, 20):
        weights = build(MODEL, MEMORY, 256, step).state_dict()
        store.save(
            directory / "checkpoints",
            step=step,
            trees={"model": weights},
            values={"progress": {"step": step}},
            files={"config.yaml": dump_yaml(settings).encode(), "tokenizer.json": byte_tokenizer().to_bytes()},
            header={"seq": step, "metrics": {"val/bits_per_byte": 30 / step}},
        )
        records.metrics(step, 100 * step, step / 100, "train", {"bits_per_byte": 40 / step})
        records.metrics(step, 100 * step, step / 100, "val", {"bits_per_byte": 30 / step})
    records.close()
    manifest.end("finished", 0)
    return directory


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run that no test changes."""
    return _make_run(tmp_path_factory.mktemp("runs"), "ada")


@pytest.fixture
def make_run(tmp_path):
    """Makes a run of our own by name."""
    return lambda name, **settings: _make_run(tmp_path, name, **settings)


@pytest.fixture
def answered(capsys):
    """Runs a command line under --json and gives its exit code and the one value it printed."""

    def ask(*words: object) -> tuple[int, object]:
        code = run([*map(str, words), "--json"])
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        return code, json.loads(out)

    return ask
