"""Sets of the library ``datasets`` as texts: read once from beginning to end, written down, and read from there.

What is written down is one record of JSON a row, beside it a file that says what it is and the hash of its bytes. So a
run depends neither on a network nor on the library, whose shuffled streams do not go on exactly where they were left.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self

import filelock
import orjson

from meristem import config
from meristem.checkpoint.atomic import replacing, sha256, sha256_file, write_atomic
from meristem.data import seen
from meristem.data.config import DataConfig
from meristem.data.download import Progress
from meristem.data.files import opened, read, store
from meristem.errors import DataError, FileChanged
from meristem.events import Emit, Event, silent
from meristem.extras import imported, needed

PREFIX: Final = "hf:"

_NAME: Final = re.compile(r"(?P<place>[^@#:]+)(?:@(?P<commit>[0-9a-f]{40}))?(?:#(?P<subset>[^:]+))?(?::(?P<split>.+))?")
_EVERY: Final = 1000


@dataclass(frozen=True)
class Set:
    """A part of a set: ``hf:PLACE[@COMMIT][#SUBSET][:SPLIT]``.

    place: a name of the hub, or a directory, as ``save_to_disk`` writes one or with files that ``load_dataset`` reads.
    """

    place: str
    commit: str | None
    subset: str | None
    split: str

    @classmethod
    def named(cls, name: str) -> Self:
        """Of a ``data.source``. Raises DataError for what names none."""
        given = name.removeprefix(PREFIX)
        if os.path.isdir(os.path.expanduser(given)):
            return cls(given, None, None, "train")
        found = _NAME.fullmatch(given)
        if found is None:
            raise DataError(
                f"data.source '{name}' names no set; expected {PREFIX}NAME, then @ and a commit of 40 hexadecimal "
                f"digits, # and a subset, : and a split, each where it is needed: {PREFIX}openai/gsm8k#main:test.",
                found=name,
            )
        return cls(found["place"], found["commit"], found["subset"], found["split"] or "train")

    @property
    def directory(self) -> Path | None:
        """Where it is, if it is a directory of this machine."""
        path = Path(os.path.expanduser(self.place))
        return path if path.is_dir() else None

    @property
    def title(self) -> str:
        """What it is called: no path of this machine."""
        name = self.place if self.directory is None else self.directory.resolve().name
        return f"{PREFIX}{name}{f'#{self.subset}' if self.subset else ''}:{self.split}"

    def stamps(self) -> str | None:
        """Of the files of a directory, which may change; None for a set of the hub."""
        return None if self.directory is None else seen.stamps(self.files())

    def files(self) -> list[Path]:
        """Those of a directory."""
        return [] if self.directory is None else sorted(path for path in self.directory.rglob("*") if path.is_file())


def local(data: DataConfig) -> Path:
    """Where the records of a set are, or would be."""
    wanted = Set.named(data.source)
    place = str(wanted.directory.resolve()) if wanted.directory else wanted.place
    key = {"place": place, "commit": wanted.commit, "subset": wanted.subset, "split": wanted.split}
    digest = sha256(config.canonical({**key, "field": data.field, "rows": data.hf.rows}))
    return store(data, "imports") / f"{digest[:32]}.jsonl"


def require_permitted(data: DataConfig) -> None:
    """Raise DataError where a set of the hub is not here yet and may not be fetched."""
    if not (data.download or Set.named(data.source).directory or local(data).exists()):
        raise DataError(
            f"the set '{data.source}' is not here. Let it be fetched: meristem data prepare data.source={data.source} "
            f"data.download=true; or name a directory that save_to_disk of the library datasets wrote.",
            path=str(local(data)),
        )


def available(data: DataConfig, emit: Emit = silent, progress: Progress | None = None) -> Path:
    """The records of a set, their hash checked; read from the set first where they are not here or it has changed.

    progress: called with the bytes written, and 0 for those that there will be.
    """
    path, wanted = local(data), Set.named(data.source)
    require_permitted(data)
    with filelock.FileLock(path.with_suffix(".lock")):
        said = _said(path)
        if said is not None and said["stamps"] == wanted.stamps():
            with opened(path):
                found = sha256_file(path)
            if found != said["sha256"]:
                raise FileChanged(
                    f"{path} has SHA-256 {found}, and {said['sha256']} when the set '{data.source}' was written there. "
                    f"Remove the file and prepare the text again.",
                    path=str(path),
                    found=found,
                    expected=said["sha256"],
                )
            return path
        _write(path, wanted, data, emit, progress or (lambda done, total: None))
    return path


def _said(path: Path) -> dict[str, Any] | None:
    """What stands beside the records; None where there are none, or it cannot be understood."""
    with suppress(DataError, orjson.JSONDecodeError):
        said = orjson.loads(read(path.with_suffix(".json")))
        return said if path.exists() and isinstance(said, dict) and {"sha256", "stamps"} <= said.keys() else None
    return None


def _write(path: Path, wanted: Set, data: DataConfig, emit: Emit, progress: Progress) -> None:
    """Read the set from beginning to end, and write its records down."""
    library = _library(data.source)
    stamps, commit = wanted.stamps(), wanted.commit
    if wanted.directory is None and commit is None:
        commit = _newest(wanted, data.source)
    told = {"set": wanted.title, "commit": commit, "streaming": data.hf.streaming}
    emit(Event("data.import", told))
    digest, n_rows, size_bytes = hashlib.sha256(), 0, 0
    rows = _rows(library, wanted, commit, data)
    with replacing(path) as descriptor, open(descriptor, "wb", closefd=False) as file:
        for row in rows:
            line = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
            file.write(line)
            digest.update(line)
            n_rows, size_bytes = n_rows + 1, size_bytes + len(line)
            if n_rows % _EVERY == 0:
                progress(size_bytes, 0)
        if not n_rows:
            raise DataError(f"the set '{data.source}' has no rows. Name another split or subset.", found=data.source)
    written = {"rows": n_rows, "size_bytes": size_bytes, "sha256": digest.hexdigest(), "stamps": stamps}
    library_version = {"library": f"datasets {version('datasets')}"}
    write_atomic(path.with_suffix(".json"), orjson.dumps(told | written | library_version, option=orjson.OPT_INDENT_2))


def _rows(library: Any, wanted: Set, commit: str | None, data: DataConfig) -> Iterator[Mapping[str, Any]]:
    """The rows, of which only the text is read. Whatever the library refuses by is a DataError."""
    try:
        found = _opened(library, wanted, commit, data)
        names = list(found.column_names or found.features or ())
        if names and data.field not in names:
            raise DataError(
                f"the set '{data.source}' has no column '{data.field}'. Set data.field to one of "
                f"{', '.join(map(repr, names[:12]))}.",
                found=data.field,
                accepted=names,
            )
        for number, row in enumerate(islice(found.select_columns([data.field]), data.hf.rows), 1):
            value = row.get(data.field)
            if not (value is None or isinstance(value, str)):
                raise DataError(
                    f"column '{data.field}' of the set '{data.source}' holds a {type(value).__name__} in row {number}, "
                    f"no text. Set data.field to a column of text.",
                    found=type(value).__name__,
                )
            yield {data.field: value}
    except (OSError, ValueError, KeyError, library.exceptions.DatasetsError) as cause:
        raise DataError(
            f"the library datasets could not read '{data.source}': {cause}. Check the name, the subset and the split.",
            found=data.source,
        ) from cause


def _opened(library: Any, wanted: Set, commit: str | None, data: DataConfig) -> Any:
    """The set as the library gives it, map-style or as a stream; either is read in its own order."""
    if wanted.directory is None or not _is_saved(wanted.directory):
        place = str(wanted.directory or wanted.place)
        given = {"split": wanted.split, "revision": commit, "streaming": data.hf.streaming}
        return library.load_dataset(place, wanted.subset, **given)
    found = library.load_from_disk(str(wanted.directory))
    if isinstance(found, dict):
        if wanted.split not in found:
            raise DataError(
                f"the set '{data.source}' has no split '{wanted.split}'; it has {', '.join(found)}. Name one behind a "
                f"colon: {data.source.partition(':')[0]}:{wanted.place}:{next(iter(found))}.",
                found=wanted.split,
                accepted=list(found),
            )
        found = found[wanted.split]
    return found.to_iterable_dataset() if data.hf.streaming else found


def _is_saved(directory: Path) -> bool:
    """Whether ``save_to_disk`` wrote it."""
    return any((directory / name).exists() for name in ("state.json", "dataset_dict.json"))


def _newest(wanted: Set, source: str) -> str:
    """The commit at which a set of the hub is now, so that all of it is of one."""
    with needed(f"data.source={source}"):
        from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(wanted.place).sha)
    except (OSError, ValueError) as cause:
        raise DataError(
            f"the hub does not give the set '{source}': {cause}. Check its name and the network.", found=source
        ) from cause


def _library(source: str) -> Any:
    """The library ``datasets``. Raises MissingExtra where it is not installed."""
    datasets = imported("datasets", f"data.source={source}")
    datasets.disable_progress_bars()
    return datasets
