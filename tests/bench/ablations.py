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
        *(f"data.source={text}", f"data.root={place}", f"run.dir={place / 'runs'}"),
        *("data.seq_len=16", "data.batch_size=2", "tokenizer.kind=byte", "device.dtype=fp32", "data.validation=0.2"),
        *("model.dim=16", "model.n_layers=1", "train.steps=4", "train.max_time=null", "train.log_every=2"),
        *("eval.every=2", "eval.every_s=null", "eval.n_windows=4", "eval.n_windows_end=4"),
        *("eval.n_samples=0", "checkpoint.every=2", "checkpoint.every_s=null"),
    ]
    tree = {
        "seeds": [0, 1],
        "same_size_as": "titans",
        "settings": [*common, *more],
        "n_recall": 2,
        "n_documents": 2,
        "variants": variants
        or {
            "attention": {"preset": "attention", "settings": ["model.n_heads=2"]},
            "titans": {
                "preset": "titans-mag",
                "against": ["attention"],
                "settings": ["model.n_heads=2", "memory.head_dim=8", "memory.chunk=4"],
                "published": "elsewhere, 12 against 13",
            },
        },
    }
    path = place / "ablation.yaml"
    path.write_text(dump_yaml(tree | changes))
    return path
