"""A model with what trains it: made when a run begins, and again where a run rolls back to another structure."""

from functools import partial
from itertools import chain

import torch
from torch import nn

from meristem.checkpoint.store import Checkpoint
from meristem.data.config import CARRIED
from meristem.device.compile import compile_blocks
from meristem.device.resolve import Device
from meristem.device.room import room_for
from meristem.distributed.agreement import fingerprint
from meristem.distributed.engine import Engine, engine_for
from meristem.distributed.shards import fill
from meristem.distributed.world import World
from meristem.growth.graft import seeds_in
from meristem.models.build import build, drawn
from meristem.models.load import fitting
from meristem.models.topology import Topology
from meristem.optim.groups import build as build_optimizer
from meristem.optim.groups import levels
from meristem.optim.half import LossScale
from meristem.runs.config import Config
from meristem.runs.directory import Run
from meristem.runs.resume import put_saved_weights
from meristem.train.progress import Progress
from meristem.train.state import TrainingState


def fresh(
    run: Run,
    config: Config,
    device: Device,
    *,
    vocabulary: int,
    progress: Progress,
    topology: Topology,
    checkpoint: Checkpoint | None = None,
) -> tuple[TrainingState, str]:
    """The state in which the model of the settings after all changes of the log is trained, and a fingerprint of its
    weights, which is empty in a process alone: the first weights of the seed, or those of ``checkpoint``.

    Where processes hold parts, a model is made in shapes and filled block by block: none holds more at once than its
    parts, what is no part, and a block.
    """
    make = partial(build, config.model, config.memory, vocabulary, config.run.seed, topology)
    is_alone = run.world.size == 1
    if config.distributed.shard and not is_alone:
        with room_for("the model", device.device):
            with torch.device("meta"):
                model = make().to(dtype=device.param_dtype)
            saved = fitting(model, checkpoint.tree("model"), checkpoint) if checkpoint else {}
            state = trainable(model, run, config, device, progress=progress, topology=topology)
            blocks = getattr(model, "blocks", ())
            return state, fill(model, chain(drawn(make, len(blocks)), saved.items()))
    with room_for("the model", device.device):
        model = make()
        if checkpoint:
            put_saved_weights(model, checkpoint)
        model = model.to(device=device.device, dtype=device.param_dtype)
    found = "" if is_alone else fingerprint(model.state_dict())
    with room_for("the optimizer", device.device):
        return trainable(model, run, config, device, progress=progress, topology=topology), found


def trainable(
    model: nn.Module, run: Run, config: Config, device: Device, *, progress: Progress, topology: Topology = ()
) -> TrainingState:
    """The state in which a model on its device is trained: compiled, called for all processes, with a new optimizer."""
    compile_blocks(model, config.device, device.device, run.emit)
    engine = engine_of(model, run.world, config, device)
    optimizer = build_optimizer(model, config.optim)
    optimizer.loss_scale = LossScale(device.device) if device.dtype == torch.float16 else None
    optimizer.reduce = None if run.world.size == 1 else run.world.all_reduce
    return TrainingState(model, optimizer, engine, progress, topology)


def engine_of(model: nn.Module, world: World, config: Config, device: Device) -> Engine:
    """How a model is called as it is now, so that its gradients are those of all processes (``is_current``)."""
    is_grown = any(seed.is_live for seed in seeds_in(model).values())
    return engine_for(
        model,
        config.distributed,
        world,
        device=device.device,
        slow=_apart(model),
        # A memory that is carried on gives no gradient to what it began from; a seed may be anybody's.
        leaves_out=config.data.order in CARRIED or is_grown,
    )


def is_current(engine: Engine, model: nn.Module) -> bool:
    """Whether an engine sums the gradients of what learns by now in every step of all processes."""
    if engine.summed is None:
        return True
    apart = {id(each) for each in _apart(model)}
    learning = (name for name, each in model.named_parameters() if each.requires_grad and id(each) not in apart)
    return engine.summed == frozenset(learning)


def _apart(model: nn.Module) -> list[nn.Parameter]:
    """Parameters whose gradients are summed when they move: those of slow levels, and of seeds that are off."""
    slow = [parameter for period, level in levels(model).items() if period > 1 for parameter in level]
    return slow + [each for seed in seeds_in(model).values() if not seed.is_live for each in seed.parameters()]
