"""Documents that are nearly the same, found by how many of their runs of characters they share.

Two documents are near where the share of runs that both have, of those that either has (Jaccard), is at least
``SIMILAR``. It is estimated from sketches of a fixed size, to within about 0.04, so that the work is linear in text and
documents. Differences in case and in white space count nowhere.
Source: Broder 1997, on the resemblance of documents; Shrivastava and Li 2014, one permutation hashing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from meristem.data.corpus import Corpus
from meristem.data.windows import mix

SIMILAR: Final = 0.8

_RUN: Final = 16
"""Bytes of a run: three or four words. A power of two, which hashing them by doubling needs."""

_N_HASHES: Final = 128
_PER_BAND: Final = 6
"""Numbers of a sketch that two documents must share in one band to be compared: of documents that share 0.8 of their
runs, 99.8 % share one of the 21 bands; of those that share half, a quarter do, and are then told apart."""

_PORTION: Final = 1 << 20
_FACTOR: Final = 0x9E3779B97F4A7C15
_EDGES: Final = np.arange(_N_HASHES, dtype=np.uint64) << np.uint64(64 - 7)
_N_SHOWN: Final = 5
_SHOWN_CHARACTERS: Final = 60


@dataclass(frozen=True)
class NearDuplicates:
    """What was found among ``n_documents``, which were compared, of ``n_all``.

    n_near: documents that are near one before them; size_bytes: theirs. n_held_out: documents of other splits that are
    near one of the training text. groups: the largest, with their places ``split#number`` and how the first begins.
    """

    n_documents: int
    n_all: int
    n_near: int
    size_bytes: int
    n_held_out: int
    groups: Sequence[dict[str, object]]


def near_duplicates(corpus: Corpus, most: int) -> NearDuplicates:
    """Compare the documents of a corpus, across its splits; of more than ``most`` so many, evenly spread."""
    places = [(name, number) for name in corpus.splits for number in range(len(corpus.documents(name)) - 1)]
    n_all, n = len(places), min(most, len(places))
    places = [places[index * n_all // n] for index in range(n)]
    sketches, sizes = np.empty((n, _N_HASHES), dtype=np.uint32), np.empty(n, dtype=np.int64)
    for index, text in enumerate(_texts(corpus, places)):
        sketches[index], sizes[index] = sketch(text), len(text)
    firsts = near_firsts(sketches)
    is_near = firsts != np.arange(n)
    trained = {int(firsts[index]) for index, (name, _) in enumerate(places) if name == "train"}
    held_out = sum(
        name != "train" and int(first) in trained for (name, _), first in zip(places, firsts.tolist(), strict=True)
    )
    heads, counts = np.unique(firsts[is_near], return_counts=True)
    largest = heads[np.argsort(-counts, kind="stable")][:_N_SHOWN].tolist()
    groups = [_shown(corpus, [places[at] for at in np.flatnonzero(firsts == head)]) for head in largest]
    return NearDuplicates(n, n_all, int(is_near.sum()), int(sizes[is_near].sum()), held_out, groups)


def sketch(text: bytes) -> np.ndarray:
    """Numbers of which two documents share about as large a part as they share of their runs.

    The hashes of all runs are divided by size into as many ranges, and the least of each is taken; where a range has
    none, the next one that has lends its own.
    """
    data = np.frombuffer(b" ".join(text.lower().split()).ljust(_RUN, b"\0"), dtype=np.uint8)
    least = np.zeros(_N_HASHES, dtype=np.uint64)
    is_met = np.zeros(_N_HASHES, dtype=np.bool_)
    for start in range(0, len(data) - _RUN + 1, _PORTION):
        hashes = np.sort(_hashes(data[start : start + _PORTION + _RUN - 1]))
        edges = np.searchsorted(hashes, _EDGES)
        has = edges < np.append(edges[1:], len(hashes))
        found = hashes[edges[has]]
        least[has] = np.where(is_met[has], np.minimum(least[has], found), found)
        is_met |= has
    met = np.flatnonzero(is_met)
    missing = np.flatnonzero(~is_met)
    lender = met[np.searchsorted(met, missing) % len(met)]
    least[missing] = mix(least[lender] + ((lender - missing) % _N_HASHES).astype(np.uint64))
    return (least & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def near_firsts(sketches_nk: np.ndarray) -> np.ndarray:
    """For each document the number of the first of those that are near it, directly or through others; its own where
    none is before it."""
    parents = np.arange(len(sketches_nk))

    def first_of(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = int(parents[number])
        return number

    for start in range(0, _N_HASHES - _PER_BAND + 1, _PER_BAND):
        keys = np.zeros(len(sketches_nk), dtype=np.uint64)
        for column in range(start, start + _PER_BAND):
            keys = mix(keys ^ sketches_nk[:, column])
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        candidates = np.flatnonzero(first[group] != np.arange(len(keys)))
        for portion in np.array_split(candidates, max(1, len(candidates) * _N_HASHES // _PORTION)):
            shared = (sketches_nk[portion] == sketches_nk[first[group[portion]]]).mean(axis=1)
            for number in portion[shared >= SIMILAR].tolist():
                ends = first_of(number), first_of(int(first[group[number]]))
                parents[max(ends)] = min(ends)
    return np.array([first_of(number) for number in range(len(parents))], dtype=np.int64)


def _hashes(data: np.ndarray) -> np.ndarray:
    """A 64-bit number for every run of ``_RUN`` bytes, that of a run of two halves from those of the halves."""
    hashes, factor, width = data.astype(np.uint64) + np.uint64(1), _FACTOR, 1
    while width < _RUN:
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        factor, width = factor * factor % 2**64, 2 * width
    return mix(hashes)


def _texts(corpus: Corpus, places: Iterable[tuple[str, int]]) -> Iterable[bytes]:
    edges = {name: corpus.documents(name).tolist() for name in corpus.splits}
    for name, number in places:
        start, stop = edges[name][number : number + 2]
        yield corpus.tokenizer.decode_bytes(corpus.tokens(name)[start:stop].tolist())


def _shown(corpus: Corpus, places: Sequence[tuple[str, int]]) -> dict[str, object]:
    (text,) = _texts(corpus, places[:1])
    begins = " ".join(text[: 4 * _SHOWN_CHARACTERS].decode(errors="replace").split())[:_SHOWN_CHARACTERS]
    named = [f"{name}#{number}" for name, number in places[:_N_SHOWN]]
    return {"count": len(places), "begins": begins, "documents": named}
