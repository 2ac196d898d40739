"""What an earlier version saved becomes today's section by section; what a later one saved is refused by name."""

from pathlib import Path

import orjson
import pytest
import torch

from meristem.checkpoint import manifest as manifests
from meristem.checkpoint import migrate
from meristem.checkpoint.run import RunManifest
from meristem.checkpoint.run import read as read_run
from meristem.checkpoint.store import newest, open_checkpoint, save
from meristem.config import canonical, read_yaml
from meristem.errors import CheckpointTooNew, RunError, UnknownKey
from meristem.events import silent
from meristem.runs.config import Config, load_config

SETTINGS = {section: {} for section in migrate.FIRST_SETTINGS} | {"optim": {"lr": 0.1, "betas": {"first": 0.9}}}


def saved(root, monkeypatch=None, **versions):
    """A checkpoint with all kinds of sections; each in ``versions`` is said to be of that version."""
    path = save(
        root,
        step=3,
        trees={
            "model": {"block.recall.rate": torch.arange(3.0)},
            "memory": {"layer.0.matrix_bkv": torch.ones(1, 2, 3)},
        },
        values={"progress": {"tokens": 7}},
        files={"config.yaml": b"number: 1\n"},
        header={},
    )
    manifest = orjson.loads((path / "manifest.json").read_bytes())
    for file in manifest["files"]:
        file["version"] = versions.get(file["path"], file["version"])
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = manifests.sha256(canonical(manifest))
    (path / "manifest.json").write_bytes(orjson.dumps(manifest))
    return path


@pytest.mark.parametrize("section", ["model.safetensors", "memory.safetensors", "progress.json", "config.yaml"])
def test_newer_section_is_refused_by_name(tmp_path, section):
    """The message says which section, which version was found and which can be read; nothing older is taken instead."""
    save(tmp_path, step=1, trees={}, values={}, files={}, header={})
    path = saved(tmp_path, **{section: 99})
    for read in (lambda: open_checkpoint(path), lambda: newest(tmp_path, silent)):
        with pytest.raises(
            CheckpointTooNew, match=f"step-00000003: its section '{section}' is of version 99"
        ) as caught:
            read()
        known = migrate.version(section)
        assert (caught.value.fields["version"], caught.value.fields["supported"]) == (99, known)
        assert "Update meristem" in str(caught.value)


def test_older_section_is_migrated_in_order(tmp_path, monkeypatch):
    """Each function makes the next version of the one before, and may look at what was saved beside."""
    path = saved(tmp_path, **{"progress.json": 1})
    chain = (lambda told, beside: told | {"seen": sorted(beside("model.safetensors"))}, lambda told, _: [told])
    monkeypatch.setitem(migrate.SECTIONS, "progress.json", chain)
    assert open_checkpoint(path).value("progress") == [{"tokens": 7, "seen": ["block.recall.rate"]}]
    monkeypatch.setitem(migrate.SECTIONS, "model.safetensors", (migrate.renamed({"recall": "memory"}),))
    (name,) = open_checkpoint(path).tree("model")
    assert name == "block.memory.rate"


def test_integers_of_a_memory_that_were_saved_apart_come_back_in_it(tmp_path):
    path = save(
        tmp_path,
        step=1,
        trees={"memory": {"a.matrix_bkv": torch.ones(1, 2, 3)}},
        values={"memory_integers": {"a.count": 5}},
        files={},
        header={},
    )
    manifest = orjson.loads((path / "manifest.json").read_bytes())
    del manifest["manifest_sha256"]
    manifest |= {"schema": "meristem.checkpoint/1", "compat": {"min_reader": 1}}
    manifest["files"] = [{key: value for key, value in file.items() if key != "version"} for file in manifest["files"]]
    manifest["manifest_sha256"] = manifests.sha256(canonical(manifest))
    (path / "manifest.json").write_bytes(orjson.dumps(manifest))
    memory = open_checkpoint(path).tree("memory")
    assert sorted(memory) == ["a.count", "a.matrix_bkv"] and int(memory["a.count"]) == 5


def test_saved_settings_get_the_keys_of_today(monkeypatch):
    """Those of version 1 name no version and have every section of then; later ones name it."""
    moves = migrate.moved(
        {"optim.lr": "optim.lr", "optim.betas.first": "optim.beta1", "evaluate": "eval", "guard": None}
    )
    monkeypatch.setitem(migrate.SECTIONS, "config.yaml", (moves, lambda found, _: found | {"third": True}))
    first = migrate.settings(canonical(SETTINGS).decode(), "a.yaml")
    assert first["optim"] == {"lr": 0.1, "beta1": 0.9, "betas": {}} and first["third"]
    assert "eval" in first and not {"evaluate", "guard"} & first.keys()
    second = migrate.settings(canonical(SETTINGS | {"version": 2}).decode(), "a.yaml")
    assert second == SETTINGS | {"third": True}
    with pytest.raises(CheckpointTooNew, match=r"a.yaml: its section 'config.yaml' is of version 4; .* up to 3"):
        migrate.settings("version: 4\n", "a.yaml")


def test_guard_and_rollback_keep_eight_keys():
    """Issue 9, 4.4. Settings that a run saved with the others are still those of that run; typed, each is a mistake."""
    text = (Path(__file__).parents[1] / "fixtures/e97c871/titans-mag/config.yaml").read_text()
    then, now = read_yaml(text), migrate.settings(text.replace("is_on: true", "is_on: false"), "a.yaml")
    assert sorted(now["guard"]) == ["enabled", "nonfinite_steps", "span", "z"] and now["guard"]["enabled"] is False
    assert sorted(now["rollback"]) == ["change", "max_bytes", "snapshot_every", "snapshots"]
    Config.model_validate(now)
    gone = [(part, key) for part in ("guard", "rollback") for key in then[part] if key not in now[part]]
    assert len(gone) == 22
    for part, key in gone:
        with pytest.raises(UnknownKey, match=f"unknown key '{part}.{key}' .*(has the keys|Did you mean)"):
            load_config("titans-mag", [f"{part}.{key}=1"], {})


def test_settings_that_a_person_wrote_are_taken_as_they_are(monkeypatch):
    """An old word in them is a mistake to be told, and a key left out has the default of today."""
    monkeypatch.setitem(migrate.SECTIONS, "config.yaml", (migrate.moved({"optim.lr": "optim.lr"}),))
    text = "optim:\n  rate: 0.1\n"
    assert migrate.settings(text, "a.yaml") == read_yaml(text)


def test_renamed_weights_have_their_first_names_for_old_fingerprints(monkeypatch):
    monkeypatch.setattr(migrate, "WEIGHT_NAMES", ({"recall": "memory", "a": "b"}, {"b": "c"}))
    tensors = {"x.recall.a": 1, "recalled.a": 2}
    now = tensors
    for words in migrate.WEIGHT_NAMES:
        now = migrate.renamed(words)(now, None)
    assert now == {"x.memory.c": 1, "recalled.c": 2}
    assert [migrate.first_name(name) for name in now] == list(tensors)
    assert migrate.renamed({"a": "b"})({"x.a/exp_avg": 1}, None) == {"x.b/exp_avg": 1}


def test_newer_run_is_refused_and_older_ones_get_the_fields_of_today(tmp_path):
    """The manifest of a run that a later meristem wrote is not read as if it were one of today."""
    manifest = RunManifest.create(tmp_path, name="a")
    content = orjson.loads((tmp_path / "run.json").read_bytes())
    del content["plan"], content["bypass"]
    (tmp_path / "run.json").write_bytes(orjson.dumps(content))
    assert read_run(tmp_path) == manifest.content
    (tmp_path / "run.json").write_bytes(orjson.dumps(content | {"schema": "meristem.run/99"}))
    with pytest.raises(RunError, match=r"'run\.json' is of version 99; this meristem reads up to 1"):
        read_run(tmp_path)
