"""What archives hold, read as streams within bounds: zip, tar, gz, bz2 and xz, told by their bytes and not by names.

Nothing is written to the disk, and nothing is unpacked beyond a bound: not in depth, not in bytes of one member, not in
bytes, members or ratio of a whole file. Each archive is read once, from its beginning to its end.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import IO, Final, cast

from meristem.safety.secrets import Readable

HEAD_BYTES: Final = 512

_MAGIC: Final = (
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"\x1f\x8b", "gz"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "rar"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
_TAIL_BYTES: Final = 1 << 17
_DIRECTORY_BYTES: Final = 32 << 20

_FILTERS: Final[dict[str, Callable[[IO[bytes]], Readable]]] = {
    "gz": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}
_UNREADABLE: Final = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    MemoryError,
    OverflowError,
    KeyError,
    IndexError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
)
"""What the readers of broken and of encrypted archives raise."""


@dataclass(frozen=True)
class Limits:
    """How much of one file is unpacked. n_deep: archives in archives; a compressed tar is one.

    ratio: bytes unpacked for each byte of the file, once ``free_bytes`` have been.
    """

    n_deep: int = 3
    member_bytes: int = 64 << 20
    total_bytes: int = 1 << 30
    n_members: int = 100_000
    ratio: int = 200
    free_bytes: int = 1 << 20


class BoundReached(Exception):
    """A bound ends the reading of a whole file; the message says which."""


class _MemberBoundReached(Exception):
    """A bound ends the reading of one member."""


@dataclass
class _Budget:
    """What may still be unpacked of one file."""

    limits: Limits
    file_bytes: int
    n_bytes: int = 0
    n_members: int = 0

    def add_bytes(self, n: int) -> None:
        self.n_bytes += n
        if self.n_bytes > self.limits.total_bytes:
            raise BoundReached(f"it unpacks to more than {self.limits.total_bytes} bytes")
        if self.n_bytes > max(self.limits.free_bytes, self.limits.ratio * self.file_bytes):
            raise BoundReached(f"it unpacks to more than {self.limits.ratio} times its size, as a zip bomb does")

    def add_member(self) -> None:
        self.n_members += 1
        if self.n_members > self.limits.n_members:
            raise BoundReached(f"it holds more than {self.limits.n_members} members")


class _Bounded(io.RawIOBase):
    """Bytes that come out of an archive. budget: what they are counted in. most_bytes: of this stream."""

    def __init__(self, inner: Readable, budget: _Budget | None, most_bytes: int) -> None:
        self._inner, self._budget, self._most_bytes, self._n_bytes = inner, budget, most_bytes, 0
        self._begun = b""
        self.head = self._begun = self.read(HEAD_BYTES)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        """As many bytes as there are, up to ``size``; all for -1."""
        size = self._most_bytes + 1 if size < 0 else size
        parts, self._begun = [self._begun[:size]], self._begun[size:]
        n_wanted = size - len(parts[0])
        while n_wanted and (part := self._inner.read(min(n_wanted, 1 << 20))):
            self._count(len(part))
            parts.append(part)
            n_wanted -= len(part)
        return b"".join(parts)

    def _count(self, n: int) -> None:
        self._n_bytes += n
        if self._n_bytes > self._most_bytes:
            raise _MemberBoundReached(_longer(self._most_bytes))
        if self._budget is not None:
            self._budget.add_bytes(n)


Read = Callable[[str, Readable], None]
Refuse = Callable[[str, str], None]


class Unpacking:
    """One file and all that is in it.

    read: called with the name of each member, and what gives its bytes; the name is "" for the file itself.
    refuse: called with the name of what cannot be read to its end, and why.
    """

    def __init__(self, limits: Limits, read: Read, refuse: Refuse) -> None:
        self._limits, self._read, self._refuse = limits, read, refuse

    def file(self, file: IO[bytes], size_bytes: int) -> int:
        """Read a file that can be read twice; gives the members that it held."""
        budget = _Budget(self._limits, size_bytes)
        head = file.read(HEAD_BYTES)
        file.seek(0)
        try:
            self._stream(file, kind_of(head), "", 0, budget)
        except BoundReached as reached:
            self._refuse("", str(reached))
        return budget.n_members

    def _stream(self, file: IO[bytes], kind: str, name: str, n_deep: int, budget: _Budget) -> None:
        """Read a stream, as its kind says; what keeps it from being read is said of it."""
        try:
            if not kind:
                self._read(name, file)
            elif n_deep >= self._limits.n_deep:
                self._refuse(name, f"it is an archive in more than {self._limits.n_deep} others")
            elif kind == "zip":
                self._zip(file, name, n_deep, budget)
            elif kind == "tar":
                self._tar(file, name, n_deep, budget)
            elif kind in _FILTERS:
                self._filter(file, kind, name, n_deep, budget)
            else:
                self._refuse(name, f"archives of the kind {kind} are not read")
        except _MemberBoundReached as reached:
            self._refuse(name, str(reached))
        except _UNREADABLE as cause:
            # The words of a reader may quote what it read.
            self._refuse(name, f"it cannot be read as {kind or 'a file'}: {type(cause).__name__}")

    def _filter(self, file: IO[bytes], kind: str, name: str, n_deep: int, budget: _Budget) -> None:
        inner = _Bounded(_FILTERS[kind](file), budget, self._limits.total_bytes)
        found = kind_of(inner.head)
        self._stream(self._prepared(inner, found), found, name, n_deep + (found != "tar"), budget)

    def _zip(self, file: IO[bytes], name: str, n_deep: int, budget: _Budget) -> None:
        _require_short_directory(file)
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                budget.add_member()
                if not member.is_dir():
                    self._member(partial(archive.open, member), f"{name}!{member.filename}", n_deep, budget, budget)

    def _tar(self, file: IO[bytes], name: str, n_deep: int, budget: _Budget) -> None:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                budget.add_member()
                # What a tar holds is as long as the tar, but for the holes of sparse files.
                own = budget if member.issparse() else None
                if member.isfile():
                    self._member(partial(archive.extractfile, member), f"{name}!{member.name}", n_deep, budget, own)

    def _member(
        self,
        opened: Callable[[], IO[bytes] | None],
        name: str,
        n_deep: int,
        budget: _Budget,
        own: _Budget | None,
    ) -> None:
        """Read one member: as it is, or as the archive that it is. own: what its bytes are counted in."""
        name = name.removeprefix("!")
        try:
            with contextlib.closing(opened() or io.BytesIO()) as inner:
                stream = _Bounded(inner, own, self._limits.member_bytes)
                kind = kind_of(stream.head)
                self._stream(self._prepared(stream, kind), kind, name, n_deep + 1, budget)
        except _MemberBoundReached as reached:
            self._refuse(name, str(reached))
        except _UNREADABLE as cause:
            self._refuse(name, f"it cannot be unpacked: {type(cause).__name__}")

    def _prepared(self, stream: "_Bounded", kind: str) -> IO[bytes]:
        """The stream itself; all of it in memory for a zip, whose list of members is at its end."""
        if kind != "zip":
            return cast("IO[bytes]", stream)
        whole = stream.read(self._limits.member_bytes + 1)
        if len(whole) > self._limits.member_bytes:
            raise _MemberBoundReached(_longer(self._limits.member_bytes))
        return io.BytesIO(whole)


def kind_of(head: bytes) -> str:
    """The kind of archive that begins with ``head``, of ``HEAD_BYTES``; "" for none."""
    if head[257:262] == b"ustar":
        return "tar"
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")


def _longer(most_bytes: int) -> str:
    return f"it is longer than {most_bytes} bytes"


def _require_short_directory(file: IO[bytes]) -> None:
    """Raise BoundReached for a zip whose list of members would be long to read, before it is."""
    file.seek(0, io.SEEK_END)
    file.seek(max(file.tell() - _TAIL_BYTES, 0))
    tail = file.read()
    end, end64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    size_bytes = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if size_bytes == 0xFFFFFFFF and end64 >= 0:
        size_bytes = int.from_bytes(tail[end64 + 40 : end64 + 48], "little")
    if size_bytes > _DIRECTORY_BYTES:
        raise BoundReached(f"its list of members takes {size_bytes} bytes")
