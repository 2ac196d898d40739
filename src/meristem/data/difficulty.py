"""Which documents are read when: the easiest first, and by and by all that are admitted.

A curriculum over the difficulty of documents. The share of a text that is admitted rises as the competence of Platanios
et al. 2019 does, by the square root: what is newly admitted gets the same time, whatever there is already.
"""

import math
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from meristem.data.config import DifficultyConfig
from meristem.data.corpus import Corpus
from meristem.data.windows import permute

N_STAGES: Final = 20
"""In how many steps the admitted share rises."""

_CHUNK: Final = 1 << 22
"""Ids that are counted together."""

_ONE_BIT: Final = 1 << 16
"""Bits are counted in whole numbers of this unit, so that their sums are the same everywhere."""


@dataclass(frozen=True)
class Stages:
    """Of items in the order of their difficulty, how many are admitted, by stage.

    n_admitted: the first so many items. begins: how many items were taken before the stage begins; the first is 0. The
    last stage has no end. Within a stage every admitted item is taken once before any is taken twice.
    """

    n_admitted: np.ndarray
    begins: np.ndarray

    @classmethod
    def one(cls, n_items: int) -> Self:
        """All items, from the beginning on."""
        return cls(np.array([n_items]), np.zeros(1, dtype=np.int64))

    @classmethod
    def rising(cls, n_items: int, how: DifficultyConfig) -> Self:
        """Of items of one size."""
        n_admitted = np.array([max(1, math.ceil(share * n_items)) for share in _shares(how)])
        n_ramp = max(1, round(how.epochs * int(n_admitted[-1])))
        return cls(n_admitted, np.arange(N_STAGES + 1) * n_ramp // N_STAGES)

    @classmethod
    def rising_by_size(cls, sizes: np.ndarray, how: DifficultyConfig, key: int) -> Self:
        """Of items of these sizes, whose shares and stages are of the sum of sizes; a stage ends with a whole item."""
        ends = np.cumsum(sizes)
        n_admitted = np.minimum(np.searchsorted(ends, [share * ends[-1] for share in _shares(how)]) + 1, len(sizes))
        size_of_ramp = max(1, round(how.epochs * int(ends[n_admitted[-1] - 1])))
        begins, done = [0], 0
        for stage, n_of in enumerate(n_admitted[:-1].tolist()):
            # In whole epochs of what is admitted, and what is left of the last one.
            left = size_of_ramp * (stage + 1) // N_STAGES - done
            n_epochs, left = divmod(max(0, left), int(ends[n_of - 1]))
            order = permute(np.arange(n_of), n_of, key, n_epochs * (N_STAGES + 1) + stage)
            taken = np.cumsum(sizes[order])
            n_last = int(np.searchsorted(taken, left)) + 1 if left else 0
            done += n_epochs * int(ends[n_of - 1]) + (int(taken[n_last - 1]) if n_last else 0)
            begins.append(begins[-1] + n_epochs * n_of + n_last)
        return cls(n_admitted, np.array(begins))

    def items(self, taken: np.ndarray, key: int) -> np.ndarray:
        """Which items are taken after so many of them; in an order that ``key`` draws anew in every epoch."""
        items, stage_n = np.empty_like(taken), np.searchsorted(self.begins, taken, side="right") - 1
        for stage in np.unique(stage_n).tolist():
            own, n_items = stage_n == stage, int(self.n_admitted[stage])
            epoch, place = np.divmod(taken[own] - self.begins[stage], n_items)
            items[own] = permute(place, n_items, key, epoch * len(self.begins) + stage)
        return items


def _shares(how: DifficultyConfig) -> list[float]:
    """The admitted share by stage: c(t) = sqrt(start^2 + (cap^2 - start^2) t), the last one ``cap``."""
    rise = how.cap**2 - how.start**2
    return [min(how.cap, math.sqrt(how.start**2 + rise * stage / N_STAGES)) for stage in range(N_STAGES + 1)]


def by_document(corpus: Corpus, split: str) -> np.ndarray:
    """How difficult each document of a split is, by ``corpus.difficulty.score``; only the order of the numbers counts.

    ``length``: its tokens. ``rarity``: its bits per token, were each drawn by itself as often as it is in the split,
    (1 / n) sum_i -log2 p(x_i).
    """
    edges = corpus.documents(split).astype(np.int64)
    lengths = np.diff(edges)
    if corpus.difficulty.score == "length":
        return lengths
    return _bits(corpus, split, edges) / np.maximum(lengths, 1)


def _bits(corpus: Corpus, split: str, edges: np.ndarray) -> np.ndarray:
    """The sum of -log2 p over the tokens of each document, in parts of a bit."""
    tokens, n_entries = corpus.tokens(split), len(corpus.tokenizer.byte_lengths)
    firsts = range(0, len(tokens), _CHUNK)
    counts = np.zeros(n_entries, dtype=np.int64)
    for first in firsts:
        counts += np.bincount(tokens[first : first + _CHUNK], minlength=n_entries)[:n_entries]
    share = np.maximum(counts, 1) / max(1, len(tokens))
    bits_of = np.rint(-np.log2(share) * _ONE_BIT).astype(np.int64)
    sums = np.zeros(len(edges) - 1, dtype=np.int64)
    for first in firsts:
        ids = tokens[first : first + _CHUNK]
        done = np.concatenate([[0], np.cumsum(bits_of[ids])])
        # The documents that have tokens here.
        low = int(np.searchsorted(edges, first, side="right")) - 1
        high = int(np.searchsorted(edges, first + len(ids)))
        sums[low:high] += np.diff(done[np.clip(edges[low : high + 1] - first, 0, len(ids))])
    return sums


class OrderedWindows:
    """The numbers of windows in the order of the difficulty of the documents in which they begin."""

    def __init__(self, n_before: np.ndarray, difficulty: np.ndarray) -> None:
        """n_before: how many windows begin before each document, and last how many there are."""
        order = np.argsort(difficulty, kind="stable")
        self._firsts, n_of = n_before[:-1][order], np.diff(n_before)[order]
        self._ends = np.cumsum(n_of)
        self._before = self._ends - n_of

    def numbers(self, items: np.ndarray) -> np.ndarray:
        """The numbers of the windows at these places of the order."""
        document = np.searchsorted(self._ends, items, side="right")
        numbers: np.ndarray = self._firsts[document] + items - self._before[document]
        return numbers
