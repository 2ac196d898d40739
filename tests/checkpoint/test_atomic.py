"""A file written atomically is the old one or the new one, whatever fails."""

import errno
import hashlib
import os

import pytest

from meristem.checkpoint.atomic import sha256, sha256_file, write_atomic
from meristem.errors import DiskFull


def test_written_bytes_come_back(tmp_path):
    """What was written is what is read, twice over the same name, and no other name is left."""
    path = tmp_path / "run.json"
    for content in (b"", b"first", b"x" * 1_000_003):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_fault_leaves_the_old_file(tmp_path, monkeypatch, call):
    """A failing system call before the rename leaves the old content and nothing else."""
    path = tmp_path / "run.json"
    write_atomic(path, b"old")

    def fail(*_args, **_kwargs):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="broken"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"run.json": b"old"}


def test_short_writes_are_continued(tmp_path, monkeypatch):
    """A system that takes five bytes at a time still gets the whole file."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:5]))
    write_atomic(tmp_path / "a", bytes(range(97)))
    assert (tmp_path / "a").read_bytes() == bytes(range(97))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_is_disk_full(tmp_path, monkeypatch, number):
    """No space and no quota are ``DiskFull``, which names the file and what to do."""

    def fail(*_args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(DiskFull, match=r"write .*a\.json.*--run-dir"):
        write_atomic(tmp_path / "a.json", b"new")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_hash_of_file_is_hash_of_bytes(tmp_path):
    """Both hashes are plain SHA-256."""
    content = bytes(range(251)) * 4099
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == sha256(content) == hashlib.sha256(content).hexdigest()
