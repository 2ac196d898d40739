"""What memories cost in whole models: as context, gate and layer, in HOPE, and at several speeds.

Models of two layers on sequences of 512 tokens, whole training steps in fp32, optimizer included.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Final

import torch

from meristem.bench.measure import Row, medians, timed
from meristem.bench.trained import N_TIME, decoding, n_parameters, sized, training_step
from meristem.memory.kernels.select import force_reference
from meristem.runs.config import Config

TITANS: Final = {64: 20_000, 128: 12_000, 256: 5_000}
"""Width to the tokens/s that training with a titans memory has to attain."""
SHARE: Final = 0.45
"""Of a transformer's tokens/s."""
HOPE: Final = {64: 5_000, 128: 3_000, 256: 1_000}
HOPE_SPEAKS: Final = {64: 3_000, 128: 2_500, 256: 1_500}
PACKAGE: Final = {64: 546, 128: 392, 256: 192}
"""Tokens/s of training that the package ``nested-learning`` 0.2 was found to attain in its best variant."""
COST: Final = 1.3
"""Of a step with four levels over one with one."""
N_SPOKEN: Final = 64
"""Tokens spoken in one repetition: the chunks of every preset end in it."""


def compositions(n_repeats: int) -> Iterator[Row]:
    """Training of mac, mag and mal with a titans memory, interleaved with a transformer: full attention, all else
    equal.

    The transformer has no persistent vectors, which cost it torch's fused attention.
    """
    for batch in (1, 8):
        for width, asked in TITANS.items():
            full = sized("attention", width, "model.sliding_window=null", "model.n_heads=4")
            configs = {"full": full} | {name: sized(f"titans-{name}", width) for name in ("mac", "mag", "mal")}
            speed = _training(configs, batch, n_repeats)
            for name in ("mac", "mag", "mal"):
                size = f"{n_parameters(configs[name]):,} parameters against {n_parameters(full):,}"
                label = f"titans-{name}, width {width}, batch {batch}"
                yield Row(f"{label}: training", speed[name], "tokens/s", asked, note=size)
                note = f"{speed[name]:,.0f} against {speed['full']:,.0f} tokens/s"
                yield Row(f"{label}: over transformer", speed[name] / speed["full"], "x", SHARE, note=note)


def hope(n_repeats: int) -> Iterator[Row]:
    """Training of hope, memories of one matrix and of two layers interleaved; the targets are for a batch of one."""
    for batch in (1, 8):
        for width, asked in HOPE.items():
            configs = {kind: _hope(width, kind) for kind in ("matrix", "mlp")}
            speed = _training(configs, batch, n_repeats)
            for kind, measured in speed.items():
                is_asked = batch == 1 and kind == "matrix"
                note = f"{n_parameters(configs[kind]):,} parameters"
                if is_asked:
                    note += f"; {measured / asked:.1f} times the target, {measured / PACKAGE[width]:.0f} times the "
                    note += f"{PACKAGE[width]} of nested-learning 0.2"
                name = f"hope, {kind}, width {width}, batch {batch}: training"
                yield Row(name, measured, "tokens/s", asked if is_asked else None, note=note)


def hope_decoding(n_repeats: int) -> Iterator[Row]:
    """Tokens/s of hope as a session decodes, its memories written: batch of one, one thread. Of memories of one matrix
    with the native core, where there is one, and without."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for width, asked in HOPE_SPEAKS.items():
            steps = {kind: decoding(_hope(width, kind), N_SPOKEN) for kind in ("matrix", "mlp")}
            with force_reference():
                steps["matrix without the core"] = decoding(_hope(width, "matrix"), N_SPOKEN)
            candidates = {kind: timed(step, time.process_time) for kind, step in steps.items()}
            seconds = medians(candidates, n_repeats=4 * n_repeats, n_warm=3)
            for kind, value in seconds.items():
                target = asked if kind == "matrix" else None
                yield Row(f"hope, {kind}, width {width}: decoding", N_SPOKEN / value, "tokens/s", target)
    finally:
        torch.set_num_threads(threads)


def levels(n_repeats: int) -> Iterator[Row]:
    """Seconds of a training step with four levels over one with one, at width 128.

    Of memories, alone and as gate; and, for comparison, of feed-forward layers, where each level adds one that reads
    every token or, pooled, only means.
    """
    four, ones = "memory.levels.count=4", "memory.levels.count=1"
    chain = ("model.mlp=levels", "model.mlp_dim=256")
    cases = {
        "memory levels, lmm": ("lmm", (ones,), (four,)),
        "memory levels, titans-mag": ("titans-mag", (ones,), (four,)),
        "memory levels of each token, lmm": ("lmm", (ones,), (four, "memory.levels.tokens=each")),
        "feed-forward levels, pooled": (
            "lmm",
            (*chain, "model.levels.count=1"),
            (*chain, "model.levels.count=4", "model.levels.tokens=pooled"),
        ),
        "feed-forward levels of each token": (
            "lmm",
            (*chain, "model.levels.count=1"),
            (*chain, "model.levels.count=4"),
        ),
    }
    for batch in (8, 1):
        for name, (preset, one, many) in cases.items():
            is_asked = name in ("memory levels, lmm", "memory levels, titans-mag")
            speed = _training({"1": sized(preset, 128, *one), "4": sized(preset, 128, *many)}, batch, n_repeats)
            note = f"{speed['4']:,.0f} against {speed['1']:,.0f} tokens/s"
            label = f"{name}, batch {batch}: k = 4 over k = 1"
            yield Row(label, speed["1"] / speed["4"], "x", COST if is_asked else None, "<=", note)


def _hope(width: int, kind: str) -> Config:
    return sized("hope", width, f"model.mlp_dim={2 * width}", f"memory.self_reference.structure={kind}")


def _training(configs: Mapping[str, Config], batch: int, n_repeats: int) -> dict[str, float]:
    """Tokens/s of training, by name."""
    steps = {name: timed(training_step(config, batch)) for name, config in configs.items()}
    seconds = medians(steps, n_repeats=n_repeats)
    return {name: batch * N_TIME / value for name, value in seconds.items()}
