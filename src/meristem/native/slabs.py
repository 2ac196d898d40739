"""Blocks of numbers in large pages of memory.

Each token reads the whole block of every reader, more in all than a cache holds. In pages of 4 KiB a processor looks up
one after the other, and loads ahead within one alone; pages of 2 MiB hold a block and more.
"""

import math
import mmap
import weakref
from collections import deque
from typing import Final

import torch
from torch import Tensor

PAGE_BYTES: Final = 2 << 20
SLAB_BYTES: Final = 8 << 20
LINE_BYTES: Final = 64
"""Of the cache; blocks begin where one does, as tensors of torch do."""


class Slabs:
    """Gives out blocks of one size. Small ones share pages, and a place is free again when nothing refers to it any
    more. Threads may share it."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        """size: numbers of a block."""
        self._size, self._dtype = size, dtype
        self._stride = math.ceil(size * dtype.itemsize / LINE_BYTES) * LINE_BYTES
        # Any thread takes from and appends to it, and so does the collector of garbage in the midst of either: no lock.
        self._free: deque[tuple[mmap.mmap, int]] = deque()

    def blocks(self, n: int) -> Tensor:
        """So many blocks of zeros, side by side: ``(n, size)``."""
        n_bytes = n * self._size * self._dtype.itemsize
        if not n_bytes or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(n, self._size, dtype=self._dtype)
        has_place = n == 1 and self._stride <= PAGE_BYTES
        slab, at = self._place() if has_place else _mapped(n_bytes)
        # The storage of a tensor and of all its views refers to this view, and nothing else does.
        view = memoryview(slab)[at : at + n_bytes]
        if has_place:
            weakref.finalize(view, self._free.append, (slab, at)).atexit = False
        return torch.frombuffer(view, dtype=self._dtype).zero_().view(n, self._size)

    def _place(self) -> tuple[mmap.mmap, int]:
        while True:
            try:
                return self._free.popleft()
            except IndexError:
                slab, first = _mapped(SLAB_BYTES)
                self._free.extend((slab, first + index * self._stride) for index in range(SLAB_BYTES // self._stride))


def _mapped(n_bytes: int) -> tuple[mmap.mmap, int]:
    """New memory, and where in it so many bytes begin that lie in large pages where the system has any."""
    # It gives these for whole ones alone, which begin at their multiples.
    whole = math.ceil(n_bytes / PAGE_BYTES) * PAGE_BYTES
    found = mmap.mmap(-1, whole + PAGE_BYTES)
    first = -torch.frombuffer(found, dtype=torch.uint8).data_ptr() % PAGE_BYTES
    found.madvise(mmap.MADV_HUGEPAGE, first, n_bytes // PAGE_BYTES * PAGE_BYTES)
    return found, first
