"""Nothing that is loaded is run, and there is one torch that the code is written for."""

import ast
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import orjson
import pytest

import house
from meristem.checkpoint import manifest as manifests
from meristem.checkpoint.journal import Journal, read
from meristem.checkpoint.store import newest, open_checkpoint, verify
from meristem.config import canonical
from meristem.errors import CheckpointCorrupt
from meristem.events import silent
from meristem.shapes import OLDEST_TORCH

from .sample import number_of, save_sample

ROOT = Path(__file__).parents[2]
PACKAGE = house.modules(ROOT / "src" / "meristem", "meristem")
FILES = ("model.safetensors", "memory.safetensors", "cursor.json", "progress.json", "config.yaml", "tokenizer.json")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def trap(tmp_path):
    """The pickle of a trap. That it works is tried first; that it was not sprung is checked at the end."""
    sprung = tmp_path / "sprung"
    content = pickle.dumps(Trap(sprung))
    pickle.loads(content).close()
    assert sprung.exists()
    sprung.unlink()
    yield content
    assert not sprung.exists()


@pytest.mark.parametrize("part", (*FILES, "manifest.json"))
def test_l25_a_pickle_in_place_of_any_file_is_refused(tmp_path, trap, part):
    """Put there by accident or by somebody who cannot make the hash fit: named, passed over, never run.

    CX-7.3, CX-9.6.
    """
    root = tmp_path / "checkpoints"
    save_sample(root, 3, number=1)
    path = save_sample(root, 5, number=2)
    (path / part).write_bytes(trap)
    with pytest.raises(CheckpointCorrupt, match=part):
        open_checkpoint(path)
    (found,) = verify(path)
    assert part in found
    assert number_of(newest(root, silent)) == 1


@pytest.mark.parametrize("part", FILES)
def test_l25_a_pickle_with_a_hash_that_fits_is_never_run(tmp_path, trap, part):
    """Put there by somebody who sealed the checkpoint again: it is no tree, no value, and as a file only bytes."""
    path = save_sample(tmp_path / "checkpoints", 3)
    (path / part).write_bytes(trap)
    manifest = orjson.loads((path / "manifest.json").read_bytes())
    for file in manifest["files"]:
        if file["path"] == part:
            file.update(size_bytes=len(trap), sha256=manifests.sha256(trap))
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = manifests.sha256(canonical(manifest))
    (path / "manifest.json").write_bytes(orjson.dumps(manifest))
    checkpoint = open_checkpoint(path)
    stem, ending = part.rsplit(".", 1)
    if part in ("config.yaml", "tokenizer.json"):
        assert checkpoint.file(part) == trap
    elif ending == "json":
        with pytest.raises(CheckpointCorrupt, match=f"{part} is not JSON"):
            checkpoint.value(stem)
    else:
        with pytest.raises(CheckpointCorrupt, match=f"{part} is not a safetensors file"):
            checkpoint.tree(stem)


def test_l25_a_pickle_in_place_of_the_journal_is_refused(tmp_path, trap):
    (tmp_path / "journal").write_bytes(trap)
    for use in (read, Journal):
        with pytest.raises(CheckpointCorrupt, match="damaged at byte 0"):
            use(tmp_path / "journal")


def test_l25_nothing_in_the_package_unpickles():
    """CX-7.3, CX-9.6: No pickle and its kin, no torch.load and torch.save, in any file, at any depth."""
    assert [found for source in PACKAGE for found in house.unpickling(source)] == []


TELLS = {
    "meristem.device.describe": "writes down what a run ran on",
    "meristem.checkpoint.manifest": "writes down what a checkpoint was saved by",
    "meristem.bench.suite": "writes down what was measured on",
    "meristem.cli.doctor": "tells the user that a newer torch was not tried",
    "meristem.shapes": "refuses an older one: the one check",
}
"""Who may look at the version of torch, and for what."""


def versions(source):
    """Every place that looks at the version of torch, or asks whether torch has something."""
    for node in ast.walk(source.tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
        if re.fullmatch(r"torch\.(__version__|version|torch_version)|(hasattr|getattr)\(torch\b.*", text):
            yield node
        elif re.fullmatch(r"([\w.]+\.)?version\('torch'\)|TorchVersion\(.*", text):
            yield node


def decisions(source):
    """Every comparison, or question to a text, that has the version of torch in it."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Compare) and any(True for _ in versions(house.Module("a", ast.unparse(node), False))):
            yield node


def test_l1_one_minimum_torch_no_version_branches():
    """One place compares the version, at import; a handful write it down; it is the version that is installed with."""
    looking = {source.name for source in PACKAGE if any(True for _ in versions(source))}
    assert looking == set(TELLS)
    assert [source.name for source in PACKAGE if any(True for _ in decisions(source))] == ["meristem.shapes"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(line.startswith(f"torch>={OLDEST_TORCH},") for line in project["dependencies"])


@pytest.mark.parametrize(
    "text, n_looks, n_decisions",
    [
        ("if torch.__version__ >= '2.14': pass", 1, 1),
        ("x = 1 if (2, 13) < TorchVersion(torch.__version__) else 2", 2, 1),
        ("if importlib.metadata.version('torch') != '2.13.0': pass", 1, 1),
        ("if hasattr(torch, 'accelerator'): pass", 1, 0),
        ("cuda = torch.version.cuda", 1, 0),
        ("x = torch.versions.a == 3", 0, 0),
    ],
)
def test_l1_a_planted_branch_is_found(text, n_looks, n_decisions):
    source = house.Module("meristem.memory.planted", text, False)
    assert (len(list(versions(source))), len(list(decisions(source)))) == (n_looks, n_decisions)


AGED = """
import json
import sys
import torch
from importlib import import_module
from torch.torch_version import TorchVersion
from meristem.errors import CapabilityError
said = []
for version, door in json.loads(sys.argv[1]):
    torch.__version__ = TorchVersion(version)
    sys.modules.pop("meristem.shapes", None)
    try:
        import_module(f"meristem.{door}")
        said.append("taken")
    except CapabilityError as error:
        said.append(f"{error.exit_code} {error}")
print(json.dumps(said))
"""
DOORS = ("memory", "nn.mag", "models.lm", "train.loop", "recipes.pretrain", "bench.suite", "serve.session")


def test_l1_an_older_torch_is_refused_at_import():
    """By whatever trains, computes or talks: with what was found, what is expected and what to type."""
    refusal = "3 torch 2.12.1+cpu is installed, and meristem needs 2.13 or newer. pip install --upgrade 'torch>=2.13'"
    newer = [(version, "shapes") for version in ("2.13.0", "2.9.1", "2.20.0+cu130")]
    said = imported([*(("2.12.1+cpu", door) for door in DOORS), *newer])
    assert said[: len(DOORS)] == [refusal] * len(DOORS)
    assert [text[:7] for text in said[len(DOORS) :]] == ["taken", "3 torch", "taken"]


def imported(cases):
    """What importing a room says under a torch of another version, for each case in turn."""
    command = [sys.executable, "-c", AGED, orjson.dumps(cases).decode()]
    return orjson.loads(subprocess.run(command, capture_output=True, check=True, timeout=100).stdout)
