"""What keeps a run from being lost: a guard that checks it, snapshots and checkpoints, and rollback to them."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch

from meristem.checkpoint.journal import Journal
from meristem.checkpoint.saver import Saver
from meristem.checkpoint.snapshots import Snapshot, SnapshotBuffer
from meristem.device.limits import available_bytes
from meristem.device.room import room_for
from meristem.distributed.shards import is_part, local_by_name
from meristem.errors import Halted, RollbackFailed, SnapshotTooLarge
from meristem.events import Event
from meristem.models.topology import from_json
from meristem.optim.state import expected_bytes
from meristem.runs.directory import Run
from meristem.runs.resume import (
    Contents,
    Job,
    Safety,
    contents,
    gathered,
    newest_sound,
    put_back_weights,
    restore,
    write,
)
from meristem.runs.structure import fresh
from meristem.train import rollback
from meristem.train.config import RollbackConfig
from meristem.train.emergency import FILE, Level, SharedLevel, Signals, downgraded, quiet, raised
from meristem.train.guard import Verdict, observe, observe_held_out
from meristem.train.loop import Step
from meristem.train.loss import cross_entropy
from meristem.train.progress import Progress
from meristem.train.rollback import FAST, FULL, MOST_IN_ROW, USUAL, Attempt, Tier, TierName, most_bytes, n_snapshots

PROBE_TOKENS: Final = 128
"""Held-out tokens whose loss is saved with every state: after a rollback to it they must cost the same again."""

QUIET_STEPS: Final = 200
"""Steps without a verdict after which the emergency level falls by one."""

EASE: Final = 0.5
"""The factor on the rate of the steps after a panic, where it is lower (growth.md 20)."""


class Recovery:
    """The guard, the snapshots and the checkpoints of one run while it trains.

    safety: how sound the run is; saved with it.
    time_scale: a factor on the deadlines of rollbacks, for machines on which nothing can be timed.
    """

    def __init__(self, run: Run, job: Job, safety: Safety, time_scale: float = 1.0) -> None:
        self._run, self._job, self.safety, self._time_scale = run, job, safety, time_scale
        self._config = job.config.rollback
        window = job.corpus.tokens("val")[: min(PROBE_TOKENS, job.config.data.seq_len + 1)]
        self._probe_bt = torch.from_numpy(window.astype("int64"))[None]
        self._uniform_nats = math.log(job.corpus.tokenizer.vocab_size)
        self._ring = _snapshot_buffer(self._config, job, run)
        self._saver, self._journal = Saver(), Journal(run.directory / "journal")
        self._signals = Signals(run.emit)
        self._level = SharedLevel(run.directory / FILE)
        self._level.write(safety.emergency)
        if self._journal.n_cut_bytes:
            payload = {"what": "torn end cut off", "path": "journal", "n_bytes": self._journal.n_cut_bytes}
            run.emit(Event("degraded", payload, "warning"))
        for left in self._journal.uncommitted():
            run.emit(Event("journal.undone", {"kind": left.kind, **left.fields}, "warning"))
            self._journal.undo(left.number, "the process ended before it was done")
        self._is_due = self._is_spared = False
        self.snapshot("start")

    def close(self) -> None:
        """Wait for what is still being written."""
        try:
            self._saver.close()
        finally:
            self._signals.flush(is_end=True)
            self._journal.close()
            self._level.close()

    def check(self, step: Step) -> str | None:
        """Why the run must roll back, or None."""
        self._saver.poll()
        self._signals.flush()
        for stats in step.stats:
            guard, verdict = observe(self.safety.guard, self._job.config.guard, stats, uniform_nats=self._uniform_nats)
            self.safety = replace(self.safety, guard=guard)
            self._heed(verdict)
            if verdict.level == "panic":
                return ", ".join(verdict.detectors)
        return None

    def keep(self, step: Step) -> None:
        """A snapshot after a sound step, where one is due."""
        self._is_due |= step.progress.step % self._config.snapshot_every == 0
        if self._is_due and step.stats:
            self.snapshot("interval")

    def evaluated(self, step: int, nats: float) -> None:
        """Hear what the held-out text cost."""
        guard, verdict = observe_held_out(self.safety.guard, self._job.config.guard, step, nats)
        self.safety = replace(self.safety, guard=guard)
        if verdict.level != "ok":
            self._heed(verdict)

    def should_skip_eval(self) -> bool:
        """Whether an evaluation is to be left out: every other one is while the run has too little time."""
        if self.safety.emergency.level < Level.ELEVATED:
            return False
        self._is_spared = not self._is_spared
        return self._is_spared

    def save(self, *, reason: str, metrics: dict[str, float]) -> Path:
        """Have a checkpoint written beside the training, which waits for no more than one copy in memory."""
        self._job.optimizer.gather_pending(is_first=self._run.world.is_first)
        taken, progress = self.snapshot("save"), self._job.state.progress
        held = None
        if self._ring and taken:
            saved, held = Contents(taken.trees, taken.values), self._ring.pinned(taken)
        else:
            saved = contents(self._job, self.safety, self._probe())
        with room_for("a checkpoint", self._job.device.device):
            saved = gathered(self._job, saved)
        path = self._run.checkpoints / f"step-{progress.step:08d}"
        if not self._run.world.is_first:
            return path
        seq, number = self._run.records.seq, 0

        def begin_and_write() -> Path:
            # In the thread of the saver: a journal waits for the disk, as a checkpoint does.
            nonlocal number
            number = self._journal.begin("save", {"step": progress.step, "reason": reason})
            return write(self._run, self._job, progress, saved, reason=reason, metrics=metrics, seq=seq)

        self._saver.submit(
            begin_and_write,
            done=lambda path: self._journal.commit(number, {"checkpoint": path.name}),
            reading=held,
        )
        if held is None:
            # Without a copy in memory the tensors in use are written, and must not change meanwhile.
            self._saver.wait()
        return path

    def snapshot(self, tag: str) -> Snapshot | None:
        """A snapshot of the run as it is; None where none are kept, or there is no room and no number is set."""
        self._is_due = False
        self._run.world.require_alike(weight for weight in self._job.model.parameters() if not is_part(weight))
        if self._ring is None:
            return None
        probe_nats = self._probe()
        saved, step = contents(self._job, self.safety, probe_nats), self._job.state.progress.step
        is_valid = self.safety.guard.is_quiet and math.isfinite(probe_nats)
        try:
            return self._ring.take(saved.trees, saved.values, step=step, tag=tag, is_valid=is_valid)
        except SnapshotTooLarge as error:
            if self._config.snapshots is not None:
                raise
            self._run.emit(Event("rollback.fewer_snapshots", {"step": step, "reason": str(error)}, "warning"))
            return None

    def wait(self) -> None:
        """Until every checkpoint is on the disk; raises what kept one from getting there."""
        self._saver.wait()

    def roll_back(self, *, reason: str, n_micro_batches: int | None = None) -> None:
        """Put an earlier state of the run in place, with something changed so that it does not end here again.

        n_micro_batches: only the number of micro-batches is changed; the text is read again as it was.
        Raises RollbackFailed where no rollback is possible, and Halted where rollbacks have not helped.
        """
        self._saver.wait()
        now = self._job.state.progress
        rollbacks = self.safety.rollbacks.panicked(now.step)
        number = self._journal.begin("rollback", {"step": now.step, "reason": reason})
        try:
            found, attempts = self._restored()
        except RollbackFailed as error:
            self._journal.undo(number, str(error))
            self._raise_level(Level.HALT, "rollback_failed", "rollback")
            raise
        # What was skipped before the snapshot led to this rollback; counted again it would lead to the next one.
        guard = found.safety.guard if n_micro_batches is not None else replace(found.safety.guard, skipped=())
        self.safety = Safety(guard, rollbacks.observed(attempts), self.safety.emergency)
        then, changed = self._changed(now, self._job.state.progress, rollbacks.n_in_row, n_micro_batches)
        self._job.state = replace(self._job.state, progress=then)
        payload = {
            "resumed_from": then.step,
            "panicked_at": now.step,
            "reason": reason,
            "tier": attempts[-1].tier,
            "changed": changed,
            "in_row": rollbacks.n_in_row,
            "attempts": [vars(attempt) | {"phases": dict(attempt.phases)} for attempt in attempts],
            "latencies": self.safety.rollbacks.to_json()["latencies"],
        }
        self._run.emit(Event("rollback.done", payload))
        self._run.view.note(
            f"rolled back from step {now.step} to {then.step} in {1000 * attempts[-1].seconds:.0f} ms ({reason}); "
            + ", ".join(f"{name} {value}" for name, value in changed.items())
        )
        self._journal.commit(number, {"resumed_from": then.step, "changed": changed})
        if any(attempt.is_violation for attempt in attempts):
            self._raise_level(Level.ELEVATED, "rollback_late", "rollback")
        if self._ring:
            self._ring.drop_after(then.step)
        self.snapshot("rollback")
        if rollbacks.n_in_row >= MOST_IN_ROW:
            self._halt(then, now, rollbacks.n_in_row)

    def _halt(self, then: Progress, now: Progress, n_in_row: int) -> None:
        self._raise_level(Level.HALT, "panics_in_row", "rollback")
        self.save(reason="rollback", metrics={})
        self._saver.wait()
        raise Halted(
            f"the run rolled back {n_in_row} times in a row, the last time from step {now.step} to {then.step}, and "
            f"what it did about it ({self._config.change}) did not help. The state of step {then.step} is saved. Look "
            "at guard.verdict in events.ndjson, lower optim.lr or mend the text, then resume.",
            step=then.step,
            n_in_row=n_in_row,
        )

    def _changed(
        self, now: Progress, then: Progress, n_in_row: int, n_micro_batches: int | None
    ) -> tuple[Progress, dict[str, object]]:
        """Where the run goes on, and what is different from the first time. The time that was used stays used.

        The second time in a row as many batches more are skipped as lie between two snapshots: the rollback has brought
        the run so far, and no farther. The rate is lower for as many steps, until there is another snapshot.
        """
        then = replace(then, seconds_used=now.seconds_used)
        if n_micro_batches is not None:
            return replace(then, n_micro_batches=n_micro_batches), {"n_micro_batches": n_micro_batches}
        changed: dict[str, object] = {}
        change = "both" if n_in_row > 1 else self._config.change
        if change in ("skip", "both"):
            more = self._config.snapshot_every if n_in_row > 1 else 0
            cursor = replace(now.cursor, position=now.cursor.position + more)
            changed["skipped_batches"] = [then.cursor.position, cursor.position]
            # The memory knows the text before the gap, and not that which follows it.
            then = replace(then, cursor=cursor, memory=None)
        if change in ("ease", "both"):
            until_step = then.step + self._config.snapshot_every
            changed |= {"rate_factor": EASE, "until_step": until_step}
            then = replace(then, ease=EASE, eased_until=until_step)
        return then, changed

    def _restored(self) -> tuple["_Found", tuple[Attempt, ...]]:
        """What was put in place, and how long that took by which tier.

        Each phase is one of all processes, by the clock of the first: all come to the same state, or to none.
        """
        world = self._run.world
        found = _Found(self._job, self._run, self._probe)
        snapshot = self._ring.latest(is_valid=True) if self._ring else None
        fast = {"prepare": lambda: found.choose(snapshot), "commit": found.put, "confirm": found.confirm}
        full = {
            "load": found.load,
            "model": found.put_weights,
            "optimizer": found.put_rest,
            "verify": found.confirm,
        }
        tiers = [self._tier("full", full, FULL)]
        if world.any(snapshot is not None):
            tiers.insert(0, self._tier("fast", fast, FAST))
        return found, rollback.restore(tiers, world.clock)

    def _tier(self, name: TierName, acts: Mapping[str, Callable[[], str]], budgets_s: Mapping[str, float]) -> Tier:
        """A tier whose phases are those of all processes, and which fails where there is no room for one."""
        room = room_for("a rollback", self._job.device.device)
        phases = {phase: partial(self._run.world.act, phase, room(act)) for phase, act in acts.items()}
        return Tier(name, phases, self._time_scale * sum(budgets_s.values()))

    def _probe(self) -> float:
        """Nats per target on a little held-out text, read with a fresh memory."""
        device, engine = self._job.device, self._job.engine
        with room_for("the probe", device.device), torch.no_grad(), engine.whole(), device.autocast():
            tokens_bt, targets_bt = device.move(self._probe_bt[:, :-1], self._probe_bt[:, 1:])
            logits_bto, _ = self._job.model(tokens_bt, None)
            return float(cross_entropy(logits_bto, targets_bt)) / targets_bt.numel()

    def _heed(self, verdict: Verdict) -> None:
        """Record what the guard says, and let the emergency level follow it."""
        now = self.safety.emergency
        if verdict.level == "ok":
            now = quiet(now)
            if now.level and now.n_quiet >= QUIET_STEPS:
                now = downgraded(now, Level(now.level - 1), after=QUIET_STEPS)
                self._run.emit(Event("emergency.cleared", {"level": int(now.level)}))
                self._level.write(now)
            self.safety = replace(self.safety, emergency=now)
            return
        self._run.emit(verdict.event)
        self._raise_level(Level.CONSERVATIVE if verdict.level == "panic" else Level.NOTICE, verdict.detectors[0])

    def _raise_level(self, level: Level, reason: str, origin: str = "guard") -> None:
        level = self._signals.send(level, origin=origin, reason=reason)
        self.safety = replace(self.safety, emergency=raised(self.safety.emergency, level, reason=reason, origin=origin))
        self._level.write(self.safety.emergency)


class _Found:
    """The state that a run rolls back to, put in place piece by piece."""

    def __init__(self, job: Job, run: Run, probe: Callable[[], float]) -> None:
        self._job, self._run, self._probe = job, run, probe

    def choose(self, snapshot: Snapshot | None) -> str:
        """Choose what is in memory."""
        if snapshot is None:
            raise RollbackFailed("no sound snapshot is in memory here")
        self._saved = Contents(snapshot.trees, snapshot.values)
        return f"step {snapshot.step}"

    def load(self) -> str:
        """Choose what is on disk."""
        checkpoint = newest_sound(self._run.checkpoints, self._run.emit)
        if checkpoint is None:
            raise RollbackFailed(
                f"{self._run.checkpoints} holds no whole checkpoint that was saved while the run was sound."
            )
        self._saved = Contents.of(checkpoint).of_process(self._run.world, self._job.config.data.batch_size)
        return f"step {checkpoint.step}"

    def put(self) -> str:
        return f"{self.put_weights()}, {self.put_rest()}"

    def put_weights(self) -> str:
        """Into the model that is there; where that has another structure by now, into one that is built again."""
        job, run = self._job, self._run
        topology = from_json(self._saved.values.get("topology", []))
        if topology != job.state.topology:
            vocabulary = job.corpus.tokenizer.vocab_size
            start = job.state.progress
            job.state, _ = fresh(run, job.config, job.device, vocabulary=vocabulary, progress=start, topology=topology)
        put_back_weights(job, self._saved.trees["model"])
        return "weights"

    def put_rest(self) -> str:
        self.safety = restore(self._job, self._saved, self._run.emit)
        progress = self._job.state.progress
        return f"step {progress.step}, batch {progress.cursor.position}"

    def confirm(self) -> str:
        """What the probe costs. Raises RollbackFailed unless that is what it cost when the state was taken."""
        found = self._probe()
        expected = self._saved.values.get("probe", {}).get("nats", found)
        is_exact = self._job.device.device.type == "cpu"
        if found != expected and (is_exact or not math.isclose(found, expected, rel_tol=1e-4)):
            raise RollbackFailed(
                f"after the rollback the probe costs {found} nats, and it cost {expected} when this state was taken.",
                found=found,
                expected=expected,
            )
        return f"probe {found!r}"


def _snapshot_buffer(config: RollbackConfig, job: Job, run: Run) -> SnapshotBuffer | None:
    """Room for snapshots, as many as are configured, or as fit."""
    weights, world = local_by_name(job.model.state_dict()), run.world
    capacity_bytes = sum(tensor.nbytes + 64 for tensor in weights.values()) + expected_bytes(job.optimizer) + 2**16
    free_bytes = available_bytes() // world.n_local
    count = n_snapshots(config, capacity_bytes, free_bytes)
    # The machines of a run need not have the same room, and all roll back the same way.
    count = int(min(least for (least,) in world.all_gather_numbers([count])))
    max_bytes = most_bytes(config, free_bytes)
    is_pinned, buffer = job.device.device.type == "cuda", None
    try:
        if count:
            buffer = SnapshotBuffer(
                n_snapshots=count, capacity_bytes=capacity_bytes, max_bytes=max_bytes, is_pinned=is_pinned
            )
    except SnapshotTooLarge:
        if config.snapshots is not None:
            raise
    # What one process is refused the others do without, as all roll back the same way.
    if world.any(buffer is None):
        count, buffer = 0, None
    if config.snapshots is None and count < USUAL:
        payload = {"snapshots": count, "capacity_bytes": capacity_bytes, "max_bytes": max_bytes}
        run.emit(Event("rollback.fewer_snapshots", payload, "warning"))
    return buffer


@contextlib.contextmanager
def recovering(run: Run, job: Job, safety: Safety, time_scale: float = 1.0) -> Iterator[Recovery]:
    """The recovery of the run while the block lasts; ``time_scale`` as in ``Recovery``."""
    recovery = Recovery(run, job, safety, time_scale)
    try:
        yield recovery
    finally:
        recovery.close()
