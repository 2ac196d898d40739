"""A file of tables whose variants train for a few steps on a short text."""

from pathlib import Path
from typing import Any

from meristem.config import dump_yaml
from recipes.small import TEXT


def tables(place: Path) -> dict[str, Any]:
    """Two tables that train the same models; the second reads with them."""
    shared = {
        "against": ["titans"],
        "texts": {"times": [f"data.source={place / 'text.txt'}"]},
        "budgets": {"tokens": ["train.steps=4"]},
    }
    reading = {
        "learn": ["none", "memory"],
        "texts": {"prose": str(place / "prose.txt"), "sums": str(place / "text.txt")},
        "marks": [16, 64],
    }
    return {
        "memory": shared | {"question": "Is a memory better than none?", "variants": ["attention", "titans"]},
        "reading": shared | {"question": "Does it gain by reading?", "variants": ["titans"], "reading": reading},
    }


def listed(place: Path, *more: str, **changes: Any) -> Path:
    """Written into ``place``; ``more`` settings of all variants, ``changes`` of the tree."""
    (place / "text.txt").write_text(TEXT * 3)
    (place / "prose.txt").write_text("Rain fell on the old harbour, and nobody came home.\n" * 4)
    common = [
        *(f"data.root={place}", f"run.dir={place / 'runs'}", "data.validation=0.2", "device.device=cpu"),
        *("data.seq_len=16", "data.batch_size=2", "tokenizer.kind=byte", "device.dtype=fp32"),
        *("model.dim=16", "model.n_layers=1", "model.n_heads=2", "train.log_every=2", "eval.batch_size=4"),
        *("eval.every=2", "eval.every_s=null", "eval.n_windows=4", "eval.n_windows_end=4"),
        *("eval.n_samples=0", "checkpoint.every=2", "checkpoint.every_s=null"),
    ]
    tree = {
        "seeds": [0, 1],
        "rates": [1.0e-3, 3.0e-3],
        "rate_share": 0.5,
        "span": 4,
        "n_texts": 1,
        "n_documents": 1,
        "same_size_as": "titans",
        "settings": [*common, *more],
        "variants": {
            "attention": {"preset": "attention", "published": "elsewhere, 12 against 13"},
            "titans": {"preset": "titans-mag", "settings": ["memory.head_dim=8", "model.combine=additive"]},
        },
        "tables": tables(place),
    }
    path = place / "evidence.yaml"
    path.write_text(dump_yaml(tree | changes))
    return path
