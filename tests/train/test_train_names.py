"""What the room ``train`` offers, name by name: a new public name is a decision, and this is where it is taken."""

import ast
from importlib import import_module
from pathlib import Path

import meristem.train

ROOM = Path(meristem.train.__file__).parent

PUBLIC = {
    "aggregate": {
        *("Conflict", "Gradients", "HIGH", "JUMP", "Report", "WARN"),
        *("changes", "combine", "gather", "keep_graphs", "settle", "total"),
    },
    "backward": {"BackwardResult", "backward", "make_room", "read_again"},
    "emergency": {
        *("Emergency", "Level", "raised", "quiet", "downgraded"),
        *("PER_MINUTE", "Clock", "Signal", "Signals"),
        *("FILE", "SharedLevel", "read_shared"),
    },
    "guard": {
        *("StepStats", "Guard", "Verdict", "observe", "observe_held_out"),
        *("SKIPPED_SPAN", "SKIPPED_SHARE", "DETECTORS", "Detector", "Figures", "History", "Baseline"),
        *("LEAST_SHARE", "IN_ROW", "TIMES_MEDIAN", "FLOOR_NATS", "TIMES_SEVERE", "COLLAPSE", "COLLAPSE_FROM"),
        *("TIMES_NORM", "FLOOR_NORM", "UPDATE_RATIO", "HELD_OUT_SPAN", "HELD_OUT_MARGIN_NATS", "HELD_OUT_IN_ROW"),
    },
    "loop": {"Beside", "MOVING", "Step", "steps"},
    "loss": {"Teacher", "cross_entropy", "distillation"},
    "config": {
        *(
            "Duration",
            "TrainConfig",
            "GuardConfig",
            "RollbackConfig",
            "ProfileConfig",
            "AggregateConfig",
            "SourceWeights",
        ),
    },
    "profile": {"N_ROWS", "PHASES", "Tick", "activities", "profiled", "table"},
    "progress": {"Progress"},
    "state": {"Held", "Holder", "Saved", "TrainingState"},
    "rollback": {
        *("Tier", "TierName", "Act", "Attempt", "restore", "Rollbacks", "Latency"),
        *("FAST", "FULL", "BOUNDS_S", "USUAL", "SOUND_AFTER", "MOST_IN_ROW", "n_snapshots", "most_bytes"),
    },
}


def public_names(path: Path) -> set[str]:
    """The names without underscore that a file itself defines at its top level; what it imports is not among them."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_l7_public_names_of_train():
    """Each file offers these and no others, each of them can be imported, and the package itself offers none."""
    found = {path.stem: public_names(path) for path in ROOM.glob("*.py") if path.stem != "__init__"}
    assert found == PUBLIC
    for name, names in PUBLIC.items():
        module = import_module(f"meristem.train.{name}")
        assert all(hasattr(module, public) for public in names)
    assert public_names(ROOM / "__init__.py") == set()
