"""Reading files that others own: open, look and read are separate steps, each with its own error."""

import contextlib
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from meristem.data.config import DataConfig
from meristem.errors import DataError, FileChanged

PIECE_BYTES: Final = 1 << 24
"""How much of a text is in memory at once."""

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def refused(step: str, path: Path | str, cause: OSError | ValueError) -> DataError:
    """The error for a step that the system refused: what, where, why."""
    number = cause.errno if isinstance(cause, OSError) else None
    reason = f"{cause.strerror or cause} (errno {number})" if isinstance(cause, OSError) else f"{cause}"
    return DataError(
        f"cannot {step} {path}: {reason}. Check that it exists and that you may read it.",
        path=str(path),
        errno=number,
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """The descriptor and status of a regular file; anything else is refused, and nothing stays open."""
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as cause:
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


def pieces(path: Path) -> Iterator[tuple[bytes, bool]]:
    """The content of a regular file in pieces that fit into memory, and of each whether there is another one.

    A piece ends before a whole UTF-8 character, and never between a carriage return and its line feed. Raises
    FileChanged where the file was written to meanwhile.
    """
    with opened(path) as (descriptor, status), open(descriptor, "rb", buffering=0, closefd=False) as file:

        def read() -> bytes:
            try:
                return bytes(file.read(min(PIECE_BYTES, status.st_size + 1)))
            except OSError as cause:
                raise refused("read", path, cause) from cause

        text = read()
        while more := read():
            end = _last_character(text)
            yield text[:end], True
            text = text[end:] + more
        now = stamp(os.fstat(descriptor))
        if now != stamp(status):
            raise FileChanged(
                f"{path} changed while it was read: size, time and inode were {stamp(status)}, now {now}. Prepare the "
                f"text again when nothing writes to it.",
                path=str(path),
                found=now,
                expected=stamp(status),
            )
        yield text, False


def _last_character(text: bytes) -> int:
    """Where the last UTF-8 character begins, which may not be whole, or the line end; in other bytes, the last byte."""
    if text.endswith(b"\r\n"):
        return len(text) - 2
    for end in range(len(text) - 1, max(len(text) - 5, -1), -1):
        if text[end] & 0xC0 != 0x80:
            return end
    return len(text) - 1


class Numbers:
    """Whole numbers in a file, each read on access.

    They are not mapped. Where a mapped file is cut, whoever touches what is gone is killed by a signal that Python
    cannot catch, and no check before can rule that out; a read just comes back short, which is FileChanged.
    """

    def __init__(self, path: Path, descriptor: int, status: os.stat_result, dtype: str) -> None:
        """descriptor: of the open file, read only; it is closed with the last reference to this."""
        self._path, self._descriptor, self._stamp = path, descriptor, stamp(status)
        self.dtype = np.dtype(dtype)
        self._length = status.st_size // self.dtype.itemsize
        weakref.finalize(self, os.close, descriptor)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """The numbers of a slice without a step."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"numbers of a file are read one after the other, and not every {step}-th")
        found = np.empty(max(0, stop - start), self.dtype)
        self._read(found, start)
        return found

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The ``length`` numbers from each start on, a row for each; 0 where the file holds no more."""
        found = np.zeros((len(starts), length), self.dtype)
        for row, start in zip(found, starts.tolist(), strict=True):
            self._read(row[: max(0, len(self) - start)], start)
        return found

    def require_unchanged(self) -> None:
        """Refuse to read on when the file was replaced, cut or written to since it was opened."""
        try:
            found = stamp(os.stat(self._path))
        except OSError as cause:
            raise refused("read", self._path, cause) from cause
        if found != self._stamp:
            raise self._changed(found)

    def _read(self, target: np.ndarray, start: int) -> None:
        """Fill ``target``, which lies in one piece, with the numbers from ``start`` on."""
        left, at = target.data.cast("B"), start * self.dtype.itemsize
        while left:
            try:
                n_read = os.preadv(self._descriptor, [left], at)
            except OSError as cause:
                raise refused("read", self._path, cause) from cause
            if not n_read:
                raise self._changed(stamp(os.fstat(self._descriptor)))
            left, at = left[n_read:], at + n_read

    def _changed(self, found: tuple[int, int, int]) -> FileChanged:
        return FileChanged(
            f"{self._path} changed while it was in use: size, time and inode were {self._stamp}, now {found}. "
            f"Prepare the text again and resume the run.",
            path=str(self._path),
            found=found,
            expected=self._stamp,
        )


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """What changes with a file: its size, its time, and which file it is."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def open_numbers(path: Path, dtype: str) -> Numbers:
    """The numbers in a file that holds nothing else."""
    with opened(path) as (descriptor, status):
        width = np.dtype(dtype).itemsize
        if status.st_size == 0 or status.st_size % width:
            raise DataError(
                f"{path} holds {status.st_size} bytes; expected a positive multiple of {width}.",
                path=str(path),
                found=status.st_size,
            )
        return Numbers(path, os.dup(descriptor), status, dtype)


def store(data: DataConfig, kind: str) -> Path:
    """The directory for ``kind`` (corpora, downloads) below ``data.root``, made when it is not there."""
    root = os.path.expanduser(data.root or os.environ.get("MERISTEM_CACHE") or "~/.cache/meristem")
    if root.startswith("~"):
        raise DataError(f"no home directory is known for {root}. Set data.root or $MERISTEM_CACHE.", path=root)
    path = Path(root, kind)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as cause:
        reason = f"{cause.strerror} (errno {cause.errno})" if isinstance(cause, OSError) else f"{cause}"
        raise DataError(
            f"cannot make {path}: {reason}. Set data.root or $MERISTEM_CACHE to a directory that you may write to.",
            path=str(path),
        ) from cause
    return path
