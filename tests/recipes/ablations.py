"""A file of variants that train for a few steps on a short text."""

from pathlib import Path
from typing import Any

from meristem.config import dump_yaml
from recipes.small import TEXT


def listed(place: Path, *more: str, variants: dict[str, Any] | None = None, **changes: object) -> Path:
    """Written into ``place``; ``more`` settings of all variants, ``changes`` of the tree."""
    text = place / "text.txt"
    text.write_text(TEXT * 3)
    common = [
        *(f"data.source={text}", f"data.root={place}", f"run.root={place / 'runs'}"),
        *("data.window=16", "data.batch=2", "tokenizer.kind=byte", "device.compute=fp32", "data.validation=0.2"),
        *("model.width=16", "model.n_layers=1", "train.steps=4", "train.budget=null", "train.log_every=2"),
        *("evaluate.every=2", "evaluate.every_s=null", "evaluate.n_windows=4", "evaluate.n_windows_end=4"),
        *("evaluate.n_samples=0", "checkpoint.every=2", "checkpoint.every_s=null"),
    ]
    tree = {
        "seeds": [0, 1],
        "same_size_as": "titans",
        "settings": [*common, *more],
        "n_recall": 2,
        "n_documents": 2,
        "variants": variants
        or {
            "attention": {"preset": "attention", "settings": ["model.heads=2"]},
            "titans": {
                "preset": "titans-mag",
                "against": ["attention"],
                "settings": ["model.heads=2", "memory.head_width=8", "memory.chunk=4"],
                "published": "elsewhere, 12 against 13",
            },
        },
    }
    path = place / "ablation.yaml"
    path.write_text(dump_yaml(tree | changes))
    return path
