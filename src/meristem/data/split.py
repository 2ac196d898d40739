"""Which documents are held out: a keyed hash of the name decides, so that a growing corpus moves none of them.

Copies of a document go where the first of them goes.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from meristem.errors import SplitError

SPLITS: Final = ("train", "val", "test")
SALT: Final = "meristem.split/1"


def ratios_for(validation: float) -> tuple[float, float, float]:
    """The shares of train, val and test when ``validation`` is held out."""
    return (1.0 - validation, validation, 0.0)


def require_ratios(ratios: Sequence[float]) -> None:
    """Refuse shares that are negative or do not add up to one."""
    if len(ratios) != len(SPLITS) or min(ratios) < 0 or abs(sum(ratios) - 1.0) > 1e-9:
        raise SplitError(f"split ratios {tuple(ratios)} are not three shares of one. Give {SPLITS}, each >= 0, sum 1.")


def assign(group: str, ratios: Sequence[float], salt: str = SALT) -> int:
    """The number in ``SPLITS`` of the part that a group of records belongs to.

    u = first 8 bytes of blake2b(salt | 0x00 | group) / 2^64 falls into the cumulative ratios. It depends on nothing but
    the name of the group, so adding records moves none.
    """
    digest = hashlib.blake2b(salt.encode() + b"\0" + group.encode(), digest_size=64).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    below = 0.0
    for number, ratio in enumerate(ratios):
        below += ratio
        if share < below:
            return number
    return max(number for number, ratio in enumerate(ratios) if ratio > 0)


def normal(text: bytes) -> bytes:
    """What copies have in common: the text with every line end as one line feed."""
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text


def content(text: bytes) -> int:
    """A 64-bit number that copies share, in this process."""
    return hash(normal(text)) & (1 << 64) - 1


def firsts(contents: np.ndarray) -> np.ndarray:
    """For each document the number of the first that has the same content, its own where none is before it."""
    _, first, group = np.unique(contents, return_index=True, return_inverse=True)
    numbers: np.ndarray = first[group]
    return numbers


def place_in(text: bytes, n_normal: int) -> int:
    """After how many bytes of a text the first ``n_normal`` bytes of ``normal`` end."""
    place = n_normal
    for n_before, end in enumerate(re.finditer(rb"\r\n", text)):
        if end.start() - n_before >= n_normal:
            break
        place += 1
    return place


def cut_points(size: int, ratios: Sequence[float]) -> tuple[int, int]:
    """Where a text of ``size`` bytes is cut into contiguous train, val and test parts."""
    return round(size * ratios[0]), round(size * (ratios[0] + ratios[1]))


def character_start(text: bytes, place: int) -> int:
    """The nearest place at or before this one that is not inside a UTF-8 character; the place itself in other bytes."""
    place = min(max(place, 0), len(text))
    starts = (at for at in range(place, max(place - 4, -1), -1) if at == len(text) or text[at] & 0xC0 != 0x80)
    return next(starts, place)
