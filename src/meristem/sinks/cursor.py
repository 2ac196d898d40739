"""Records of a run that may still write them, a bounded portion at a time; each begins where the last one ended."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from meristem.errors import BadRecords
from meristem.sinks.jsonl import parsed, rotated


@dataclass(frozen=True)
class Cursor:
    """Where reading goes on. file: how many files were set aside before that one. offset: of its bytes."""

    file: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Portion:
    """What was read. after: where the next portion begins.

    is_end: nothing was left behind it but, perhaps, a line that is half written. n_unreadable: lines that hold no
    record and were passed over.
    """

    records: tuple[dict[str, Any], ...]
    after: Cursor
    is_end: bool
    n_unreadable: int = 0


def read_portion(path: Path, cursor: Cursor, most_bytes: int) -> Portion | None:
    """The next whole records of ``path``, those set aside from it first. A last line that is half written waits.

    most_bytes: how much is read, but for the rest of the last line. None where the files end before the cursor, so
    that they are others than those that it was made for. Raises BadRecords where one that was set aside is missing.
    """
    records: list[dict[str, Any]] = []
    n_unreadable = 0
    while True:
        opened = _opened(path, cursor.file)
        if opened is None:
            is_other = cursor.offset > 0 or cursor.file > len(rotated(path))
            return None if is_other else Portion(tuple(records), cursor, True, n_unreadable)
        file, is_aside = opened
        with file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes < cursor.offset:
                return None
            file.seek(cursor.offset)
            text = file.read(min(most_bytes, size_bytes - cursor.offset))
            if not text.endswith(b"\n"):
                text += file.readline()
        has_read_all = cursor.offset + len(text) >= size_bytes
        # Nothing is added to a file that was set aside: what its last line lacks will not come.
        end = len(text) if is_aside and has_read_all else text.rfind(b"\n") + 1
        lines = text[:end].splitlines(keepends=True)
        found = [record for line in lines if (record := parsed(line)) is not None]
        records += found
        n_unreadable += len(lines) - len(found)
        most_bytes -= len(text)
        cursor = Cursor(cursor.file, cursor.offset + end)
        if not (is_aside and has_read_all):
            return Portion(tuple(records), cursor, has_read_all, n_unreadable)
        cursor = Cursor(cursor.file + 1)
        if most_bytes <= 0:
            return Portion(tuple(records), cursor, False, n_unreadable)


def _opened(path: Path, index: int) -> tuple[BinaryIO, bool] | None:
    """The file before which ``index`` others were set aside, and whether it is set aside; None where it is not there.

    A run may set the file aside at any moment, and has for a moment none of its name then.
    """
    aside = path.with_suffix(f".{index + 1:04d}{path.suffix}")
    for _ in range(3):
        file = _open(aside)
        if file is not None:
            return file, True
        file = _open(path)
        n_aside = len(rotated(path))
        if n_aside == index and file is not None:
            return file, False
        if file is not None:
            file.close()
        if n_aside <= index:
            return None
        # Set aside since; it has its number now.
    raise BadRecords(
        f"{aside} is missing, though later records were set aside after it. Put that file in its place.",
        path=str(aside),
    )


def _open(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None
