"""What earlier versions saved loads and goes on: runs and sessions of e97c871 (tests/fixtures/e97c871/README.md)."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from meristem.checkpoint import migrate
from meristem.checkpoint.atomic import sha256
from meristem.checkpoint.store import find
from meristem.config import canonical, dump_yaml, read_yaml
from meristem.errors import CheckpointMismatch, CheckpointTooNew
from meristem.events import silent
from meristem.models.generate import Sampling
from meristem.models.load import load
from meristem.nn.neural_memory import NeuralMemory
from meristem.recipes.pretrain import pretrain
from meristem.runs.config import Config, load_config
from meristem.runs.resume import Contents
from meristem.serve import store
from meristem.serve.session import Session
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from recipes.small import config, write_text

OLD = Path(__file__).parents[1] / "fixtures" / "e97c871"
EXPECTED = json.loads((OLD / "expected.json").read_text())
SPEC = importlib.util.spec_from_file_location("fixtures", Path(__file__).parents[2] / "scripts" / "fixtures.py")
fixtures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fixtures)


@pytest.fixture(params=list(EXPECTED))
def old(request, tmp_path, monkeypatch) -> tuple[str, dict[str, Any]]:
    """A copy of one run in the working directory, with its session and text; its name and what is expected of it."""
    name = request.param
    shutil.copytree(OLD / name, tmp_path / name)
    shutil.copy(OLD / f"{name}.session", tmp_path)
    shutil.copy(OLD / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    return name, EXPECTED[name]


def same(tensors, expected: dict[str, str]) -> bool:
    """Whether these are the saved tensors, whatever each is called; whole numbers without axes were saved apart."""
    found = {name: tensor for name, tensor in tensors.items() if name in expected or tensor.shape}
    return sorted(fixtures.hashes(found).values()) == sorted(expected.values())


def test_run_goes_on(old):
    """The same command finds the run, takes up every tensor to the bit, and makes the steps that it made then.

    It may save at other steps: a run is still the same then.
    """
    name, expected = old
    saved = Contents.of(find(Path(name), silent))
    assert sorted(saved.trees) == sorted(expected["trees"])
    for tree, tensors in saved.trees.items():
        assert same(tensors, expected["trees"][tree]), tree
    settings = load_config(f"{name}/config.yaml", ["checkpoint.every=77"], {}).tree
    found = pretrain(settings, view=fixtures.Interrupting(25))
    (resumed,) = [event for event in read_records(Path(name) / "events.ndjson") if event["name"] == "run.resumed"]
    assert (found.run_dir, found.step, resumed["payload"]["resumed_from"]) == (Path(name), 25, 20)
    losses = {record["step"]: record["metrics"]["nats"] for record in history(Path(name)) if record["split"] == "train"}
    then = {int(step): nats for step, nats in expected["losses_nats"].items()}
    # The first comes of what was saved alone. Later ones also follow what was mended in training since, as decay.
    assert losses[21] == pytest.approx(then[21], abs=1e-4)
    assert {step: losses[step] for step in then} == pytest.approx(then, abs=5e-3)


def test_session_goes_on(old):
    """The weights are those that were saved, and the session knows what it knew."""
    name, expected = old
    model, tokenizer = load(name)
    assert same(model.state_dict(), expected["trees"]["model"])
    session = Session.load(f"{name}.session", model, tokenizer)
    told = expected["session"]
    assert (session.name, session.random_seed, session.turn, session.n_tokens) == (
        name,
        7,
        told["turn"],
        told["n_tokens"],
    )
    assert session.feed(fixtures.FED_LATER).nats == pytest.approx(told["later_nats"], abs=1e-4)


def resealed(checkpoint: Path, name: str, content: bytes | None) -> None:
    """Put other content in the place of a file of a checkpoint, or take it out, as if it had been saved so."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (file,) = (file for file in manifest["files"] if file["path"] == name)
    if content is None:
        manifest["files"].remove(file)
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(content)
        file |= {"size_bytes": len(content), "sha256": sha256(content)}
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = sha256(canonical(manifest))
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def stopped(tmp_path) -> tuple[Config, Path]:
    """The settings of a small run that was stopped after four steps, and its checkpoint."""
    settings = config(write_text(tmp_path), "eval.n_samples=0", f"run.dir={tmp_path}")
    return settings, pretrain(settings, view=fixtures.Interrupting(4)).checkpoint


def taken_up(settings: Config) -> list[dict[str, Any]]:
    """The events of the run when the same command goes on for a step."""
    found = pretrain(settings, view=fixtures.Interrupting(5))
    assert (found.step, found.run_dir.name) == (5, settings.run.name)
    return read_records(found.run_dir / "events.ndjson")


@pytest.mark.parametrize("key", ["memory.chunk", "model.rope", "optim.eps", "schedule.stairs", "rollback"])
def test_settings_that_were_not_there_yet_have_their_default(stopped, key):
    """GR15: today's model of a checkpoint that does not know a key of it, or a whole section, is the same model."""
    settings, checkpoint = stopped
    for path in (checkpoint / "config.yaml", checkpoint.parents[1] / "config.yaml"):
        told = read_yaml(path.read_text())
        section, _, last = key.rpartition(".")
        del (told[section] if section else told)[last]
        text = dump_yaml(told)
        if path.parent == checkpoint:
            resealed(checkpoint, "config.yaml", text.encode())
        path.write_text(text)
    assert "run.resumed" in [event["name"] for event in taken_up(settings)]


@pytest.mark.parametrize("name", ["progress", "cursor", "safety", "probe", "device", "random"])
def test_fields_that_were_not_there_yet_have_their_default(stopped, name):
    """GR15: not one field of the plain values is missed: each is taken out, with all of its kind."""
    settings, checkpoint = stopped
    resealed(checkpoint, f"{name}.json", b"{}")
    if name == "device":
        settings = settings.model_copy(update={"device": settings.device.model_copy(update={"dtype": "auto"})})
        (checkpoint.parents[1] / "config.yaml").write_text(migrate.settings_text(settings))
    assert "run.resumed" in [event["name"] for event in taken_up(settings)]


@pytest.mark.parametrize("name", ["cursor", "optim", "random", "safety", "probe", "device", "topology"])
def test_section_that_was_not_there_yet_is_as_in_a_run_that_begins(stopped, name):
    """A section that the future depends on is named in an event."""
    settings, checkpoint = stopped
    for file in checkpoint.glob(f"{name}.*"):
        resealed(checkpoint, file.name, None)
    told = [event["payload"] for event in taken_up(settings) if event["name"] == "degraded"]
    is_told = name in ("cursor", "optim", "random")
    assert [each["absent"] for each in told if "absent" in each] == ([[name]] if is_told else [])


def test_newer_section_is_refused_and_nothing_begins_afresh(stopped, monkeypatch):
    settings, checkpoint = stopped
    newer = {"optim.safetensors": (lambda tensors, _: tensors,) * 3}
    monkeypatch.setattr(migrate, "SECTIONS", {**migrate.SECTIONS, **newer})
    pretrain(settings, view=fixtures.Interrupting(6))
    monkeypatch.undo()
    with pytest.raises(CheckpointTooNew, match="'optim.safetensors' is of version 4; this meristem reads up to 1"):
        pretrain(settings)


def test_session_of_another_model_is_refused(old):
    """Also where its fingerprint was made in the old way."""
    name, _ = old
    model, tokenizer = load(name)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    with pytest.raises(CheckpointMismatch, match="belongs to another model"):
        Session.load(f"{name}.session", model, tokenizer)


def test_session_knows_its_model_by_names_of_then(monkeypatch):
    """Weights that have other names now are still those that an old session was made with."""
    model, _ = load(OLD / "titans-mag")
    modules = model.blocks[0].mixer._modules
    (name,) = (name for name, module in modules.items() if isinstance(module, NeuralMemory))
    modules["other"] = modules.pop(name)
    monkeypatch.setattr(migrate, "WEIGHT_NAMES", (*migrate.WEIGHT_NAMES, {name: "other"}))
    header = store.read(OLD / "titans-mag.session").header
    assert store.named_model_fingerprint(model) == header["named_model"]


def test_fields_of_a_session_that_were_not_there_yet_have_their_default(tmp_path):
    """All that it cannot do without is what it belongs to."""
    model, tokenizer = load(OLD / "titans-mag")
    before = Session(model, tokenizer, name="a", sampling=Sampling(top_k=3), random_seed=5, learn="none")
    before.feed("3 times 3")
    before.save(tmp_path / "a.session")
    tensors, header = store.read(tmp_path / "a.session")
    store.write(tmp_path / "b.session", tensors, {part: header[part] for part in ("model", "tokenizer")})
    found = Session.load(tmp_path / "b.session", model, tokenizer)
    assert (found.learn, found.random_seed, found.n_tokens, found.turn) == ("memory", 0, 0, 0)
    assert found.sampling == Sampling() and found.size_bytes == before.size_bytes
