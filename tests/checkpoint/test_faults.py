"""Whatever fails, or whenever the process dies, the old checkpoint or the new one can be loaded."""

import errno
import os
import shutil
import subprocess

import orjson
import pytest

from meristem.checkpoint.prune import prune
from meristem.checkpoint.store import entries, newest, open_checkpoint, pin, verify
from meristem.errors import DiskFull
from meristem.events import silent

from .sample import number_of, save_sample

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Nothing here takes the power away, so waiting for the disk would only take time; the call itself stays."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Dead(BaseException):
    """The process is gone: nothing that comes after may reach the disk."""


class Faults:
    """Wraps the system calls of ``os``: counts them, and breaks the one of a given number."""

    def __init__(self, monkeypatch, at, *, error=None):
        self.count, self.at, self.error, self.broke = 0, at, error, ""
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name, call):
        def wrapper(*args, **kwargs):
            self.count += 1
            if self.error is not None and self.count == self.at:
                self.broke = name
                raise OSError(self.error, os.strerror(self.error))
            if self.error is None and self.count == self.at:
                self.broke = name
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
            if self.error is None and self.count >= self.at:
                raise Dead
            return call(*args, **kwargs)

        return wrapper


def count_calls(action):
    """How many system calls ``action`` makes."""
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, at=10**9)
        action()
    return faults.count


def break_each(tmp_path, before, action, error):
    """Run ``action`` in a fresh copy of ``before`` once for each of its system calls, with that call broken."""
    shutil.copytree(before, tmp_path / "count")
    n_calls = count_calls(lambda: action(tmp_path / "count"))
    assert n_calls > 5
    for at in range(1, n_calls + 1):
        root = tmp_path / f"at-{at}"
        shutil.copytree(before, root)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, at, error=error)
            try:
                action(root)
                failed = False
            except (OSError, DiskFull, Dead):
                failed = True
        yield root, f"call {at} ({faults.broke}), failed={failed}", failed


@pytest.mark.parametrize("error", [None, errno.EIO, errno.ENOSPC], ids=["death", "EIO", "ENOSPC"])
@pytest.mark.parametrize("step", [3, 5], ids=["same-step", "next-step"])
def test_fault_while_saving(tmp_path, step, error):
    """With any one system call broken, or the process dead from there on, old or new is whole; the next save heals.

    CX-7.1, A8.3.
    """
    before = tmp_path / "before"
    save_sample(before, 3, number=1)
    for root, where, failed in break_each(tmp_path, before, lambda root: save_sample(root, step, number=2), error):
        found = newest(root, silent)
        assert found is not None, where
        assert number_of(found) in ((1, 2) if failed else (2,)), where
        assert all(verify(entry.path) == [] for entry in entries(root)), where
        if error is not None:
            assert not list(root.glob(".step-*.partial")), where
        save_sample(root, 7, number=3)
        assert number_of(newest(root, silent)) == 3, where
        assert not [path for path in root.iterdir() if path.name.startswith(".")], where
        assert not failed or {e.step for e in entries(root)} >= {3, 7}, where


@pytest.mark.parametrize("error", [None, errno.EIO], ids=["death", "EIO"])
def test_fault_while_pruning(tmp_path, error):
    """A broken deletion never touches what stays, and never leaves half a checkpoint visible."""
    before = tmp_path / "before"
    for step in (3, 5, 7):
        save_sample(before, step, number=step)

    def action(root):
        prune(root, last=1, best=0, metric="loss", direction="min", every=0)

    for root, where, _failed in break_each(tmp_path, before, action, error):
        assert number_of(newest(root, silent)) == 7, where
        assert all(verify(entry.path) == [] for entry in entries(root)), where
        assert not [path for path in root.iterdir() if path.name.startswith("step-") and verify(path)], where


def test_disk_holds_everything_before_it_gets_its_name(tmp_path, monkeypatch):
    """At the rename every file and the directory were synced; the rename itself is synced before the index changes."""
    trail, paths = [], {}
    open_, rename, replace = os.open, os.rename, os.replace

    def opened(path, *args, **kwargs):
        descriptor = open_(path, *args, **kwargs)
        paths[descriptor] = os.fspath(path)
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda descriptor: trail.append(("sync", os.path.basename(paths[descriptor]))))
    monkeypatch.setattr(os, "rename", lambda a, b: (trail.append(("rename", b.name)), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (trail.append(("rename", b.name)), replace(a, b)))
    final = save_sample(tmp_path / "root", 3)
    before, after = trail[: (at := trail.index(("rename", final.name)))], trail[at + 1 :]
    assert before[-2:] == [("sync", "manifest.json"), ("sync", f".{final.name}.partial")]
    assert {("sync", path.name) for path in final.iterdir()} <= set(before)
    assert after == [("sync", "root"), ("sync", ".index.json.partial"), ("rename", "index.json"), ("sync", "root")]


FILES = ("model.safetensors", "memory.safetensors", "cursor.json", "progress.json", "config.yaml", "tokenizer.json")


def test_damage_is_tried_on_every_file(tmp_path):
    """The list below is that of the files that a checkpoint has."""
    assert sorted(path.name for path in save_sample(tmp_path, 3).iterdir()) == sorted((*FILES, "manifest.json"))


@pytest.mark.parametrize("part", (*FILES, "manifest.json"))
def test_a_changed_byte_is_found(tmp_path, part):
    """A byte anywhere in any file of the newest checkpoint: ``verify`` names the file, the one before is used."""
    save_sample(tmp_path, 3, number=1)
    path = save_sample(tmp_path, 5, number=2)
    content = (path / part).read_bytes()
    for place in range(0, len(content), 1 + len(content) // 700):
        (path / part).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        (found,) = verify(path)
        assert part in found, place
        assert place % 9 or newest(tmp_path, silent).step == 3, place
    (path / part).write_bytes(content)
    assert verify(path) == [] and number_of(newest(tmp_path, silent)) == 2


@pytest.mark.parametrize("part", (*FILES, "manifest.json"))
def test_a_torn_file_is_found(tmp_path, part):
    """At every length, or one in a few, but its own; too long, and padded to its own with zeros, too."""
    save_sample(tmp_path, 3, number=1)
    path = save_sample(tmp_path, 5, number=2)
    content = (path / part).read_bytes()
    torn = [content[:length] for length in range(0, len(content), 1 + len(content) // 700)]
    padded = [start.ljust(len(content), b"\0") for start in torn[::17]]
    for spoilt in [*torn, *(start for start in padded if start != content), content + b"\0", content * 2]:
        (path / part).write_bytes(spoilt)
        (found,) = verify(path)
        assert part in found, spoilt
        assert len(spoilt) % 9 or newest(tmp_path, silent).step == 3, spoilt
    (path / part).write_bytes(content)
    assert verify(path) == [] and number_of(newest(tmp_path, silent)) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 99])
def test_files_beside_the_checkpoints_may_be_torn(tmp_path, content):
    """The index is made again from the manifests, and what a pin says is not in it: a damaged one loses nothing."""
    pin(save_sample(tmp_path, 3, number=1))
    (tmp_path / "index.json").write_bytes(content)
    (tmp_path / "step-00000003" / "pinned").write_bytes(content)
    assert number_of(newest(tmp_path, silent)) == 1 and verify(tmp_path / "step-00000003") == []
    save_sample(tmp_path, 5, number=2)
    listed = orjson.loads((tmp_path / "index.json").read_bytes())["checkpoints"]
    assert [(entry["step"], entry["pinned"]) for entry in listed] == [(3, True), (5, False)]


def test_full_disk(tmp_path):
    """On a disk that is really full the save is ``DiskFull``, leaves nothing, and the old checkpoint loads."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        root = disk / "checkpoints"
        save_sample(root, 3, number=1)
        (disk / "ballast").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 4096))
        with pytest.raises(DiskFull, match=r"no space is left to write .*step-00000005.*Free space"):
            save_sample(root, 5, number=2)
        assert sorted(path.name for path in root.iterdir()) == ["index.json", "step-00000003"]
        assert number_of(open_checkpoint(root / "step-00000003")) == 1
        (disk / "ballast").unlink()
        assert number_of(open_checkpoint(save_sample(root, 5, number=2))) == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)
