"""A checkpoint gives back what was saved, or says what is wrong with it."""

import json
import pickle
from pathlib import Path

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from meristem.checkpoint import manifest as manifests
from meristem.checkpoint import migrate
from meristem.checkpoint.store import diff, entries, find, newest, open_checkpoint, pin, save, unpin, verify
from meristem.checkpoint.tensors import write_tensors
from meristem.config import canonical
from meristem.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointTooNew, NoCheckpoint
from meristem.events import silent

from .sample import model_tree, number_of, save_sample

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_saved_parts_come_back(tmp_path):
    """Trees, values and files come back equal, with dtypes, empty tensors, scalars and transposed views."""
    path = save_sample(tmp_path, 12_000, number=3)
    assert path == tmp_path / "step-00012000"
    checkpoint = open_checkpoint(path)
    assert number_of(checkpoint) == 3
    assert checkpoint.step == 12_000
    assert checkpoint.tree("memory") == {}
    assert checkpoint.value("progress") == [3, 0.1, None, "é"]
    assert [checkpoint.has(name) for name in ("model", "cursor", "config.yaml", "optim")] == [True, True, True, False]


@settings(max_examples=40, deadline=None)
@given(
    tree=st.dictionaries(
        st.text(min_size=1, max_size=9),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans()),
        max_size=6,
    )
)
def test_tensors_read_by_the_library(tmp_path_factory, tree):
    """What we write is a safetensors file: the library reads the same bytes, shapes and dtypes back."""
    tensors = {}
    for seed, (name, (dtype, shape, flipped)) in enumerate(tree.items()):
        tensor = torch.randint(
            0, 2 if dtype == torch.bool else 100, shape, generator=torch.Generator().manual_seed(seed)
        )
        tensors[name] = tensor.to(dtype).t() if flipped and len(shape) == 2 else tensor.to(dtype)
    path = tmp_path_factory.mktemp("trees") / "a.safetensors"
    size_bytes, _ = write_tensors(path, tensors)
    assert path.stat().st_size == size_bytes
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_tensor_that_cannot_be_saved_is_named(tmp_path):
    """A tensor without bytes is refused by name, and nothing is left behind."""
    with pytest.raises(ValueError, match=r"'lost' cannot be saved.*meta"):
        save(tmp_path, step=1, trees={"model": {"lost": torch.empty(3, device="meta")}}, values={}, files={}, header={})
    assert names(tmp_path) == []


def test_writing_into_a_loaded_tensor_leaves_the_file(tmp_path):
    """Tensors are mapped from the file, but training in them does not reach it."""
    path = save_sample(tmp_path, 5)
    open_checkpoint(path).tree("model")["embed.weight"].fill_(-1)
    assert number_of(open_checkpoint(path)) == 0


def test_same_step_again_replaces(tmp_path):
    """A second save of a step leaves the second one alone, and a pin stays where it was."""
    pin(save_sample(tmp_path, 7, number=1))
    assert number_of(open_checkpoint(save_sample(tmp_path, 7, number=2))) == 2
    assert names(tmp_path) == ["index.json", "step-00000007"]
    assert [entry.pinned for entry in entries(tmp_path)] == [True]


def test_next_save_clears_what_a_killed_one_left(tmp_path):
    """Half-written and half-deleted directories do not exist for readers and go at the next save."""
    save_sample(tmp_path, 3)
    for left in (".step-00000005.partial", ".step-00000002.deleted", ".step-00000003.replaced"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"half")
    assert [entry.step for entry in entries(tmp_path)] == [3]
    save_sample(tmp_path, 5)
    assert names(tmp_path) == ["index.json", "step-00000003", "step-00000005"]


def test_value_with_nan_is_refused(tmp_path):
    """JSON would turn NaN into null unasked; the place is named instead, and nothing is left behind."""
    with pytest.raises(ValueError, match=r"value 'progress\.best\.1' is nan"):
        save(tmp_path, step=1, trees={}, values={"progress": {"best": [1.0, float("nan")]}}, files={}, header={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../up", "manifest.json", "pinned", ".hidden", "cursor.json"])
def test_file_name_that_could_do_harm_is_refused(tmp_path, name):
    """A file may not leave the directory nor take the name of another file."""
    with pytest.raises(ValueError, match="file name"):
        save(tmp_path, step=1, trees={}, values={"cursor": 1}, files={name: b""}, header={})


def test_metric_that_is_not_a_number_becomes_null(tmp_path):
    """The manifest holds null and names what it was; the hash still fits."""
    path = save_sample(tmp_path, 1, metrics={"a": float("nan"), "b": float("-inf"), "c": 2.5})
    manifest = open_checkpoint(path).manifest
    assert manifest["metrics"] == {"a": None, "b": None, "c": 2.5}
    assert manifest["nonfinite"] == {"a": "nan", "b": "-inf"}


def test_unknown_header_field_is_refused(tmp_path):
    """A misspelt field is a defect of the caller, not a silent extra."""
    with pytest.raises(ValueError, match="unknown header fields \\['tokns'\\]"):
        save_sample(tmp_path, 1, tokns=3)


def test_index_lists_the_entries(tmp_path):
    """``index.json`` is what the manifests say, oldest first, and entries need no index."""
    save_sample(tmp_path, 5, metrics={"loss": 2.0}, seq=10)
    save_sample(tmp_path, 3, seq=20)
    pin(tmp_path / "step-00000005")
    listed = json.loads((tmp_path / "index.json").read_text())["checkpoints"]
    assert [(e["path"], e["step"], e["pinned"]) for e in listed] == [
        ("step-00000005", 5, True),
        ("step-00000003", 3, False),
    ]
    (tmp_path / "index.json").unlink()
    assert [(e.step, e.metrics) for e in entries(tmp_path)] == [(5, {"loss": 2.0}), (3, {})]
    unpin(tmp_path / "step-00000005")
    assert [e.pinned for e in entries(tmp_path)] == [False, False]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": flip,
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}
PARTS = ["model.safetensors", "memory.safetensors", "cursor.json", "progress.json", "config.yaml", "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", PARTS)
def test_damage_is_named_and_passed_over(tmp_path, part, damage):
    """Any damage to any file: opening raises, ``verify`` names it, ``newest`` takes the one before and says so."""
    good, bad = save_sample(tmp_path, 3, number=1), save_sample(tmp_path, 5, number=2)
    DAMAGE[damage](bad / part)
    with pytest.raises(CheckpointCorrupt, match=part):
        open_checkpoint(bad)
    assert len(verify(bad)) == 1
    assert part in verify(bad)[0]
    assert verify(good) == []
    events = []
    found = newest(tmp_path, events.append)
    assert found is not None
    assert number_of(found) == 1
    assert [(e.name, e.severity, e.payload["checkpoint"]) for e in events] == [
        ("checkpoint.skipped", "warning", "step-00000005")
    ]
    assert part in events[0].payload["reason"]


def reseal(path, **changes):
    """Change the manifest as another program would, with a hash that fits."""
    manifest = orjson.loads((path / "manifest.json").read_bytes()) | changes
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = manifests.sha256(canonical(manifest))
    (path / "manifest.json").write_bytes(orjson.dumps(manifest))


@pytest.mark.parametrize("change", [{"schema": "meristem.checkpoint/99"}, {"compat": {"min_reader": 99}}])
def test_newer_schema_is_refused(tmp_path, change):
    """Version 99 is refused with both versions in the message, also where an older one is there to go on from.

    CX-7.7.
    """
    save_sample(tmp_path, 3, number=1)
    bad = save_sample(tmp_path, 5, number=2)
    reseal(bad, **change)
    for read in (lambda: open_checkpoint(bad), lambda: newest(tmp_path, silent)):
        with pytest.raises(CheckpointTooNew, match=r"'manifest\.json' is of version 99; .* reads up to 2. Update"):
            read()


def test_edited_manifest_is_damage(tmp_path):
    """A manifest that is still JSON but says something else than was sealed is not believed."""
    path = save_sample(tmp_path, 3, metrics={"loss": 2.0})
    content = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(content.replace(b'"loss": 2.0', b'"loss": 1.0'))
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json does not match the hash it carries"):
        open_checkpoint(path)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"schema": "meristem.run/1"}', b'{"schema": 3, "compat": 4}'])
def test_manifest_of_another_kind_is_damage(tmp_path, content):
    """JSON that is no checkpoint manifest is damage, not a crash."""
    path = save_sample(tmp_path, 3)
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointCorrupt, match="not a manifest"):
        open_checkpoint(path)


def test_older_manifest_is_migrated_step_by_step(tmp_path, monkeypatch):
    """CX-7.7: Entry n leads from version n to n + 1, in order."""
    path = save_sample(tmp_path, 3, number=4)
    more = (lambda m, _: m | {"trail": [2]}, lambda m, _: m | {"trail": [*m["trail"], 3]})
    monkeypatch.setitem(migrate.SECTIONS, "manifest.json", migrate.SECTIONS["manifest.json"] + more)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.manifest["trail"], checkpoint.manifest["schema"]) == ([2, 3], "meristem.checkpoint/4")
    assert number_of(checkpoint) == 4


def test_version_1_fixture_opens():
    """CX-7.7: A checkpoint written when version 1 was made is still read."""
    checkpoint = open_checkpoint(Path(__file__).parent / "fixtures" / "step-00000007")
    assert number_of(checkpoint) == 11


def test_path_out_of_the_directory_is_damage(tmp_path):
    """A manifest cannot make the loader read elsewhere."""
    path = save_sample(tmp_path / "a", 3)
    (tmp_path / "secret").write_bytes(b"x")
    file = {"path": "../../secret", "size_bytes": 1, "sha256": manifests.sha256(b"x"), "role": "file", "version": 1}
    reseal(path, files=[file])
    with pytest.raises(CheckpointCorrupt, match="not a plain name"):
        open_checkpoint(path)


class Trap:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_is_refused_unopened(tmp_path):
    """A pickle under the name of a tree, with a hash that fits, is refused and never run."""
    path = save_sample(tmp_path, 3)
    content = pickle.dumps(Trap(tmp_path / "sprung"))
    (path / "model.safetensors").write_bytes(content)
    files = orjson.loads((path / "manifest.json").read_bytes())["files"]
    changed = {"size_bytes": len(content), "sha256": manifests.sha256(content)}
    reseal(path, files=[f | changed if f["path"] == "model.safetensors" else f for f in files])
    with pytest.raises(CheckpointCorrupt, match="not a safetensors file"):
        open_checkpoint(path).tree("model")
    assert not (tmp_path / "sprung").exists()


def test_absent_part_says_what_is_there(tmp_path):
    """Asking for a tree that was not saved names those that were."""
    checkpoint = open_checkpoint(save_sample(tmp_path, 3))
    with pytest.raises(CheckpointMismatch, match="no tree 'modle'; it holds memory, model"):
        checkpoint.tree("modle")
    with pytest.raises(CheckpointMismatch, match="no value 'model'; it holds cursor, progress"):
        checkpoint.value("model")


def test_find_takes_any_level(tmp_path):
    """A checkpoint, its checkpoints directory and its run directory all mean the newest."""
    root = tmp_path / "run" / "checkpoints"
    save_sample(root, 3, number=1)
    path = save_sample(root, 5, number=2)
    assert [number_of(find(p, silent)) for p in (path, root, tmp_path / "run", root / "step-00000003")] == [2, 2, 2, 1]


def test_find_says_what_is_missing(tmp_path):
    """Nothing there, nothing inside, and nothing but damage are three findings of one error."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(NoCheckpoint, match="there is no .*/nine. Did you mean .*/mine.? Expected a checkpoint"):
        find(tmp_path / "nine", silent)
    with pytest.raises(NoCheckpoint, match="there is no .*/other/nowhere. Expected a checkpoint"):
        find(tmp_path / "other" / "nowhere", silent)
    with pytest.raises(NoCheckpoint, match="no checkpoint in .*/mine. Expected"):
        find(tmp_path / "mine", silent)
    with pytest.raises(NoCheckpoint, match="no checkpoint directory"):
        find(tmp_path / "step-00000009", silent)
    flip(save_sample(tmp_path / "checkpoints", 3) / "model.safetensors")
    with pytest.raises(NoCheckpoint, match="found 1 damaged"):
        find(tmp_path, silent)


def test_newest_goes_by_the_records_not_the_step(tmp_path):
    """After going back to an earlier step, what is saved then is newer than the steps abandoned."""
    save_sample(tmp_path, 9, number=1, seq=100)
    save_sample(tmp_path, 5, number=2, seq=150)
    assert number_of(newest(tmp_path, silent)) == 2


def test_diff_names_what_changed(tmp_path):
    """Only what differs is listed: fields, files, the size of the change in each tensor, the side that lacks one."""
    a, b = save_sample(tmp_path, 3, number=1), save_sample(tmp_path, 5, number=3)
    found = diff(open_checkpoint(a), open_checkpoint(b))
    assert found["manifest"] == {"step": [3, 5]}
    assert found["files"] == ["config.yaml", "cursor.json", "model.safetensors", "progress.json"]
    assert found["tensors"]["model/embed.weight"] == 2.0
    assert set(found["tensors"]) == {f"model/{name}" for name in ("embed.weight", "scale", "half", "mask", "steps")}
    tree = model_tree(1)
    tree["new"] = tree.pop("scale")
    tree["embed.weight"] = tree["embed.weight"][:4]
    c = save(tmp_path, step=6, trees={"model": tree}, values={}, files={}, header={})
    found = diff(open_checkpoint(a), open_checkpoint(c))
    assert found["tensors"] == {
        "model/embed.weight": ["torch.float32 [5, 3]", "torch.float32 [4, 3]"],
        "model/new": [None, "torch.float64 []"],
        "model/scale": ["torch.float64 []", None],
    }
    assert "cursor.json" in found["files"]


def test_nothing_there_is_said(tmp_path):
    """Every question about a directory that is not there has the same answer."""
    for ask in (open_checkpoint, verify, pin, unpin):
        with pytest.raises(NoCheckpoint, match="no checkpoint directory"):
            ask(tmp_path / "step-00000009")


def test_library_file_is_accepted_as_tree(tmp_path):
    """Bytes of our writer and of the library's differ at most in the header; both are read alike."""
    save_file({"a": torch.arange(7.0)}, tmp_path / "theirs.safetensors")
    write_tensors(tmp_path / "ours.safetensors", {"a": torch.arange(7.0)})
    assert torch.equal(load_file(tmp_path / "theirs.safetensors")["a"], load_file(tmp_path / "ours.safetensors")["a"])
