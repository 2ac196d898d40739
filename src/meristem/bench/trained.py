"""Small language models as they are trained and as they decode: presets at any width, candidates for ``medians``."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Final

import torch
from torch import nn

from meristem.bench.measure import medians, timed
from meristem.device.resolve import Device
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


def training_step(
    config: Config, batch: int, n_time: int = N_TIME, *, vocabulary: int = VOCABULARY, device: Device | None = None
) -> Callable[[], object]:
    """One whole step on ``batch`` sequences: forward, loss, backward, clipping and the optimizer, as ``train.loop``.

    device: where, and whose dtypes it takes; None for float32 on the CPU.
    """
    where = device.device if device else torch.device("cpu")
    model = build(config.model, config.memory, vocabulary, 0).to(where)
    optimizer = build_optimizer(model, config.optim)
    tokens_bt = torch.randint(vocabulary, (batch, n_time + 1), generator=torch.Generator().manual_seed(0)).to(where)
    seen_bt, targets_bt = tokens_bt[:, :-1], tokens_bt[:, 1:]

    def step() -> None:
        with device.autocast() if device else nullcontext():
            logits_bto, state = model(seen_bt, None)
        loss = cross_entropy(logits_bto, targets_bt) / targets_bt.numel()
        own = auxiliary(state)
        (loss if own is None else loss + own).backward()
        optimizer.step(loss.detach())
        optimizer.zero_grad()

    return step


def training_speeds(
    configs: Mapping[str, Config], vocabulary: int, device: Device, n_repeats: int = 3
) -> dict[str, float]:
    """Tokens/s of each in training: steps of one thread by turns, the median of its own time, so that what else runs on
    the machine counts little; on a GPU of the time that passes, as each step waits to see whether it is finite."""
    threads, clock = torch.get_num_threads(), time.process_time if device.device.type == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    try:
        steps = {}
        for name, config in configs.items():
            step = training_step(
                config, config.data.batch_size, config.data.seq_len, vocabulary=vocabulary, device=device
            )
            steps[name] = timed(step, clock)
        seconds = medians(steps, n_repeats=n_repeats, n_warm=1)
    finally:
        torch.set_num_threads(threads)
    return {name: config.data.batch_size * config.data.seq_len / seconds[name] for name, config in configs.items()}


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
