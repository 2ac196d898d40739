"""Training as a generator: it makes steps and says what each one was; the recipe does everything else."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch.profiler import record_function

from meristem.data.prefetch import Batches
from meristem.data.stream import Batch, Cursor
from meristem.device.random import GlobalGenerators, global_generators
from meristem.device.resolve import Device
from meristem.device.room import is_out_of_room, no_room
from meristem.distributed.engine import Engine
from meristem.distributed.shards import local
from meristem.errors import NonFinite
from meristem.memory.state import State
from meristem.optim.multi_period import MultiPeriodOptimizer, Update
from meristem.optim.origins import HOST, origin_of
from meristem.optim.schedule import ScheduleProgress, set_rates
from meristem.train.aggregate import Conflict
from meristem.train.backward import BackwardResult, backward, make_room
from meristem.train.config import AggregateConfig, TrainConfig
from meristem.train.guard import StepStats
from meristem.train.progress import Progress
from meristem.train.state import Holder, TrainingState

MOVING: Final = "moving the weights"
"""Where there was no room, if weights may have been moved already and must be brought back."""

_PLAIN: Final = AggregateConfig()

_UNMEASURED: Final = -1.0
"""In place of how far a weight was moved. NaN would not do: that says that a weight is NaN."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step was.

    progress: where the run stands after it; all that is needed to go on from here besides weights and moments.
    stats: what was measured, of every step since the last one that was read, this one last. Empty where it was left
        on the device: an accelerator is read only on steps that log, so that it never waits for the host.
    seconds: of the slowest process. n_targets, n_bytes: those of all processes.
    conflict: how far the objectives of the step disagree, where they were separated; still on the device.
    each_s: seconds of every process, by rank.
    """

    progress: Progress
    stats: tuple[StepStats, ...]
    rate: float
    seconds: float
    n_targets: int
    n_bytes: int
    is_logged: bool
    conflict: Conflict | None = None
    each_s: tuple[float, ...] = ()

    @property
    def loss_nats(self) -> float | None:
        """Per target; None where it was not read."""
        return self.stats[-1].loss_nats if self.stats else None

    @property
    def grad_norm(self) -> float | None:
        """Before clipping; None where it was not read."""
        return self.stats[-1].grad_norm if self.stats else None

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits per byte of text: what compares across tokenizers."""
        return None if self.loss_nats is None else self.loss_nats * self.n_targets / (math.log(2) * self.n_bytes)


class Beside(Protocol):
    """What is done once in every step when its gradients are complete and nothing has moved yet.

    It may put gradients on parameters that have none; those that it puts there move with the step. What it draws from
    global generators, and any other change, is its own affair.
    """

    def __call__(
        self,
        state: TrainingState,
        batches: list[Batch],
        memory: State | None,
        loss: torch.Tensor,
        generators: GlobalGenerators,
    ) -> None:
        """state: before the step, but that its progress says in how many micro-batches the step was read.
        memory: what the step began from. loss: of the step, in nats per target, on the device; of several processes
        each has its share. generators: where those of torch stood before the step was read.
        """


def steps(
    held: Holder,
    stream: Batches,
    schedule: Callable[[ScheduleProgress], float],
    *,
    config: TrainConfig,
    device: Device,
    aggregate: AggregateConfig = _PLAIN,
    beside: Beside | None = None,
    flops: Callable[[TrainingState], float] | None = None,
) -> Iterator[Step]:
    """Train on from where ``held.state`` is until a limit of ``config`` is reached, yielding after every step.

    held: what the state is taken from before each step; its progress is put back after it. Another state may be put in
        its place in between: the next step is then one of that.
    schedule: where the run stands to the factor on the highest rate of each group in the step that follows.
    aggregate: how gradients of several objectives become one.
    beside: what is called in every step between its gradients and its move.
    flops: operations of a step for each predicted token, both passes; None where nothing counts them.
    Which parameters move in a step, and how they are clipped, is the optimizer's affair, as is what waits at the end.
    A step whose loss or gradient is not finite changes neither weights nor moments, and the memory begins afresh after
    it; ``config.max_nonfinite`` such steps in a row raise NonFinite, after a step was yielded that reports them.
    Where the device runs out of room, batches are cut into more micro-batches from then on (``backward``);
    OutOfDeviceBytes with ``where=MOVING`` says that it happened while weights were moved, which must then be brought
    back. Of several processes each makes the same step of its own rows, and yields the same but for its own memory.
    """
    unread: list[torch.Tensor] = []
    while not held.state.progress.is_over(config):
        began, state = time.perf_counter(), held.state
        optimizer, now = state.optimizer, state.progress
        engine = replace(state.engine, scale_loss=optimizer.scale_loss)
        done = ScheduleProgress(share=now.share(config), step=now.step, tokens=now.tokens)
        set_rates(optimizer, schedule(done) * now.easing())
        with record_function("data"):
            batches, cursor = _take(stream, now.cursor, config.grad_accum_steps)
        n_targets = engine.world.size * sum(batch.n_targets for batch in batches)
        result = _backward(replace(state, engine=engine), batches, device, by=aggregate, beside=beside)
        is_measured = (now.step + 1) % config.measure_updates_every == 0
        with record_function("optimizer"):
            update, ratio = _move(engine, optimizer, result.loss, device, is_measured=is_measured)
        optimizer.zero_grad()
        unread.append(_measured(result.loss, update, ratio))
        now = replace(
            now,
            cursor=cursor,
            step=now.step + 1,
            tokens=now.tokens + n_targets,
            flops=now.flops + (flops(state) * n_targets if flops else 0.0),
            memory=result.memory,
            n_micro_batches=result.n_micro_batches,
        )
        is_logged = now.step % config.log_every == 0
        stats: tuple[StepStats, ...] = ()
        failure: NonFinite | None = None
        # On the CPU a read costs nothing. A memory that is carried on must not stay spoilt until the next record.
        if is_logged or result.loss.is_cpu or not batches[-1].starts:
            stats, unread = _read(now.step, unread), []
            now, failure = _count(now, stats, config.max_nonfinite)
        seconds = time.perf_counter() - began
        of_ranks = engine.world.all_gather_numbers([seconds, sum(batch.n_bytes for batch in batches)])
        each_s, each_bytes = zip(*of_ranks, strict=True)
        now = replace(now, seconds_used=now.seconds_used + max(each_s))
        held.state = replace(state, progress=now)
        yield Step(
            progress=now,
            stats=stats,
            rate=optimizer.param_groups[0]["lr"],
            seconds=max(each_s),
            n_targets=n_targets,
            n_bytes=int(sum(each_bytes)),
            is_logged=is_logged,
            conflict=result.conflict,
            each_s=each_s,
        )
        if failure:  # only now: whoever heard of the same steps may have rolled back instead
            raise failure


def _take(stream: Batches, cursor: Cursor, n_batches: int) -> tuple[list[Batch], Cursor]:
    """The batches of one step. All are taken before the first is used: the step divides by all of their targets."""
    batches = []
    for _ in range(n_batches):
        batch, cursor = stream.next(cursor)
        batches.append(batch)
    return batches, cursor


def _backward(
    state: TrainingState, batches: list[Batch], device: Device, *, by: AggregateConfig, beside: Beside | None
) -> BackwardResult:
    """The gradients of a step, and then what is done beside it."""
    now = state.progress
    generators = global_generators(device.device) if beside else {}
    result = backward(
        state.model,
        batches,
        now.memory,
        device,
        n_micro_batches=now.n_micro_batches,
        by=by,
        step=now.step,
        engine=state.engine,
    )
    if beside:
        as_read = replace(state, progress=replace(now, n_micro_batches=result.n_micro_batches))
        beside(as_read, batches, now.memory, result.loss, generators)
    return result


def _move(
    engine: Engine, optimizer: MultiPeriodOptimizer, loss: torch.Tensor, device: Device, *, is_measured: bool
) -> tuple[Update, torch.Tensor]:
    """Step; and how far the weight that moved most was moved, as a share of itself, or ``_UNMEASURED``.

    A weight of less than a thousandth on average counts as one of that: what began at 0 moves by more than itself.
    Seeds, which do begin at 0, are left out: what is reported is how the host does.
    Where weights are sharded, each shard counts as a weight.
    """
    named = engine.model.named_parameters() if is_measured else ()
    trained = [parameter for name, parameter in named if parameter.requires_grad and origin_of(name) == HOST]
    cause, moved = "", None
    try:
        weights = [weight for parameter in trained if (weight := local(parameter)).numel()]
        before = [weight.detach().clone() for weight in weights]
        update = optimizer.step(loss)
        moved = update, _largest_ratio(before, weights) if weights else torch.full_like(loss, _UNMEASURED)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_room(error):
            raise
        cause = str(error)
    # Where one process could not, the others have moved weights for nothing and roll back with it.
    if engine.world.any(moved is None) or moved is None:
        make_room(engine.model, device)
        advice = "Lower data.batch_size or the size of the model."
        raise no_room(MOVING, device.device, cause or "in another process", advice)
    update, ratio = moved
    if is_measured and engine.world.size > 1:
        every = engine.world.all_gather_numbers([float(ratio)])
        ratio = torch.full_like(loss, max(math.inf if math.isnan(each) else each for (each,) in every))
    return update, ratio


def _largest_ratio(before: list[torch.Tensor], after: Sequence[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        sizes = torch.stack(torch._foreach_norm(before))
        least = torch.tensor([1e-3 * weight.numel() ** 0.5 for weight in before], device=sizes.device)
        torch._foreach_sub_(before, list(after))
        return (torch.stack(torch._foreach_norm(before)) / sizes.maximum(least)).max().float()


def _measured(loss: torch.Tensor, update: Update, ratio: torch.Tensor) -> torch.Tensor:
    """What ``_read`` reads of one step, still on the device."""
    loss = loss if update.loss is None else update.loss
    is_rescaled = torch.zeros_like(loss) if update.is_rescaled is None else update.is_rescaled
    return torch.stack([loss, update.norm, update.is_skipped, is_rescaled, ratio])


def _read(last_step: int, unread: list[torch.Tensor]) -> tuple[StepStats, ...]:
    """The measurements of the steps up to ``last_step``, in one transfer."""
    first = last_step - len(unread) + 1
    return tuple(
        StepStats(
            step=first + index,
            loss_nats=loss,
            grad_norm=norm,
            is_skipped=bool(is_skipped),
            is_rescaled=bool(is_rescaled),
            update_ratio=None if ratio == _UNMEASURED else math.inf if math.isnan(ratio) else ratio,
        )
        for index, (loss, norm, is_skipped, is_rescaled, ratio) in enumerate(torch.stack(unread).tolist())
    )


def _count(now: Progress, stats: tuple[StepStats, ...], most: int) -> tuple[Progress, NonFinite | None]:
    """Progress after the steps that were read; and what ends the run, where ``most`` of them were skipped in a row.

    A step that was skipped to lower the loss scale is none of them: the next one is made at half of it.
    """
    failure = None
    for each in stats:
        if each.is_rescaled:
            continue
        in_row = now.n_nonfinite_in_row + 1 if each.is_skipped else 0
        now = replace(now, n_nonfinite=now.n_nonfinite + int(each.is_skipped), n_nonfinite_in_row=in_row)
        if in_row >= most:
            failure = failure or NonFinite(
                f"loss or gradient was not finite in {in_row} steps in a row, up to step {each.step}; "
                f"{most} end a run (train.max_nonfinite). Lower optim.lr or optim.grad_clip, or set device.dtype=fp32.",
                step=each.step,
                count=in_row,
            )
    is_spoilt = now.n_nonfinite_in_row or not math.isfinite(stats[-1].loss_nats)
    return (replace(now, memory=None) if is_spoilt else now), failure
