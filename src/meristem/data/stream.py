"""Batches, each a pure function of (random seed, position, layout), so that a cursor is two words and a number.

batch, cursor = stream.next(cursor)
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self

import numpy as np
import torch

from meristem.data.config import CARRIED, DifficultyConfig, Documents, Order
from meristem.data.corpus import Corpus
from meristem.data.difficulty import OrderedWindows, Stages, by_document
from meristem.data.mixture import Mixture
from meristem.data.packing import PackedText, Packing
from meristem.data.windows import Windows, draw, key, permute
from meristem.errors import ConflictingKeys, CorpusTooShort, DataError, ManifestMismatch
from meristem.shapes import Targets, Tokens

IGNORED: Final = -100
"""The target of a place that counts nowhere: padding after the end of a document."""

N_BLOCKS: Final = 20
"""Parts of a text that ``curriculum`` reads one after the other."""


@dataclass(frozen=True)
class Batch:
    """Rows of ids with the ids that follow them.

    n_targets, n_bytes: how many targets of these rows count, and the bytes of text they stand for.
    starts: the memory must begin afresh before this batch.
    reset_mask_bt: True where a document begins, which the memory of its row must not carry into; None where nothing is
        reset. attend_mask_bt: True where a document begins, over whose beginning attention alone must not look back.
    """

    tokens_bt: Tokens
    targets_bt: Targets
    n_targets: int
    n_bytes: int
    starts: bool
    reset_mask_bt: torch.Tensor | None = None
    attend_mask_bt: torch.Tensor | None = None

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """What a model is given beside the tokens."""
        masks = {"reset_mask_bt": self.reset_mask_bt, "attend_mask_bt": self.attend_mask_bt}
        return {name: mask_bt for name, mask_bt in masks.items() if mask_bt is not None}

    @property
    def size_bytes(self) -> int:
        """Of all that it holds."""
        return sum(held.nbytes for held in (self.tokens_bt, self.targets_bt, *self.masks.values()))

    def take_rows(self, start: int, stop: int) -> "Batch":
        """The rows from ``start`` to ``stop``; the counts stay those of the batch."""
        masks: dict[str, Any] = {name: mask_bt[start:stop] for name, mask_bt in self.masks.items()}
        tokens_bt, targets_bt = self.tokens_bt[start:stop], self.targets_bt[start:stop]
        return replace(self, tokens_bt=tokens_bt, targets_bt=targets_bt, **masks)


@dataclass(frozen=True)
class Cursor:
    """The next batch: how many were taken, from which data (``fingerprint``) and in which order (``layout``)."""

    position: int
    fingerprint: str
    layout: str

    def to_json(self) -> dict[str, object]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "Cursor":
        """The cursor that ``to_json`` wrote."""
        return cls(int(str(values["position"])), str(values["fingerprint"]), str(values["layout"]))


@dataclass(frozen=True)
class SourceRead:
    """What was read of one source. epochs: how often its text was seen."""

    name: str
    n_tokens: int
    epochs: float


@dataclass(frozen=True)
class _Text:
    """The windows of one source, and the key of their orders.

    stages: how many windows are admitted when. ordered: their order where some are read before others.
    """

    name: str
    windows: Windows
    key: int
    stages: Stages
    ordered: OrderedWindows | None

    @property
    def n_windows(self) -> int:
        """Those that are read in the end."""
        return int(self.stages.n_admitted[-1])

    def starts(self, order: Order, taken: np.ndarray) -> np.ndarray:
        """Where the windows begin that are read after so many of this source."""
        n_windows = len(self.windows)
        if order == "random":
            return self.windows.starts(draw(taken, n_windows, self.key))
        if order == "curriculum":
            return self.windows.starts(self._by_blocks(taken % n_windows, taken // n_windows))
        items = self.stages.items(taken, self.key)
        return self.windows.starts(items if self.ordered is None else self.ordered.numbers(items))

    def _by_blocks(self, place: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """Windows of one block after the other; within a block each place of an epoch has another window."""
        n_windows = len(self.windows)
        size = -(-n_windows // N_BLOCKS)
        indices = np.empty_like(place)
        for block in np.unique(place // size).tolist():
            first, inside = block * size, place // size == block
            n_inside = min(size, n_windows - first)
            times = epoch[inside] * N_BLOCKS + block
            indices[inside] = first + permute(place[inside] - first, n_inside, self.key, times)
        return indices


def _text(
    name: str,
    windows: Windows,
    key: int,
    edges: np.ndarray,
    difficulty: np.ndarray | None,
    how: DifficultyConfig,
) -> _Text:
    """edges: where its documents begin, and last where they end. difficulty: of each, where the easiest come first."""
    if difficulty is None or not len(windows):
        return _Text(name, windows, key, Stages.one(len(windows)), None)
    ordered = OrderedWindows(windows.before(edges), difficulty)
    return _Text(name, windows, key, Stages.rising(len(windows), how), ordered)


class Stream:
    """The batches of a split, without end. Where the corpus has weights, its sources are mixed.

    batch: rows of a batch, those of all processes together (``share``).
    stride: tokens between sequence starts; None for ``window``, or for 1 when order is random.
    order: ``shuffled`` reads every sequence once per epoch; ``curriculum`` does too, block by block of ``N_BLOCKS`` as
    they stand in the text, each shuffled; ``random`` draws with replacement; ``sequential`` lets each
    row read on through its own contiguous part and start over at its end, the part moved by some windows from epoch
    to epoch where the rows do not share the text evenly; ``documents`` lets each row read whole documents one after the
    other, in an order that is shuffled anew in every epoch (``data.packing``), and says where each begins.
    documents: ``join`` lets sequences run over the ends of documents, ``within`` does not; ``mask`` and ``reset`` let
    them and say where documents begin, for attention alone or for whatever has a state.

    Of a mixture each source has epochs and an order of its own, and rows are taken from them by their shares
    (``data.mixture``); with ``documents`` the inputs are (``data.packing``).

    Where the corpus has a difficulty, the easiest documents of each source are read first (``data.difficulty``); a
    sequence is as difficult as the document in which it begins.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        *,
        window: int,
        stride: int | None = None,
        batch: int,
        order: Order = "shuffled",
        documents: Documents = "join",
        random_seed: int,
    ) -> None:
        stride = stride or (1 if order == "random" else window)
        self._corpus, self._split = corpus, split
        self._tokens = corpus.tokens(split)
        self._window, self._batch = window, batch
        self._rows = np.arange(batch)
        self._order = order
        self._layout = (
            f"{split} {order} {documents} window={window} stride={stride} batch={batch} random_seed={random_seed}"
        )
        self._mixture: Mixture | None = None
        if corpus.weights:
            self._layout += f" weights={','.join(map(str, corpus.weights))}"
            self._mixture = Mixture(corpus.weights, key(random_seed, "mixture"))
        if corpus.difficulty.score != "none":
            self._layout += f" difficulty={corpus.difficulty.layout}"
        edges, difficulty = _edges(corpus, split), _difficulty(corpus, split)
        names = [f"data {name}" for name in edges] if corpus.weights else ["data"]
        keys = [key(random_seed, name) for name in names]
        self._documents, self._firsts = documents, corpus.documents(split)[:-1].astype(np.int64)
        self._packing: Packing | None = None
        if order == "documents":
            texts = [
                PackedText(own, key, difficulty.get(name), corpus.difficulty)
                for (name, own), key in zip(edges.items(), keys, strict=True)
            ]
            self._packing = Packing(texts, weights=corpus.weights or (1.0,), n_rows=batch, window=window)
            self.n_windows = sum(self._packing.n_inputs) // window
            self._require_documents(self._packing, split)
            return
        spans = {
            name: np.stack([own[:-1], own[1:]], axis=1) if documents == "within" else own[[0, -1]].reshape(-1, 2)
            for name, own in edges.items()
        }
        self._texts = [
            _text(name, Windows(own, window, stride), key, edges[name], difficulty.get(name), corpus.difficulty)
            for (name, own), key in zip(spans.items(), keys, strict=True)
        ]
        for text in self._texts:
            if not len(text.windows):
                raise _too_short(text.name, split, window, int(np.diff(spans[text.name]).max(initial=0)))
        self.n_windows = sum(text.n_windows for text in self._texts)
        if order == "sequential" and self.n_windows < batch:
            raise CorpusTooShort(
                f"corpus '{corpus.name}' has {self.n_windows} sequences of {window} tokens in split '{split}'; "
                f"data.order=sequential needs one for each of {batch} rows. "
                f"Add text, or set data.batch_size to {self.n_windows} or less.",
                found=self.n_windows,
                expected=batch,
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches until every sequence was read once; the last may reach into the next epoch."""
        if self._order == "sequential":
            return self.n_windows // self._batch
        if self._packing is not None:
            return -(-sum(self._packing.n_inputs) // (self._batch * self._window))
        return -(-self.n_windows // self._batch)

    def share(self, rank: int, n_ranks: int) -> Self:
        """The same stream, of whose batches process ``rank`` of ``n_ranks`` takes its own rows, one next to the other.

        Cursor and epoch are those of the whole: any number of processes that divides the batch goes on from them.
        """
        if self._batch % n_ranks:
            raise ConflictingKeys(
                f"data.batch_size is {self._batch} rows, those of all processes together, and {n_ranks} processes "
                f"cannot share them evenly. Set data.batch_size to {-(-self._batch // n_ranks) * n_ranks}, or start a "
                f"number of processes that divides {self._batch}.",
                path="data.batch_size",
                value=self._batch,
            )
        made = copy.copy(self)
        n_rows = self._batch // n_ranks
        made._rows = np.arange(rank * n_rows, (rank + 1) * n_rows)
        return made

    def start(self) -> Cursor:
        """The cursor before the first batch."""
        return Cursor(0, self._corpus.fingerprint, self._layout)

    def epoch(self, cursor: Cursor) -> float:
        """How often the windows were seen before this cursor; of a mixture, on average."""
        if self._order == "sequential":
            return cursor.position / self.batches_per_epoch
        if self._packing is not None:
            return cursor.position * self._batch * self._window / sum(self._packing.n_inputs)
        return cursor.position * self._batch / self.n_windows

    def read(self, cursor: Cursor) -> list[SourceRead]:
        """What was read of each source of a mixture before this cursor."""
        names = list(self._corpus.sources(self._split))
        if self._packing is not None:
            n_tokens, n_all = self._packing.counts(cursor.position), self._packing.n_inputs
            return [
                SourceRead(name, n, n / whole) for name, n, whole in zip(names, n_tokens.tolist(), n_all, strict=True)
            ]
        if self._mixture is None:
            return [SourceRead(names[0], cursor.position * self._batch * self._window, self.epoch(cursor))]
        counts = self._mixture.counts(cursor.position * self._batch).tolist()
        return [
            SourceRead(text.name, n * self._window, n / text.n_windows)
            for text, n in zip(self._texts, counts, strict=True)
        ]

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The batch at the cursor, and the cursor after it."""
        self._require_same(cursor)
        tokens, targets, begins = self._read(cursor.position)
        # Afterwards: whatever was done to the files before or meanwhile, what was read is what was prepared.
        self._corpus.require_unchanged()
        self._require_known(max(int(tokens.max()), int(targets.max())))
        is_first = cursor.position == 0 if self._packing else cursor.position % self.batches_per_epoch == 0
        batch = Batch(
            tokens_bt=torch.from_numpy(tokens),
            targets_bt=torch.from_numpy(targets),
            n_targets=targets.size,
            n_bytes=int(self._corpus.tokenizer.byte_lengths[targets].sum()),
            starts=self._order not in CARRIED or is_first,
            **self._masks(begins),
        )
        return batch, replace(cursor, position=cursor.position + 1)

    def _read(self, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Ids, those that follow, and where documents begin, as far as that is known."""
        if self._packing is None:
            starts = self._starts(position)
            rows = self._tokens.rows(starts, self._window + 1).astype(np.int64)
            begins = self._begins(starts) if self._documents in ("mask", "reset") else None
            return rows[:, :-1].copy(), rows[:, 1:].copy(), begins
        shape = len(self._rows), self._window
        tokens, targets = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        begins = np.zeros(shape, dtype=np.bool_)
        packed = self._packing.rows(position)
        for row, number in enumerate(self._rows.tolist()):
            at = 0
            for piece in packed[number]:
                ids = self._tokens[piece.first : piece.first + piece.n_tokens + 1]
                stop = at + piece.n_tokens
                tokens[row, at:stop], targets[row, at:stop], begins[row, at] = ids[:-1], ids[1:], piece.begins
                at = stop
        return tokens, targets, begins

    def _begins(self, starts: np.ndarray) -> np.ndarray:
        """True where a document begins in the windows that begin there."""
        begins = np.zeros((len(starts), self._window), dtype=np.bool_)
        low, high = (np.searchsorted(self._firsts, edges) for edges in (starts, starts + self._window))
        for row, start in enumerate(starts.tolist()):
            begins[row, self._firsts[low[row] : high[row]] - start] = True
        return begins

    def _masks(self, begins: np.ndarray | None) -> dict[str, Any]:
        """What a batch says of where documents begin."""
        if begins is None:
            return {}
        name = "attend_mask_bt" if self._documents == "mask" else "reset_mask_bt"
        return {name: torch.from_numpy(begins)}

    def _starts(self, position: int) -> np.ndarray:
        """Where the window of each row of the batch at this position begins."""
        rows = self._rows
        if self._order == "sequential":
            (text,), per_row = self._texts, self.batches_per_epoch
            epoch, place = divmod(position, per_row)
            left_over = self.n_windows - per_row * self._batch
            moved = draw(np.array([epoch]), left_over + 1, text.key)
            return text.windows.starts(moved + rows * per_row + place)
        taken = position * self._batch + rows
        if self._mixture is None:
            return self._texts[0].starts(self._order, taken)
        source_n, before_n = self._mixture.take(taken)
        starts = np.empty_like(taken)
        for source in np.unique(source_n).tolist():
            own = source_n == source
            starts[own] = self._texts[source].starts(self._order, before_n[own])
        return starts

    def _require_documents(self, packing: Packing, split: str) -> None:
        """Refuse too few documents for the rows, and a source without any."""
        if packing.n_documents < self._batch:
            raise _too_few_documents(self._corpus, split, packing.n_documents, self._batch)
        for name, n_inputs in zip(self._corpus.sources(split), packing.n_inputs, strict=True):
            if not n_inputs:
                raise _too_short(name, split, 1, 1)

    def _require_known(self, largest: int) -> None:
        """Files are compared with their hashes when they are opened; later a disk may still give other bytes."""
        n_known = len(self._corpus.tokenizer.byte_lengths)
        if largest >= n_known:
            raise ManifestMismatch(
                f"corpus '{self._corpus.name}' gave the id {largest}, and its tokenizer has {n_known} entries: its "
                f"files were read wrongly. Check the disk, prepare the text again and resume the run.",
                path=str(self._corpus.path),
                found=largest,
                expected=n_known,
            )

    def _require_same(self, cursor: Cursor) -> None:
        if cursor.fingerprint != self._corpus.fingerprint:
            raise ManifestMismatch(
                f"the cursor belongs to data {cursor.fingerprint[:12]}, this corpus '{self._corpus.name}' is "
                f"{self._corpus.fingerprint[:12]}: the text, its split or its tokenizer changed. "
                f"Bring the old text back, or start a new run.",
                found=self._corpus.fingerprint,
                expected=cursor.fingerprint,
            )
        if cursor.layout != self._layout:
            raise DataError(
                f"the cursor counts batches of '{cursor.layout}', this stream gives '{self._layout}'. "
                f"Set the keys of data and run.seed as they were, or start a new run.",
                found=self._layout,
                expected=cursor.layout,
            )


def held_out(corpus: Corpus, split: str, *, window: int, batch: int, max_windows: int | None = None) -> Iterator[Batch]:
    """The documents of a split once each, from front to back, in windows that do not overlap.

    Every token but the first of a document is a target exactly once. The last window of a document is padded with
    targets of ``IGNORED``. max_windows: take that many, evenly spread, the same ones every time.
    """
    tokens, edges = corpus.tokens(split), corpus.documents(split).astype(np.int64)
    n_windows = -(-np.maximum(np.diff(edges) - 1, 0) // window)
    last = np.cumsum(n_windows)
    if not last[-1]:
        raise _too_short(corpus.name, split, 1, int(np.diff(edges).max()))
    chosen = np.arange(last[-1])
    if max_windows is not None and max_windows < len(chosen):
        chosen = np.arange(max_windows) * len(chosen) // max_windows
    lengths = corpus.tokenizer.byte_lengths
    for first in range(0, len(chosen), batch):
        numbers = chosen[first : first + batch]
        document = np.searchsorted(last, numbers, side="right")
        starts = edges[document] + (numbers - last[document] + n_windows[document]) * window
        places = starts[:, None] + np.arange(window + 1)
        is_text = places < edges[document + 1][:, None]
        rows = np.where(is_text, tokens.rows(starts, window + 1).astype(np.int64), 0)
        is_target = is_text[:, 1:]
        yield Batch(
            tokens_bt=torch.from_numpy(rows[:, :-1].copy()),
            targets_bt=torch.from_numpy(np.where(is_target, rows[:, 1:], IGNORED)),
            n_targets=int(is_target.sum()),
            n_bytes=int((lengths[rows[:, 1:]] * is_target).sum()),
            starts=True,
        )


def held_out_documents(
    corpus: Corpus, split: str, *, window: int, batch: int, max_windows: int | None = None
) -> Iterator[Batch]:
    """The documents of a split once each, each in a row of its own, which reads on from window to window.

    ``starts`` of a batch says that its rows begin other documents than those before. Documents of about one length are
    read together, the shortest first; what is missing in a row counts nowhere (``IGNORED``), and every token but the
    first of a document is a target exactly once.
    max_windows: take documents, evenly spread and the same ones every time, as long as their tokens fill no more than
        that many windows; of the first, where it is longer, what does.
    """
    tokens, edges = corpus.tokens(split), corpus.documents(split).astype(np.int64)
    n_inputs = np.diff(edges) - 1
    if n_inputs.max(initial=0) < 1:
        raise _too_short(corpus.name, split, 1, int(np.diff(edges).max()))
    chosen = np.flatnonzero(n_inputs > 0)
    if max_windows is not None:
        chosen = _spread(chosen, n_inputs, max_windows * window)
        n_inputs = np.minimum(n_inputs, max_windows * window)
    chosen = chosen[np.argsort(n_inputs[chosen], kind="stable")]
    lengths = corpus.tokenizer.byte_lengths
    for numbers in np.split(chosen, range(batch, len(chosen), batch)):
        for first in range(0, int(n_inputs[numbers].max()), window):
            rows = tokens.rows(edges[numbers] + first, window + 1).astype(np.int64)
            is_target = first + np.arange(window) < n_inputs[numbers][:, None]
            yield Batch(
                tokens_bt=torch.from_numpy(np.where(is_target, rows[:, :-1], 0)),
                targets_bt=torch.from_numpy(np.where(is_target, rows[:, 1:], IGNORED)),
                n_targets=int(is_target.sum()),
                n_bytes=int((lengths[np.where(is_target, rows[:, 1:], 0)] * is_target).sum()),
                starts=first == 0,
            )


def _spread(documents: np.ndarray, n_inputs: np.ndarray, most: int) -> np.ndarray:
    """As many of the documents, evenly spread, as have at most so many inputs together; at least one."""
    low, high = 1, len(documents)
    while low < high:
        middle = (low + high + 1) // 2
        taken = documents[np.arange(middle) * len(documents) // middle]
        low, high = (middle, high) if n_inputs[taken].sum() <= most else (low, middle - 1)
    found: np.ndarray = documents[np.arange(low) * len(documents) // low]
    return found


def _edges(corpus: Corpus, split: str) -> dict[str, np.ndarray]:
    """Where the documents of each source that is mixed begin, and last where they end; else of all as one."""
    edges = corpus.documents(split).astype(np.int64)
    if not corpus.weights:
        return {corpus.name: edges}
    return {name: edges[own.start : own.stop + 1] for name, own in corpus.sources(split).items()}


def _difficulty(corpus: Corpus, split: str) -> dict[str, np.ndarray]:
    """How difficult the documents are of each source that is mixed, else of all as one.

    A source whose documents are all alike has no order, and is not among them.
    """
    score = corpus.difficulty.score
    if score == "none":
        return {}
    whole = by_document(corpus, split)
    own = corpus.sources(split) if corpus.weights else {corpus.name: slice(None)}
    found = {name: whole[part] for name, part in own.items() if len(np.unique(whole[part])) > 1}
    if not found:
        alike = f"{len(whole)} documents of one {score}" if len(whole) > 1 else "one document"
        raise DataError(
            f"data.difficulty.score={score} orders documents, and '{corpus.name}' has {alike} in split '{split}'. Give "
            f"it as records or as a directory of files, or leave data.difficulty out.",
            found=len(whole),
        )
    return found


def _too_few_documents(corpus: Corpus, split: str, n_documents: int, batch: int) -> CorpusTooShort:
    advice = f"set data.batch_size to {n_documents} or less" if n_documents else "prepare text with longer documents"
    return CorpusTooShort(
        f"corpus '{corpus.name}' has {n_documents} documents of two tokens or more in split '{split}'; "
        f"data.order=documents needs one for each of {batch} rows. Add text, {advice}, or set data.order=shuffled.",
        found=n_documents,
        expected=batch,
    )


def _too_short(name: str, split: str, window: int, longest: int) -> CorpusTooShort:
    hint = f", or set data.seq_len to {longest - 1} or less" if longest > 1 else ""
    return CorpusTooShort(
        f"corpus '{name}' holds {longest} tokens in the longest run of split '{split}'; a sequence of {window} "
        f"needs at least {window + 1}. Add text{hint}.",
        found=longest,
        expected=window + 1,
    )
