"""First weights from named random streams: what one layer draws does not depend on the layers beside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from meristem.device.random import stream


@contextmanager
def seeded(random_seed: int, name: str, *indices: int) -> Iterator[None]:
    """Inside, torch's own draws on the CPU come from the stream of that name; outside, nothing has been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(stream(random_seed, name, *indices).get_state())
        yield
