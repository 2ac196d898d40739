"""Sequences of a corpus by number, and a keyed order of them that needs no shuffled copy."""

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np

_ROUNDS: Final = 8
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


class Windows:
    """Every run of ``window`` inputs with their shifted targets, so ``window + 1`` tokens, that starts a stride apart.

    spans: (start, stop) pairs that no window crosses. A span of z tokens gives floor((z - window - 1) / stride) + 1
    windows, none when it is shorter than one. ``len`` counts windows.
    """

    def __init__(self, spans: Sequence[tuple[int, int]] | np.ndarray, window: int, stride: int) -> None:
        edges = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        self.length = window + 1
        self.stride = stride
        self._firsts = edges[:, 0]
        n_windows = np.maximum(0, (edges[:, 1] - edges[:, 0] - self.length) // stride + 1)
        self._ends = np.cumsum(n_windows)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """Where the windows with these numbers begin."""
        span = np.searchsorted(self._ends, indices, side="right")
        before = np.where(span > 0, self._ends[span - 1], 0)
        starts: np.ndarray = self._firsts[span] + (indices - before) * self.stride
        return starts

    def before(self, places: np.ndarray) -> np.ndarray:
        """How many windows begin before each of these places."""
        n_begun = np.searchsorted(self._firsts, places, side="left")
        span = np.maximum(n_begun - 1, 0)
        begun = np.where(span > 0, self._ends[span - 1], 0)
        inside = -(-(places - self._firsts[span]) // self.stride)
        before: np.ndarray = np.where(n_begun == 0, 0, np.minimum(begun + inside, self._ends[span]))
        return before


def key(random_seed: int, name: str) -> int:
    """A 64-bit key of the named random stream."""
    return int.from_bytes(hashlib.blake2b(f"{name}\0{random_seed}".encode(), digest_size=8).digest(), "big")


def permute(index: np.ndarray, n: int, key: int, epoch: int | np.ndarray) -> np.ndarray:
    """Where each position of an epoch falls: for every (key, epoch) a bijection of 0 .. n - 1.

    A balanced Feistel network over the least 4^w >= n; a result beyond n is sent through again (cycle walking),
    fewer than four times on average.
    Source: Black and Rogaway 2002, ciphers with arbitrary finite domains.
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    place = np.array(index, dtype=np.uint64).ravel()
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.uint64), np.shape(index)).reshape(1, -1)
    rounds = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * _GOLDEN
    round_keys = mix(rounds + mix(epochs * _GOLDEN ^ np.uint64(key)))
    walking = np.arange(len(place))
    while len(walking):
        place[walking] = _feistel(place[walking], half, round_keys[:, walking])
        walking = walking[place[walking] >= n]
    return place.astype(np.int64).reshape(np.shape(index))


def draw(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """For each index a number of 0 .. n - 1, evenly and independently: choice with replacement."""
    bits = mix(np.asarray(index, dtype=np.uint64) * _GOLDEN ^ np.uint64(key))
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 * n).astype(np.int64)


def _feistel(place: np.ndarray, half: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = place >> half, place & mask
    for round_key in round_keys:
        left, right = right, left ^ (mix(right ^ round_key) & mask)
    return (left << half) | right


def mix(bits: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every output bit depends on every input bit."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = bits ^ (bits >> np.uint64(31))
    return mixed
