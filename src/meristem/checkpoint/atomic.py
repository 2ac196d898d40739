"""Files that are either whole or absent: atomic writes and hashes.

Every system call goes through ``os``, so that a test can make any one of them fail.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from meristem.errors import DiskFull

PARTIAL = ".partial"
"""Ending of names that are still being written; readers pass over them."""

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
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with disk_full(path):
            write_synced(partial, content)
            os.replace(partial, path)
            sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


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


def sha256(content: bytes) -> str:
    """The lower-case hex SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """The lower-case hex SHA-256 of a file, read in portions."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
