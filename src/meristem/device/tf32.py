"""Where products of float32 may round their factors to fewer bits, and where they may not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

EXACT: Final = "ieee"


def allow_tf32(is_allowed: bool) -> None:
    """Whether products of float32 on CUDA may be TF32: 10 bits of the mantissa in the place of 23, several times as
    fast."""
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 inside are exact, whatever is allowed outside.

    A triangular solve multiplies the errors of its factors: with TF32 a memory would lose the digits that make one form
    agree with another. The compiler cannot follow the switch; inside compiled code what is allowed outside holds.
    """
    if torch.compiler.is_compiling():
        yield
        return
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    loose = [(each, each.fp32_precision) for each in backends if each.fp32_precision not in (EXACT, "none")]
    for backend, _ in loose:
        backend.fp32_precision = EXACT
    try:
        yield
    finally:
        for backend, was in loose:
            backend.fp32_precision = was
