"""A model with what trains it: made when a run begins, and again where a run rolls back to another structure."""

import torch
from torch import nn

from meristem.device.compile import compile_blocks
from meristem.device.resolve import Device
from meristem.distributed.engine import engine_for
from meristem.models.build import build
from meristem.models.topology import Topology
from meristem.optim.groups import build as build_optimizer
from meristem.optim.groups import levels
from meristem.optim.half import LossScale
from meristem.runs.config import Config
from meristem.runs.directory import Run
from meristem.train.progress import Progress
from meristem.train.state import TrainingState


def rebuilt(config: Config, device: Device, *, vocabulary: int, topology: Topology) -> nn.Module:
    """The model of the settings after all changes of the log, on the device. Weights and moments are not put back."""
    model = build(config.model, config.memory, vocabulary, config.run.seed, topology)
    return model.to(device=device.device, dtype=device.param_dtype)


def trainable(
    model: nn.Module, run: Run, config: Config, device: Device, *, progress: Progress, topology: Topology = ()
) -> TrainingState:
    """The state in which a model on its device is trained: compiled, called for all processes, with a new optimizer."""
    compile_blocks(model, config.device, run.emit)
    engine = engine_for(
        model,
        config.distributed,
        run.world,
        slow=[parameter for period, level in levels(model).items() if period > 1 for parameter in level],
        # A memory that is carried on gives no gradient to what it began from.
        leaves_out=config.data.order == "sequential",
    )
    optimizer = build_optimizer(model, config.optim)
    optimizer.loss_scale = LossScale(device.device) if device.dtype == torch.float16 else None
    optimizer.reduce = None if run.world.size == 1 else run.world.all_reduce
    return TrainingState(model, optimizer, engine, progress, topology)
