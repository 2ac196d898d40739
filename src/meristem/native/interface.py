"""What every call of the native core needs: tensors by their strides, how numbers are stored, and torch's threads."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from meristem.native.library import core, library

NUMBERS: Final = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
"""``MeristemNumbers`` of ``core.cpp``: how numbers are stored. What is computed of bfloat16 is float32."""


class View(ctypes.Structure):
    """``MeristemView`` of ``core.cpp``: a tensor by its strides."""

    _fields_ = (("at", ctypes.c_void_p), ("row", ctypes.c_int64), ("time", ctypes.c_int64), ("head", ctypes.c_int64))

    @classmethod
    def of(cls, tensor: Tensor) -> "View":
        """Of ``b t h k``, whose last axis has no gaps."""
        row, time, head, _ = tensor.stride()
        return cls(tensor.data_ptr(), row, time, head)


@cache
def function(name: str) -> Any:
    """A function of the core. Raises RuntimeError without one: whoever calls it had to ask first."""
    found = library()
    if found is None:
        raise RuntimeError(f"there is no native core: {core().said}")
    return getattr(found, f"meristem_{name}")


@cache
def counting(name: str) -> Any:
    """The same of one that gives a count, which may be larger than 32 bits."""
    found = function(name)
    found.restype = ctypes.c_int64
    return found


@cache
def lanes(dtype: torch.dtype) -> int:
    """How many numbers a vector of the core has, of those that are computed for this dtype."""
    size_bytes = torch.promote_types(dtype, torch.float32).itemsize
    return int(function("vector_bytes")()) // size_bytes


@cache
def torchs_threads() -> int | None:
    """The function of torch's own OpenMP that runs another in its pool of threads; None where torch brings none along.

    Threads of ours would compete with that pool, whose threads spin for a while after each operation.
    """
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        # Torch has loaded this file, so that no second pool begins here.
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
    return None
