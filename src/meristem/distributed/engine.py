"""Torch's own engines that sum gradients while they are made, and what they leave to the optimizer.

Parameters that move every step are in the engine's hands: replicated (DDP) or sharded (FSDP2). Those of slower levels
are replicated and out of its sight; their gradients gather in each process, and the optimizer sums what has gathered
when the level fires (memory.md 6.4, 9.6). Gradients are summed, not averaged: the loss of each process is a share of
that of the whole batch, divided by the targets of all.
"""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from meristem.distributed.agreement import lost_process
from meristem.distributed.config import DistributedConfig
from meristem.distributed.world import CONTROL, World
from meristem.errors import ConflictingKeys

EVERY_STEP: Final = "period 1"
"""Kind of the bytes of gradients that are summed while they are made."""

PARAMETERS: Final = "parameters"
"""Kind of the bytes by which sharded parameters are gathered."""


@dataclass(frozen=True)
class Engine:
    """How a model is called so that its gradients are those of all processes.

    model: what to call; it takes and gives what the model itself does. world: exchanges of what is no gradient.
    micro_batch: around forward and backward of one; given whether it is the last of its step, after which alone
        gradients are summed.
    use_all: called before the micro-batches of a step: whether some process uses parameters that others may leave out,
        so that all must give them a gradient, of zeros where they do.
    scale_loss: from a loss to what gradients are taken of; the optimizer's.
    whole: while it lasts, the model itself can be read in any way, its parameters whole. All processes must enter.
    summed: names of the parameters whose gradients it sums, where it holds them whole; None where it holds no list.
    """

    model: nn.Module
    micro_batch: Callable[[bool], AbstractContextManager[None]]
    whole: Callable[[], AbstractContextManager[None]]
    world: World
    use_all: Callable[[bool], None] = lambda is_used: None
    scale_loss: Callable[[Tensor], Tensor] = lambda loss: loss
    summed: frozenset[str] | None = None


def alone(model: nn.Module) -> Engine:
    """A single process: the model as it is."""
    return Engine(model, lambda is_last: nullcontext(), nullcontext, World())


def engine_for(
    model: nn.Module,
    config: DistributedConfig,
    world: World,
    *,
    device: torch.device,
    slow: Collection[nn.Parameter],
    leaves_out: bool,
) -> Engine:
    """The engine that ``config`` names, on the device of this process; see ``replicated`` and ``sharded``."""
    if world.size == 1:
        return alone(model)
    if config.shard:
        return sharded(model, world, device=device, slow=slow)
    return replicated(model, world, slow=slow, leaves_out=leaves_out)


def replicated(model: nn.Module, world: World, *, slow: Collection[nn.Parameter], leaves_out: bool) -> Engine:
    """Every process holds all parameters. They become those of the first process, but for ``slow``.

    What learns now is what it knows of: where a parameter comes, goes, freezes or begins to be used, another is made.

    slow: parameters that do not move every step, or that no step of the whole model uses.
    leaves_out: whether a step may give some parameter no gradient, as a memory that is carried on gives none to what it
        began from. Finding them costs a walk over the graph in every step.
    """
    left = {id(parameter) for parameter in slow}
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in left]
    fast = [(name, each) for name, each in model.named_parameters() if each.requires_grad and id(each) not in left]
    summed = frozenset(name for name, _ in fast)
    if not fast:
        return Engine(model, lambda is_last: nullcontext(), nullcontext, world, summed=summed)
    for parameter in model.parameters():
        vars(parameter).pop("_ddp_ignored", None)  # an engine before this one may have left it out
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(
        model, forward_sync_buffers=False, find_unused_parameters=leaves_out, gradient_as_bucket_view=True
    )

    def add_up(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        world.traffic.add(EVERY_STEP, bucket.buffer().nbytes)
        if bucket.is_last() and leaves_out:
            world.traffic.add(CONTROL, len(fast) * torch.int32.itemsize)  # which parameters had a gradient
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        summed: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return summed

    wrapped.register_comm_hook(None, add_up)

    @contextlib.contextmanager
    def micro_batch(is_last: bool) -> Iterator[None]:
        lost = lost_process("the sum of gradients", world.rank, world.size)
        with lost, nullcontext() if is_last else wrapped.no_sync():
            yield

    return Engine(wrapped, micro_batch, nullcontext, world, summed=summed)


def sharded(model: nn.Module, world: World, *, device: torch.device, slow: Collection[nn.Parameter]) -> Engine:
    """Every process holds a part of each parameter, but for ``slow``; a block is whole only while it works.

    A model on ``meta`` gets room on ``device`` for what this process holds of it, in which nothing is written yet
    (``shards.fill``). The parameters of the model are others afterwards, so that this comes before the optimizer.
    Raises ConflictingKeys where they are of several dtypes, which FSDP2 does not take.
    """
    # A second that a process alone does not have to wait.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    ignored = set(slow)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter not in ignored}
    if len(dtypes) > 1:
        raise ConflictingKeys(
            f"distributed.shard cuts parameters of one dtype only; found {', '.join(sorted(map(str, dtypes)))}, since "
            "memories and their gates stay in float32. Set device.param_dtype=fp32 (device.dtype=bf16 computes in "
            "bf16 all the same), or distributed.shard=false.",
            path="device.param_dtype",
        )
    mesh = init_device_mesh(device.type, (world.size,))
    blocks = getattr(model, "blocks", None)
    blocks = blocks if isinstance(blocks, nn.ModuleList) else nn.ModuleList()
    with_zeros = _WithZeros(ignored)
    for module in [*blocks, model]:
        # Before those of FSDP, which let go of what is whole.
        module.register_forward_hook(lambda module, given, found: _with_own_bytes(found))
        if module is not model:
            module.register_forward_hook(with_zeros)
        fully_shard(module, mesh=mesh, ignored_params=ignored)
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.set_custom_all_gather(_CountedGather(world))  # type: ignore[arg-type]
        part.set_custom_reduce_scatter(_CountedScatter(world))  # type: ignore[arg-type]
    # It warns of an operation in place on what a block gives; the models add out of place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    (root,) = (part for part in parts if part is model)

    @contextlib.contextmanager
    def micro_batch(is_last: bool) -> Iterator[None]:
        root.set_requires_gradient_sync(is_last)
        with lost_process("the sum of gradients", world.rank, world.size):
            yield

    @contextlib.contextmanager
    def whole() -> Iterator[None]:
        with lost_process("the gathering of parameters", world.rank, world.size):
            root.set_reshard_after_forward(False)
            for part in parts:
                part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
            root.set_reshard_after_forward(True)
            root.set_reshard_after_forward(False, recurse=False)

    return Engine(model, micro_batch, whole, world, with_zeros.switch)


class _WithZeros:
    """A forward hook by which a block gives each of its parameters a gradient, of zeros where it was not used.

    Shards of gradients are summed for those that have one; where only some processes had, the sums would not match.
    """

    def __init__(self, ignored: Collection[nn.Parameter]) -> None:
        self._ignored, self._is_on = {id(parameter) for parameter in ignored}, False

    def switch(self, is_on: bool) -> None:
        self._is_on = is_on

    def __call__(self, module: nn.Module, given: Any, found: Any) -> Any:
        if not self._is_on or not torch.is_grad_enabled():
            return found
        used = [each for each in module.parameters() if each.requires_grad and id(each) not in self._ignored]
        hidden_btd, state = found
        return _Used.apply(hidden_btd, *used), state  # type: ignore[no-untyped-call]


class _Used(torch.autograd.Function):
    """``apply(hidden_btd, *parameters)``: the hidden vectors, and a gradient of zeros for the parameters."""

    @staticmethod
    def forward(ctx: Any, hidden_btd: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return hidden_btd.view_as(hidden_btd)

    @staticmethod
    def backward(ctx: Any, d_hidden_btd: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return d_hidden_btd, *zeros


def _with_own_bytes(found: Any) -> Any:
    """What a module gives, with copies in place of views of its parameters, which are whole only while it works."""
    if isinstance(found, tuple):
        return tuple(_with_own_bytes(each) for each in found)
    if isinstance(found, dict):
        return {name: _with_own_bytes(each) for name, each in found.items()}
    is_own = not isinstance(found, Tensor) or not isinstance(
        found if found._base is None else found._base, nn.Parameter
    )
    return found if is_own else found.clone()


class _Counted:
    """How FSDP2 gets room for what it sends."""

    def __init__(self, world: World) -> None:
        self._traffic = world.traffic

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _CountedGather(_Counted):
    """Sharded parameters to full ones."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self._traffic.add(PARAMETERS, output_tensor.nbytes)
        work: dist.Work | None = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        return work


class _CountedScatter(_Counted):
    """Whole gradients to the sum of the part that is one's own."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self._traffic.add(EVERY_STEP, input_tensor.nbytes)
        work: dist.Work | None = dist.reduce_scatter_single(
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )
        return work
