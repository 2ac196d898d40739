"""What of a run is saved, and how a run goes on from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import nn

from meristem.checkpoint import migrate, prune, store
from meristem.checkpoint import run as runs
from meristem.checkpoint.snapshots import copy_into
from meristem.checkpoint.store import Checkpoint
from meristem.config import fingerprint, leaves
from meristem.data.config import CARRIED
from meristem.data.corpus import Corpus
from meristem.data.stream import Cursor, Stream
from meristem.data.tokenizer import Tokenizer, tokenizer_from_bytes
from meristem.device.config import DeviceConfig
from meristem.device.random import random_state, restore_random_state
from meristem.device.resolve import NAMES, Device
from meristem.distributed.engine import Engine
from meristem.distributed.shards import as_part_of, is_part, local_by_name, whole
from meristem.distributed.world import World
from meristem.errors import CheckpointMismatch, NoCheckpoint, TokenizerMismatch
from meristem.events import Emit, Event
from meristem.growth.garden import Garden
from meristem.growth.graft import seeds_in
from meristem.growth.settle import settled_in
from meristem.memory.state import State, as_tensors, from_tensors, join_rows, move, take_rows
from meristem.models.load import of_today, put_weights
from meristem.models.topology import to_json
from meristem.models.weights import rates_of
from meristem.optim import state as optim_state
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.runs.backend import Backend
from meristem.runs.config import Config, config_of
from meristem.runs.directory import Run
from meristem.train.emergency import Emergency
from meristem.train.guard import Guard
from meristem.train.progress import Progress
from meristem.train.rollback import Rollbacks
from meristem.train.state import TrainingState


@dataclass
class Job:
    """What is trained, on what, and how far.

    state: all that training changes. It is replaced by assignment, so that ``model``, ``optimizer`` and ``engine`` are
        those of now and not to be kept from one step to the next.
    backend: what its memories are computed by, from the first step to the last.
    """

    config: Config
    device: Device
    corpus: Corpus
    stream: Stream
    state: TrainingState
    backend: Backend

    @property
    def model(self) -> nn.Module:
        """The model of ``state``."""
        return self.state.model

    @property
    def optimizer(self) -> MultiPeriodOptimizer:
        """The optimizer of ``state``."""
        return self.state.optimizer

    @property
    def engine(self) -> Engine:
        """The engine of ``state``."""
        return self.state.engine


@dataclass(frozen=True)
class Contents:
    """What of a run is saved, in memory and on disk alike: trees of tensors, and plain values.

    In memory each process saves what it holds: its rows of the memory, its own sums of gradients that wait, and of
    tensors that are sharded its shard. On disk is that of the run: ``gathered`` and ``of_process`` lead there and back.
    """

    trees: Mapping[str, Mapping[str, torch.Tensor]]
    values: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """What a checkpoint holds; its tensors are mapped from the file."""
        trees = {name: checkpoint.tree(name) for name in ("model", "optim", "random", "memory") if checkpoint.has(name)}
        names = ("progress", "cursor", "random", "safety", "probe", "topology", "garden")
        values = {name: checkpoint.value(name) for name in names if checkpoint.has(name)}
        counted = {"step": checkpoint.step, "tokens": checkpoint.manifest["tokens"] or 0}
        return cls(trees, values | {"progress": counted | values.get("progress", {})})

    def of_process(self, world: World, n_rows: int) -> Self:
        """What of it one of some processes goes on from: its share of ``n_rows``; and what waits the first offers."""
        if world.size == 1:
            return self
        trees = dict(self.trees)
        if "memory" in trees:
            start, stop = (rank * n_rows // world.size for rank in (world.rank, world.rank + 1))
            trees["memory"] = as_tensors(take_rows(from_tensors(trees["memory"]), start, stop))
        if not world.is_first:
            trees["optim"] = {
                name: torch.zeros_like(tensor) if name.endswith(f"/{optim_state.PENDING}") else tensor
                for name, tensor in trees["optim"].items()
            }
        return replace(self, trees=trees)


@dataclass(frozen=True)
class Safety:
    """What a run knows of its own soundness."""

    guard: Guard = Guard()
    rollbacks: Rollbacks = Rollbacks()
    emergency: Emergency = Emergency()

    def to_json(self) -> dict[str, object]:
        """Plain values for a checkpoint."""
        return {name: value.to_json() for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What ``to_json`` wrote; what is absent is as in a run that begins."""
        return cls(
            Guard.from_json(values.get("guard", {})),
            Rollbacks.from_json(values.get("rollbacks", {})),
            Emergency.from_json(values.get("emergency", {})),
        )


@dataclass(frozen=True)
class Best:
    """The best that was measured of the saved."""

    value: float
    step: int
    path: Path


def after_restart(resume: str, directory: Path, n_restarts: int) -> str:
    """How a run resumes whose processes were all started again: from what it has saved since, if anything."""
    if n_restarts == 0 or not (directory / runs.FILE).exists():
        return resume
    return "auto" if resume in ("auto", "must", "never") or store.entries(directory / "checkpoints") else resume


def checkpoint_to_resume(run: Run, resume: str) -> Checkpoint | None:
    """Where the run goes on, or None for its beginning.

    resume: ``auto`` takes the newest whole checkpoint if there is one, ``must`` insists on one, ``never`` takes none;
    anything else is the path of a checkpoint or of a run. A checkpoint that was found and cannot be used is an error,
    never a fresh start.

    One that was saved while the guard counted something is passed over for the newest sound one: the run may have gone
    back behind it since, and goes on from there as it would have, to the bit.

    Of several processes the first chooses for all.
    """
    if not run.world.is_first:
        path = run.world.broadcast("checkpoint", "")
        return store.open_checkpoint(Path(path)) if path else None
    found = _found(run, resume)
    run.world.broadcast("checkpoint", str(found.path) if found else "")
    return found


def _found(run: Run, resume: str) -> Checkpoint | None:
    if resume == "never":
        return None
    if resume not in ("auto", "must"):
        return store.find(Path(resume).expanduser(), run.emit)
    found = newest_sound(run.checkpoints, run.emit) or store.newest(run.checkpoints, run.emit)
    if found is None and resume == "must":
        raise NoCheckpoint(
            f"{run.directory} holds no whole checkpoint to go on from. "
            "Give the directory of another run with --run-dir, or begin with --resume auto.",
            path=str(run.directory),
        )
    return found


def newest_sound(checkpoints: Path, emit: Emit) -> Checkpoint | None:
    """The newest whole checkpoint saved while no detector of the guard was counting and the probe cost a number."""
    return store.newest(checkpoints, emit, _unsound)


def _unsound(checkpoint: Checkpoint) -> str | None:
    names = ("probe", "safety")
    return _why_unsound({name: checkpoint.value(name) for name in names if checkpoint.has(name)})


def _why_unsound(values: Mapping[str, Any]) -> str | None:
    """Why a resume passes over a checkpoint with these plain values; None where it does not."""
    if values.get("probe", {}).get("nats", 0.0) is None:
        # Spoilt in the last step before it was saved, so that no detector had met it yet.
        return "the probe cost no number when it was saved"
    if "safety" not in values or Safety.from_json(values["safety"]).guard.is_quiet:
        return None
    return "it was saved while the guard was counting"


def contents(job: Job, safety: Safety, probe_nats: float) -> Contents:
    """Everything that the future of this process depends on; tensors are those in use, and not copies."""
    progress = job.state.progress
    memory = as_tensors(progress.memory or {}) if job.config.data.order in CARRIED else {}
    random_values, random_tensors = random_state(job.device.device)
    trees: dict[str, Mapping[str, torch.Tensor]] = {
        "model": local_by_name(job.model.state_dict()),
        "optim": local_by_name(optim_state.tensors(job.model, job.optimizer)),
        "random": random_tensors,
    }
    if memory:
        trees["memory"] = memory
    values = {
        "progress": progress.to_json(),
        "cursor": progress.cursor.to_json(),
        "random": random_values,
        "device": {"dtype": NAMES[job.device.dtype], "memory": job.backend.name, "layers": job.backend.layers},
        "safety": safety.to_json(),
        "probe": {"nats": probe_nats if math.isfinite(probe_nats) else None},
        "topology": to_json(job.state.topology),
    }
    if job.state.garden is not None:
        values["garden"] = job.state.garden.to_json()
    if rates := rates_of(job.model):
        values["learn"] = {"rates": dict(rates)}
    return Contents(trees, values)


def gathered(job: Job, saved: Contents) -> Contents:
    """What was just saved of this process, as that of the run. All processes must call; alone it is the same.

    What waits in the optimizer must have been pooled before (``MultiPeriodOptimizer.gather_pending``).
    """
    world = job.engine.world
    if world.size == 1:
        return saved
    trees = dict(saved.trees)
    if any(is_part(parameter) for parameter in job.model.parameters()):
        held = {"model": job.model.state_dict(), "optim": optim_state.tensors(job.model, job.optimizer)}
        for tree, tensors in held.items():
            # One after the other, and on the host: a device has no room for all of them.
            full = ((name, whole(tensor)) for name, tensor in tensors.items())
            trees[tree] = {name: tensor.to("cpu", copy=True) for name, tensor in full if world.is_first}
    if "memory" in trees:
        # As bytes: rows that stand at other places in their documents have leaves of other shapes.
        own = serialize({name: leaf.to("cpu", copy=True).contiguous() for name, leaf in trees["memory"].items()})
        each = [from_tensors(deserialize(saved_rows)) for saved_rows in world.all_gather_bytes(own, "memory")]
        trees["memory"] = as_tensors(join_rows(each))
    return replace(saved, trees=trees)


def write(
    run: Run, job: Job, progress: Progress, saved: Contents, *, reason: str, metrics: dict[str, float], seq: int
) -> Path:
    """Write one checkpoint, then let go of what retention does not keep. May run beside the training it is of."""
    config, tokenizer, n_ranks = job.config, job.corpus.tokenizer, run.world.size
    path = store.save(
        run.checkpoints,
        step=progress.step,
        trees=saved.trees,
        values=saved.values,
        files={"config.yaml": migrate.settings_text(config).encode(), "tokenizer.json": tokenizer.to_bytes()},
        header={
            "run": run.manifest.content["id"],
            "tokens": progress.tokens,
            "epoch": job.stream.epoch(progress.cursor),
            "seq": seq,
            "reason": reason,
            "config_sha256": fingerprint(config),
            "code": run.manifest.content["code"],
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "dataset_fingerprint": job.corpus.fingerprint,
            "metrics": metrics,
            "world": {"size": n_ranks, "mesh": [n_ranks] if config.distributed.shard and n_ranks > 1 else None},
        },
    )
    # The run may be steps further by now, and its record stands there; so the step that is safe is said apart.
    safe = {"step": progress.step, "is_sound": _why_unsound(saved.values) is None}
    run.emit(Event("checkpoint.saved", {"checkpoint": path.name, **safe, "reason": reason, "metrics": metrics}))
    part = config.checkpoint
    prune.prune(
        run.checkpoints,
        last=part.last,
        best=part.best,
        metric=part.metric,
        direction=part.direction,
        every=part.keep_every,
    )
    best = best_so_far(run, config)
    run.manifest.update(checkpoints={"last": path.name, "best": best.path.name if best else None})
    if best:
        run.manifest.update(best={"metric": part.metric, "value": best.value, "step": best.step})
    return path


def best_so_far(run: Run, config: Config) -> Best | None:
    """The best of the checkpoints that are there; None when none was measured."""
    sign = 1 if config.checkpoint.direction == "min" else -1
    measured = [(entry.metrics.get(config.checkpoint.metric), entry) for entry in store.entries(run.checkpoints)]
    ranked = [Best(value, entry.step, entry.path) for value, entry in measured if value is not None]
    return min(ranked, key=lambda best: sign * best.value, default=None)


def from_checkpoint(config: DeviceConfig, checkpoint: Checkpoint | None) -> DeviceConfig:
    """What ``auto`` came to when the run began: a second measurement might choose other numbers in the middle of it."""
    if checkpoint is None or config.dtype != "auto" or not checkpoint.has("device"):
        return config
    return config.model_copy(update={"dtype": checkpoint.value("device").get("dtype", "auto")})


def put_saved_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the model the saved weights; its parameters are new ones afterwards, so this comes before the optimizer."""
    # Copies: a tensor mapped from a file lies otherwise in RAM than a fresh one, and a sum may then end in other bits.
    put_weights(model, {name: tensor.clone() for name, tensor in checkpoint.tree("model").items()}, checkpoint)


def restore(job: Job, saved: Contents, emit: Emit) -> Safety:
    """Put moments, random streams, memory and position back, and say how sound the run was.

    The weights come apart: a run that begins has them before its optimizer is made, one that rolls back has both.
    What was not saved is as in a run that begins; an event names it.
    """
    absent = [name for name in ("cursor", "optim", "random") if name not in {*saved.values, *saved.trees}]
    if absent:
        emit(Event("degraded", {"what": "saved state", "absent": absent}, "warning"))
    cursor = Cursor.from_json(job.stream.start().to_json() | saved.values.get("cursor", {}))
    job.stream.next(cursor)  # refuses another text or another order now, also where no step is left to make
    optim_state.restore(job.model, job.optimizer, _in_parts(job.model, saved.trees.get("optim", {})), emit)
    restore_random_state(saved.values.get("random", {}), saved.trees.get("random", {}), emit, device=job.device.device)
    memory: State | None = None
    if "memory" in saved.trees:
        found = from_tensors(saved.trees["memory"])
        memory = of_today(job.model, move(found, job.device.device))
    progress = Progress.from_json(saved.values["progress"], cursor, memory)
    garden = Garden.from_json(saved.values["garden"]) if "garden" in saved.values else None
    job.state = replace(job.state, progress=progress, garden=garden)
    return Safety.from_json(saved.values.get("safety", {}))


def put_back_weights(job: Job, weights: Mapping[str, torch.Tensor]) -> None:
    """Give the model saved weights in place, each process its shard where they are sharded."""
    live = job.model.state_dict()
    own = {name: as_part_of(live[name], tensor) if name in live else tensor for name, tensor in weights.items()}
    copy_into(local_by_name(live), local_by_name(own))
    settled = [seed for seeds in settled_in(job.model).values() for seed in seeds]
    for seed in (*seeds_in(job.model).values(), *settled):
        seed.follow(seed.way)


def _in_parts(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an optimizer gathered, each tensor in the form in which its parameter is held."""
    parameters = dict(model.named_parameters())
    owners = {path: parameters.get(path.rsplit("/", 1)[0]) for path in saved}
    return {
        path: tensor if (owner := owners[path]) is None else as_part_of(owner, tensor) for path, tensor in saved.items()
    }


def require_same(config: Config, now: Tokenizer, checkpoint: Checkpoint) -> None:
    """Refuse to go on with another tokenizer, model or kind of optimizer than the checkpoint's."""
    was = tokenizer_from_bytes(checkpoint.file("tokenizer.json"))
    if was.fingerprint != now.fingerprint:
        raise TokenizerMismatch(
            f"{checkpoint.path} was trained with a {was.kind} tokenizer of {was.vocab_size} entries (SHA-256 "
            f"{was.fingerprint[:12]}); the text is now cut by a {now.kind} tokenizer of {now.vocab_size} "
            f"({now.fingerprint[:12]}). Set the keys of tokenizer and data as they were, or start a new run.",
            path=str(checkpoint.path),
            found=now.fingerprint,
            expected=was.fingerprint,
        )
    every = changed(config, checkpoint)
    differences = {
        key: values
        for key, values in every.items()
        if key.split(".")[0] in ("model", "memory", "finetune") and key != "finetune.remote_code"
    }
    if differences:
        listed = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in differences.items())
        raise CheckpointMismatch(
            f"{checkpoint.path} holds another model: {listed}. Set them as they were, or start a new run with "
            "--resume never and another --run-dir.",
            path=str(checkpoint.path),
            step=checkpoint.step,
            differences=differences,
        )
    if "optim.name" in every:
        old, new = every["optim.name"]
        raise CheckpointMismatch(
            f"{checkpoint.path} holds what the optimizer '{old}' gathered, of which '{new}' can make nothing. Set "
            "optim.name as it was, or start a new run with --resume never and another --run-dir.",
            path=str(checkpoint.path),
            step=checkpoint.step,
            differences={"optim.name": (old, new)},
        )


def changed(config: Config, checkpoint: Checkpoint) -> dict[str, tuple[object, object]]:
    """The settings that are not as they were when the checkpoint was saved: what each was and is."""
    was = leaves(config_of(checkpoint.path).model_dump(mode="json"))
    now = leaves(config.model_dump(mode="json"))
    return {
        key: (was.get(key), now.get(key)) for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)
    }
