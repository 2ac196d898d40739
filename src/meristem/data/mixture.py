"""Which source of a mixture each row of the batches is taken from, by its number alone."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from meristem.data.config import MIXED_ROWS
from meristem.data.windows import permute


class Mixture:
    """The rows of all batches in one row of numbers, of which each source has its share.

    Of every ``MIXED_ROWS`` rows in turn each source has the same whole number, the nearest to its share, in an order
    that a key draws anew. So the row with a number, and how many of its source came before it, are found at once, and
    the shares of a run are its weights but for what is left of the last rows.
    """

    def __init__(self, weights: Sequence[float], key: int) -> None:
        """weights: of the sources, in any unit, each at least ``1 / MIXED_ROWS`` of their sum."""
        self._n = _apportioned(np.array(weights) / sum(weights) * MIXED_ROWS)
        self._key = key
        self._turn = lru_cache(maxsize=2)(self._turn_of)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row the number of its source, and how many rows of that source come before it."""
        source_n, before_n = np.empty_like(rows), np.empty_like(rows)
        turn_n, at_n = np.divmod(rows, MIXED_ROWS)
        for turn in np.unique(turn_n).tolist():
            own = turn_n == turn
            sources, before = self._turn(turn)
            source_n[own] = sources[at_n[own]]
            before_n[own] = turn * self._n[source_n[own]] + before[at_n[own]]
        return source_n, before_n

    def counts(self, n_rows: int) -> np.ndarray:
        """How many of the first rows are of each source."""
        turn, rest = divmod(n_rows, MIXED_ROWS)
        counts: np.ndarray = turn * self._n + np.bincount(self._turn(turn)[0][:rest], minlength=len(self._n))
        return counts

    def _turn_of(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of the rows of a turn, and how many of the same come before each."""
        drawn = permute(np.arange(MIXED_ROWS), MIXED_ROWS, self._key, turn)
        sources = np.searchsorted(np.cumsum(self._n), drawn, side="right")
        before = np.empty_like(sources)
        for source, n_rows in enumerate(self._n.tolist()):
            before[sources == source] = np.arange(n_rows)
        return sources, before


def _apportioned(exact_n: np.ndarray) -> np.ndarray:
    """Whole numbers, none of them 0, with the sum of these and as near to them as may be: by largest remainders."""
    whole_n: np.ndarray = np.maximum(np.floor(exact_n).astype(np.int64), 1)
    left = round(exact_n.sum()) - int(whole_n.sum())
    whole_n[np.argsort(whole_n - exact_n, kind="stable")[:left]] += 1
    return whole_n
