"""Which figures there are, and how they are selected."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from meristem.bench import (
    batches,
    compositions,
    finetuning,
    memory,
    model,
    prepare,
    rules,
    safety,
    seeds,
    snapshot,
    trackers,
)
from meristem.bench.measure import Row
from meristem.device.config import DeviceConfig
from meristem.device.describe import describe
from meristem.device.resolve import resolve
from meristem.events import silent

SECTIONS: dict[str, tuple[Callable[[int], Iterator[Row]], ...]] = {
    "memory": (memory.forms, memory.native, memory.layer, memory.deep, memory.gated),
    "model": (model.models, model.growth),
    "training": (model.training, memory.projections),
    "compositions": (compositions.compositions,),
    "hope": (compositions.hope, compositions.hope_decoding),
    "levels": (compositions.levels,),
    "decode": (model.decoding, model.decoding_speed, memory.token),
    "data": (batches.batches,),
    "snapshot": (snapshot.snapshots, safety.safety),
    "seeds": (seeds.seeds,),
    "prepare": (prepare.preparing,),
    "trackers": (trackers.trackers,),
    "finetune": (finetuning.finetuning,),
    "start": (model.start,),
}
"""What is measured by name, beside ``rules``: every rule in every form."""


def measure(
    names: Sequence[str],
    *,
    n_repeats: int = 5,
    widths: Sequence[int] = (128,),
    windows: Sequence[int] = (512,),
    text_bytes: int | None = None,
) -> Iterator[Row]:
    """The rows of the named sections, each as soon as it is measured, in a process set up as for training.

    widths, windows: those of the layers of the section ``rules``.
    text_bytes: of the text that the section ``prepare`` prepares.
    """
    resolve(DeviceConfig(), silent)
    for name in names:
        if name == "rules":
            yield from rules.speeds(n_repeats, widths, windows)
            continue
        sections = SECTIONS[name]
        if name == "prepare" and text_bytes is not None:
            sections = (partial(prepare.preparing, size_bytes=text_bytes),)
        for section in sections:
            yield from section(n_repeats)


def to_json(rows: Sequence[Row], *, n_repeats: int) -> dict[str, object]:
    """The one line that a benchmark leaves: where it was measured, how, and what."""
    found = describe()
    return {
        "schema": "meristem.bench/1",
        "hardware": found["hardware"],
        "code": found["code"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "repeats": n_repeats,
        "rows": [row.to_json() for row in rows],
    }
