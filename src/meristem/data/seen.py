"""What is known of a text that was read before, so that it is read again only when one of its files changed.

As ``make`` does, a file is taken as unchanged while its size, its time of change and its number are what they were.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from meristem import config
from meristem.checkpoint.atomic import sha256, write_atomic
from meristem.data.files import stamp
from meristem.errors import DiskFull


@dataclass(frozen=True)
class Found:
    """What a reading found besides the text. first_binary: the name of the first of ``n_binary`` files."""

    n_copies: int
    n_binary: int
    first_binary: str | None


@dataclass(frozen=True)
class Seen:
    """A reading: stamps of the text's files in one hash, what was found, and the corpus with stamps of its files."""

    text: str
    found: Found
    corpus: str
    files: Mapping[str, tuple[int, ...]]


def place_of(corpora: Path, settings: Mapping[str, Any], paths: Iterable[Path]) -> Path:
    """Where a reading with these settings is kept: one file for each directory that holds some of the text."""
    directories = sorted({os.path.dirname(os.path.abspath(path)) for path in paths})
    digest = sha256(b"\0".join([config.canonical(settings), *map(os.fsencode, directories)]))
    return corpora / f".{digest[:32]}.seen"


def stamps(paths: Iterable[Path]) -> str | None:
    """One hash of where the files are, their sizes, times of change and numbers; None when one of them is not there."""
    try:
        return sha256(b"\0".join(b"%b\0%d\0%d\0%d" % (os.fsencode(path), *stamp(os.stat(path))) for path in paths))
    except OSError:
        return None


def stamps_of(corpus: Path, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The stamp of each file of a corpus."""
    return {name: stamp(os.stat(corpus / name)) for name in names}


def recall(place: Path) -> Seen | None:
    """The reading kept at ``place``; None where there is none that can be understood, which costs one more reading."""
    try:
        said = orjson.loads(place.read_bytes())
        files = {name: tuple(numbers) for name, numbers in said["files"].items()}
        return Seen(said["text"], Found(**said["found"]), said["corpus"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(place: Path, seen: Seen) -> None:
    """Keep a reading, where the store can be written to; where not, the text is read again every time."""
    with suppress(OSError, DiskFull):
        write_atomic(place, orjson.dumps(asdict(seen)))
