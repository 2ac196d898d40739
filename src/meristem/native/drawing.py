"""The next token of each of several rows by the native core (``native/draw.hpp``)."""

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

from jaxtyping import Float
from torch import Tensor


def draw(
    core: ctypes.CDLL, logits_bo: Float[Tensor, "b o"], temperatures: Sequence[float], uniforms: Sequence[float]
) -> list[int]:
    """One id for each row of float32 on the CPU, -1 where its largest is not finite or one is NaN.

    temperatures: 0 takes the first of the likeliest; an ``array("f")`` is not copied. uniforms: in [0, 1).
    """
    n, n_ids = logits_bo.shape
    rows_bo = logits_bo if logits_bo.stride(1) == 1 else logits_bo.contiguous()
    own = temperatures if isinstance(temperatures, array) else array("f", temperatures)
    numbers, ids = array("d", uniforms), array("q", bytes(8 * n))
    places = (each.buffer_info()[0] for each in (own, numbers, ids))
    _function(core)(n, n_ids, rows_bo.stride(0), rows_bo.data_ptr(), *places)
    return ids.tolist()


@cache
def _function(core: ctypes.CDLL) -> Any:
    count, place = ctypes.c_int64, ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, count, count, count, place, place, place, place)(("meristem_draw", core))
