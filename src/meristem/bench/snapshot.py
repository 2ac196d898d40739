"""How long a run waits for a snapshot in memory and for a restore, beside one plain copy of as many bytes."""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from meristem.bench.measure import Row, medians, timed
from meristem.checkpoint.snapshots import SnapshotBuffer, copy_into, needed_bytes
from meristem.device.limits import available_bytes

N_LAYERS, WIDTH, HIDDEN = 100, 1000, 999
"""A weight of ``WIDTH x HIDDEN`` and a bias each: 100 million parameters in 200 tensors."""

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
DEADLINE_MS: Final = 500.0


def snapshots(n_repeats: int) -> Iterator[Row]:
    """Milliseconds of first touch, snapshot and restore, and the share of the machine's copy bandwidth they attain."""
    size_bytes = 3 * 4 * N_LAYERS * WIDTH * (HIDDEN + 1)
    free_bytes = available_bytes()
    if free_bytes < 5 * size_bytes:
        note = f"needs {5 * size_bytes / 1e9:.0f} GB of RAM, {free_bytes / 1e9:.0f} GB are free"
        yield Row("snapshot", None, "ms", DEADLINE_MS, "<=", note)
        return
    trees = _trees()
    capacity_bytes = needed_bytes(trees)
    touched = medians({"ring": timed(lambda: _ring(capacity_bytes))}, n_repeats=n_repeats, n_warm=0)
    buffer = _ring(capacity_bytes)
    plain, target = (torch.empty(size_bytes, dtype=torch.uint8).fill_(fill) for fill in (1, 0))
    candidates = {
        "snapshot": timed(lambda: buffer.take(trees, {}, step=1, tag="bench", is_valid=True)),
        "restore": timed(lambda: _restore(trees, buffer)),
        "plain": timed(lambda: target.copy_(plain)),
    }
    seconds = medians(candidates, n_repeats=n_repeats, n_warm=1)
    n_tensors = sum(len(tree) for tree in trees.values())
    about = f"{size_bytes / 1e9:.1f} GB in {n_tensors} tensors: 100 M fp32 parameters with Adam's moments"
    yield Row("first touch of a snapshot's buffer", touched["ring"] * 1e3, "ms", note="once, before training")
    yield Row("snapshot", seconds["snapshot"] * 1e3, "ms", DEADLINE_MS, "<=", about)
    yield Row("restore", seconds["restore"] * 1e3, "ms", DEADLINE_MS, "<=", about)
    yield Row("copy bandwidth", size_bytes / seconds["plain"] / 1e9, "GB/s", note="one copy_ of as many bytes")
    for name in ("snapshot", "restore"):
        yield Row(f"{name}, share of the copy bandwidth", seconds["plain"] / seconds[name], "x")


def _trees() -> dict[str, dict[str, Tensor]]:
    """What a checkpoint of such a model holds, as the trees of a run are named."""
    shapes = {f"layers.{number}.weight": (WIDTH, HIDDEN) for number in range(N_LAYERS)}
    biases = {f"layers.{number}.bias": (WIDTH,) for number in range(N_LAYERS)}
    model = {name: torch.ones(shape) for name, shape in (shapes | biases).items()}
    optim = {f"{name}/{moment}": torch.ones_like(model[name]) for name in model for moment in MOMENTS}
    return {"model": model, "optim": optim | {f"{name}/step": torch.tensor(1) for name in model}}


def _ring(capacity_bytes: int) -> SnapshotBuffer:
    return SnapshotBuffer(n_snapshots=1, capacity_bytes=capacity_bytes, max_bytes=capacity_bytes)


def _restore(trees: Mapping[str, Mapping[str, Tensor]], buffer: SnapshotBuffer) -> None:
    for snapshot in buffer.snapshots():
        for name, saved in snapshot.trees.items():
            copy_into(trees[name], saved)
