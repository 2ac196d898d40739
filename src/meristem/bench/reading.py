"""What is gained by learning while a text is read that the model has not seen, and what of it is forgotten again."""

import time
from itertools import accumulate, pairwise
from operator import add
from typing import Final

import numpy as np
import torch
from torch import nn

from meristem.bench.evidence import ReadingConfig
from meristem.data import sources
from meristem.data.config import DataConfig
from meristem.data.tokenizer import Tokenizer
from meristem.device.resolve import Device
from meristem.errors import CorpusTooShort
from meristem.evaluate.likelihood import Likelihood, Reader
from meristem.memory.state import State
from meristem.models.online import online_reader
from meristem.shapes import Tokens
from meristem.train.loss import cross_entropy

PIECE: Final = 1024
"""Tokens that are read at once; the state goes from piece to piece."""


def reading_figures(
    model: nn.Module, tokenizer: Tokenizer, asked: ReadingConfig, data: DataConfig, device: Device
) -> dict[str, float]:
    """Bits per byte of every text up to each mark, with whatever learns.

    Each text is read from a fresh state. ``LEARN/TEXT/MARK`` is of the tokens from the mark before up to this one,
    ``LEARN/TEXT/MARK/whole`` of all up to it. The state after the first text then reads the others and the first once
    more: ``LEARN/again``, beside ``LEARN/first``, the same tokens before. Nothing of a state is shared.
    """
    texts = {name: _tokens(source, tokenizer, asked.marks[-1] + 1, data) for name, source in asked.texts.items()}
    found: dict[str, float] = {}
    for learn in asked.learn:
        reader, began = online_reader(model, learn, cross_entropy), time.perf_counter()
        (first, (likelihoods, state)), *others = (
            (name, _read(reader, ids_bt, None, (asked, tokenizer, device))) for name, ids_bt in texts.items()
        )
        taken_s = time.perf_counter() - began
        for name, (stretches, _) in ((first, (likelihoods, state)), *others):
            for mark, stretch, whole in zip(asked.marks, stretches, accumulate(stretches, add), strict=True):
                found[f"{learn}/{name}/{mark}"] = stretch.bits_per_byte
                found[f"{learn}/{name}/{mark}/whole"] = whole.bits_per_byte
        for name in (*list(texts)[1:], first):
            again, state = _read(reader, texts[name], state, (asked, tokenizer, device))
        found[f"{learn}/first"] = found[f"{learn}/{first}/{asked.marks[-1]}/whole"]
        found[f"{learn}/again"] = list(accumulate(again, add))[-1].bits_per_byte
        found[f"{learn}/tokens_per_s"] = len(texts) * asked.marks[-1] / taken_s
    return found


def _tokens(source: str, tokenizer: Tokenizer, n: int, data: DataConfig) -> Tokens:
    """The first ``n`` tokens of a text's documents, one behind the other."""
    ids: list[int] = []
    chosen = data.model_copy(update={"source": source, "include": (), "exclude": ()})
    for document in sources.documents(chosen):
        ids += tokenizer.encode_bytes(document.text)
        if len(ids) >= n:
            return torch.tensor([ids[:n]])
    raise CorpusTooShort(
        f"text '{source}' has {len(ids):,} tokens; {n:,} are read. Name a longer one, or a smaller last mark.",
        found=len(ids),
        expected=n,
    )


@torch.no_grad()
def _read(
    reader: Reader, ids_bt: Tokens, state: State | None, how: tuple[ReadingConfig, Tokenizer, Device]
) -> tuple[list[Likelihood], State | None]:
    """The likelihood of each stretch between two marks, and the state after the last."""
    asked, tokenizer, device = how
    n_bytes = np.asarray(tokenizer.byte_lengths)[ids_bt[0].numpy()]
    (tokens_bt,) = device.move(ids_bt)
    found = []
    for start, stop in pairwise((0, *asked.marks)):
        nats = 0.0
        for at in range(start, stop, PIECE):
            part_bt = tokens_bt[:, at : min(at + PIECE, stop) + 1]
            with device.autocast():
                logits_bto, state = reader(part_bt[:, :-1], state)
            nats += float(cross_entropy(logits_bto, part_bt[:, 1:]))
        found.append(Likelihood(nats, stop - start, int(n_bytes[start + 1 : stop + 1].sum())))
    return found, state
