"""The default model against a full-attention transformer, its memory as text grows longer, and decoding."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from meristem.bench.measure import Row, medians, timed
from meristem.bench.peer_titans import peak_bytes
from meristem.models.build import build
from meristem.runs.config import load_config
from meristem.train.loss import cross_entropy

N_TOKENS = 4096
"""Tokens of one step: longer sequences mean fewer rows, down to one."""


def models(n_repeats: int) -> Iterator[Row]:
    """Training tokens/s of titans-mag over those of a full-attention transformer of its width and depth, by sequence
    length."""
    config = load_config("titans-mag").tree
    ours = build(config.model, config.memory, 256, 0)
    part = config.model.model_copy(update={"mixer": "attention", "sliding_window": None})
    transformer = build(part, config.memory, 256, 0)
    crossing = None
    for n_time in (512, 1024, 2048, 4096, 8192):
        steps = {name: timed(_step(model, n_time)) for name, model in (("mag", ours), ("full", transformer))}
        seconds = medians(steps, n_repeats=n_repeats, n_warm=1)
        ratio = seconds["full"] / seconds["mag"]
        n_tokens = max(N_TOKENS, n_time)
        note = f"{n_tokens / seconds['mag']:,.0f} against {n_tokens / seconds['full']:,.0f} tokens/s"
        target = 0.45 if n_time == 512 else None
        yield Row(f"titans-mag over transformer, T = {n_time}", ratio, "x", target, note=note)
        crossing = crossing or (n_time if ratio >= 1 else None)
    note = "first sequence length at which titans-mag trains faster"
    yield Row("crossing", crossing, "tokens", 4096, "<=", note)


def growth(n_repeats: int) -> Iterator[Row]:
    """Peak bytes of a training step of titans-mag, by sequence length: they must not grow faster."""
    config = load_config("titans-mag").tree
    model = build(config.model, config.memory, 256, 0)
    peaks = {n_time: peak_bytes(_step(model, n_time, batch=1)) for n_time in (512, 1024, 2048, 4096)}
    note = ", ".join(f"{peak / 2**20:.0f} MiB at {n_time}" for n_time, peak in peaks.items())
    yield Row("peak bytes, T = 4096 over T = 512", peaks[4096] / peaks[512], "x", 8.0, "<=", note)


def decoding(n_repeats: int) -> Iterator[Row]:
    """Seconds per token of titans-mag late in a text of 20,000 tokens over those early in it."""
    config = load_config("titans-mag").tree
    model = build(config.model, config.memory, 256, 0)
    seconds, state = [], None
    token_bt = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(20_000):
            began = time.perf_counter()
            logits_bto, state = model(token_bt, state)
            token_bt = logits_bto[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - began)
    first, last = statistics.median(seconds[:2000]), statistics.median(seconds[-2000:])
    note = f"{1 / first:,.0f} tokens/s in the first tenth, {1 / last:,.0f} in the last"
    yield Row("decoding, last tenth over first", last / first, "x", 1.2, "<=", note)


def start(n_repeats: int) -> Iterator[Row]:
    """Seconds that ``meristem --help`` takes."""
    command = [str(Path(sys.executable).with_name("meristem")), "--help"]
    seconds = []
    for _ in range(n_repeats):
        began = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - began)
    yield Row("meristem --help", statistics.median(seconds), "s", 0.5, "<=")


def _step(model: nn.Module, n_time: int, batch: int | None = None) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    tokens_bt = torch.randint(256, (batch or max(1, N_TOKENS // n_time), n_time), generator=generator)

    def step() -> None:
        model.zero_grad()
        logits_bto, _ = model(tokens_bt)
        (cross_entropy(logits_bto, tokens_bt) / tokens_bt.numel()).backward()

    return step
