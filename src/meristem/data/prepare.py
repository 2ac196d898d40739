"""From a source to a prepared corpus: read, divide, tokenize, write once, find again.

A corpus stands under a key of everything that shaped it, so the same text with the same settings is prepared once, and
any difference makes another corpus. It is built under another name and renamed when whole. The work is linear in
bytes of text and in documents.
"""

import array
import contextlib
import datetime
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Final

import filelock
import numpy as np

from meristem import config
from meristem.checkpoint.atomic import PARTIAL, disk_full, sync_directory, write_synced
from meristem.data import manifest as manifests
from meristem.data import seen, sources, split
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
_BINARY_BYTES: Final = 1 << 13
"""How much of a file is looked through for a byte 0, which no text holds; as git does."""

_DTYPES: Final = ((1 << 8, "uint8"), (1 << 16, "uint16"), (1 << 32, "uint32"))


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig | Tokenizer,
    emit: Emit = silent,
    progress: Progress | None = None,
    *,
    wanted: str | None = None,
) -> Corpus:
    """The prepared corpus of ``data``: the one in the store when there is one, otherwise built.

    A text whose files are those that were read before is not read again, and neither are the tokens of its corpus.

    tokenizer: settings to learn one from the training part, or the one to use, as that of a checkpoint.
    progress: called with the bytes of text done and the bytes there are (and likewise while downloading).
    wanted: fingerprint of the corpus that a run began with. Where copies of a document were divided by name, as they
    once were, and that gives this fingerprint, they are so again.
    """
    started = time.monotonic()
    source = sources.resolve(data)
    corpora = store(data, "corpora")
    paths = list(source.paths())
    settings = _settings(source, data, tokenizer)
    stamps, place = seen.stamps(paths), seen.place_of(corpora, settings, paths)
    before = seen.recall(place)
    corpus, is_built = _unchanged(corpora, before, stamps), False
    if before is None or corpus is None or wanted not in (None, corpus.fingerprint):
        if data.source in registered():
            available(data, data.source, registered()[data.source], emit, progress)
        reading = _Reading(source, data, tokenizer)
        place_for = partial(_place, corpora, settings)
        corpus, is_built = _prepared(
            place_for, reading, tokenizer, wanted, emit, progress or (lambda done, total: None)
        )
        names = [entry["path"] for entry in corpus.manifest["files"]]
        before = seen.Seen(stamps or "", reading.found, corpus.path.name, seen.stamps_of(corpus.path, names))
        if corpus.path == place_for(reading.divided("content")):
            seen.remember(place, before)
    _tell(data, corpus, before.found, "data.prepared" if is_built else "data.reused", emit, started)
    return corpus


def _unchanged(corpora: Path, before: seen.Seen | None, stamps: str | None) -> Corpus | None:
    """The corpus of a text that was read before, if no file of either has changed since."""
    if before is None or before.text != stamps or not _is_whole(corpora / before.corpus):
        return None
    try:
        is_same = seen.stamps_of(corpora / before.corpus, before.files) == before.files
    except OSError:
        return None
    return open_corpus(corpora / before.corpus, verify=False) if is_same else None


def _prepared(
    place_for: Callable[["_Listing"], Path],
    reading: "_Reading",
    tokenizer: TokenizerConfig | Tokenizer,
    wanted: str | None,
    emit: Emit,
    progress: Progress,
) -> tuple[Corpus, bool]:
    """The corpus of a text that was just read, opened with every byte verified, and whether it was built now."""

    def divided(group: str) -> tuple[Corpus, bool]:
        listing = reading.divided(group)
        place, is_built = place_for(listing), False
        if not _is_whole(place):
            with _locked(place, emit):
                if not _is_whole(place):
                    _build(place, reading.source, listing, tokenizer, progress)
                    is_built = True
        return open_corpus(place), is_built

    found = divided("content")
    if wanted in (None, found[0].fingerprint) or found[0].manifest["split"]["group_key"] == "id":
        return found
    by_name = divided("id")
    return by_name if by_name[0].fingerprint == wanted else found


def _tell(data: DataConfig, corpus: Corpus, found: seen.Found, name: str, emit: Emit, started: float) -> None:
    if found.n_binary:
        binary = {"n_files": found.n_binary, "first": found.first_binary, "advice": "data.exclude leaves files out"}
        emit(Event("data.binary", binary, "warning"))
    payload = {
        "source": data.source,
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "counts": corpus.manifest["counts"],
        "n_copies": found.n_copies,
        "split": corpus.manifest["split"]["method"],
        "seconds": round(time.monotonic() - started, 3),
    }
    emit(Event(name, payload))


@dataclass
class _Listing:
    """What a first reading found: which files, and which part each document belongs to.

    group: by what documents are divided: "id", or "content" where copies of one would else fall into several parts.
    firsts: with "content", for each document the number of the first that is a copy of it.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratios: tuple[float, float, float] = (1.0, 0.0, 0.0)
    parts: bytearray = field(default_factory=bytearray)
    method: str = "document"
    group: str = "id"
    firsts: "np.ndarray | None" = None
    cuts: tuple[int, int] = (0, 0)
    size_bytes: int = 0
    n_empty: int = 0
    n_copies: int = 0
    digest: str = ""


class _Reading:
    """A first reading of a text: its documents by name, content and size, from which it can be divided."""

    def __init__(self, source: sources.Source, data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> None:
        self.source = source
        self._listing = _Listing(ratios=split.ratios_for(data.validation))
        split.require_ratios(self._listing.ratios)
        contents, sizes, file, n_binary, first_binary = array.array("Q"), array.array("Q"), None, 0, None
        for document in _hashed(source.read(), self._listing):
            if isinstance(tokenizer, TokenizerConfig) and tokenizer.kind == "bpe":
                _require_utf8(document)
            if document.file != file and b"\0" in document.text[:_BINARY_BYTES]:
                n_binary, first_binary = n_binary + 1, first_binary or document.file
            file = document.file
            self._listing.parts.append(split.assign(document.id, self._listing.ratios))
            sizes.append(len(document.text))
            contents.append(split.content(document.text))
        self._sizes = np.array(sizes, dtype=np.int64)
        self._firsts = split.firsts(np.array(contents, dtype=np.uint64))
        self._is_first = self._firsts == np.arange(len(self._firsts))
        self._listing.size_bytes, self._listing.n_copies = int(self._sizes.sum()), int((~self._is_first).sum())
        self.found = seen.Found(self._listing.n_copies, n_binary, first_binary)
        if not self._listing.size_bytes:
            raise DataError(f"data.source '{data.source}' holds no text: every file is empty.", found=data.source)

    def divided(self, group: str) -> _Listing:
        """The text divided by the names of its documents, or with the copies of a document where its first one is.

        One document, or so few that a part would be empty: the joined text is cut into contiguous parts instead, and a
        copy where its first one is cut. Where no copy is moved, both are the same and called "id".
        """
        ratios = self._listing.ratios
        by_id = np.frombuffer(bytes(self._listing.parts), dtype=np.uint8)
        parts = by_id if group == "id" else by_id[self._firsts]
        sizes = np.bincount(parts, self._sizes, len(ratios))
        is_cut = any(ratio > 0 and size == 0 for ratio, size in zip(ratios, sizes, strict=True))
        if group == "content" and not (is_cut and self._listing.n_copies) and np.array_equal(parts, by_id):
            group = "id"
        listing = replace(self._listing, parts=bytearray(parts.tobytes()), group=group)
        if group == "content":
            listing.firsts = self._firsts
        if is_cut:
            size_bytes = int(self._sizes[self._is_first].sum()) if group == "content" else listing.size_bytes
            listing.method, listing.cuts = "cut", split.cut_points(size_bytes, ratios)
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
            f"{document.id} is not UTF-8: {cause.reason} at byte {cause.start}, 0x{document.text[cause.start]:02x}. "
            f"tokenizer.kind=bpe learns from characters. Leave the file out with data.exclude, or set "
            f"tokenizer.kind=byte.",
            path=document.id,
            offset=cause.start,
        ) from cause


def _settings(source: sources.Source, data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> dict[str, Any]:
    """Everything that shapes a corpus besides its text."""
    if isinstance(tokenizer, Tokenizer):
        vocabulary: dict[str, object] = {"fingerprint": tokenizer.fingerprint}
    else:
        vocabulary = tokenizer.model_dump(exclude={"vocab_size"} if tokenizer.kind == "byte" else None)
    return {
        "version": VERSION,
        "name": source.name,
        "loader": {"name": source.loader, "args": source.args},
        "tokenizer": vocabulary,
        "split": {"salt": split.SALT, "ratios": split.ratios_for(data.validation)},
    }


def _place(corpora: Path, settings: Mapping[str, Any], listing: _Listing) -> Path:
    """Where the corpus of a text is, under a key of everything that shapes it."""
    by_content = {"group": listing.group} if listing.group != "id" else {}
    everything = {**settings, "text": listing.digest, "split": {**settings["split"], **by_content}}
    return corpora / config.fingerprint(everything)[:32]


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
            n_readings = 2 if isinstance(tokenizer, TokenizerConfig) and tokenizer.kind == "bpe" else 1
            if not isinstance(tokenizer, Tokenizer):
                tokenizer = train_tokenizer(tokenizer, _to_learn_from(source, listing, progress))
            tokenizer.save(partial)
            before = listing.size_bytes * (n_readings - 1)
            counts, files, max_token_id = _write_tokens(
                partial,
                source,
                listing,
                tokenizer,
                lambda done, total: progress((before + done) // n_readings, total),
            )
            files.append(manifests.describe_file(partial / TOKENIZER, "json", tokenizer.vocab_size))
            manifest = _manifest(source, listing, tokenizer, asked)
            manifests.write(partial, {**manifest, "counts": counts, "files": files, "max_token_id": max_token_id})
            os.rename(partial, place)
            sync_directory(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_learn_from(source: sources.Source, listing: _Listing, progress: Progress) -> Iterator[bytes]:
    """The training part, whose reading is half of the work."""
    size_done = size_told = 0
    for name, text in _divided(source, listing):
        if name == "train":
            yield text
        size_done += len(text)
        if size_done >= size_told + _BATCH_BYTES:
            progress(size_done // 2, listing.size_bytes)
            size_told = size_done
    progress(size_done // 2, listing.size_bytes)


def _divided(source: sources.Source, listing: _Listing) -> Iterator[tuple[str, bytes]]:
    """The name of the split and the text of each document, or piece of one.

    Raises ``FileChanged`` in the end when the text is no longer the one that was listed.
    """
    again, offset = _Listing(), 0
    marks: dict[int, list[int]] = {}  # where first documents are cut, by what copies of them have in common
    for number, document in enumerate(_hashed(source.read(), again)):
        if number >= len(listing.parts):
            continue
        if listing.method == "document":
            yield split.SPLITS[listing.parts[number]], document.text
            continue
        first = number if listing.firsts is None else int(listing.firsts[number])
        if first == number:
            edges = [_character_start(document.text, cut - offset) for cut in listing.cuts]
            offset += len(document.text)
            if listing.firsts is not None:
                marks[number] = [len(split.normal(document.text[:edge])) for edge in edges]
        else:
            edges = [split.place_in(document.text, mark) for mark in marks[first]]
        yield from _pieces(document.text, edges)
    if again.digest != listing.digest:
        names = sorted({*listing.files, *again.files})
        changed = [name for name in names if listing.files.get(name) != again.files.get(name)]
        raise FileChanged(
            f"the text of '{source.name}' changed while it was prepared: "
            f"{', '.join(changed[:3])}. Prepare it again when nothing writes to it.",
            paths=changed,
        )


def _pieces(text: bytes, edges: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """A document cut where the splits meet."""
    for name, (start, stop) in zip(split.SPLITS, itertools.pairwise((0, *edges, len(text))), strict=True):
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
    size_bytes = 0
    for piece in pieces:
        batch.append(piece)
        size_bytes += len(piece[1])
        if size_bytes >= _BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
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
        "split": {
            "method": listing.method,
            "salt": split.SALT,
            "ratios": list(listing.ratios),
            "group_key": listing.group,
        },
        "quality": {"bad": 0, "empty": listing.n_empty, "duplicates": listing.n_copies, "too_long": 0, "examples": []},
        "random_seed": None,
    }
