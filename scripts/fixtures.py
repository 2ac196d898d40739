"""Writes small runs and sessions into a directory: what this version saves, for later versions to read.

    cd tests/fixtures/e97c871 && python ../../../scripts/fixtures.py

``text.txt`` beside them is the corpus. Each run is interrupted after step 20 and its session saved; ``expected.json``
holds hashes of all tensors, and the losses of the five steps that follow, made in a copy.
"""

import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson
import torch

from meristem.checkpoint.store import find
from meristem.events import silent
from meristem.models.load import load
from meristem.recipes.pretrain import pretrain
from meristem.runs.config import load_config
from meristem.serve import store as sessions
from meristem.serve.session import Session
from meristem.sinks.console import Console
from meristem.sinks.records import history

STOP_AT: Final = 20
N_MORE: Final = 5
FED: Final = "3 times 3 is 9, they say. 4 times 4 i"
"""So many bytes that every chunk, period and segment is in its middle."""

FED_LATER: Final = "s 16, they say.\n"

COMMON: Final = (
    *("data.source=text.txt", "data.window=24", "data.batch=2", "tokenizer.kind=byte", "run.root=."),
    *("device.name=cpu", "device.compute=fp32", "device.threads=1", "model.width=8", "model.n_layers=1"),
    *("memory.head_width=4", "train.steps=40", "train.budget=null", "train.log_every=1", "evaluate.every_s=null"),
    *("evaluate.n_windows=2", "checkpoint.every=100", "checkpoint.every_s=null", "rollback.snapshots=2"),
    "sinks.system_every_s=3600",
)
ATTENTION: Final = ("model.heads=2", "model.span=16")
READS_ON: Final = "data.order=sequential"
RUNS: Final[Mapping[str, tuple[str, ...]]] = {
    "titans-mag": ATTENTION,
    "hope": (
        "model.tied=true",
        "model.hidden=16",
        "model.levels.periods=[1, 3, 8]",
        READS_ON,
        "memory.self_reference.chunk_memory=7",
        "memory.self_reference.chunk_other=14",
    ),
    "lmm-titans_mlp": (READS_ON, "model.tied=true", "memory.chunk=7"),
    "atlas-mag": (READS_ON, "model.tied=true", *ATTENTION, "memory.chunk=7"),
    "kept": (READS_ON, "model.tied=true", "memory.kept.read=gated", "memory.kept.length=11", "memory.kept.limit=3"),
    "levels": (READS_ON, "model.tied=true", "memory.levels.count=3", "memory.levels.periods=[1, 7, 19]"),
    "muon": (*ATTENTION, "model.tied=true", "optim.kind=muon", "optim.rate=0.02", "model.n_persistent=2"),
}
"""Settings by name of the run; ``kept`` and ``levels`` are of preset lmm, ``muon`` of titans-mag."""

PRESETS: Final = {"kept": "lmm", "levels": "lmm", "muon": "titans-mag"}
WITH_RECORDS: Final = "titans-mag"
"""The one whose records stay; those of the others would take more room than all that is of use."""

LEARN: Final = {"hope": "levels"}


class Interrupting(Console):
    """A view that asks the run to stop once it shows a step."""

    def __init__(self, step: int) -> None:
        super().__init__(json=True)
        self._step = step

    def update(self, fields: Mapping[str, str], *, progress: float | None = None, loss: float | None = None) -> None:
        if fields.get("step") == str(self._step):
            signal.raise_signal(signal.SIGINT)


def train(name: str, stop_at: int) -> Path:
    """Train or go on, and stop after a step; gives the run directory."""
    config = load_config(PRESETS.get(name, name), [*COMMON, f"run.name={name}", *RUNS[name]], {}).tree
    return pretrain(config, view=Interrupting(stop_at)).run_dir


def hashes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The first half of the SHA-256 over dtype, shape and bytes of each tensor."""
    found = {}
    for name, tensor in sorted(tensors.items()):
        content = f"{tensor.dtype} {list(tensor.shape)}".encode()
        found[name] = hashlib.sha256(content + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {name: digest.hexdigest()[:32] for name, digest in found.items()}


def write_session(name: str) -> dict[str, Any]:
    """A session with the model of a run, and what is expected of it."""
    model, tokenizer = load(name)
    session = Session(model, tokenizer, random_seed=7, name=name, learn=LEARN.get(name, "memory"))  # type: ignore[arg-type]
    session.feed(FED)
    session.save(Path(f"{name}.session"))
    tensors, header = sessions.read(Path(f"{name}.session"))
    return {
        "tensors": hashes(tensors),
        "integers": header.get("integers", {}),
        "n_tokens": header["n_tokens"],
        "turn": header["turn"],
        "later_nats": session.feed(FED_LATER).nats,
    }


def write(name: str) -> dict[str, Any]:
    """One run, its session, and what is expected of both."""
    directory = train(name, STOP_AT)
    checkpoint = find(directory, silent)
    trees = [Path(file["path"]).stem for file in checkpoint.manifest["files"] if file["role"] == "tree"]
    records = ("events.ndjson", "metrics.ndjson") if name != WITH_RECORDS else ()
    for left in ("run.lock", "journal", "emergency.state", "samples.ndjson", "system.ndjson", *records):
        (directory / left).unlink(missing_ok=True)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(directory, Path(copy) / name)
        shutil.copy("text.txt", copy)
        os.chdir(copy)
        train(name, STOP_AT + N_MORE)
        os.chdir(here)
        told = [record for record in history(Path(copy) / name) if record["split"] == "train"]
    losses = {str(record["step"]): record["metrics"]["nats"] for record in told if record["step"] > STOP_AT}
    return {
        "trees": {tree: hashes(checkpoint.tree(tree)) for tree in trees},
        "losses_nats": losses,
        "session": write_session(name),
    }


def main() -> None:
    """All of them, in the working directory."""
    os.environ["MERISTEM_CACHE"] = tempfile.mkdtemp()
    torch.set_num_threads(1)
    expected = {name: write(name) for name in RUNS}
    Path("latest").unlink(missing_ok=True)
    Path("expected.json").write_bytes(orjson.dumps(expected, option=orjson.OPT_INDENT_2) + b"\n")


if __name__ == "__main__":
    main()
