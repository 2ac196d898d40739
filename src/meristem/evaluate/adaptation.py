"""What a reader gains from what it has read: the second half of a document against the first, and a second pass.

The second half of a text need not be as hard as its first. What a memory brings is therefore measured by two passes
over the same documents, one with the memory and one without (``models.online``).
One long document, read to its end, shows how long that goes on.
"""

from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from meristem.checkpoint.atomic import sha256
from meristem.data.corpus import Corpus
from meristem.device.resolve import Device
from meristem.errors import CorpusTooShort
from meristem.evaluate.likelihood import Likelihood, Loss, Reader
from meristem.memory.state import State
from meristem.shapes import Tokens

N_WINDOWS: Final = 4
"""Training sequences that a document holds, unless given: what is remembered over their ends counts too."""

N_DOCUMENTS: Final = 32
"""Documents that are read, unless given."""


MOST_TOKENS: Final = 65536
"""Of the one document that is read from its beginning to its end."""

FIRST_POINT: Final = 1024
"""Tokens after which it is first said how well it was predicted; then after twice as many each time."""


@dataclass(frozen=True)
class Documents:
    """Beginnings of documents, all of one length, and the bytes of text that each of their tokens is."""

    tokens_bt: Tokens
    bytes_bt: Tensor

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all ids: who read the same can be compared."""
        return sha256(self.tokens_bt.numpy().tobytes())


def documents(corpus: Corpus, split: str, *, length: int, most: int | None = None) -> Documents:
    """The first ``length`` + 1 tokens of every document of a split that has so many; shorter ones are left out.

    most: take that many, evenly spread over those, the same ones every time.
    """
    tokens, edges = corpus.tokens(split), corpus.documents(split).astype(np.int64)
    lengths = np.diff(edges)
    firsts = edges[:-1][lengths > length]
    if not len(firsts):
        longest = int(lengths.max())
        raise CorpusTooShort(
            f"no document of split '{split}' of corpus '{corpus.name}' holds {length + 1} tokens; the longest has "
            f"{longest}. Add longer documents, or set data.seq_len to {max(1, (longest - 1) // N_WINDOWS)} or less: "
            f"{N_WINDOWS} sequences of a document are read.",
            found=longest,
            expected=length + 1,
        )
    if most is not None and most < len(firsts):
        firsts = firsts[np.arange(most) * len(firsts) // most]
    rows = tokens.rows(firsts, length + 1).astype(np.int64)
    return Documents(torch.from_numpy(rows), torch.from_numpy(corpus.tokenizer.byte_lengths[rows].astype(np.int64)))


@dataclass(frozen=True)
class Adaptation:
    """The same documents by halves, and read once more in the same session.

    first, second: of every document its first half and the rest, read from a fresh memory. Together they are the whole.
    again: the whole once more, the memory carried over. With the memory reset between, a second pass is the first one.
    """

    first: Likelihood
    second: Likelihood
    again: Likelihood

    def __add__(self, other: "Adaptation") -> "Adaptation":
        """That of both sets of documents: sums are added, never means averaged."""
        return Adaptation(self.first + other.first, self.second + other.second, self.again + other.again)

    @property
    def whole(self) -> Likelihood:
        """The first pass, and the second one of a reader whose memory is reset between."""
        return self.first + self.second

    @property
    def gain_nats(self) -> float:
        """Nats that a token of the second half costs less than one of the first."""
        return self.first.nats - self.second.nats

    @property
    def gain_bits_per_byte(self) -> float:
        """The same in bits per byte."""
        return self.first.bits_per_byte - self.second.bits_per_byte

    def figures(self) -> dict[str, float]:
        """By name, as they are printed."""
        return {
            "first_half_nats": self.first.nats,
            "second_half_nats": self.second.nats,
            "gain_nats": self.gain_nats,
            "first_half_bits_per_byte": self.first.bits_per_byte,
            "second_half_bits_per_byte": self.second.bits_per_byte,
            "gain_bits_per_byte": self.gain_bits_per_byte,
            "again_reset_bits_per_byte": self.whole.bits_per_byte,
            "again_kept_bits_per_byte": self.again.bits_per_byte,
        }


def longest(corpus: Corpus, split: str, most: int = MOST_TOKENS) -> Documents:
    """The longest document of a split, or its first ``most`` + 1 tokens. CorpusTooShort for a single token."""
    tokens, edges = corpus.tokens(split), corpus.documents(split).astype(np.int64)
    lengths = np.diff(edges)
    at, length = int(lengths.argmax()), min(int(lengths.max()), most + 1)
    if length < 2:
        raise CorpusTooShort(
            f"the longest document of split '{split}' of corpus '{corpus.name}' holds {length} tokens; one that is "
            f"read needs 2. Add text.",
            found=length,
            expected=2,
        )
    rows = tokens.rows(edges[at : at + 1], length).astype(np.int64)
    return Documents(torch.from_numpy(rows), torch.from_numpy(corpus.tokenizer.byte_lengths[rows].astype(np.int64)))


@torch.no_grad()
def reading(
    reader: Reader, chosen: Documents, *, piece: int, device: Device, loss: Loss, first: int = FIRST_POINT
) -> list[tuple[int, Likelihood]]:
    """How well one document is predicted over the tokens read: its ``first``, twice and four times as many, and all.

    piece: most tokens that are read at once.
    """
    (tokens_bt,) = device.move(chosen.tokens_bt)
    n_targets = tokens_bt.shape[1] - 1
    stops = [first * 2**k for k in range(n_targets.bit_length()) if first * 2**k < n_targets]
    state, found, start, total = None, [], 0, Likelihood(0.0, 0, 0)
    for stop in (*stops, n_targets):
        nats, state = read(reader, tokens_bt[:, start : stop + 1], state, (piece, device, loss))
        total = total + Likelihood(nats, stop - start, int(chosen.bytes_bt[:, start + 1 : stop + 1].sum()))
        found.append((stop, total))
        start = stop
    return found


@torch.no_grad()
def adaptation(reader: Reader, chosen: Documents, *, piece: int, batch: int, device: Device, loss: Loss) -> Adaptation:
    """How well ``reader`` predicts each half of the documents, and all of it when it reads it again.

    piece: most tokens that are read at once; the state goes from piece to piece. batch: documents read side by side;
    levels that learn read one. A document of n targets has n // 2 in its first half.
    """
    parts = []
    for rows_bt, bytes_bt in zip(chosen.tokens_bt.split(batch), chosen.bytes_bt.split(batch), strict=True):
        (tokens_bt,) = device.move(rows_bt)
        n_targets = tokens_bt.shape[1] - 1
        half = n_targets // 2
        state, found = None, []
        for start, stop in ((0, half), (half, n_targets), (0, n_targets)):
            nats, state = read(reader, tokens_bt[:, start : stop + 1], state, (piece, device, loss))
            n_bytes = int(bytes_bt[:, start + 1 : stop + 1].sum())
            found.append(Likelihood(nats, (stop - start) * len(tokens_bt), n_bytes))
        parts.append(Adaptation(*found))
    return reduce(add, parts)


def read(
    reader: Reader, tokens_bt: Tokens, state: State | None, how: tuple[int, Device, Loss]
) -> tuple[float, State | None]:
    """Nats of all tokens but the first, which is read and not predicted, and the state after all but the last."""
    piece, device, loss = how
    total: Any = 0.0
    for start in range(0, tokens_bt.shape[1] - 1, piece):
        part_bt = tokens_bt[:, start : start + piece + 1]
        with device.autocast():
            logits_bto, state = reader(part_bt[:, :-1], state)
        total = total + loss(logits_bto, part_bt[:, 1:])
    return float(total), state
