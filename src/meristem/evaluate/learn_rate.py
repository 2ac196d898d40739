"""The rates at which the weights of a trained model learn best while they read, found on held-out text."""

import contextlib
from typing import Final

import torch
from torch import nn

from meristem.device.resolve import Device
from meristem.errors import CapabilityError
from meristem.evaluate.adaptation import Documents, read
from meristem.evaluate.likelihood import Loss
from meristem.models.config import LearnConfig
from meristem.models.online import online_reader
from meristem.models.weights import RATES

FACTORS: Final = (0.25, 0.5, 1.0, 2.0)
"""The usual rate times these is tried."""

KINDS: Final = ("mlp", "head")
"""What learns there; of the other kinds the usual rate stays."""

LENGTH: Final = 1024
"""Tokens read of a document, at most ``MOST_DOCUMENTS`` of them."""

MOST_DOCUMENTS: Final = 2
SHARE: Final = 100
"""Of the tokens trained on, one in so many may be read for it."""


def n_documents(n_tokens: int) -> int:
    """How many documents are read at every rate after a training on so many tokens."""
    return min(MOST_DOCUMENTS, n_tokens // SHARE // (LENGTH * len(FACTORS) * len(KINDS)))


@torch.no_grad()
def find_learn_rates(
    model: nn.Module, chosen: Documents, learning: LearnConfig, *, piece: int, device: Device, loss: Loss
) -> dict[str, float]:
    """By what learns, the rate with which the documents cost least; nothing for what the model has not.

    piece: most tokens that are read at once.
    """
    rows = [device.move(row_bt)[0] for row_bt in chosen.tokens_bt.split(1)]
    found = {}
    for which in KINDS:
        rates = [factor * RATES[which] for factor in FACTORS]
        ways = [learning.model_copy(update={"which": which, "lr": rate}) for rate in rates]
        with contextlib.suppress(CapabilityError):
            readers = [online_reader(model, "weights", loss, way) for way in ways]
            nats = [sum(read(reader, row_bt, None, (piece, device, loss))[0] for row_bt in rows) for reader in readers]
            found[which] = rates[nats.index(min(nats))]
    return found
