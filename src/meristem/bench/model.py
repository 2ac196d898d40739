"""The default model against a full-attention transformer, its memory as text grows longer, and decoding."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import nn

from meristem.bench.measure import Row, medians, timed
from meristem.bench.peer_titans import peak_bytes
from meristem.bench.trained import training_step
from meristem.device.config import DeviceConfig
from meristem.device.resolve import NAMES, resolve
from meristem.events import silent
from meristem.memory.kernels.select import force_reference
from meristem.models.build import build
from meristem.models.decoding import Decoding
from meristem.native.library import core, library
from meristem.runs.config import load_config
from meristem.train.loss import cross_entropy

N_TOKENS = 4096
"""Tokens of one step: longer sequences mean fewer rows, down to one."""

DECODED: Final = {1: 10_000, 64: 18_000}
"""Readers that go on token by token at once, and the tokens/s of all that are asked."""

N_READ: Final = {1: (8, 256), 64: (2, 16)}
"""By readers, the tokens of each in one repetition: of torch, and of the native core."""


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


def training(n_repeats: int) -> Iterator[Row]:
    """Training tokens/s of the default preset through the native core over the same by tensor code: whole steps, their
    optimizer included, on one thread, its own time. In the dtype that a run takes here, and in float32."""
    if library() is None:
        yield Row("default preset, training by the native core", None, "x", note=f"skipped: {core().said}")
        return
    threads = torch.get_num_threads()
    taken = resolve(DeviceConfig(device="cpu"), silent)
    torch.set_num_threads(1)
    try:
        config = load_config("default").tree
        n_tokens = config.data.batch_size * config.data.seq_len
        for device in dict.fromkeys([taken, replace(taken, dtype=torch.float32)]):
            shape = config.data.batch_size, config.data.seq_len
            step = training_step(config, *shape, vocabulary=config.tokenizer.vocab_size, device=device)
            candidates = {"native": step, "tensor code": _in_torch(step)}
            timed_steps = {name: timed(each, time.process_time) for name, each in candidates.items()}
            seconds = medians(timed_steps, n_repeats=2 * n_repeats)
            speed = {name: f"{n_tokens / each:,.0f}" for name, each in seconds.items()}
            note = f"{speed['native']} against {speed['tensor code']} tokens/s"
            target = 1.5 if device == taken else None
            ratio = seconds["tensor code"] / seconds["native"]
            yield Row(
                f"default preset, training, {NAMES[device.dtype]}, over tensor code", ratio, "x", target, note=note
            )
    finally:
        torch.set_num_threads(threads)


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
    seconds = []
    with torch.no_grad():
        logits_bto, state = model(torch.zeros(1, 1, dtype=torch.int64))
        text, token_id = Decoding(model, state), int(logits_bto[0, -1].argmax())
        for _ in range(20_000):
            began = time.perf_counter()
            token_id = int(text.step([token_id])[0].argmax())
            seconds.append(time.perf_counter() - began)
    first, last = statistics.median(seconds[:2000]), statistics.median(seconds[-2000:])
    note = f"{1 / first:,.0f} tokens/s in the first tenth, {1 / last:,.0f} in the last"
    yield Row("decoding, last tenth over first", last / first, "x", 1.2, "<=", note)


def decoding_speed(n_repeats: int) -> Iterator[Row]:
    """Tokens/s that titans-mag reads one by one, alone and with 63 others: over the same by torch, and over a
    full-attention transformer of its width and depth with 512 tokens in its cache. One thread, its own time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = load_config("titans-mag").tree
        ours = build(config.model, config.memory, config.tokenizer.vocab_size, 0)
        part = config.model.model_copy(update={"mixer": "attention", "sliding_window": None})
        transformer = build(part, config.memory, config.tokenizer.vocab_size, 0)
        for n_rows, asked in DECODED.items():
            few, many = N_READ[n_rows]
            candidates = {
                "ours": timed(_reading(ours, n_rows, many), time.process_time),
                "torch": timed(_in_torch(_reading(ours, n_rows, few)), time.process_time),
                "full": timed(_in_torch(_reading(transformer, n_rows, few)), time.process_time),
            }
            seconds = medians(candidates, n_repeats=4 * n_repeats)
            speed = {name: n_rows * (many if name == "ours" else few) / each for name, each in seconds.items()}
            label = f"titans-mag, {n_rows} at once: decoding"
            yield Row(label, speed["ours"], "tokens/s", asked)
            for name, what, target in (("torch", "torch", None), ("full", "transformer at 512 tokens", 2.0)):
                note = f"{speed['ours']:,.0f} against {speed[name]:,.0f} tokens/s"
                yield Row(f"{label}, over {what}", speed["ours"] / speed[name], "x", target, note=note)
    finally:
        torch.set_num_threads(threads)


def _reading(model: nn.Module, n_rows: int, n_tokens: int) -> Callable[[], object]:
    """So many tokens of each row after a text of 512."""
    generator = torch.Generator().manual_seed(0)
    tokens_bt = torch.randint(model.get_parameter("embedding.weight").shape[0], (n_rows, 512), generator=generator)
    with torch.no_grad():
        _, state = model(tokens_bt)
    columns = tokens_bt[:, :n_tokens].T.tolist()

    def step() -> None:
        rows = Decoding(model, state)
        for token_ids in columns:
            rows.step(token_ids)

    return step


def _in_torch(step: Callable[[], object]) -> Callable[[], object]:
    """The same without the native core."""

    def plain() -> None:
        with force_reference():
            step()

    return plain


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
