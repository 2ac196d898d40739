"""How well a model predicts held-out text, in sums that can be added up."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch

from meristem.data.stream import Batch
from meristem.device.resolve import Device
from meristem.device.room import cut_to_fit, empty_cache
from meristem.memory.state import State, join_rows, take_rows

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits and targets to the nats of all targets together: ``train.loss.cross_entropy``, handed in by the recipe."""

Reader = Callable[[torch.Tensor, State | None], tuple[torch.Tensor, State]]
"""A model, or what ``models.online`` makes of one: ``reader(tokens_bt, state) -> (logits_bto, state)``."""


@dataclass(frozen=True)
class Likelihood:
    """Nats of some predicted tokens, and the bytes of text that those tokens are."""

    total_nats: float
    n_tokens: int
    n_bytes: int

    def __add__(self, other: "Likelihood") -> "Likelihood":
        """The likelihood of both texts: sums are added, never means averaged."""
        return Likelihood(
            self.total_nats + other.total_nats, self.n_tokens + other.n_tokens, self.n_bytes + other.n_bytes
        )

    @property
    def nats(self) -> float:
        """Nats per token."""
        return self.total_nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens the model hesitates between."""
        return math.exp(self.nats)

    @property
    def bits_per_byte(self) -> float:
        """What compares across tokenizers: bits per byte of the text, not per token."""
        return self.total_nats / (math.log(2) * self.n_bytes)


@torch.no_grad()
def likelihood(reader: Reader, batches: Iterable[Batch], *, device: Device, loss: Loss) -> Likelihood:
    """How well ``reader`` predicts the targets of all batches; the state is carried on where a batch does not start.

    batches: ``data.stream.held_out``, each sequence from a fresh memory, or ``held_out_documents``, each document in a
    row of its own through which its memory is carried.
    Where the device has no room for a batch, fewer rows are read at a time from then on; OutOfDeviceBytes where one
    does not fit.
    """
    found: list[Likelihood] = []
    n_pieces, state = 1, None

    def read(held: Batch, before: State | None, n_pieces: int) -> tuple[float, State, int]:
        """The nats of a batch that is read in so many parts, the state after it, and the number of parts."""
        nats, states, n_rows = 0.0, [], len(held.tokens_bt)
        n_cuts = min(n_pieces, n_rows)
        edges = [n_rows * cut // n_cuts for cut in range(n_cuts + 1)]
        for start, stop in zip(edges, edges[1:], strict=False):
            rows = held.take_rows(start, stop)
            tokens_bt, targets_bt = device.move(rows.tokens_bt, rows.targets_bt)
            own = before if before is None or n_cuts == 1 else take_rows(before, start, stop)
            with device.autocast():
                logits_bto, after = reader(tokens_bt, own)
            nats += float(loss(logits_bto, targets_bt))
            states.append(after)
        return nats, states[0] if n_cuts == 1 else join_rows(states), n_pieces

    for held in batches:
        nats, state, n_pieces = cut_to_fit(
            "an evaluation of one row",
            partial(read, held, None if held.starts else state),
            n_pieces,
            most=len(held.tokens_bt),
            release=partial(empty_cache, device.device),
            device=device.device,
        )
        found.append(Likelihood(nats, held.n_targets, held.n_bytes))
    return reduce(add, found)
