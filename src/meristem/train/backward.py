"""From the batches of a step to gradients, in as few pieces as the device has room for."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import nn
from torch.profiler import record_function

from meristem.data.stream import Batch
from meristem.device.resolve import Device
from meristem.device.room import SMALLER_MODEL, cut_to_fit, empty_cache
from meristem.distributed.engine import Engine, alone
from meristem.memory.state import State, join_rows, map_tensors, take_rows
from meristem.nn.auxiliary import auxiliary
from meristem.train.aggregate import Conflict, gather, settle, total
from meristem.train.config import AggregateConfig
from meristem.train.loss import Teacher, cross_entropy, distillation
from meristem.train.state import TrainingState

_Losses: TypeAlias = dict[str, torch.Tensor]
"""By objective, ``text`` first: each a share of that of the step."""


@dataclass(frozen=True)
class BackwardResult:
    """What the backward of a step left besides gradients.

    loss: the mean of all targets in nats, on the device. memory: after the last batch.
    n_micro_batches: into how many pieces each batch was cut, by rows, to fit.
    conflict: how far the objectives disagree, where they were separated.
    """

    loss: torch.Tensor
    memory: State | None
    n_micro_batches: int
    conflict: Conflict | None = None


def backward(
    model: nn.Module,
    batches: list[Batch],
    memory: State | None,
    device: Device,
    *,
    n_micro_batches: int,
    by: AggregateConfig,
    step: int,
    engine: Engine | None = None,
) -> BackwardResult:
    """Gradients of the mean loss over all targets of the step, added to those that there are.

    loss = (sum of nats over all batches and targets) / N with N the targets of the whole step: however the targets are
    spread over batches, micro-batches and processes, each counts the same. _Losses of layers are in the gradient, and
    not in the reported loss.

    by: how the gradients of the text and of the layers' own losses become one. step: its number, from which the order
        of objectives is drawn where that matters.
    engine: what makes the gradients of ``model``; of several processes each gives its share of the loss, and those that
        move every step come summed. All processes have as many rows.

    Where the device runs out of room, what was gathered is thrown away and each batch cut into twice as many
    micro-batches; rows do not know of each other, so that the gradients stay what they were. Raises OutOfDeviceBytes
    when a single row does not fit; and in one of several processes at once, since the others already wait for its
    gradients.
    """
    engine = engine or alone(model)
    n_rows, n_ranks = max(batch.tokens_bt.shape[0] for batch in batches), engine.world.size

    def attempt(n_pieces: int) -> BackwardResult:
        loss, after, gathered = _attempt(engine, batches, memory, device, min(n_pieces, n_rows), by)
        drawn = torch.Generator().manual_seed(step)
        return BackwardResult(loss, after, n_pieces, settle(model, gathered, by, drawn) if gathered else None)

    rows = "one row" if n_ranks == 1 else f"the {n_rows} rows of process {engine.world.rank}"
    return cut_to_fit(
        f"forward and backward of {rows}",
        attempt,
        n_micro_batches,
        most=n_rows if n_ranks == 1 else 1,
        release=partial(make_room, model, device),
        device=device.device,
        advice=SMALLER_MODEL if n_ranks == 1 else f"Start more processes, lower data.batch_size, or: {SMALLER_MODEL}",
    )


def read_again(
    state: TrainingState,
    batches: Sequence[Batch],
    memory: State | None,
    take: Callable[[torch.Tensor], None],
    *,
    device: Device,
    by: AggregateConfig,
    teacher: Teacher | None = None,
) -> torch.Tensor:
    """The loss of a step as ``backward`` reads it, with the model as it is now; gradients are the caller's affair.

    state: as ``loop.Beside`` is given it: of several processes each gives its share, and no engine sums anything.
    memory: what the step began from; what is left of it after the step is let go.
    take: is given the loss of each micro-batch in turn, the objectives summed by their weights and scaled for the
        optimizer, and is done with it when it returns.
    teacher: what the text's part of it is distilled from (``loss.distillation``).
    The mean of all targets in nats, on the device, whatever a teacher says.
    """
    beside = replace(state.engine, model=state.model, micro_batch=lambda is_last: nullcontext())
    n_rows = max(batch.tokens_bt.shape[0] for batch in batches)
    n_pieces = min(state.progress.n_micro_batches, n_rows)

    def sums(losses: Mapping[str, torch.Tensor]) -> None:
        take(total(losses, by))

    return _read(beside, batches, memory, device, n_pieces, sums, teacher)[0]


def make_room(model: nn.Module, device: Device) -> None:
    """Let go of gradients, and of what the device keeps for later."""
    model.zero_grad()
    empty_cache(device.device)


def _attempt(
    engine: Engine,
    batches: list[Batch],
    memory: State | None,
    device: Device,
    n_micro_batches: int,
    by: AggregateConfig,
) -> tuple[torch.Tensor, State | None, dict[str, list[torch.Tensor | None]]]:
    """The loss, the memory, and by objective the gradients that are still to be settled."""
    gathered: dict[str, list[torch.Tensor | None]] = {}

    def teach(losses: _Losses) -> None:
        nonlocal gathered
        gathered = _teach(engine.model, losses, by, gathered)

    loss, memory = _read(engine, batches, memory, device, n_micro_batches, teach)
    return loss, memory, gathered


def _read(
    engine: Engine,
    batches: Sequence[Batch],
    memory: State | None,
    device: Device,
    n_micro_batches: int,
    take: Callable[[_Losses], None],
    teacher: Teacher | None = None,
) -> tuple[torch.Tensor, State | None]:
    """The loss and the memory after a step's batches; ``take`` is given the scaled losses of each micro-batch."""
    n_ranks = engine.world.size
    n_targets = max(1, n_ranks * sum(batch.n_targets for batch in batches))
    masks = [batch.reset_mask_bt for batch in batches if batch.reset_mask_bt is not None]
    if masks and n_ranks > 1:
        # A row that begins a document uses what a memory begins from; a process whose rows all go on does not.
        engine.use_all(engine.world.any(any(bool(mask_bt.any()) for mask_bt in masks)))
    told = []
    for batch in batches:
        states = []
        before = None if batch.starts else memory
        cuts = _cuts(batch.tokens_bt.shape[0], n_micro_batches)
        for start, stop in cuts:
            share = (stop - start) / batch.tokens_bt.shape[0] / len(batches) / n_ranks
            part, own = batch.take_rows(start, stop), before and take_rows(before, start, stop)
            is_last = batch is batches[-1] and (start, stop) == cuts[-1]
            with engine.micro_batch(is_last):
                losses, nats, state = _forward(engine.model, part, own, device, n_targets, share, teacher)
                take({name: engine.scale_loss(loss) for name, loss in losses.items()})
            told.append(nats)
            states.append(map_tensors(_carried, state))
        memory = join_rows(states)
    return torch.stack(told).sum(), memory


def _carried(leaf: torch.Tensor) -> torch.Tensor:
    """A leaf of a memory, cut from the graph. A view of a weight gets bytes of its own, for the weight moves on."""
    is_weight = isinstance(leaf if leaf._base is None else leaf._base, nn.Parameter)
    return leaf.detach().clone() if is_weight else leaf.detach()


def _teach(
    model: nn.Module,
    losses: _Losses,
    by: AggregateConfig,
    gathered: dict[str, list[torch.Tensor | None]],
) -> dict[str, list[torch.Tensor | None]]:
    """Gradients in their place, or by objective, added to those gathered."""
    with record_function("backward"):
        if by.how != "mean":
            return gather(model, gathered, losses)
        total(losses, by).backward()
    return gathered


def _forward(
    model: nn.Module,
    batch: Batch,
    memory: State | None,
    device: Device,
    n_targets: int,
    share: float,
    teacher: Teacher | None,
) -> tuple[_Losses, torch.Tensor, State]:
    """What some rows cost by objective, what their text costs without a teacher, and their memory. share: of the step's
    rows."""
    tokens_bt, targets_bt = device.move(batch.tokens_bt, batch.targets_bt)
    with record_function("forward"), device.autocast():
        # Read on the host, and so not moved.
        masks = batch.masks
        logits_bto, memory = model(tokens_bt, memory, **masks)
        teacher_bto = None if teacher is None else teacher.logits(tokens_bt, **masks)
    text = cross_entropy(logits_bto, targets_bt) / n_targets
    losses, nats, own = {"text": text}, text.detach(), auxiliary(memory)
    if teacher is not None and teacher_bto is not None:
        how = {"weight": teacher.weight, "temperature": teacher.temperature}
        losses["text"] = distillation(logits_bto, targets_bt, teacher_bto, **how) / n_targets
    return losses if own is None else losses | {"layers": own * share}, nats, memory


def _cuts(n_rows: int, n_micro_batches: int) -> list[tuple[int, int]]:
    """Where the rows of a batch are cut, as evenly as it goes."""
    edges = [n_rows * part // n_micro_batches for part in range(n_micro_batches + 1)]
    return [(start, stop) for start, stop in zip(edges, edges[1:], strict=False) if stop > start]
