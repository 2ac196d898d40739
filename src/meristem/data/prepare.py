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
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import filelock
import numpy as np

from meristem import config
from meristem.checkpoint.atomic import PARTIAL, disk_full, sync_directory, write_synced
from meristem.data import chat as chats
from meristem.data import manifest as manifests
from meristem.data import seen, sources, split
from meristem.data.bad import BadRecords
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.corpus import DOCUMENTS, TOKENS, Corpus, open_corpus
from meristem.data.download import Progress
from meristem.data.files import store
from meristem.data.given import given
from meristem.data.scanning import require_scanned
from meristem.data.tokenizer import FILE as TOKENIZER
from meristem.data.tokenizer import Tokenizer, template_of, train_tokenizer
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

    Where ``data.scan`` is set, the text is searched for secrets before anything is made of it.

    tokenizer: settings to learn one from the training part, or the one to use, as that of a checkpoint.
    progress: called with the bytes of text done and the bytes there are (and likewise while downloading).
    wanted: fingerprint of the corpus that a run began with. Where copies of a document were divided by name, as they
    once were, and that gives this fingerprint, they are so again.
    """
    started = time.monotonic()
    source = sources.resolve(data)
    corpora = store(data, "corpora")
    template = None
    if isinstance(tokenizer, TokenizerConfig):
        template = template_of(tokenizer)
        tokenizer = given(tokenizer, download=data.download) or tokenizer
    chats.require_usable(tokenizer, template, is_chat=data.format == "chat")
    paths = list(source.paths())
    settings = _settings(source, data, tokenizer, template)
    stamps, place = seen.stamps(paths), seen.place_of(corpora, settings, paths)
    before = seen.recall(place)
    require_scanned(data, source, stamps, corpora, emit)
    corpus, is_built = _unchanged(corpora, before, stamps), False
    if before is None or corpus is None or wanted not in (None, corpus.fingerprint):
        sources.fetch(data, emit, progress)
        reading = _Reading(source, data, tokenizer)
        place_for = partial(_place, corpora, settings)
        corpus, is_built = _prepared(
            place_for, reading, tokenizer, wanted, emit, progress or (lambda done, total: None)
        )
        names = [entry["path"] for entry in corpus.manifest["files"]]
        before = seen.Seen(stamps or "", reading.found, corpus.path.name, seen.stamps_of(corpus.path, names))
        if corpus.path == place_for(reading.divided("content")):
            seen.remember(place, before)
    if corpus.tokenizer.loses:
        what = {"kind": corpus.tokenizer.kind, "reason": corpus.tokenizer.loses}
        emit(Event("tokenizer.loses", what, "warning"))
    _tell(data, corpus, before.found, "data.prepared" if is_built else "data.reused", emit, started)
    return replace(corpus, weights=data.weights)


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
    """The corpus of a text that was just read, every byte verified unless it was written now, and whether it was."""

    def divided(group: str) -> tuple[Corpus, bool]:
        listing = reading.divided(group)
        place, is_built = place_for(listing), False
        if not _is_whole(place):
            with _locked(place, emit):
                if not _is_whole(place):
                    _build(place, reading.source, listing, tokenizer, progress)
                    is_built = True
        return open_corpus(place, verify=not is_built), is_built

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
    sources: for each document the number of its source. cuts: where the joined text of a source is cut, by its number;
    the documents of the others are divided.
    """

    files: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    ratios: tuple[float, float, float] = (1.0, 0.0, 0.0)
    parts: bytearray = field(default_factory=bytearray)
    sources: bytearray = field(default_factory=bytearray)
    group: str = "id"
    firsts: "np.ndarray | None" = None
    cuts: dict[int, tuple[int, int]] = field(default_factory=dict)
    size_bytes: int = 0
    n_empty: int = 0
    n_copies: int = 0
    bad: BadRecords = field(default_factory=lambda: BadRecords(0.0))
    digest: str = ""
    is_chat: bool = False


class _Reading:
    """A first reading of a text: its documents by name, content and size, from which it can be divided."""

    def __init__(self, source: sources.Source, data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> None:
        self.source = source
        self._listing = _Listing(
            ratios=split.ratios_for(data.validation),
            bad=BadRecords(data.max_bad_fraction),
            is_chat=data.format == "chat",
        )
        split.require_ratios(self._listing.ratios)
        contents, sizes, file, n_binary, first_binary = array.array("Q"), array.array("Q"), None, 0, None
        for document in _hashed(source.read(), self._listing):
            if isinstance(tokenizer, TokenizerConfig) and tokenizer.kind != "byte":
                _require_utf8(document, tokenizer.kind)
            if document.file != file and b"\0" in document.text[:_BINARY_BYTES]:
                n_binary, first_binary = n_binary + 1, first_binary or document.file
            file = document.file
            self._listing.parts.append(split.assign(document.id, self._listing.ratios))
            self._listing.sources.append(document.source)
            sizes.append(len(document.text))
            contents.append(split.content(document.text))
        self._listing.bad.require_few()
        self._sizes = np.array(sizes, dtype=np.int64)
        self._firsts = split.firsts(np.array(contents, dtype=np.uint64))
        self._is_first = self._firsts == np.arange(len(self._firsts))
        self._listing.size_bytes, self._listing.n_copies = int(self._sizes.sum()), int((~self._is_first).sum())
        self.found = seen.Found(self._listing.n_copies, n_binary, first_binary)
        filled = set(self._listing.sources)
        for number, part in enumerate(sources.named(data) if data.weights else [data]):
            if number not in filled:
                raise DataError(f"data.source '{part.source}' holds no text: every file is empty.", found=part.source)

    def divided(self, group: str) -> _Listing:
        """The text divided by the names of its documents, or with the copies of a document where its first one is.

        One document, or so few that a part would be empty: the joined text is cut into contiguous parts instead, and a
        copy where its first one is cut. Where no copy is moved, both are the same and called "id". Each source of a
        mixture is divided by itself.
        """
        ratios = self._listing.ratios
        by_id = np.frombuffer(bytes(self._listing.parts), dtype=np.uint8)
        parts = by_id if group == "id" else by_id[self._firsts]
        source_of = np.frombuffer(bytes(self._listing.sources), dtype=np.uint8)
        cut = []
        for source in np.unique(source_of).tolist():
            own = source_of == source
            sizes = np.bincount(parts[own], self._sizes[own], len(ratios))
            if any(ratio > 0 and size == 0 for ratio, size in zip(ratios, sizes, strict=True)):
                cut.append(source)
        if cut and self._listing.is_chat:
            raise SplitError(
                f"'{self.source.name}' has so few chats that a split would be empty, and none is cut in two. Add some, "
                f"or set data.validation=0."
            )
        if group == "content" and not (cut and self._listing.n_copies) and np.array_equal(parts, by_id):
            group = "id"
        listing = replace(self._listing, parts=bytearray(parts.tobytes()), group=group, cuts={})
        if group == "content":
            listing.firsts = self._firsts
        for source in cut:
            own = (source_of == source) & self._is_first if group == "content" else source_of == source
            listing.cuts[source] = split.cut_points(int(self._sizes[own].sum()), ratios)
        return listing


def _hashed(documents: Iterable[sources.Document], listing: _Listing) -> Iterator[sources.Document]:
    """The documents that hold text; when the last has passed, the listing knows every file and the hash of them all."""
    whole, n_empty = hashlib.sha256(), 0
    files: dict[tuple[int, str], dict[str, Any]] = {}
    for place, group in itertools.groupby(documents, key=lambda document: (document.source, document.file)):
        digest, size_bytes = hashlib.sha256(), 0
        for document in group:
            digest.update(document.text)
            size_bytes += len(document.text)
            whole.update(f"{document.id}\0{len(document.text)}\0".encode())
            listing.bad.count(document)
            n_empty += not document.text and document.bad is None
            if document.text:
                yield document
        files[place] = {"uri": place[1], "size_bytes": size_bytes, "sha256": digest.hexdigest()}
        whole.update(digest.digest())
    listing.files, listing.n_empty, listing.digest = files, n_empty, whole.hexdigest()


def _require_utf8(document: sources.Document, kind: str) -> None:
    try:
        document.text.decode()
    except UnicodeDecodeError as cause:
        raise DataError(
            f"{document.id} is not UTF-8: {cause.reason} at byte {cause.start}, 0x{document.text[cause.start]:02x}. "
            f"tokenizer.kind={kind} learns from characters. Leave the file out with data.exclude, or set "
            f"tokenizer.kind=byte.",
            path=document.id,
            offset=cause.start,
        ) from cause


def _settings(
    source: sources.Source, data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, template: str | None
) -> dict[str, Any]:
    """Everything that shapes a corpus besides its text. template: the content of the file that settings name."""
    if isinstance(tokenizer, Tokenizer):
        vocabulary: dict[str, object] = {"fingerprint": tokenizer.fingerprint}
    else:
        named = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
        by_content = {} if template is None else {"chat_template": template}
        vocabulary = named | tokenizer.model_dump(exclude_defaults=True) | by_content
        if tokenizer.kind == "byte":
            del vocabulary["vocab_size"]
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
            n_readings = 2 if isinstance(tokenizer, TokenizerConfig) and tokenizer.kind != "byte" else 1
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
    for piece in _divided(source, listing):
        if piece.split == "train" and listing.is_chat:
            yield from (message.content.encode() for message in chats.messages_in(piece.text))
        elif piece.split == "train":
            yield piece.text
        size_done += len(piece.text)
        if size_done >= size_told + _BATCH_BYTES:
            progress(size_done // 2, listing.size_bytes)
            size_told = size_done
    progress(size_done // 2, listing.size_bytes)


class _Piece(NamedTuple):
    """A document, or what of it belongs to a split. source: the number of its source."""

    split: str
    text: bytes
    source: int


def _divided(source: sources.Source, listing: _Listing) -> Iterator[_Piece]:
    """The documents, or the pieces of them, in their order.

    Raises ``FileChanged`` in the end when the text is no longer the one that was listed.
    """
    again, offsets = _Listing(bad=BadRecords(1.0)), dict.fromkeys(listing.cuts, 0)
    marks: dict[int, list[int]] = {}  # where first documents are cut, by what copies of them have in common
    for number, document in enumerate(_hashed(source.read(), again)):
        if number >= len(listing.parts):
            continue
        first = number if listing.firsts is None else int(listing.firsts[number])
        cut = listing.sources[first]
        if cut not in listing.cuts:
            yield _Piece(split.SPLITS[listing.parts[number]], document.text, document.source)
            continue
        if first == number:
            edges = [split.character_start(document.text, at - offsets[cut]) for at in listing.cuts[cut]]
            offsets[cut] += len(document.text)
            if listing.firsts is not None:
                marks[number] = [len(split.normal(document.text[:edge])) for edge in edges]
        else:
            edges = [split.place_in(document.text, mark) for mark in marks[first]]
        yield from _pieces(document, edges)
    if again.digest != listing.digest:
        names = sorted({*listing.files, *again.files})
        changed = [name for name in names if listing.files.get(name) != again.files.get(name)]
        raise FileChanged(
            f"the text of '{source.name}' changed while it was prepared: "
            f"{', '.join(name for _, name in changed[:3])}. Prepare it again when nothing writes to it.",
            paths=[name for _, name in changed],
        )


def _pieces(document: sources.Document, edges: Iterable[int]) -> Iterator[_Piece]:
    """A document cut where the splits meet."""
    text = document.text
    for name, (start, stop) in zip(split.SPLITS, itertools.pairwise((0, *edges, len(text))), strict=True):
        if start < stop:
            yield _Piece(name, text[start:stop], document.source)


@dataclass
class _Part:
    """A split as it is written: its token file, where its documents begin and end, and how many are of each source."""

    file: BinaryIO
    edges: "array.array[int]" = field(default_factory=lambda: array.array("Q", [0]))
    size_bytes: int = 0
    n_of: Counter[int] = field(default_factory=Counter)


def _write_tokens(
    directory: Path, source: sources.Source, listing: _Listing, tokenizer: Tokenizer, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Write the tokens and document starts of every split; what the manifest says of them."""
    dtype = next(np.dtype(name) for limit, name in _DTYPES if tokenizer.vocab_size <= limit)
    encode = partial(chats.encode_documents, tokenizer) if listing.is_chat else tokenizer.encode_documents
    parts: dict[str, _Part] = {}
    size_done, max_token_id, lengths = 0, 0, tokenizer.byte_lengths
    with contextlib.ExitStack() as stack:
        for batch in _batches(_divided(source, listing)):
            for piece, ids in zip(batch, encode([piece.text for piece in batch]), strict=True):
                if piece.split not in parts:
                    path = directory / f"{TOKENS}.{piece.split}.u{8 * dtype.itemsize}"
                    parts[piece.split] = _Part(stack.enter_context(open(path, "wb")))
                part = parts[piece.split]
                part.file.write(ids.astype(dtype, copy=False).data)
                part.edges.append(part.edges[-1] + len(ids))
                part.n_of[piece.source] += 1
                part.size_bytes += int(lengths[ids].sum()) if listing.is_chat else len(piece.text)
                size_done += len(piece.text)
                max_token_id = max(max_token_id, int(ids.max(initial=0)))
            progress(size_done, listing.size_bytes)
        described = _synced(parts, dtype)
    _require_filled(parts, listing, source)
    counts: dict[str, Any] = {}
    files = []
    for name in sorted(parts, key=split.SPLITS.index):
        part, n_documents = parts[name], len(parts[name].edges) - 1
        starts = directory / f"{DOCUMENTS}.{name}.u64"
        write_synced(starts, part.edges.tobytes())
        counts[name] = {"records": n_documents, "tokens": part.edges[-1], "size_bytes": part.size_bytes}
        if source.loader == "mixture":
            counts[name]["sources"] = [part.n_of[number] for number in range(max(listing.sources) + 1)]
        files.append(described[name])
        files.append(manifests.describe_file(starts, "uint64", n_documents))
    return counts, files, max_token_id


def _synced(parts: Mapping[str, _Part], dtype: np.dtype[Any]) -> dict[str, dict[str, Any]]:
    """What the manifest says of each token file; a disk takes it while it is hashed."""
    for part in parts.values():
        part.file.flush()
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(os.fsync, part.file.fileno()) for part in parts.values()]
        described = {
            name: manifests.describe_file(Path(part.file.name), str(dtype), len(part.edges) - 1)
            for name, part in parts.items()
        }
        for each in waiting:
            each.result()
    return described


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in groups large enough to share the cores and small enough to stay in memory."""
    batch: list[_Piece] = []
    size_bytes = 0
    for piece in pieces:
        batch.append(piece)
        size_bytes += len(piece.text)
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
            "method": "cut" if listing.cuts else "document",
            "salt": split.SALT,
            "ratios": list(listing.ratios),
            "group_key": listing.group,
        },
        "quality": {
            "bad": listing.bad.n,
            "empty": listing.n_empty,
            "duplicates": listing.n_copies,
            "too_long": 0,
            "examples": listing.bad.examples,
        },
        "random_seed": None,
    }
