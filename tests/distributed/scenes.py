"""What each of the processes of a test does."""

import itertools
import json
import os
import signal
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import meristem.growth as grow
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.data.stream import Stream
from meristem.device.config import DeviceConfig
from meristem.device.resolve import resolve
from meristem.distributed.agreement import Agreement, Change, fingerprint
from meristem.distributed.config import DistributedConfig
from meristem.distributed.engine import Engine, alone, replicated, sharded
from meristem.distributed.shards import local, whole
from meristem.distributed.world import World, joined
from meristem.errors import AgreementFailed
from meristem.events import silent
from meristem.growth.isolation import Isolation, Pair, ShadowPass, enter
from meristem.memory.state import State, detach, flatten
from meristem.models.build import build as build_model
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build as build_optimizer
from meristem.optim.groups import levels
from meristem.optim.state import tensors
from meristem.runs import recovery
from meristem.train.backward import read_again
from meristem.train.config import AggregateConfig, TrainConfig
from meristem.train.loop import steps
from meristem.train.loss import cross_entropy
from meristem.train.progress import Progress
from meristem.train.state import Held, TrainingState

PERIODS = (1, 2, 4)
N_STEPS = 2 * PERIODS[-1]
WAITS_S = 2.0
"""How long processes wait for each other's answers: much longer than a machine in use takes for one."""

SPOILT = 5
"""A step in which one process finds a gradient of a slow level that is not finite, and nobody else does."""


@dataclass(frozen=True)
class Kind:
    """One way to train, whatever the number of processes."""

    name: str
    engine: str
    order: str = "shuffled"
    accumulate: int = 1
    dtype: str = "float64"
    is_spoilt: bool = False


KINDS = (
    Kind("plain", "replicated", accumulate=2),
    Kind("reading on", "replicated", order="sequential"),
    Kind("parts", "sharded", accumulate=2),
    Kind("parts reading on", "sharded", order="sequential"),
    Kind("spoilt", "replicated", is_spoilt=True),
    Kind("single", "replicated", dtype="float32"),
    Kind("single parts", "sharded", dtype="float32"),
)


def train(world: World, folder: Path) -> dict[str, Any]:
    """Every kind, one after the other: what was exchanged and measured in each step."""
    return {kind.name: _train(kind, world, folder) for kind in KINDS}


def _train(kind: Kind, world: World, folder: Path) -> dict[str, Any]:
    model = _model(getattr(torch, kind.dtype))
    slow = [parameter for period, level in levels(model).items() if period > 1 for parameter in level]
    engine = _engine(kind, model, world, slow)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01, grad_clip=0.5))
    optimizer.reduce = None if world.size == 1 else world.all_reduce
    stream = _stream(folder, kind.order).share(world.rank, world.size)
    cursor, memory, steps = stream.start(), None, []
    for step in range(N_STEPS):
        batches = []
        for _ in range(kind.accumulate):
            batch, cursor = stream.next(cursor)
            batches.append(batch)
        world.traffic.take()
        written = _written_bytes()
        loss, memory = _backward(engine, batches, memory, world.size)
        if kind.is_spoilt and step == SPOILT and world.rank == world.size - 1:
            next(parameter.grad for parameter in slow if parameter.grad is not None).fill_(float("nan"))
        pulse = optimizer.clock.pulse()
        update = optimizer.step(loss)
        optimizer.zero_grad()
        numbers = [update.loss, update.norm, update.is_skipped]
        steps.append(
            {
                "traffic": world.traffic.take(),
                "written_bytes": _written_bytes() - written,
                "pulse": pulse,
                "numbers": [float(number) for number in numbers if number is not None],
            }
        )
    trees = {"trained": _whole(model), "memory": {k: v for k, v in flatten(memory or {}).items() if _is_tensor(v)}}
    optimizer.gather_pending(is_first=world.is_first)
    trees["waiting"] = {n: optimizer.pending[p] for n, p in model.named_parameters() if p in optimizer.pending}
    with engine.whole():
        trees["read"] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trees["answer"] = {"logits": model(torch.arange(2 * world.rank + 5)[None])[0].detach()}
    optimizer.flush()
    trees["flushed"] = _whole(model)
    for name, tree in trees.items():
        save_file({key: leaf.contiguous() for key, leaf in tree.items()}, _path(folder, kind, name, world.rank))
    sizes = {str(period): sum(each.nbytes for each in level) for period, level in optimizer.levels.items()}
    return {"steps": steps, "sizes": sizes, "fingerprint": fingerprint(trees["flushed"])}


def _model(dtype: torch.dtype) -> nn.Module:
    """A Titans memory that gates attention, above a chain of three levels."""
    levelled = {"count": len(PERIODS), "periods": PERIODS}
    model = ModelConfig(dim=12, n_layers=2, n_heads=2, sliding_window=5, mixer="mag", mlp="levels", levels=levelled)  # type: ignore[arg-type]
    return build_model(model, MemoryConfig(head_dim=4), 256, random_seed=3).to(dtype)


def _engine(kind: Kind, model: nn.Module, world: World, slow: list[nn.Parameter]) -> Engine:
    if world.size == 1:
        return alone(model)
    if kind.engine == "sharded":
        return sharded(model, world, device=torch.device("cpu"), slow=slow)
    return replicated(model, world, slow=slow, leaves_out=kind.order == "sequential")


def _stream(folder: Path, order: str) -> Stream:
    corpus = prepare(
        DataConfig(source=str(folder.parent / "text.txt"), root=folder.parent / "cache"), TokenizerConfig()
    )
    return Stream(corpus, "train", window=13, batch=4, order=order, random_seed=5)  # type: ignore[arg-type]


def _backward(engine: Engine, batches: list[Any], memory: State | None, n_ranks: int) -> tuple[Tensor, State]:
    """As the loop does it: the mean over the targets of all processes, gradients summed after the last batch."""
    n_targets = n_ranks * sum(batch.n_targets for batch in batches)
    losses = []
    for number, batch in enumerate(batches):
        with engine.micro_batch(number == len(batches) - 1):
            logits_bto, memory = engine.model(batch.tokens_bt, None if batch.starts else memory)
            loss = cross_entropy(logits_bto, batch.targets_bt) / n_targets
            loss.backward()
        losses.append(loss.detach())
        memory = detach(memory)
    return torch.stack(losses).sum(), memory


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter in full."""
    held = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf.clone() for name, leaf in held.items()}


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def _path(folder: Path, kind: Kind, name: str, rank: int) -> Path:
    return folder / f"{kind.name}.{name}.{rank}.safetensors"


def _written_bytes() -> int:
    """What this process has written so far, to files and sockets, as the kernel counts it; 0 where it does not tell."""
    if not Path("/proc/self/io").exists():
        return 0
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"])


def _agreement(world: World) -> Agreement:
    return Agreement(world.rank, world.size, world.store, timeout_s=WAITS_S)


def agree(world: World, folder: Path, *, misses: str = "") -> dict[str, Any]:
    """Orders one after the other; in the second, what ``misses`` says happens in the last process."""
    agreement = _agreement(world)
    held = [0]
    is_odd = world.rank == world.size - 1

    def plan(order: bytes) -> str:
        if is_odd and misses == "answer" and order == b"second":
            time.sleep(1.5 * WAITS_S)
        if is_odd and misses == "will" and order == b"second":
            raise ValueError("no room for this")
        if is_odd and misses == "life before" and order == b"second":
            os.kill(os.getpid(), signal.SIGKILL)
        return "other plan" if is_odd and misses == "plan" and order == b"second" else f"plan of {order.decode()}"

    def apply(order: bytes) -> str:
        held.append(len(held))
        if is_odd and misses == "life within" and order == b"second":
            os.kill(os.getpid(), signal.SIGKILL)
        is_other = is_odd and misses == "result" and order == b"second"
        return "other" if is_other else fingerprint({"": torch.tensor(held)})

    def undo() -> None:
        held.pop()

    outcomes = []
    for word in (b"first", b"second", b"third"):
        try:
            outcome = agreement.commit(word if world.is_first else b"", Change(plan, apply, undo))
        except AgreementFailed as error:
            outcomes.append({"error": str(error), "held": list(held)})
            break
        outcomes.append({"order": outcome.order.decode(), "against": outcome.against, "held": list(held)})
    return {"outcomes": outcomes}


def decider(world: World, folder: Path) -> dict[str, Any]:
    """The first process dies after it has given an order; the others can neither plan nor wait for ever."""

    def plan(order: bytes) -> str:
        if world.is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        return "plan"

    applied: list[bytes] = []

    def apply(order: bytes) -> str:
        applied.append(order)
        return ""

    try:
        _agreement(world).commit(b"order", Change(plan, apply, applied.clear))
    except AgreementFailed as error:
        return {"error": str(error), "applied": len(applied)}
    return {}


def meet(world: World, folder: Path) -> dict[str, Any]:
    """Barriers, values that must be the same, numbers of all, a process that does not come, and store keys."""
    agreement = _agreement(world)
    agreement.require_same("settings", "alike")
    for number in range(50):
        agreement.barrier(f"step {number}")
    n_keys = world.store.num_keys() if world.store else 0
    gathered = world.all_gather_numbers([world.rank, 0.5])
    tensors = [torch.full((3,), 1.0 + world.rank), torch.ones(2, dtype=torch.float64), torch.tensor(2.0)]
    world.all_reduce(tensors, "period 8")
    errors = []
    for what, found in (("settings", str(world.rank)), ("late", "")):
        if what == "late" and not world.is_first:
            time.sleep(1.5 * WAITS_S)
        try:
            agreement.require_same(what, found)
        except AgreementFailed as error:
            errors.append(str(error))
    return {
        "n_keys": n_keys,
        "gathered": gathered,
        "sums": [tensor.tolist() for tensor in tensors],
        "traffic": world.traffic.take(),
        "errors": errors,
    }


def killed(world: World, folder: Path) -> dict[str, Any]:
    """The last process dies in the middle of a step; the others raise instead of waiting."""
    model = _model(torch.float32)
    slow = [parameter for period, level in levels(model).items() if period > 1 for parameter in level]
    engine = replicated(model, world, slow=slow, leaves_out=False)
    stream = _stream(folder, "shuffled").share(world.rank, world.size)
    cursor, began = stream.start(), time.monotonic()
    try:
        for step in itertools.count():
            batch, cursor = stream.next(cursor)
            if step == 2 and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            began = time.monotonic()
            _backward(engine, [batch], None, world.size)
            model.zero_grad()
    except AgreementFailed as error:
        return {"error": str(error), "step": step, "seconds": time.monotonic() - began}


def shadow(world: World, folder: Path) -> dict[str, Any]:
    """Steps beside which a seed learns in shadow: what host and seed are then, and the pairs of losses."""
    model = grow.attach(_model(torch.float64), "blocks.1")
    seed = grow.graft(model, "blocks.1", "bottleneck", hidden=7)
    enter(model, "blocks.1", "shadow")
    slow = [parameter for period, level in levels(model).items() if period > 1 for parameter in level]
    engine = alone(model)
    if world.size > 1:  # the engine sums nothing of a seed that is off
        engine = replicated(model, world, slow=[*slow, *seed.parameters()], leaves_out=False)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01, grad_clip=0.5))
    optimizer.reduce = None if world.size == 1 else world.all_reduce
    stream = _stream(folder, "shuffled").share(world.rank, world.size)
    device, told = resolve(DeviceConfig(device="cpu", dtype="fp32", threads=1), silent), []
    read = partial(read_again, device=device, by=AggregateConfig())
    beside = ShadowPass(read, ["blocks.1"], told.append, every=2)
    held = Held(TrainingState(model, optimizer, engine, Progress(cursor=stream.start())))
    config = TrainConfig.model_validate({"max_time": None, "steps": N_STEPS})
    list(steps(held, stream, lambda _: 1.0, config=config, device=device, beside=beside))
    save_file(_whole(model), _path(folder, KINDS[0], "shadow", world.rank))
    pairs = [[float(each.without), float(each.with_seed)] for each in told if isinstance(each, Pair)]
    return {"pairs": pairs, "is_isolated": [each.is_isolated for each in told if isinstance(each, Isolation)]}


SCENES: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train,
    "shadow": shadow,
    "agree": agree,
    "decider": decider,
    "meet": meet,
    "killed": killed,
}


def run(
    folder: Path, overrides: list[str], resume: str = "auto", breaks: str = "", preset: str = "titans-mag"
) -> dict[str, Any]:
    """A whole run in ``folder``/run, as a command makes it.

    breaks: ``fault:rank:step``: what goes wrong, in which process, in which step counted from its start.
    """
    from meristem.recipes.pretrain import prepare_job, pretrain
    from meristem.runs import backend
    from meristem.runs.config import load_config
    from meristem.sinks.console import Console

    fault, rank, step = (*breaks.split(":"), "", "", "")[:3]
    is_here = fault and rank == os.environ.get("RANK", "0")
    jobs: list[Any] = []
    made: dict[str, Any] = {}

    def make_job(*given: Any) -> Any:
        # What the comparison of the native core with tensor code holds for a moment is no part of any weight.
        with Living() as living, mock.patch.object(backend, "measured_gain", lambda *_: 1.0):
            job = prepare_job(*given)
        made.update(_made(job.model), peak_bytes=living.peak_bytes)
        jobs.append(FAULTS[fault](job, int(step)) if is_here else job)
        return jobs[-1]

    result = pretrain(
        load_config(preset, overrides, {}).tree,
        run_dir=folder / "run",
        resume=resume,
        view=Console(json=True),
        make_job=make_job,
        time_scale=120,  # as many processes as there are here share few cores
    )
    weights = fingerprint({name: local(tensor) for name, tensor in jobs[0].model.state_dict().items()})
    return {"status": result.status, "step": result.step, "nats": result.nats, "weights": weights, "made": made}


def grow_run(folder: Path, overrides: list[str], breaks: str = "") -> dict[str, Any]:
    """A whole run that grows, in ``folder``/run.

    breaks: ``fault:rank:step``: which process is killed after the orders of a step (``struck``), or finds from then on
        that no change of structure is as it was planned (``unlike``).
    """
    from meristem.recipes import grow as grow_module
    from meristem.runs.config import load_config
    from meristem.sinks.console import Console
    from recipes import growing  # noqa: F401 - has a policy

    fault, rank, step = (*breaks.split(":"), "", "", "")[:3]
    before = grow_module.Growth.before
    jobs: list[Any] = []

    def unlike(*_: Any, **__: Any) -> float:
        raise RuntimeError("pretended")

    def stepping(self: grow_module.Growth) -> None:
        jobs[:] = [self._job]
        is_now = rank == os.environ.get("RANK", "0") and self._job.state.progress.step == int(step or 0)
        if is_now and fault == "unlike":
            vars(sys.modules["meristem.growth.transaction"])["verify"] = unlike  # `grow.transaction` is the function
        before(self)
        if is_now and fault == "struck":
            os.kill(os.getpid(), signal.SIGKILL)

    grow_module.Growth.before = stepping  # type: ignore[method-assign]
    config = load_config("titans-mag", overrides, {}).tree
    result = grow_module.grow(config, run_dir=folder / "run", view=Console(json=True), time_scale=120)
    (job,) = jobs
    return {
        "status": result.status,
        "step": result.step,
        "weights": fingerprint(job.model.state_dict()),
        "moments": fingerprint(tensors(job.model, job.optimizer)),
        "garden": job.state.garden.to_json(),
    }


class Living(TorchDispatchMode):
    """Counts the bytes of all numbers of the host that live while it lasts, by their storages; and the most at once.

    States of random generators are no numbers: they are uint8.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._now_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if type(leaf) in (Tensor, nn.Parameter) and leaf.is_cpu and leaf.is_floating_point():
                self._follow(leaf.untyped_storage())
        return found

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, n_bytes = storage._cdata, storage.nbytes()
        if address in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[address]
            self._now_bytes -= n_bytes

        self._alive[address] = weakref.ref(storage, gone)
        self._now_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self._now_bytes)


def _made(model: nn.Module) -> dict[str, Any]:
    """What was made: all of its tensors, those that are saved, and how large its parts are here and in full."""
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    full = {name: whole(tensor) for name, tensor in tensors.items()}
    part_of: Counter[str] = Counter()
    for name, tensor in full.items():
        part_of[".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""] += tensor.nbytes
    return {
        "tensors": fingerprint(full),
        "saved": fingerprint({name: full[name] for name in model.state_dict()}),
        "held_bytes": sum(local(tensor).nbytes for tensor in tensors.values()),
        "whole_bytes": sum(part_of.values()),
        "block_bytes": max(part_of.values()),
        "tensor_bytes": max(tensor.nbytes for tensor in full.values()),
    }


def _spoilt(job: Any, step: int) -> Any:
    """Three steps whose logits are no numbers."""

    def spoil(module: nn.Module, inputs: Any, found: Any) -> Any:
        return (found[0] * float("nan"), found[1]) if torch.is_grad_enabled() else found

    handles: list[Any] = []
    _at(job, step, lambda: handles.append(job.model.register_forward_hook(spoil)))
    return _at(job, step + 3, lambda: handles[0].remove())


def _interrupted(job: Any, step: int) -> Any:
    """Ctrl-C for one process alone."""
    return _at(job, step, lambda: os.kill(os.getpid(), signal.SIGINT))


def _struck(job: Any, step: int) -> Any:
    """It is killed while it makes gradients."""
    return _at(job, step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _at(job: Any, step: int, act: Callable[[], None]) -> Any:
    """``act`` in the forward of a training step."""
    count = itertools.count()

    def before(*_: Any) -> None:
        if job.model.training and torch.is_grad_enabled() and next(count) == step:
            act()

    job.model.register_forward_pre_hook(before)
    return job


def _lost(job: Any, step: int) -> Any:
    """It finds no number in three steps, and is killed while all go back."""

    def strike(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    recovery.put_back_weights = strike
    return _spoilt(job, step)


def _apart(job: Any, step: int) -> Any:
    """One weight becomes another, as by a bit that has flipped."""

    def flip() -> None:
        with torch.no_grad():
            next(job.model.parameters()).view(-1)[0] += 1e-3

    return _at(job, step, flip)


def _full(job: Any, step: int) -> Any:
    """No room is left when the weights are moved, once."""
    part, count = job.optimizer.parts[0], itertools.count()
    move = part.step

    def full(*given: Any) -> Any:
        if next(count) == step:
            raise torch.OutOfMemoryError("pretended")
        return move(*given)

    part.step = full
    return job


FAULTS: dict[str, Callable[[Any, int], Any]] = {
    "spoilt": _spoilt,
    "interrupted": _interrupted,
    "struck": _struck,
    "lost": _lost,
    "apart": _apart,
    "full": _full,
}


def play(scene: str, folder: Path, **more: Any) -> None:
    """Be one of the processes of a scene, and write down what was found."""
    torch.set_num_threads(1)
    if scene in ("run", "grow"):
        found = (run if scene == "run" else grow_run)(folder, **more)
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    with joined(DistributedConfig(timeout_s=20), DeviceConfig(device="cpu")) as world:
        found = SCENES[scene](world, folder, **more)
        (folder / f"{world.rank}.json").write_text(json.dumps(found))
