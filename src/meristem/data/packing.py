"""Whole documents in rows: which row reads what, where each row takes the next document when it has read one."""

from collections.abc import Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from threading import Lock
from typing import Final, NamedTuple

import numpy as np

from meristem.data.config import DifficultyConfig
from meristem.data.difficulty import Stages

KEPT_EVERY: Final = 256
"""Positions from one state that is kept to the next: at most so many windows are walked again for an earlier one."""

_STRETCH: Final = 1 << 12
"""Documents whose places in the order are found together."""


class Piece(NamedTuple):
    """What a row reads without a break: ``n_tokens`` inputs from ``first`` on, each with the token that follows.

    begins: the document begins here.
    """

    first: int
    n_tokens: int
    begins: bool


class _State(NamedTuple):
    """Before a window: where each row stands in the text, how much of its document is left, from which source that is;
    and of each source the documents taken, and their inputs."""

    first_n: np.ndarray
    left_n: np.ndarray
    source_n: np.ndarray
    taken: np.ndarray
    inputs: np.ndarray


class PackedText:
    """The documents of one source that give an input, those of two tokens or more, in an order for each epoch."""

    def __init__(self, edges: np.ndarray, key: int, difficulty: np.ndarray | None, how: DifficultyConfig) -> None:
        """edges: where its documents begin, and last where they end. key: of their orders.

        difficulty: of each, where the easiest come first.
        """
        n_inputs = np.diff(edges) - 1
        own = np.flatnonzero(n_inputs > 0)
        is_rising = difficulty is not None and len(own) > 0
        if difficulty is not None:
            own = own[np.argsort(difficulty[own], kind="stable")]
        self._firsts, self._inputs, self._key = edges[:-1][own], n_inputs[own], key
        self._stages = Stages.rising_by_size(self._inputs, how, key) if is_rising else Stages.one(len(own))
        self._stretch = lru_cache(maxsize=2)(self._stretch_of)

    @property
    def n_documents(self) -> int:
        """Documents of two tokens or more that are read in the end."""
        return int(self._stages.n_admitted[-1])

    @property
    def n_inputs(self) -> int:
        """Their inputs."""
        return int(self._inputs[: self.n_documents].sum())

    def document(self, n_taken: int) -> tuple[int, int]:
        """Where the document begins that is taken after so many, and how many inputs it gives."""
        stretch, place = divmod(n_taken, _STRETCH)
        document = int(self._stretch(stretch)[place])
        return int(self._firsts[document]), int(self._inputs[document])

    def _stretch_of(self, number: int) -> np.ndarray:
        return self._stages.items(np.arange(number * _STRETCH, (number + 1) * _STRETCH), self._key)


class Packing:
    """The documents of an epoch in a shuffled order, and after them those of the next; the row that is first at the end
    of its document takes the next one, of several the one with the lowest number.

    So every document is read whole and by one row, no place is empty, and each epoch has every document once. A
    document of z tokens gives z - 1 inputs with their targets; none is the first token of another. What a row reads
    follows from the rows before: a position is found by walking there from the last state that was kept.

    Of several sources each has epochs of its own, and the next document is of the one that is the furthest behind its
    share of all inputs.
    """

    def __init__(self, texts: Sequence[PackedText], *, weights: Sequence[float], n_rows: int, window: int) -> None:
        """texts: of each source."""
        self._texts, self._weights, self._window = texts, np.array(weights), window
        rows, sources = np.zeros(n_rows, dtype=np.int64), np.zeros(len(texts), dtype=np.int64)
        self._states = {0: _State(rows, rows, rows, sources, sources)}
        self._last = 0, self._states[0]
        # A stream is read by the thread that reads ahead, and by whoever asks it for something else.
        self._lock = Lock()

    @property
    def n_documents(self) -> int:
        """Documents that give an input: those of two tokens or more."""
        return sum(text.n_documents for text in self._texts)

    @property
    def n_inputs(self) -> list[int]:
        """Inputs of an epoch of each source."""
        return [text.n_inputs for text in self._texts]

    def rows(self, position: int) -> list[list[Piece]]:
        """What each row reads in the window with this number, in pieces that fill it."""
        return self._step(self._at(position))[0]

    def counts(self, position: int) -> np.ndarray:
        """How many inputs of each source come before the window with this number."""
        state = self._at(position)
        left = np.bincount(state.source_n, state.left_n, minlength=len(self._texts))
        return state.inputs - left.astype(np.int64)

    def _at(self, position: int) -> _State:
        """The state before a window."""
        with self._lock:
            at, state = self._last
            if at > position:
                at = max(kept for kept in self._states if kept <= position)
                state = self._states[at]
            for now in range(at, position):
                _, state = self._step(state)
                if (now + 1) % KEPT_EVERY == 0:
                    self._states[now + 1] = state
            self._last = position, state
            return state

    def _step(self, state: _State) -> tuple[list[list[Piece]], _State]:
        """The pieces of one window, and the state after it."""
        source_n, taken, inputs = state.source_n.copy(), state.taken.copy(), state.inputs.copy()
        read_n = np.minimum(state.left_n, self._window)
        rows = [
            [Piece(first, n_tokens, begins=False)] if n_tokens else []
            for first, n_tokens in zip(state.first_n.tolist(), read_n.tolist(), strict=True)
        ]
        free = [(n_tokens, row) for row, n_tokens in enumerate(state.left_n.tolist()) if n_tokens < self._window]
        first_n, left_n = state.first_n + read_n, state.left_n - read_n
        heapify(free)
        while free:
            at, row = heappop(free)
            source = int(np.argmin(inputs / self._weights)) if len(self._texts) > 1 else 0
            first, n_inputs = self._texts[source].document(int(taken[source]))
            taken[source] += 1
            inputs[source] += n_inputs
            n_tokens = min(n_inputs, self._window - at)
            rows[row].append(Piece(first, n_tokens, begins=True))
            source_n[row] = source
            first_n[row], left_n[row] = first + n_tokens, n_inputs - n_tokens
            if at + n_inputs < self._window:
                heappush(free, (at + n_inputs, row))
        return rows, _State(first_n, left_n, source_n, taken, inputs)
