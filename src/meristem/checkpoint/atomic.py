"""Files that are either whole or absent: atomic writes and hashes.

Every system call goes through ``os``, so that a test can make any one of them fail.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from meristem.errors import DiskFull, RunError

PARTIAL = ".partial"
"""Ending of names that are still being written; readers pass over them."""

_PORTION_BYTES = 1 << 24

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, the user has used up what is theirs, or a file may not grow beyond a limit (``ulimit -f``)."""


@contextlib.contextmanager
def disk_full(path: Path) -> Iterator[None]:
    """Turn ``NO_SPACE`` inside the block into ``DiskFull`` naming ``path``."""
    try:
        yield
    except OSError as cause:
        if cause.errno in NO_SPACE:
            raise DiskFull(
                f"no space is left to write {path}: {cause.strerror}. What was saved before is untouched. "
                f"Free space there, or point the run at another disk with --run-dir.",
                path=str(path),
            ) from cause
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``: a reader, or a crash, meets the old file or the new one and nothing between."""
    with replacing(path) as descriptor:
        write_all(descriptor, content)


def require_replaceable(path: Path) -> None:
    """Refuse, as a RunError, a path at which ``write_atomic`` could put nothing. It is left as it is."""
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial, descriptor = _partial(path)
        os.unlink(partial)
        os.close(descriptor)
    except OSError as cause:
        raise RunError(f"{path} cannot be written: {cause.strerror}. Choose another path.", path=str(path)) from cause


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor of a new file, which takes the place of ``path`` when the block ends and is deleted when it fails.

    There may be many writers at once, threads or processes: each has a temporary name of its own, and the last to end
    wins. The name is locked while it is used. The system frees the lock of a writer that dies, and the next writer
    takes over what that one left.
    """
    with disk_full(path):
        partial, descriptor = _partial(path)
        try:
            try:
                yield descriptor
                os.fsync(descriptor)
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
                raise
            sync_directory(path.parent)
        finally:
            os.close(descriptor)


def _partial(path: Path) -> tuple[Path, int]:
    """The first temporary name for ``path`` that no living writer uses, and the locked, empty file of that name."""
    for number in itertools.count():
        partial = path.with_name(f".{path.name}{f'.{number}' if number else ''}{PARTIAL}")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except PermissionError:
            if os.path.lexists(partial):  # what another user left
                continue
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock before may have given the file its final name since it was opened here.
            if os.path.samestat(os.fstat(descriptor), os.stat(partial)):
                os.ftruncate(descriptor, 0)
                return partial, descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise AssertionError("numbers do not end")


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk holds it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write every byte; the system may take them in several portions."""
    left = memoryview(content).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


def sync_directory(path: Path) -> None:
    """Wait until the disk holds the names in this directory: a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_in(directory: int, name: str) -> int:
    """A descriptor to read the file ``name`` in the open directory ``directory``."""
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait forever.
    return os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory)


def read_in(directory: int, name: str) -> bytes:
    """What the file ``name`` in the open directory ``directory`` holds."""
    descriptor = open_in(directory, name)
    try:
        return read_all(descriptor)
    finally:
        os.close(descriptor)


def read_all(descriptor: int) -> bytes:
    """What an open file holds, from its beginning, wherever others have read to."""
    portions, at = [], 0
    while portion := os.pread(descriptor, _PORTION_BYTES, at):
        portions.append(portion)
        at += len(portion)
    return b"".join(portions)


def sha256(content: bytes) -> str:
    """The lower-case hex SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(file_or_path: Path | int) -> str:
    """The lower-case hex SHA-256 of a file, or of an open one that was not read yet, read in portions."""
    with open(file_or_path, "rb", closefd=not isinstance(file_or_path, int)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
