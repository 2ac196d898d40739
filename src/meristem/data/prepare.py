"""From a source to a prepared corpus: read, divide, tokenize, write once, find again.

A corpus stands under a key of everything that shaped it, so the same text with the same settings is prepared once, and
any difference makes another corpus. It is built under another name and renamed when whole.
"""

import array
import contextlib
import datetime
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Final

import filelock
import numpy as np

from meristem import config
from meristem.checkpoint.atomic import PARTIAL, disk_full, sync_directory, write_synced
from meristem.data import manifest as manifests
from meristem.data import sources, split
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.corpus import DOCUMENTS, TOKENS, Corpus, open_corpus
from meristem.data.download import Progress, available, registered
from meristem.data.files import store
from meristem.data.tokenizer import FILE as TOKENIZER
from meristem.data.tokenizer import Tokenizer, train_tokenizer
from meristem.errors import DataError, FileChanged, SplitError
from meristem.events import Emit, Event, silent

VERSION: Final = "1"
"""Of the files: another number makes every corpus be prepared again."""

_BATCH_BYTES: Final = 1 << 22
_DTYPES: Final = ((1 << 8, "uint8"), (1 << 16, "uint16"), (1 << 32, "uint32"))


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, emit: Emit = silent, progress: Progress | None = None
) -> Corpus:
    """The prepared corpus of ``data``: the one in the store when there is one, otherwise built.

    tokenizer: settings to learn one from the training part, or the one to use, as that of a checkpoint.
    progress: called with the bytes of text done and the bytes there are (and likewise while downloading).
    """
    started = time.monotonic()
    source = sources.resolve(data)
    if data.source in registered():
        available(data, data.source, registered()[data.source], emit, progress)
    listing = _list(source, data, text_only=tokenizer.kind == "bpe")
    corpora = store(data, "corpora")
    place = corpora / _key(source, listing, tokenizer)
    is_built = False
    if not _is_whole(place):
        with _locked(place, emit):
            if not _is_whole(place):
                _build(place, source, listing, tokenizer, progress or (lambda done, total: None))
                is_built = True
    corpus = open_corpus(place)
    payload = {
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "counts": corpus.manifest["counts"],
        "split": listing.method,
        "seconds": round(time.monotonic() - started, 3),
    }
    emit(Event("data.prepared" if is_built else "data.reused", payload))
    return corpus


@dataclass
class _Listing:
    """What a first reading found: which files, and which part each document belongs to."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratios: tuple[float, float, float] = (1.0, 0.0, 0.0)
    parts: bytearray = field(default_factory=bytearray)
    method: str = "document"
    cuts: tuple[int, int] = (0, 0)
    size_bytes: int = 0
    n_empty: int = 0
    digest: str = ""


def _list(source: sources.Source, data: DataConfig, *, text_only: bool) -> _Listing:
    listing = _Listing(ratios=split.ratios_for(data.validation))
    split.require_ratios(listing.ratios)
    sizes = [0] * len(split.SPLITS)
    for document in _hashed(source.read(), listing):
        if text_only:
            _require_utf8(document)
        part = split.assign(document.id, listing.ratios)
        listing.parts.append(part)
        sizes[part] += len(document.text)
    listing.size_bytes = sum(sizes)
    if not listing.size_bytes:
        raise DataError(f"data.source '{data.source}' holds no text: every file is empty.", found=data.source)
    if any(ratio > 0 and size == 0 for ratio, size in zip(listing.ratios, sizes, strict=True)):
        # One document, or so few that a part would be empty: the joined text is cut into contiguous parts instead.
        listing.method, listing.cuts = "cut", split.cut_points(listing.size_bytes, listing.ratios)
    return listing


def _hashed(documents: Iterable[sources.Document], listing: _Listing) -> Iterator[sources.Document]:
    """The documents that hold text; when the last has passed, the listing knows every file and the hash of them all."""
    whole, n_empty = hashlib.sha256(), 0
    files: dict[str, dict[str, Any]] = {}
    for name, group in itertools.groupby(documents, key=lambda document: document.file):
        digest, size_bytes = hashlib.sha256(), 0
        for document in group:
            digest.update(document.text)
            size_bytes += len(document.text)
            whole.update(f"{document.id}\0{len(document.text)}\0".encode())
            n_empty += not document.text
            if document.text:
                yield document
        files[name] = {"uri": name, "size_bytes": size_bytes, "sha256": digest.hexdigest()}
        whole.update(digest.digest())
    listing.files, listing.n_empty, listing.digest = files, n_empty, whole.hexdigest()


def _require_utf8(document: sources.Document) -> None:
    try:
        document.text.decode()
    except UnicodeDecodeError as cause:
        raise DataError(
            f"{document.id} is not UTF-8: {cause.reason} at byte {cause.start}. tokenizer.kind=bpe learns from "
            f"characters. Leave the file out with data.exclude, or set tokenizer.kind=byte.",
            path=document.id,
            offset=cause.start,
        ) from cause


def _key(source: sources.Source, listing: _Listing, tokenizer: TokenizerConfig | Tokenizer) -> str:
    if isinstance(tokenizer, Tokenizer):
        vocabulary: dict[str, object] = {"fingerprint": tokenizer.fingerprint}
    else:
        vocabulary = tokenizer.model_dump(exclude={"vocab_size"} if tokenizer.kind == "byte" else None)
    everything = {
        "version": VERSION,
        "name": source.name,
        "loader": {"name": source.loader, "args": source.args},
        "text": listing.digest,
        "tokenizer": vocabulary,
        "split": {"salt": split.SALT, "ratios": listing.ratios},
    }
    return config.fingerprint(everything)[:32]


def _is_whole(place: Path) -> bool:
    return (place / manifests.FILE).exists()


@contextlib.contextmanager
def _locked(place: Path, emit: Emit) -> Iterator[None]:
    """One builder at a time; who comes second waits and finds the corpus done."""
    lock = filelock.FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        emit(Event("data.waiting", {"corpus": place.name}))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(
    place: Path, source: sources.Source, listing: _Listing, tokenizer: TokenizerConfig | Tokenizer, progress: Progress
) -> None:
    partial = place.with_name(f".{place.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # of a builder that was killed: we hold its lock
    try:
        with disk_full(place):
            partial.mkdir()
            asked = tokenizer.vocab_size
            if not isinstance(tokenizer, Tokenizer):
                texts = (text for name, text in _divided(source, listing) if name == "train")
                tokenizer = train_tokenizer(tokenizer, texts)
            tokenizer.save(partial)
            counts, files, max_token_id = _write_tokens(partial, source, listing, tokenizer, progress)
            files.append(manifests.describe_file(partial / TOKENIZER, "json", tokenizer.vocab_size))
            manifest = _manifest(source, listing, tokenizer, asked)
            manifests.write(partial, {**manifest, "counts": counts, "files": files, "max_token_id": max_token_id})
            os.rename(partial, place)
            sync_directory(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _divided(source: sources.Source, listing: _Listing) -> Iterator[tuple[str, bytes]]:
    """The name of the split and the text of each document, or piece of one.

    Raises ``FileChanged`` in the end when the text is no longer the one that was listed.
    """
    again = _Listing()
    offset = 0
    for number, document in enumerate(_hashed(source.read(), again)):
        if number >= len(listing.parts):
            continue
        if listing.method == "cut":
            yield from _pieces(document.text, offset, listing.cuts)
        else:
            yield split.SPLITS[listing.parts[number]], document.text
        offset += len(document.text)
    if again.digest != listing.digest:
        names = sorted({*listing.files, *again.files})
        changed = [name for name in names if listing.files.get(name) != again.files.get(name)]
        raise FileChanged(
            f"the text of '{source.name}' changed while it was prepared: "
            f"{', '.join(changed[:3])}. Prepare it again when nothing writes to it.",
            paths=changed,
        )


def _pieces(text: bytes, offset: int, cuts: tuple[int, int]) -> Iterator[tuple[str, bytes]]:
    """A document at ``offset`` of the joined text, cut where the splits meet but never inside a character."""
    edges = (0, *(_character_start(text, cut - offset) for cut in cuts), len(text))
    for name, (start, stop) in zip(split.SPLITS, itertools.pairwise(edges), strict=True):
        if start < stop:
            yield name, text[start:stop]


def _character_start(text: bytes, place: int) -> int:
    """The nearest place at or before this one that is not inside a UTF-8 character; the place itself in other bytes."""
    place = min(max(place, 0), len(text))
    starts = (at for at in range(place, max(place - 4, -1), -1) if at == len(text) or text[at] & 0xC0 != 0x80)
    return next(starts, place)


@dataclass
class _Part:
    """A split as it is written: its token file, and where its documents begin and end."""

    file: BinaryIO
    edges: "array.array[int]" = field(default_factory=lambda: array.array("Q", [0]))
    size_bytes: int = 0


def _write_tokens(
    directory: Path, source: sources.Source, listing: _Listing, tokenizer: Tokenizer, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Write the tokens and document starts of every split; what the manifest says of them."""
    dtype = next(np.dtype(name) for limit, name in _DTYPES if tokenizer.vocab_size <= limit)
    parts: dict[str, _Part] = {}
    size_done, max_token_id = 0, 0
    with contextlib.ExitStack() as stack:
        for batch in _batches(_divided(source, listing)):
            for (name, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
                if name not in parts:
                    path = directory / f"{TOKENS}.{name}.u{8 * dtype.itemsize}"
                    parts[name] = _Part(stack.enter_context(open(path, "wb")))
                part = parts[name]
                part.file.write(ids.astype(dtype).tobytes())
                part.edges.append(part.edges[-1] + len(ids))
                part.size_bytes += len(text)
                size_done += len(text)
                max_token_id = max(max_token_id, int(ids.max()))
            progress(size_done, listing.size_bytes)
        for part in parts.values():
            part.file.flush()
            os.fsync(part.file.fileno())
    _require_filled(parts, listing, source)
    counts, files = {}, []
    for name in sorted(parts, key=split.SPLITS.index):
        part, n_documents = parts[name], len(parts[name].edges) - 1
        starts = directory / f"{DOCUMENTS}.{name}.u64"
        write_synced(starts, part.edges.tobytes())
        counts[name] = {"records": n_documents, "tokens": part.edges[-1], "size_bytes": part.size_bytes}
        files.append(manifests.describe_file(Path(part.file.name), str(dtype), n_documents))
        files.append(manifests.describe_file(starts, "uint64", n_documents))
    return counts, files, max_token_id


def _batches(pieces: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Pieces in groups large enough to share the cores and small enough to stay in memory."""
    batch: list[tuple[str, bytes]] = []
    for piece in pieces:
        batch.append(piece)
        if sum(len(text) for _, text in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _require_filled(parts: Collection[str], listing: _Listing, source: sources.Source) -> None:
    for name, ratio in zip(split.SPLITS, listing.ratios, strict=True):
        if ratio > 0 and name not in parts:
            raise SplitError(
                f"the split '{name}' of '{source.name}' would be empty: {listing.size_bytes} bytes are too few for a "
                f"share of {ratio:g}. Add text, or change data.validation.",
                split=name,
            )


def _manifest(source: sources.Source, listing: _Listing, tokenizer: Tokenizer, asked: int) -> dict[str, Any]:
    """asked: the most entries that the tokenizer might have learned; a short text teaches it fewer."""
    licence = {"license": source.licence} if source.licence else {}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return {
        "schema": manifests.SCHEMA,
        "name": source.name,
        "version": VERSION,
        "created": now.replace("+00:00", "Z"),
        "tool": f"meristem {version('meristem')}",
        "sources": [{**entry, **licence} for entry in listing.files.values()],
        "loader": {"name": source.loader, "args": dict(source.args)},
        "transform": [],
        "tokenizer": {
            "name": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "asked_vocab_size": max(asked, tokenizer.vocab_size),
        },
        "split": {"method": listing.method, "salt": split.SALT, "ratios": list(listing.ratios), "group_key": "id"},
        "quality": {"bad": 0, "empty": listing.n_empty, "duplicates": 0, "too_long": 0, "examples": []},
        "random_seed": None,
    }
