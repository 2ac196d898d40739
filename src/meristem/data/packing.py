"""Whole documents in rows: which row reads what, where each row takes the next document when it has read one."""

from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Final, NamedTuple

import numpy as np

from meristem.data.windows import permute

KEPT_EVERY: Final = 256
"""Positions from one state that is kept to the next: at most so many windows are walked again for an earlier one."""


class Piece(NamedTuple):
    """What a row reads without a break: ``n_tokens`` inputs from ``first`` on, each with the token that follows.

    begins: the document begins here.
    """

    first: int
    n_tokens: int
    begins: bool


class _State(NamedTuple):
    """Before a window: where each row stands in the text, how much of its document is left, and documents taken."""

    first_n: np.ndarray
    left_n: np.ndarray
    n_taken: int


class Packing:
    """The documents of an epoch in a shuffled order, and after them those of the next; the row that is first at the end
    of its document takes the next one, of several the one with the lowest number.

    So every document is read whole and by one row, no place is empty, and each epoch has every document once. A
    document of z tokens gives z - 1 inputs with their targets; none is the first token of another. What a row reads
    follows from the rows before: a position is found by walking there from the last state that was kept.
    """

    def __init__(self, edges: np.ndarray, *, n_rows: int, window: int, key: int) -> None:
        """edges: where each document begins, and last where they end. key: of the orders."""
        n_inputs = np.diff(edges) - 1
        self._firsts, self._inputs = edges[:-1][n_inputs > 0], n_inputs[n_inputs > 0]
        self._window, self._key = window, key
        nothing = np.zeros(n_rows, dtype=np.int64)
        self._states = {0: _State(nothing, nothing, 0)}
        self._last = 0, self._states[0]
        self._order = lru_cache(maxsize=2)(self._order_of)

    @property
    def n_documents(self) -> int:
        """Documents that give an input: those of two tokens or more."""
        return len(self._inputs)

    @property
    def n_inputs(self) -> int:
        """Inputs of an epoch."""
        return int(self._inputs.sum())

    def rows(self, position: int) -> list[list[Piece]]:
        """What each row reads in the window with this number, in pieces that fill it."""
        at, state = self._last
        if at > position:
            at = max(kept for kept in self._states if kept <= position)
            state = self._states[at]
        for now in range(at, position):
            _, state = self._step(state)
            if (now + 1) % KEPT_EVERY == 0:
                self._states[now + 1] = state
        self._last = position, state
        return self._step(state)[0]

    def _step(self, state: _State) -> tuple[list[list[Piece]], _State]:
        """The pieces of one window, and the state after it."""
        first_n, left_n, n_taken = state.first_n.copy(), state.left_n.copy(), state.n_taken
        read_n = np.minimum(left_n, self._window)
        rows = [
            [Piece(first, n_tokens, begins=False)] if n_tokens else []
            for first, n_tokens in zip(first_n.tolist(), read_n.tolist(), strict=True)
        ]
        free = [(n_tokens, row) for row, n_tokens in enumerate(left_n.tolist()) if n_tokens < self._window]
        first_n, left_n = first_n + read_n, left_n - read_n
        heapify(free)
        while free:
            at, row = heappop(free)
            epoch, place = divmod(n_taken, self.n_documents)
            document = int(self._order(epoch)[place])
            n_taken += 1
            first, n_inputs = int(self._firsts[document]), int(self._inputs[document])
            n_tokens = min(n_inputs, self._window - at)
            rows[row].append(Piece(first, n_tokens, begins=True))
            first_n[row], left_n[row] = first + n_tokens, n_inputs - n_tokens
            if at + n_inputs < self._window:
                heappush(free, (at + n_inputs, row))
        return rows, _State(first_n, left_n, n_taken)

    def _order_of(self, epoch: int) -> np.ndarray:
        return permute(np.arange(self.n_documents), self.n_documents, self._key, epoch)
