"""A text read once: its files hashed, its documents named, measured and divided into splits."""

import array
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import numpy as np

from meristem.data import seen, sources, split
from meristem.data.bad import BadRecords
from meristem.data.config import DataConfig
from meristem.data.hashing import LEAST_BYTES, HashThread
from meristem.data.token_files import Piece
from meristem.errors import DataError, FileChanged, SplitError

_BINARY_BYTES: Final = 1 << 13
"""How much of a file is looked through for a byte 0, which no text holds; as git does."""

_MOST_AHEAD_BYTES: Final = 1 << 23
"""How far the reading goes on while what was read is hashed."""


@dataclass
class Listing:
    """What a reading found: which files, and which part each document belongs to.

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


Passing = Callable[[sources.Document, int | None], None]
"""Is shown each document, or piece of one, that holds text, and with the last piece the number that its copies share.
"""


class Reading:
    """A reading of a text: its documents by name, content and size, from which it can be divided.

    learns: the kind of tokenizer that learns from the text, which has to be UTF-8 then; None where none does.
    passing: is shown the documents as they pass.
    """

    def __init__(
        self,
        source: sources.Source,
        data: DataConfig,
        hashing: HashThread,
        *,
        learns: str | None = None,
        passing: Passing | None = None,
    ) -> None:
        self.source = source
        self._listing = Listing(
            ratios=split.ratios_for(data.validation),
            bad=BadRecords(data.max_bad_fraction),
            is_chat=data.format == "chat",
        )
        split.require_ratios(self._listing.ratios)
        contents, sizes, file, n_binary, first_binary = array.array("Q"), array.array("Q"), None, 0, None
        size_bytes = 0
        for document, content in hashed(source.read(), self._listing, hashing):
            if learns:
                _require_utf8(document, learns, size_bytes)
            if document.file != file and b"\0" in document.text[:_BINARY_BYTES]:
                n_binary, first_binary = n_binary + 1, first_binary or document.file
            file = document.file
            size_bytes += len(document.text)
            if passing:
                passing(document, content)
            if content is not None:
                self._listing.parts.append(split.assign(document.id, self._listing.ratios))
                self._listing.sources.append(document.source)
                sizes.append(size_bytes)
                contents.append(content)
                size_bytes = 0
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

    def divided(self, group: str) -> Listing:
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
            if _is_cut(np.bincount(parts[own], self._sizes[own], len(ratios)).tolist(), ratios):
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

    def has_copies_in(self, cut: Collection[int]) -> bool:
        """Whether one of these sources holds a document that is a copy of an earlier one."""
        source_of = np.frombuffer(bytes(self._listing.sources), dtype=np.uint8)
        return bool((~self._is_first & np.isin(source_of, list(cut))).any())


def _is_cut(sizes: Iterable[float], ratios: Iterable[float]) -> bool:
    """Whether a part with a share would be empty."""
    return any(ratio > 0 and size == 0 for ratio, size in zip(ratios, sizes, strict=True))


class Guess:
    """How a text will most likely be divided, known before it is read, so that it can be written while it is read.

    Documents are divided by their names, and copies go where the first one went. Sources whose documents can be listed
    with their sizes are cut where they have to be. ``is_right`` says whether that is what the reading came to.
    """

    _MOST_KNOWN: Final = 1 << 20
    """Documents of which copies are known; more take too much memory."""

    def __init__(self, source: sources.Source, ratios: tuple[float, float, float]) -> None:
        self._ratios = ratios
        self.parts, self.cuts = bytearray(), _cuts(source, ratios)
        self._part_of: dict[int, int] = {}
        self._offsets, self._splitting = dict.fromkeys(self.cuts, 0), _Splitting()
        self._part: int | None = None

    def divide(self, document: sources.Document, content: int | None) -> list[Piece]:
        """The pieces of a document, or of a piece of one, in their splits."""
        number = document.source
        if number in self.cuts:
            if content is not None:
                self.parts.append(0)
            at = self._offsets[number]
            self._offsets[number] += len(document.text)
            edges = [_edge(document.text, cut - at) for cut in self.cuts[number]]
            return list(self._splitting.pieces(document, edges))
        if self._part is None:
            self._part = split.assign(document.id, self._ratios)
            if content is not None:
                self._part = self._part_of.get(content, self._part)
        part = self._part
        if content is not None:
            self.parts.append(part)
            if len(self._part_of) < self._MOST_KNOWN:
                self._part_of.setdefault(content, part)
            self._part = None
        return [Piece(split.SPLITS[part], document.text, number, document.goes_on)]

    def is_right(self, reading: Reading, listing: Listing) -> bool:
        """Whether the text was divided so."""
        if self.cuts != listing.cuts or reading.has_copies_in(self.cuts):
            return False
        is_divided = ~np.isin(np.frombuffer(bytes(listing.sources), dtype=np.uint8), list(self.cuts))
        found, guessed = (np.frombuffer(bytes(parts), dtype=np.uint8) for parts in (listing.parts, self.parts))
        return bool(np.array_equal(found[is_divided], guessed[is_divided]))


def _cuts(source: sources.Source, ratios: tuple[float, float, float]) -> dict[int, tuple[int, int]]:
    """Where the sources of a text are cut, as far as that can be known from the sizes of their files."""
    sizes: dict[int, list[int]] = {}
    for number, name, size_bytes in source.listed():
        part = split.assign(name, ratios) if size_bytes else 0
        sizes.setdefault(number, [0] * len(ratios))[part] += size_bytes
    return {
        number: split.cut_points(sum(of_parts), ratios)
        for number, of_parts in sizes.items()
        if _is_cut(of_parts, ratios)
    }


class _FileHash:
    """Of one file: the hash of its texts, and the number that the copies of each of its documents share.

    That is the beginning of SHA-256 of the text with every line end as one line feed: mostly the hash that the file has
    with its first document, and else one more.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._own: Any = None
        self._is_first, self._goes_on = True, False

    def take(self, text: bytes, goes_on: bool) -> int | None:
        """One more text; the number, where it ends a document."""
        if not self._goes_on:
            self._own = None if self._is_first else hashlib.sha256()
        if self._own is None and b"\r" in text:
            self._own = self.digest.copy()
        self.digest.update(text)
        if self._own is not None:
            self._own.update(split.normal(text))
        self._goes_on = goes_on
        if goes_on:
            return None
        self._is_first = False
        return int.from_bytes((self._own or self.digest).digest()[:8], "little")


class _Hashed(NamedTuple):
    """A document, of which file, and the number to come."""

    document: sources.Document
    file: _FileHash
    content: "Future[int | None] | int | None"


def hashed(
    documents: Iterable[sources.Document], listing: Listing, hashing: HashThread
) -> Iterator[tuple[sources.Document, int | None]]:
    """The documents that hold text, with the numbers that their copies share; when the last has passed, the listing
    knows every file and the hash of them all.

    Of a document in pieces the number comes with the last one.
    """
    whole, n_empty, size_bytes = hashlib.sha256(), 0, 0
    files: dict[tuple[int, str], dict[str, Any]] = {}
    numbered = _numbered(documents, hashing)
    for place, group in itertools.groupby(numbered, key=lambda each: (each.document.source, each.document.file)):
        of_file = 0
        for each in group:
            document, file = each.document, each.file
            number = each.content.result() if isinstance(each.content, Future) else each.content
            size_bytes += len(document.text)
            if not document.goes_on:
                whole.update(f"{document.id}\0{size_bytes}\0".encode())
                listing.bad.count(document)
                n_empty += not size_bytes and document.bad is None
                of_file, size_bytes = of_file + size_bytes, 0
            if document.text:
                yield document, number
        files[place] = {"uri": place[1], "size_bytes": of_file, "sha256": file.digest.hexdigest()}
        whole.update(file.digest.digest())
    listing.files, listing.n_empty, listing.digest = files, n_empty, whole.hexdigest()


def _numbered(documents: Iterable[sources.Document], hashing: HashThread) -> Iterator[_Hashed]:
    """The documents with their numbers, hashed on another thread where they are long, while the next ones are read."""
    waiting: deque[_Hashed] = deque()
    waiting_bytes, place, file, is_beside = 0, None, _FileHash(), False
    for document in documents:
        if (document.source, document.file) != place:
            place, file = (document.source, document.file), _FileHash()
            is_beside = len(document.text) >= LEAST_BYTES
        size_bytes = len(document.text)
        if is_beside:
            found: Future[int | None] | int | None = hashing.submit(
                size_bytes, file.take, document.text, document.goes_on
            )
        else:
            found = file.take(document.text, document.goes_on)
        waiting.append(_Hashed(document, file, found))
        waiting_bytes += size_bytes
        while waiting_bytes > _MOST_AHEAD_BYTES:
            waiting_bytes -= len(waiting[0].document.text)
            yield waiting.popleft()
    yield from waiting


def divided(source: sources.Source, listing: Listing, hashing: HashThread) -> Iterator[Piece]:
    """The documents, or the pieces of them, in their order, read once more.

    Raises ``FileChanged`` in the end when the text is no longer the one that was listed.
    """
    again, number = Listing(bad=BadRecords(1.0)), 0
    cutting = _Cutting(listing)
    for document, content in hashed(source.read(), again, hashing):
        if number < len(listing.parts):
            yield from cutting.pieces(document, number)
        number += content is not None
    if again.digest != listing.digest:
        names = sorted({*listing.files, *again.files})
        changed = [name for name in names if listing.files.get(name) != again.files.get(name)]
        raise FileChanged(
            f"the text of '{source.name}' changed while it was prepared: "
            f"{', '.join(name for _, name in changed[:3])}. Prepare it again when nothing writes to it.",
            paths=[name for _, name in changed],
        )


class _Cutting:
    """Where documents are cut by a listing: a first one where its source is, a copy where its first one was."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._offsets = dict.fromkeys(listing.cuts, 0)
        # Where first documents are cut, by what copies of them have in common.
        self._marks: dict[int, list[int]] = {}
        self._begun, self._n_normal = -1, 0
        self._splitting = _Splitting()

    def pieces(self, document: sources.Document, number: int) -> Iterator[Piece]:
        """What of one more document, or piece of one, is of which split. number: of the document."""
        listing, text = self._listing, document.text
        first = number if listing.firsts is None else int(listing.firsts[number])
        cut = listing.sources[first]
        if cut not in listing.cuts:
            yield Piece(split.SPLITS[listing.parts[number]], text, document.source, document.goes_on)
            return
        if self._begun != number:
            self._begun, self._n_normal = number, 0
        if first == number:
            at = self._offsets[cut]
            self._offsets[cut] += len(text)
            edges = [_edge(text, place - at) for place in listing.cuts[cut]]
            if listing.firsts is not None:
                marks = self._marks.setdefault(number, [0] * len(edges))
                for index, edge in enumerate(edges):
                    if edge > 0:
                        marks[index] = self._n_normal + len(split.normal(text[:edge]))
        else:
            lengths = [mark - self._n_normal for mark in self._marks[first]]
            edges = [min(split.place_in(text, length), len(text)) if length > 0 else 0 for length in lengths]
        if listing.firsts is not None:
            self._n_normal += len(split.normal(text))
        yield from self._splitting.pieces(document, edges)


def _edge(text: bytes, place: int) -> int:
    """Where a piece of a text is cut, given where it would be: outside of it, at one of its ends."""
    return split.character_start(text, place) if 0 < place <= len(text) else min(max(place, 0), len(text))


class _Splitting:
    """Cuts documents where the splits meet, also those that come in pieces."""

    def __init__(self) -> None:
        self._unfinished: str | None = None

    def pieces(self, document: sources.Document, edges: Iterable[int]) -> Iterator[Piece]:
        """edges: where in this text one split ends and the next begins."""
        text = document.text
        for name, (start, stop) in zip(split.SPLITS, itertools.pairwise((0, *edges, len(text))), strict=True):
            if start < stop:
                if self._unfinished not in (None, name):
                    yield Piece(self._unfinished or name, b"", document.source)
                goes_on = document.goes_on and stop == len(text)
                self._unfinished = name if goes_on else None
                yield Piece(name, text[start:stop], document.source, goes_on)


def _require_utf8(document: sources.Document, kind: str, offset: int) -> None:
    """offset: of the piece within its document."""
    try:
        document.text.decode()
    except UnicodeDecodeError as cause:
        raise DataError(
            f"{document.id} is not UTF-8: {cause.reason} at byte {offset + cause.start}, "
            f"0x{document.text[cause.start]:02x}. tokenizer.kind={kind} learns from characters. Leave the file out "
            f"with data.exclude, or set tokenizer.kind=byte.",
            path=document.id,
            offset=offset + cause.start,
        ) from cause
