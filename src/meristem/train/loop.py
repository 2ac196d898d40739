"""Training as a generator: it makes steps and says what each one was; the recipe does everything else."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from meristem.data.stream import Batch, Cursor, Stream
from meristem.device.resolve import Device
from meristem.errors import NonFinite
from meristem.memory.value import State, detach
from meristem.nn.auxiliary import auxiliary
from meristem.optim.outer import Outer
from meristem.train.loss import cross_entropy
from meristem.train.part import TrainPart
from meristem.train.progress import Progress


@dataclass(frozen=True)
class Step:
    """What one optimizer step was.

    progress: where the run stands after it; all that is needed to go on from here besides weights and moments.
    loss_nats, grad_norm: per target, and before clipping. None where they were left on the device: an accelerator is
        read only on steps that log, so that it never waits for the host.
    """

    progress: Progress
    loss_nats: float | None
    grad_norm: float | None
    rate: float
    seconds: float
    n_targets: int
    n_bytes: int
    is_logged: bool

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits per byte of text: what compares across tokenizers."""
        return None if self.loss_nats is None else self.loss_nats * self.n_targets / (math.log(2) * self.n_bytes)


def steps(
    model: nn.Module,
    stream: Stream,
    optimizer: Outer,
    schedule: Callable[[float], float],
    *,
    part: TrainPart,
    device: Device,
    start: Progress,
) -> Iterator[Step]:
    """Train from ``start`` until a limit of ``part`` is reached, yielding after every step.

    schedule: the share of the run that is done to the factor on the optimizer's rates.
    Which parameters move in a step, and how they are clipped, is the optimizer's affair, as is what waits at the end.
    A step whose loss or gradient is not finite changes neither weights nor moments, and the memory begins afresh after
    it; ``part.max_nonfinite`` such steps in a row raise NonFinite (on an accelerator at the next step that is read).
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    unread: list[torch.Tensor] = []
    now = start
    while not now.is_over(part):
        began = time.perf_counter()
        factor = schedule(now.share(part))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        batches, cursor = _take(stream, now.cursor, part.accumulate)
        n_targets = sum(batch.n_targets for batch in batches)
        loss, memory = _backward(model, batches, now.memory, device)
        update = optimizer.step(loss)
        optimizer.zero_grad()
        unread.append(update.is_skipped)
        now = replace(now, cursor=cursor, step=now.step + 1, tokens=now.tokens + n_targets, memory=memory)
        is_logged = now.step % part.log_every == 0
        numbers: list[float] = []
        # On the CPU reading costs nothing. A memory that is carried on must not stay spoilt until the next record.
        if is_logged or loss.is_cpu or not batches[-1].starts:
            numbers = torch.stack([loss, update.norm, *unread]).tolist()
            unread = []
            now = _count(now, numbers[2:], part.max_nonfinite)
        seconds = time.perf_counter() - began
        now = replace(now, seconds_used=now.seconds_used + seconds)
        yield Step(
            progress=now,
            loss_nats=numbers[0] if numbers else None,
            grad_norm=numbers[1] if numbers else None,
            rate=optimizer.param_groups[0]["lr"],
            seconds=seconds,
            n_targets=n_targets,
            n_bytes=sum(batch.n_bytes for batch in batches),
            is_logged=is_logged,
        )


def _take(stream: Stream, cursor: Cursor, n_batches: int) -> tuple[list[Batch], Cursor]:
    """The batches of one step. All are taken before the first is used: the step divides by all of their targets."""
    batches = []
    for _ in range(n_batches):
        batch, cursor = stream.next(cursor)
        batches.append(batch)
    return batches, cursor


def _backward(
    model: nn.Module, batches: list[Batch], memory: State | None, device: Device
) -> tuple[torch.Tensor, State | None]:
    """Gradients of the mean loss over all targets of the step, that mean, and the memory after the last batch.

    loss = (sum of nats over all batches and targets) / N with N the targets of the whole step: however the targets are
    spread over batches, each counts the same. Losses that layers have of their own are taught, and not told.
    """
    n_targets = max(1, sum(batch.n_targets for batch in batches))
    losses = []
    for batch in batches:
        tokens_bt, targets_bt = device.move(batch.tokens_bt, batch.targets_bt)
        with device.autocast():
            logits_bto, memory = model(tokens_bt, None if batch.starts else memory)
        loss = cross_entropy(logits_bto, targets_bt) / n_targets
        own = auxiliary(memory)
        (loss if own is None else loss + own / len(batches)).backward()
        losses.append(loss.detach())
        memory = detach(memory)
    return torch.stack(losses).sum(), memory


def _count(now: Progress, skipped: list[float], most: int) -> Progress:
    """Progress after the given steps, each 1 where it was skipped; too many in a row end the run."""
    for is_skipped in skipped:
        in_row = now.n_nonfinite_in_row + 1 if is_skipped else 0
        now = replace(now, n_nonfinite=now.n_nonfinite + int(is_skipped), n_nonfinite_in_row=in_row)
        if in_row >= most:
            raise NonFinite(
                f"loss or gradient was not finite in {in_row} steps in a row, up to step {now.step}; "
                f"{most} end a run (train.max_nonfinite). Lower optim.rate or optim.clip, or set device.compute=fp32.",
                step=now.step,
                count=in_row,
            )
    return replace(now, memory=None) if now.n_nonfinite_in_row else now
