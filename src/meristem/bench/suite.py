"""Which figures there are, and how they are selected."""

from collections.abc import Callable, Iterator, Sequence

import torch

from meristem.bench import compositions, memory, model, rules, safety, snapshot
from meristem.bench.measure import Row
from meristem.device.config import DeviceConfig
from meristem.device.describe import describe
from meristem.device.resolve import resolve
from meristem.events import silent

SECTIONS: dict[str, tuple[Callable[[int], Iterator[Row]], ...]] = {
    "memory": (memory.forms, memory.layer, memory.deep, memory.gated),
    "model": (model.models, model.growth),
    "compositions": (compositions.compositions,),
    "hope": (compositions.hope, compositions.hope_decoding),
    "levels": (compositions.levels,),
    "decode": (model.decoding, memory.token),
    "snapshot": (snapshot.snapshots, safety.safety),
    "start": (model.start,),
}


def measure(
    names: Sequence[str], *, n_repeats: int = 5, widths: Sequence[int] = (128,), windows: Sequence[int] = (512,)
) -> Iterator[Row]:
    """The rows of the named sections, each as soon as it is measured, in a process set up as for training.

    widths, windows: those of the layers in the table of rules, which belongs to the section ``memory``.
    """
    resolve(DeviceConfig(), silent)
    for name in names:
        for section in SECTIONS[name]:
            yield from section(n_repeats)
        if name == "memory":
            yield from rules.speeds(n_repeats, widths, windows)


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
