"""Steps as records and as what a person sees; and when something else is due."""

from dataclasses import dataclass
from typing import Final

import torch

from meristem.device.room import room_for
from meristem.evaluate.levels import Dormancy, level_figures
from meristem.evaluate.memory import memory_figures
from meristem.events import Event, Severity
from meristem.runs.directory import Run
from meristem.runs.resume import Job
from meristem.train.aggregate import Report, changes
from meristem.train.loop import Step
from meristem.train.progress import Progress

PROBE_TOKENS = 128
"""Held-out tokens that are read for the figures of the memory: few, since they are read at every record."""

LIMITS: Final[tuple[tuple[str, float, Severity, str], ...]] = (
    (
        "summed_rate",
        1.0,
        "warning",
        "a key that returns is written more than once; lower memory.write_rate or momentum",
    ),
    ("overshoot", 1.0, "warning", "frozen chunks overshoot; lower memory.chunk or write_limit, or take an exact form"),
    ("overshoot", 2.0, "error", "frozen chunks diverge; set memory.write_limit to 2 / chunk, or take an exact form"),
)
"""Figures of the memory, what they may be, and what to do where they are more (memory.md 2.3, 4.4)."""

SMOOTHING = 0.9
"""Share of the shown loss that stays from step to step; the recorded one is that of its step alone."""


@dataclass
class Interval:
    """Something due every so many steps, and so many seconds of training after it was last done."""

    every: int | None
    every_s: float | None
    last_s: float

    def is_due(self, progress: Progress) -> bool:
        """Whether it is due now; if so, the time until the next begins."""
        by_steps = self.every is not None and progress.step % self.every == 0
        by_time = self.every_s is not None and progress.seconds_used - self.last_s >= self.every_s
        if by_steps or by_time:
            self.last_s = progress.seconds_used
        return by_steps or by_time


def rank_figures(each_s: list[tuple[float, ...]], n_targets: int) -> dict[str, float]:
    """How fast each of several processes was over some steps, on average and at worst; alone, nothing.

    each_s: for each step the seconds of each process. n_targets: of all processes in a step.
    """
    n_ranks = len(each_s[0])
    if n_ranks < 2:
        return {}
    totals_s = [sum(seconds) for seconds in zip(*each_s, strict=True)]
    speeds = [n_targets / n_ranks * len(each_s) / max(total_s, 1e-9) for total_s in totals_s]
    return {
        "ranks/tokens_per_s/mean": sum(speeds) / n_ranks,
        "ranks/tokens_per_s/min": min(speeds),
        "ranks/step_s/mean": sum(totals_s) / n_ranks / len(each_s),
        "ranks/step_s/max": max(max(seconds) for seconds in each_s),
    }


class Log:
    """Takes every step: records those that log, reports bad ones, keeps the screen alive."""

    def __init__(self, run: Run, job: Job) -> None:
        self._run, self._job = run, job
        self._start = self._before = self._recorded = job.state.progress
        self._shown: float | None = None
        self._memory: dict[str, float] = {}
        self._tokens_per_s = 0.0
        self._told: set[tuple[str, float]] = set()
        self._each_s: list[tuple[float, ...]] = []
        self._conflict: Report | None = None
        self._still: dict[str, Dormancy] = {}
        self.held_out: float | None = None
        window = job.corpus.tokens("val")[: min(PROBE_TOKENS, job.config.data.seq_len)]
        (self._probe_bt,) = job.device.move(torch.from_numpy(window.astype("int64"))[None])

    def take(self, step: Step) -> None:
        """One step that was made."""
        now = step.progress
        self._each_s.append(step.each_s)
        if now.n_nonfinite > self._before.n_nonfinite:
            payload = {"step": now.step, "in_row": now.n_nonfinite_in_row, "count": now.n_nonfinite}
            self._run.emit(Event("loss.nonfinite", payload, "warning"))
        if now.n_micro_batches > self._before.n_micro_batches:
            payload = {"step": now.step, "n_micro_batches": now.n_micro_batches, "was": self._before.n_micro_batches}
            self._run.emit(Event("batch.split", payload, "warning"))
        if step.bits_per_byte is not None:
            before = step.bits_per_byte if self._shown is None else self._shown
            self._shown = SMOOTHING * before + (1 - SMOOTHING) * step.bits_per_byte
        if step.is_logged:
            self._record(step)
        self._show(step)
        self._before = now

    def rolled_back(self) -> None:
        """The run stands at an earlier step again."""
        # The speed too counts from here: what the process began with may lie ahead again.
        self._start = self._before = self._recorded = self._job.state.progress
        self._shown, self._each_s = None, []

    def _record(self, step: Step) -> None:
        now = step.progress
        seconds = now.seconds_used - self._recorded.seconds_used
        self._tokens_per_s = (now.tokens - self._recorded.tokens) / seconds
        device = self._job.device
        with room_for("figures of the memory", device.device), self._job.engine.whole(), device.autocast():
            self._memory = memory_figures(self._job.model, self._probe_bt)
            levels = level_figures(self._job.model, self._probe_bt)
        metrics = {
            "nats": step.loss_nats,
            "bits_per_byte": step.bits_per_byte,
            "grad_norm": step.grad_norm,
            "rate": step.rate,
            "tokens_per_s": self._tokens_per_s,
            "seconds_used": now.seconds_used,
        }
        if self._job.optimizer.loss_scale is not None:
            metrics["loss_scale"] = float(self._job.optimizer.loss_scale.scale)
        metrics |= rank_figures(self._each_s, step.n_targets)
        self._each_s = []
        if step.conflict:
            report = step.conflict.report()
            for event in changes(self._conflict, report):
                self._run.emit(event)
            self._conflict = report
            metrics |= {"aggregate/conflict_rate": report.rate}
            metrics |= {f"aggregate/share/{name}": share for name, share in report.shares.items()}
            metrics |= {f"aggregate/cosine/{pair}": cosine for pair, cosine in report.cosines.items()}
        self._warn(now.step)
        metrics |= {f"memory/{name}": value for name, value in self._memory.items()}
        for level, figures in levels.items():
            self._rouse(now.step, level, figures)
            metrics |= {f"memory/{level}/{name}": value for name, value in figures.items()}
        for period, waiting in self._job.optimizer.health().items():
            metrics |= {
                f"optim/pending_ratio/{period}": waiting.ratio,
                f"optim/pending_steps/{period}": waiting.n_steps,
            }
        self._run.records.metrics(now.step, now.tokens, self._job.stream.epoch(now.cursor), "train", metrics)
        self._recorded = now

    def _warn(self, step: int) -> None:
        """Say once that a memory writes more than it can take, and again only after it had been quiet."""
        for name, limit, severity, advice in LIMITS:
            value = self._memory.get(name, 0.0)
            if value > limit and (name, limit) not in self._told:
                payload = {"step": step, name: round(value, 3), "limit": limit, "advice": advice}
                self._run.emit(Event("memory.unstable" if limit == 2 else "memory.overshoots", payload, severity))
                self._told.add((name, limit))
            elif value <= limit:
                self._told.discard((name, limit))

    def _rouse(self, step: int, level: str, figures: dict[str, float]) -> None:
        """Say once that a level sleeps, and again only after it had been awake."""
        before = self._still.get(level, Dormancy())
        self._still[level] = now = before.fed(figures)
        if now.is_dormant and not before.is_dormant:
            self._run.emit(now.event(level, step))

    def _show(self, step: Step) -> None:
        now, part = step.progress, self._job.config.train
        share = now.share(part)
        fields = {"step": f"{now.step}"}
        if self._shown is not None:
            fields["loss"] = f"{self._shown:.3f} bits/byte"
        if self.held_out is not None:
            fields["held-out"] = f"{self.held_out:.3f}"
        if self._tokens_per_s:
            fields[""] = f"{self._tokens_per_s:,.0f} tokens/s"
        fields["left"] = _clock(self._seconds_left(now, share))
        if self._memory:
            least, most = (self._memory[f"half_life_{end}"] for end in ("least", "most"))
            fields["half-lives"] = f"{least:,.0f} to {most:,.0f} tokens"
            fields["write"] = f"{self._memory['write']:.3f}"
            fields["memory norm"] = f"{self._memory['norm']:.2f}"
        self._run.view.update(fields, progress=share, loss=self._shown)

    def _seconds_left(self, now: Progress, share: float) -> float:
        """At the speed since this process began to train."""
        done = share - self._start.share(self._job.config.train)
        return max(0.0, (now.seconds_used - self._start.seconds_used) * (1 - share) / done)


def _clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
