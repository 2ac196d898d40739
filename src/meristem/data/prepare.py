"""From a source to a prepared corpus: read, divide, tokenize, write once, find again.

A corpus stands under a key of everything that shaped it, so the same text with the same settings is prepared once, and
any difference makes another corpus. It is built under another name and renamed when whole. The work is linear in
bytes of text and in documents.
"""

import contextlib
import datetime
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import filelock

from meristem import config
from meristem.checkpoint.atomic import PARTIAL, disk_full, sync_directory
from meristem.data import chat as chats
from meristem.data import manifest as manifests
from meristem.data import seen, sources, split
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.corpus import Corpus, open_corpus
from meristem.data.download import Progress
from meristem.data.files import store
from meristem.data.given import given
from meristem.data.hashing import HashThread
from meristem.data.reading import Guess, Listing, Reading, divided
from meristem.data.scanning import require_scanned
from meristem.data.split import ratios_for
from meristem.data.token_files import Piece, TokenFiles, require_filled
from meristem.data.tokenizer import FILE as TOKENIZER
from meristem.data.tokenizer import LEARNED_BYTES, Portions, Tokenizer, template_of, train_tokenizer
from meristem.events import Emit, Event, silent

VERSION: Final = "1"
"""Of the files: another number makes every corpus be prepared again."""

_BATCH_BYTES: Final = 1 << 22


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
        work = _Work(source, data, tokenizer, partial(_place, corpora, settings), emit, progress or _untold)
        # Who comes second waits, and finds that the first has read the text.
        with _locked(place, source.name, emit) if _is_writable(corpora) else contextlib.nullcontext():
            before = seen.recall(place)
            corpus = _unchanged(corpora, before, stamps) if wanted is None else None
            if before is None or corpus is None:
                corpus, found, is_built, is_usual = work.prepared(place, wanted)
                names = [entry["path"] for entry in corpus.manifest["files"]]
                before = seen.Seen(stamps or "", found, corpus.path.name, seen.stamps_of(corpus.path, names))
                if is_usual:
                    seen.remember(place, before)
    if corpus.tokenizer.loses:
        what = {"kind": corpus.tokenizer.kind, "reason": corpus.tokenizer.loses}
        emit(Event("tokenizer.loses", what, "warning"))
    _tell(data, corpus, before.found, "data.prepared" if is_built else "data.reused", emit, started)
    return corpus.for_training(data)


def _unchanged(corpora: Path, before: seen.Seen | None, stamps: str | None) -> Corpus | None:
    """The corpus of a text that was read before, if no file of either has changed since."""
    if before is None or before.text != stamps or not _is_whole(corpora / before.corpus):
        return None
    try:
        is_same = seen.stamps_of(corpora / before.corpus, before.files) == before.files
    except OSError:
        return None
    return open_corpus(corpora / before.corpus, verify=False) if is_same else None


class _Work:
    """What it takes to prepare a text: its source and settings, the tokenizer, and where a corpus goes."""

    def __init__(
        self,
        source: sources.Source,
        data: DataConfig,
        tokenizer: TokenizerConfig | Tokenizer,
        place_for: Callable[[Listing], Path],
        emit: Emit,
        progress: Progress,
    ) -> None:
        self._source, self._data, self._place_for = source, data, place_for
        self._emit, self._progress = emit, progress
        self._tokenizer, self._asked = tokenizer, tokenizer.vocab_size
        if isinstance(tokenizer, TokenizerConfig) and tokenizer.kind == "byte":
            self._tokenizer = train_tokenizer(tokenizer, ())  # from no text

    def prepared(self, place: Path, wanted: str | None) -> tuple[Corpus, seen.Found, bool, bool]:
        """The corpus, every byte verified unless it was written now; what was found besides; whether it was written
        now, and whether it is the one that the text gives without ``wanted``.

        place: what a draft is named after.
        """
        with HashThread() as self._hashing:
            if isinstance(self._tokenizer, Tokenizer) and _is_writable(place.parent):
                reading, is_built = self._drafted(place, self._tokenizer)
            else:
                learns = self._tokenizer.kind if isinstance(self._tokenizer, TokenizerConfig) else None
                reading, is_built = Reading(self._source, self._data, self._hashing, learns=learns), False
            corpus, was_built = self._divided(reading, "content", is_written=is_built)
            is_usual = wanted in (None, corpus.fingerprint) or corpus.manifest["split"]["group_key"] == "id"
            if not is_usual:
                by_name, is_new = self._divided(reading, "id", is_written=False)
                if by_name.fingerprint == wanted:
                    return by_name, reading.found, is_new, False
            return corpus, reading.found, was_built, True

    def _divided(self, reading: Reading, group: str, *, is_written: bool) -> tuple[Corpus, bool]:
        """is_written: whether a draft has become the corpus."""
        listing = reading.divided(group)
        place, is_built = self._place_for(listing), is_written
        if not _is_whole(place):
            with _locked(place, place.name, self._emit):
                if not _is_whole(place):
                    self._build(place, listing)
                    is_built = True
        return open_corpus(place, verify=not is_built), is_built

    def _drafted(self, place: Path, tokenizer: Tokenizer) -> tuple[Reading, bool]:
        """Read the text, and write the corpus meanwhile, which is kept where the text is divided as was guessed."""
        guess = Guess(self._source, ratios_for(self._data.validation))
        total = sum(size_bytes for *_, size_bytes in self._source.listed())
        with self._partial(place) as directory:
            files = TokenFiles(directory, tokenizer, self._hashing, is_chat=self._data.format == "chat")
            with contextlib.closing(files):
                batch = _Batch(files, lambda: self._progress(files.size_bytes, max(total, files.size_bytes)))
                reading = Reading(
                    self._source,
                    self._data,
                    self._hashing,
                    passing=lambda document, content: batch.add(guess.divide(document, content)),
                )
                batch.flush()
                listing = reading.divided("content")
                if not guess.is_right(reading, listing):
                    return reading, False
                corpus = self._place_for(listing)
                with _locked(corpus, corpus.name, self._emit):
                    if _is_whole(corpus):
                        return reading, False
                    self._finish(corpus, directory, files, listing, tokenizer)
        return reading, True

    def _build(self, place: Path, listing: Listing) -> None:
        """Write the corpus of a text that was read before."""
        with self._partial(place) as directory:
            tokenizer, before, n_readings = self._tokenizer, 0, 1
            if not isinstance(tokenizer, Tokenizer):
                tokenizer = train_tokenizer(tokenizer, self._to_learn_from(listing))
                before, n_readings = listing.size_bytes, 2
            files = TokenFiles(directory, tokenizer, self._hashing, is_chat=listing.is_chat)
            with contextlib.closing(files):
                batch = _Batch(
                    files, lambda: self._progress((before + files.size_bytes) // n_readings, listing.size_bytes)
                )
                for piece in divided(self._source, listing, self._hashing):
                    batch.add([piece])
                batch.flush()
                self._finish(place, directory, files, listing, tokenizer)

    def _finish(self, place: Path, directory: Path, files: TokenFiles, listing: Listing, tokenizer: Tokenizer) -> None:
        """Make what was written the corpus at ``place``."""
        require_filled(files.splits, listing.ratios, listing.size_bytes, self._source.name)
        written = files.finish(max(listing.sources) + 1 if self._source.loader == "mixture" else None)
        tokenizer.save(directory)
        described = manifests.describe_file(directory / TOKENIZER, "json", tokenizer.vocab_size)
        manifest = _manifest(self._source, listing, tokenizer, self._asked)
        whole = {
            "counts": written.counts,
            "files": [*written.files, described],
            "max_token_id": written.max_token_id,
        }
        manifests.write(directory, {**manifest, **whole})
        os.rename(directory, place)
        sync_directory(place.parent)

    @contextlib.contextmanager
    def _partial(self, place: Path) -> Iterator[Path]:
        """A directory to build in, which is gone afterwards unless it was renamed. Its lock has to be held."""
        directory = place.with_name(f".{place.name}{PARTIAL}")
        shutil.rmtree(directory, ignore_errors=True)  # of a builder that was killed: we hold its lock
        try:
            with disk_full(place):
                directory.mkdir()
                yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _to_learn_from(self, listing: Listing) -> Iterator[bytes]:
        """The training part, whose reading is half of the work."""
        size_done = size_told = 0
        long: Portions | None = None
        for piece in divided(self._source, listing, self._hashing):
            if piece.split == "train" and listing.is_chat:
                yield from (message.content.encode() for message in chats.messages_in(piece.text))
            elif piece.split == "train" and (long or piece.goes_on):
                long = long or Portions(LEARNED_BYTES)
                yield from long.feed(piece.text, is_end=not piece.goes_on)
                long = long if piece.goes_on else None
            elif piece.split == "train":
                yield piece.text
            size_done += len(piece.text)
            if size_done >= size_told + _BATCH_BYTES:
                self._progress(size_done // 2, listing.size_bytes)
                size_told = size_done
        self._progress(size_done // 2, listing.size_bytes)


class _Batch:
    """Pieces in groups large enough to share the cores and small enough to stay in memory."""

    def __init__(self, files: TokenFiles, written: Callable[[], None]) -> None:
        """written: called after each group."""
        self._files, self._written = files, written
        self._pieces: list[Piece] = []
        self._size_bytes = 0

    def add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self._pieces.append(piece)
            self._size_bytes += len(piece.text)
        if self._size_bytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._pieces:
            self._files.write(self._pieces)
            self._pieces, self._size_bytes = [], 0
            self._written()


def _untold(done: int, total: int | None) -> None:
    """Progress that nobody is shown."""


def _is_writable(directory: Path) -> bool:
    return os.access(directory, os.W_OK)


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


def _place(corpora: Path, settings: Mapping[str, Any], listing: Listing) -> Path:
    """Where the corpus of a text is, under a key of everything that shapes it."""
    by_content = {"group": listing.group} if listing.group != "id" else {}
    everything = {**settings, "text": listing.digest, "split": {**settings["split"], **by_content}}
    return corpora / config.fingerprint(everything)[:32]


def _is_whole(place: Path) -> bool:
    return (place / manifests.FILE).exists()


@contextlib.contextmanager
def _locked(place: Path, name: str, emit: Emit) -> Iterator[None]:
    """One builder at a time; who comes second waits and finds the corpus done. name: what the event calls it."""
    lock = filelock.FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        emit(Event("data.waiting", {"corpus": name}))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _manifest(source: sources.Source, listing: Listing, tokenizer: Tokenizer, asked: int) -> dict[str, Any]:
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
