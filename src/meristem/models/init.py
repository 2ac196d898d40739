"""First weights from named random streams: what one layer draws does not depend on the layers beside it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch

from meristem.device.random import stream

_part: ContextVar[tuple[int, ...] | None] = ContextVar("part", default=None)


@contextmanager
def seeded(random_seed: int, name: str, *indices: int) -> Iterator[None]:
    """Inside, torch's own draws on the CPU come from the stream of that name; outside, nothing has been drawn.

    Inside ``only_part`` of other indices there are shapes on ``meta`` in the place of weights.
    """
    is_drawn = _part.get() in (None, indices)
    with torch.random.fork_rng(devices=[]), nullcontext() if is_drawn else torch.device("meta"):
        torch.set_rng_state(stream(random_seed, name, *indices).get_state())
        yield


@contextmanager
def only_part(indices: tuple[int, ...] | None) -> Iterator[None]:
    """Inside, only the streams of these indices are drawn: ``(3,)`` is block 3, ``()`` what is no block, None all."""
    token = _part.set(indices)
    try:
        yield
    finally:
        _part.reset(token)
