"""Reading files that others own: open, look and read are separate steps, each with its own error."""

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from meristem.data.part import DataPart
from meristem.errors import DataError

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def refused(step: str, path: Path | str, cause: OSError) -> DataError:
    """The error for a step that the system refused: what, where, why."""
    return DataError(
        f"cannot {step} {path}: {cause.strerror or cause} (errno {cause.errno}). "
        f"Check that it exists and that you may read it.",
        path=str(path),
        errno=cause.errno,
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """The descriptor and status of a regular file; anything else is refused, and nothing stays open."""
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as cause:
        raise refused("open", path, cause) from cause
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
            raise DataError(f"{path} is {kind}; expected a regular file.", path=str(path), found=kind)
        yield descriptor, status
    finally:
        os.close(descriptor)


def read(path: Path) -> bytes:
    """The whole content of a regular file."""
    with opened(path) as (descriptor, _), open(descriptor, "rb", closefd=False) as file:
        try:
            return file.read()
        except OSError as cause:
            raise refused("read", path, cause) from cause


def map_array(path: Path, dtype: str) -> tuple[np.ndarray, os.stat_result]:
    """A read-only array over the bytes of a file, and the status the file had when it was mapped."""
    with opened(path) as (descriptor, status):
        width = np.dtype(dtype).itemsize
        if status.st_size == 0 or status.st_size % width:
            raise DataError(
                f"{path} holds {status.st_size} bytes; expected a positive multiple of {width}.",
                path=str(path),
                found=status.st_size,
            )
        try:
            mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as cause:
            raise refused("map", path, cause) from cause
    return np.frombuffer(mapped, dtype=dtype), status


def store(data: DataPart, kind: str) -> Path:
    """The directory for ``kind`` (corpora, downloads) below ``data.root``, made when it is not there."""
    root = os.path.expanduser(data.root or os.environ.get("MERISTEM_CACHE") or "~/.cache/meristem")
    if root.startswith("~"):
        raise DataError(f"no home directory is known for {root}. Set data.root or $MERISTEM_CACHE.", path=root)
    path = Path(root, kind)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise DataError(
            f"cannot make {path}: {cause.strerror} (errno {cause.errno}). "
            f"Set data.root or $MERISTEM_CACHE to a directory that you may write to.",
            path=str(path),
            errno=cause.errno,
        ) from cause
    return path
