"""Drills in which the training itself goes wrong: spoilt data, numbers that are none, no room, a lost device."""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import torch

from meristem.data.stream import Batch, Cursor, Stream
from meristem.drills.drill import Drill, Seen
from meristem.drills.scene import N_STEPS, SAVED_EVERY, Break, Ended, Scene, counting
from meristem.memory.state import State, map_tensors
from meristem.runs.directory import Run
from meristem.runs.resume import Job

AT: Final = 14
"""The step, counted from 1, in which things break: late enough for the guard to have a baseline."""

LONG: Final = 40
"""Steps of a run in which the loss has flattened before the text is corrupt."""

STRETCH: Final = range(27, 33)
"""The batches, counted from 0, of a section of corrupt text in such a run; the guard panics twice in it."""

ROUNDING: Final = 1e-5
"""Largest share by which losses differ after 24 steps when sums were made in another order."""

NEVER_FITS_BYTES: Final = 2**50
"""More than any address has room for, so that the allocator itself refuses it."""


class Garbled:
    """A stream whose batches at some positions are ids drawn at random, the same ones however often they are read."""

    def __init__(self, stream: Stream, positions: Collection[int], n_ids: int) -> None:
        self._stream, self._positions, self._n_ids = stream, positions, n_ids

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The batch at the cursor, and the cursor after it."""
        batch, after = self._stream.next(cursor)
        if cursor.position in self._positions:
            draw = torch.Generator().manual_seed(cursor.position)
            shape = (batch.tokens_bt.shape[0], batch.tokens_bt.shape[1] + 1)
            ids = torch.randint(self._n_ids, shape, generator=draw)
            batch = replace(batch, tokens_bt=ids[:, :-1], targets_bt=ids[:, 1:])
        return batch, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def garble(positions: Collection[int]) -> Break:
    """Corrupt text at these positions of the stream."""

    def breaks(run: Run, job: Job) -> Job:
        garbled = Garbled(job.stream, positions, job.corpus.tokenizer.vocab_size)
        return replace(job, stream=cast(Stream, garbled))

    return breaks


def spoil_output(steps: range, spoil: Callable[[Any], Any]) -> Break:
    """What the model gives in these training passes, counted from 1, is what ``spoil`` makes of it."""

    def breaks(run: Run, job: Job) -> Job:
        count = counting()

        def hook(model: torch.nn.Module, arguments: object, output: Any) -> Any:
            return spoil(output) if torch.is_grad_enabled() and next(count) in steps else None

        job.model.register_forward_hook(hook)
        return job

    return breaks


def spoil_gradient(at: int, spoil: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    """The gradient of one weight in that backward, counted from 1, is what ``spoil`` makes of it."""

    def breaks(run: Run, job: Job) -> Job:
        count = counting()
        weight = next(each for each in job.model.parameters() if each.requires_grad)
        weight.register_hook(lambda gradient: spoil(gradient) if next(count) == at else gradient)
        return job

    return breaks


def spoil_weight(at: int) -> Break:
    """After that step of the optimizer, counted from 1, one number of one weight is none."""

    def breaks(run: Run, job: Job) -> Job:
        count = counting()
        weight = list(job.model.parameters())[-1]

        def hook(*_: object) -> None:
            if next(count) == at:
                weight.data.view(-1)[0] = math.nan

        job.optimizer.register_step_post_hook(hook)
        return job

    return breaks


def no_room_in_step(at: int) -> Break:
    """The optimizer finds no room in that step, counted from 1."""

    def breaks(run: Run, job: Job) -> Job:
        count = counting()
        job.optimizer.register_step_pre_hook(lambda *_: ask_too_much() if next(count) == at else None)
        return job

    return breaks


def ask_too_much(_: object = None) -> Any:
    """Raises what the allocator of the CPU really raises when it has no room."""
    return torch.empty(NEVER_FITS_BYTES, dtype=torch.uint8)


def lose_device(_: object) -> Any:
    """Raises what torch raises when an accelerator has failed."""
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


def not_a_number(output: tuple[torch.Tensor, State]) -> tuple[torch.Tensor, State]:
    """The same output with a loss that is none."""
    return output[0] * math.nan, output[1]


def memory_not_a_number(output: tuple[torch.Tensor, State]) -> tuple[torch.Tensor, State]:
    """The same output with a memory that is none."""
    return output[0], map_tensors(lambda leaf: leaf * math.nan if leaf.is_floating_point() else leaf, output[1])


def guarded(moved: list[bool], fresh: list[bool], job: Job) -> Job:
    """Note of every step whether it changed weights or moments, and of every pass whether it began without memory."""
    before: list[torch.Tensor] = []

    def tensors() -> list[torch.Tensor]:
        moments = [leaf for state in job.optimizer.state.values() for leaf in state.values()]
        return [leaf for leaf in (*job.model.parameters(), *moments) if isinstance(leaf, torch.Tensor)]

    def note(*_: object) -> None:
        before[:] = [leaf.clone() for leaf in tensors()]

    def compare(*_: object) -> None:
        after = tensors()
        same = len(after) == len(before) and all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        moved.append(not same)

    def look(model: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            fresh.append(arguments[1] is None)

    job.model.register_forward_pre_hook(look)
    job.optimizer.register_step_pre_hook(note)
    job.optimizer.register_step_post_hook(compare)
    return job


def events_of(ended: Ended) -> dict[str, object]:
    """What can be said of every run."""
    names = ("loss.nonfinite", "batch.split", "guard.verdict", "rollback.done", "checkpoint.skipped")
    short = {"rollback.done": ("panicked_at", "resumed_from", "tier", "changed"), "guard.verdict": ("step", "level")}
    events = []
    for event in ended.events(*names):
        kept = ("event", *short[event["event"]]) if event["event"] in short else tuple(event)
        events.append({name: event[name] for name in kept})
    return {"exit_code": ended.exit_code, "steps": ended.n_steps(), "error": ended.error, "events": events}


def finishes(ended: Ended, n_steps: int = N_STEPS) -> dict[str, bool]:
    """What every run must come to that goes on."""
    return {
        "the run goes on to its end": ended.exit_code == 0 and ended.n_steps() == n_steps,
        "every weight and moment is a number": ended.is_finite(),
    }


def bad_batch(drill: Drill, place: Path) -> Seen:
    """One batch of corrupt text."""
    at = LONG - 3
    ended = Scene.at(place).run("run", f"train.steps={LONG}", breaks=garble(range(at, at + 1)))
    warned = [event["step"] for event in ended.events("guard.verdict") if event["level"] == "warn"]
    usual = ended.value("safety")["guard"]["losses"]
    checks = {
        "the guard names that step": warned == [at + 1],
        "its loss is not in the baseline": len(usual) == 12 and ended.losses()[at + 1] not in usual,
        "nothing is rolled back": not ended.events("rollback.done"),
    }
    return Seen(finishes(ended, LONG) | checks, events_of(ended))


def skipped(breaks: Break, n: int = 1) -> Callable[[Drill, Path], Seen]:
    """So many steps in a row that cannot be made."""

    def act(drill: Drill, place: Path) -> Seen:
        moved: list[bool] = []
        fresh: list[bool] = []
        ended = Scene.at(place).run("run", breaks=lambda run, job: guarded(moved, fresh, breaks(run, job)))
        bad = ended.events("loss.nonfinite")
        steps = [event["step"] for event in bad]
        checks = {
            "each bad step is skipped and counted": [event["count"] for event in bad] == list(range(1, n + 1)),
            "weights and moments stay in it, to the bit, and move in all others": [
                step for step, has_moved in enumerate(moved, start=1) if not has_moved
            ]
            == steps,
            "the memory begins afresh after it": all(fresh[step] for step in steps),
            "nothing is rolled back": not ended.events("rollback.done"),
        }
        return Seen(finishes(ended) | checks, events_of(ended))

    return act


def rolled_back(breaks: Break, *settings: str, to: int, tier: str) -> Callable[[Drill, Path], Seen]:
    """Something after which the run has to roll back to an earlier step."""

    def act(drill: Drill, place: Path) -> Seen:
        ended = Scene.at(place).run("run", *settings, breaks=breaks)
        returns = ended.events("rollback.done")
        first = returns[0] if returns else {}
        checks = {
            f"the run rolls back to step {to}": first.get("resumed_from") == to,
            f"by the {tier} tier": first.get("tier") == tier,
            "and skips the text that it read since": "skipped_batches" in first.get("changed", {}),
        }
        return Seen(finishes(ended) | checks, events_of(ended))

    return act


def spike(drill: Drill, place: Path) -> Seen:
    """A section of corrupt text, with the guard and without."""
    scene, steps = Scene.at(place), f"train.steps={LONG}"
    clean = scene.run("clean", steps).held_out_nats()
    ended = scene.run("run", steps, breaks=garble(STRETCH))
    bare = scene.run("bare", steps, "guard.enabled=false", breaks=garble(STRETCH))
    guarded, unguarded = ended.held_out_nats(), bare.held_out_nats()
    returns = ended.events("rollback.done")
    checks = {
        "the guard panics, and the run rolls back before the section": bool(returns)
        and returns[0]["resumed_from"] <= STRETCH.start,
        "a second time in a row with a lower learning rate": [event["in_row"] for event in returns] == [1, 2]
        and "rate_factor" in returns[1]["changed"],
        "it ends nearer to the clean run than one without a guard": guarded - clean < 0.5 * (unguarded - clean),
    }
    nats = {"held_out_nats": {"clean": clean, "guarded": guarded, "unguarded": unguarded}}
    return Seen(finishes(ended, LONG) | checks, events_of(ended) | nats)


def split(breaks: Break) -> Callable[[Drill, Path], Seen]:
    """A forward or backward that finds no room."""

    def act(drill: Drill, place: Path) -> Seen:
        scene = Scene.at(place)
        truth, ended = scene.run("truth"), scene.run("run", breaks=breaks)
        parts = [(event["step"], event["n_micro_batches"]) for event in ended.events("batch.split")]
        checks = {"batches are cut in two from that step on": parts == [(AT, 2)], **same_but_rounding(truth, ended)}
        return Seen(finishes(ended) | checks, events_of(ended) | {"largest_difference": difference(truth, ended)})

    return act


def split_after_step(drill: Drill, place: Path) -> Seen:
    """An optimizer that finds no room, perhaps in the middle of moving weights."""
    scene = Scene.at(place)
    truth, ended = scene.run("truth"), scene.run("run", breaks=no_room_in_step(AT))
    returns = [(event["resumed_from"], event["changed"]) for event in ended.events("rollback.done")]
    to = (AT - 1) // SAVED_EVERY * SAVED_EVERY
    checks = {
        "weights and moments are put back": [step for step, _ in returns] == [to],
        "batches are cut in two, and the text is read again": [changed for _, changed in returns]
        == [{"n_micro_batches": 2}],
        **same_but_rounding(truth, ended),
    }
    return Seen(finishes(ended) | checks, events_of(ended) | {"largest_difference": difference(truth, ended)})


def difference(truth: Ended, ended: Ended) -> float:
    """The largest share by which a loss differs from that of the undisturbed run."""
    ours, theirs = ended.losses(), truth.losses()
    return max(abs(ours.get(step, math.inf) - nats) / nats for step, nats in theirs.items())


def same_but_rounding(truth: Ended, ended: Ended) -> dict[str, bool]:
    """The same gradients in smaller sums."""
    ours, theirs = ended.losses(), truth.losses()
    before = all(ours.get(step) == nats for step, nats in theirs.items() if step <= (AT - 1) // SAVED_EVERY)
    return {"losses are those of an undisturbed run but for rounding": before and difference(truth, ended) < ROUNDING}


def device_lost(drill: Drill, place: Path) -> Seen:
    """An accelerator that fails in the middle of a step; and the same command again."""
    scene = Scene.at(place)
    truth = scene.run("truth")
    lost = scene.run("run", breaks=spoil_output(range(AT, AT + 1), lose_device))
    seen = events_of(lost)
    again = scene.run("run")
    resumed = [event["resumed_from"] for event in again.events("run.resumed")]
    checks = {
        "the run ends with exit code 5 and says that the device is lost": (lost.exit_code, lost.error)
        == (5, "DeviceLost"),
        "the message says that the same command goes on": "same command" in lost.message,
        "it does, from the last checkpoint": resumed == [(AT - 1) // SAVED_EVERY * SAVED_EVERY],
        "and ends as an undisturbed run, to the bit": again.exit_code == 0 and again.is_same_as(truth),
    }
    return Seen(checks, seen | {"resumed_from": resumed, "message": lost.message})


DRILLS: Final = (
    Drill(
        "nan-data",
        "one batch is corrupt text",
        "trains on; the guard warns and keeps the loss out of the baseline",
        "`guard.verdict` in events.ndjson names the step; nothing to do",
        0,
        bad_batch,
    ),
    Drill(
        "nan-loss",
        "the loss of one step is no number",
        "skips the step: weights and moments stay to the bit, the memory begins afresh",
        "`loss.nonfinite` with a count; nothing to do",
        0,
        skipped(spoil_output(range(AT, AT + 1), not_a_number)),
    ),
    Drill(
        "nan-loss-stays",
        "the loss of three steps in a row is no number",
        "rolls back to the last sound snapshot in memory and skips the text that was read since",
        "`rollback.done` says from where to where and what was changed; nothing to do",
        0,
        rolled_back(spoil_output(range(AT, AT + 3), not_a_number), to=12, tier="fast"),
    ),
    Drill(
        "nan-gradient",
        "one gradient is no number, the loss is fine",
        "skips the step: weights and moments stay to the bit, the memory begins afresh",
        "`loss.nonfinite` with a count; nothing to do",
        0,
        skipped(spoil_gradient(AT, lambda gradient: gradient * math.nan)),
    ),
    Drill(
        "nan-weight",
        "one weight becomes NaN",
        "skips the steps that follow, then rolls back to the last sound snapshot in memory",
        "`loss.nonfinite`, then `rollback.done`; nothing to do",
        0,
        rolled_back(spoil_weight(AT), to=12, tier="fast"),
    ),
    Drill(
        "nan-weight-saved",
        "one weight becomes NaN just before a checkpoint, and no snapshots are kept in memory",
        "rolls back past that checkpoint to the last one whose probe loss is a number",
        "`rollback.done` with the tier `full`; nothing to do",
        0,
        rolled_back(spoil_weight(12), "rollback.snapshots=0", to=8, tier="full"),
    ),
    Drill(
        "nan-memory",
        "the memory that is carried to the next sequence becomes NaN",
        "skips the next step, after which the memory begins afresh",
        "`loss.nonfinite` with a count; nothing to do",
        0,
        skipped(spoil_output(range(AT, AT + 1), memory_not_a_number)),
    ),
    Drill(
        "spike",
        "a section of the text is corrupt",
        "the guard panics; the run rolls back before it and skips it, the second time with a lower learning rate",
        "`guard.verdict` and `rollback.done`; check the text that was skipped",
        0,
        spike,
    ),
    Drill(
        "out-of-memory-forward",
        "the device has no room in a forward pass",
        "cuts batches into twice as many micro-batches, by rows, from then on: the same gradient in smaller sums",
        "`batch.split`; nothing to do, or lower data.batch_size to be faster",
        0,
        split(spoil_output(range(AT, AT + 1), ask_too_much)),
    ),
    Drill(
        "out-of-memory-backward",
        "the device has no room in a backward pass",
        "throws away what was gathered and cuts batches into twice as many micro-batches from then on",
        "`batch.split`; nothing to do, or lower data.batch_size to be faster",
        0,
        split(spoil_gradient(AT, ask_too_much)),
    ),
    Drill(
        "out-of-memory-step",
        "the device has no room while weights are moved",
        "puts the last snapshot back, cuts batches into twice as many micro-batches and reads the same text again",
        "`rollback.done` with the new n_micro_batches; nothing to do, or lower data.batch_size to be faster",
        0,
        split_after_step,
    ),
    Drill(
        "device-lost",
        "the accelerator fails in the middle of a step",
        "ends; what was saved is whole",
        "`DeviceLost` says what the device said; the same command goes on from the last checkpoint",
        5,
        device_lost,
    ),
)
