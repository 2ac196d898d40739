"""A file of arms that train for a few steps on a short text."""

from pathlib import Path
from typing import Any

from meristem.config import dump_yaml
from recipes.small import TEXT

SCHEDULED = ["grow.enabled=true", "grow.policy.name=schedule"]


def arms() -> dict[str, Any]:
    """A small model, a large one, the two ways to make it deeper, and seeds."""
    seeds = "grow.policy.settings={steps: [4], blueprint: bottleneck, settings: {hidden: 8}, way: joint}"
    return {
        "small": {"what": "one block"},
        "large": {"what": "two blocks", "settings": ["model.n_layers=2"]},
        "zero": {
            "what": "one block, then a silent one",
            "settings": [*SCHEDULED, "grow.policy.settings={operation: insert, shares: [0.25]}"],
        },
        "stack": {
            "what": "one block, then the same again",
            "settings": [*SCHEDULED, "grow.policy.settings={operation: stack, shares: [0.25]}"],
        },
        "seeds": {"what": "one block and a seed", "settings": [*SCHEDULED, seeds]},
    }


def listed(place: Path, *more: str, **changes: Any) -> Path:
    """Written into ``place``; ``more`` settings of all arms, ``changes`` of the tree."""
    (place / "text.txt").write_text(TEXT * 3)
    common = [
        *(f"data.source={place / 'text.txt'}", f"data.root={place}", f"run.dir={place / 'runs'}"),
        *("data.validation=0.2", "data.seq_len=16", "data.batch_size=2", "tokenizer.kind=byte", "device.device=cpu"),
        *("device.dtype=fp32", "model.dim=16", "model.n_layers=1", "model.n_heads=2", "train.log_every=2"),
        *("eval.batch_size=4", "eval.every=4", "eval.every_s=null", "eval.n_windows=4", "eval.n_windows_end=4"),
        *("eval.n_samples=0", "eval.learn_rate=false", "checkpoint.every=4", "checkpoint.every_s=null"),
        *("grow.boundary_every=1", "grow.gates.training_steps=2", "grow.gates.pairs=2"),
    ]
    tree = {
        "seeds": [0, 1],
        "rates": [1.0e-3, 3.0e-3],
        "rate_share": 0.5,
        "preset": "attention",
        "settings": [*common, *more],
        "arms": arms(),
        "budgets": {"one": ["train.flops=1.0e7"], "two": ["train.flops=2.0e7"]},
    }
    path = place / "growth.yaml"
    path.write_text(dump_yaml(tree | changes))
    return path
