"""Small language models as they are trained and as they decode: presets at any width, candidates for ``medians``."""

from collections.abc import Callable
from typing import Final

import torch
from torch import nn

from meristem.models.build import build
from meristem.models.decoding import Decoding
from meristem.nn.auxiliary import auxiliary
from meristem.optim.groups import build as build_optimizer
from meristem.runs.config import Config, load_config
from meristem.train.loss import cross_entropy

VOCABULARY: Final = 256
N_TIME: Final = 512
"""Tokens of a sequence."""


def sized(preset: str, width: int, *overrides: str) -> Config:
    """The preset with two layers of this width."""
    return load_config(preset, [f"model.dim={width}", "model.n_layers=2", *overrides], {}).tree


def training_step(config: Config, batch: int) -> Callable[[], object]:
    """One whole step on ``batch`` sequences: forward, loss, backward, clipping and the optimizer, as ``train.loop``."""
    model = build(config.model, config.memory, VOCABULARY, 0)
    optimizer = build_optimizer(model, config.optim)
    tokens_bt = torch.randint(VOCABULARY, (batch, N_TIME + 1), generator=torch.Generator().manual_seed(0))
    seen_bt, targets_bt = tokens_bt[:, :-1], tokens_bt[:, 1:]

    def step() -> None:
        logits_bto, state = model(seen_bt, None)
        loss = cross_entropy(logits_bto, targets_bt) / targets_bt.numel()
        own = auxiliary(state)
        (loss if own is None else loss + own).backward()
        optimizer.step(loss.detach())
        optimizer.zero_grad()

    return step


def decoding(config: Config, n_tokens: int) -> Callable[[], object]:
    """So many tokens as a session decodes, each chosen from the prediction after the one before, memories written;
    every call goes on."""
    model = build(config.model, config.memory, VOCABULARY, 0).eval()
    with torch.no_grad():
        logits_bto, state = model(torch.zeros(1, 1, dtype=torch.int64))
    text, last = Decoding(model, state), [int(logits_bto[0, -1].argmax())]

    def step() -> None:
        for _ in range(n_tokens):
            last[0] = int(text.step(last)[0].argmax())

    return step


def n_parameters(config: Config) -> int:
    """How large the model is."""
    with torch.device("meta"):
        model: nn.Module = build(config.model, config.memory, VOCABULARY, 0)
    return sum(parameter.numel() for parameter in model.parameters())
