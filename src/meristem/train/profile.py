"""Where the time of a step goes: a trace of a few steps, and a table that can be read without one.

Growth.md section 21. Tracing is torch's own; its errors are events and changes nothing of training.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity

from meristem.checkpoint.atomic import write_atomic
from meristem.errors import ConfigError
from meristem.events import Emit, Event
from meristem.train.config import ProfileConfig

PHASES: Final = ("data", "forward", "backward", "optimizer")
"""The ranges, by ``torch.profiler.record_function``, that the loop puts around its parts."""

N_ROWS: Final = 30
"""Operations that the table lists by name."""

Tick = Callable[[int], tuple[Path, ...]]
"""To be called after every step with its number; gives the files that were written by it."""

_STEP = "ProfilerStep"
_ACTIVITIES = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
_QUIET = "6"
"""The level at which the tracer says errors only: it writes to the terminal behind the back of the live view."""


@contextlib.contextmanager
def profiled(config: ProfileConfig, directory: Path | None, device: torch.device, emit: Emit) -> Iterator[Tick]:
    """Trace the steps that ``part`` names, of those that the block makes; what it gives is called after each of them.

    Each trace of ``config.steps`` steps leaves ``step-000123.json``, a Chrome trace, and ``step-000123.txt``, a table,
    named for its last step; the event ``profile.written`` says where. A trace that the end of the block cuts short
    is written too, with the event ``profile.cut_short``. What fails is the event ``profile.failed``, ends the tracing
    and nothing else. With ``part.steps`` 0 nothing is done at all.

    directory: where the files go unless ``part`` names a place. Raises ConfigError where neither does.
    """
    if not config.steps:
        yield _untraced
        return
    into = config.directory or directory
    if into is None:
        raise ConfigError(
            f"profile.steps is {config.steps}, but there is no directory to write traces into: found none, expected a "
            "path. Set profile.directory, or profile.steps=0.",
            path="profile.directory",
            value=None,
        )
    tracing = _Tracing(config, into, activities(device, emit), emit)
    try:
        yield tracing.tick
    finally:
        tracing.end()


def activities(device: torch.device, emit: Emit) -> tuple[ProfilerActivity, ...]:
    """What can be traced of a run on ``device``: the CPU, and the device where torch's tracer knows it.

    The event ``profile.limited`` says that the device's own work will be missing from the trace.
    """
    able = torch.profiler.supported_activities()
    wanted = _ACTIVITIES.get(device.type)
    if wanted is not None and wanted in able:
        return ProfilerActivity.CPU, wanted
    if device.type != "cpu":
        payload = {"device": str(device), "missing": device.type, "traced": ["cpu"]}
        emit(Event("profile.limited", payload, "warning"))
    return (ProfilerActivity.CPU,)


def table(profile: torch.profiler.profile, n_steps: int, title: str) -> str:
    """Where the time of ``n_steps`` traced steps went: by phase of the loop, then by operation.

    Times are of the host, except in the column of an accelerator. An operation's time is its own, without that of the
    operations which it calls; what a phase does between its operations stands there as one of them.
    """
    rows = [row for row in profile.key_averages() if row.device_type.name == "CPU"]
    step_us = sum(row.cpu_time_total for row in rows if row.key.startswith(_STEP)) or 1.0
    phase_us = {row.key: row.cpu_time_total for row in rows if row.is_user_annotation and row.key in PHASES}
    lines = [title, f"one step took {step_us / n_steps / 1e3:.3f} ms", "", f"{'phase':<46}{'ms/step':>12}{'share':>10}"]
    for name, time_us in [*phase_us.items(), ("rest", step_us - sum(phase_us.values()))]:
        lines.append(f"{name:<46}{time_us / n_steps / 1e3:>12.3f}{time_us / step_us:>10.1%}")
    has_device = any(row.self_device_time_total for row in rows)
    rows.sort(key=lambda row: (-row.self_device_time_total, -row.self_cpu_time_total))
    device_head = f"{'device ms/step':>16}" if has_device else ""
    lines += ["", f"{'operation':<46}{'ms/step':>12}{'share':>10}{'calls/step':>12}{device_head}"]
    for row in rows[:N_ROWS]:
        lines.append(_line(_named(row), [row], step_us, n_steps, has_device))
    if rows[N_ROWS:]:
        lines.append(_line(f"{len(rows) - N_ROWS} others", rows[N_ROWS:], step_us, n_steps, has_device))
    return "\n".join([*lines, ""])


def _named(row: Any) -> str:
    """An operation, or what a range of the loop did between its operations."""
    if not row.is_user_annotation:
        return str(row.key)
    return "python between phases" if row.key.startswith(_STEP) else f"python in {row.key}"


def _line(name: str, rows: list[Any], step_us: float, n_steps: int, has_device: bool) -> str:
    time_us, n_calls = sum(row.self_cpu_time_total for row in rows), sum(row.count for row in rows)
    device_us = sum(row.self_device_time_total for row in rows)
    short = name if len(name) <= 45 else f"{name[:42]}..."
    line = f"{short:<46}{time_us / n_steps / 1e3:>12.3f}{time_us / step_us:>10.1%}{n_calls / n_steps:>12.1f}"
    return f"{line}{device_us / n_steps / 1e3:>16.3f}" if has_device else line


def _untraced(step: int) -> tuple[Path, ...]:
    return ()


def _export(profile: torch.profiler.profile, path: Path) -> None:
    """Write the trace. Torch tells the terminal alone when it could not, so that it is looked for afterwards."""
    path.unlink(missing_ok=True)
    profile.export_chrome_trace(str(path))
    if not path.is_file():
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        raise OSError(f"torch wrote no trace to {path}; is the disk full?")


class _Tracing:
    """Traces of some steps each, one after the other. ``profile`` is None once there is nothing more to trace."""

    def __init__(self, config: ProfileConfig, into: Path, traced: tuple[ProfilerActivity, ...], emit: Emit) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)
        self.config, self.into, self.traced, self.emit = config, into, traced, emit
        self.profile: torch.profiler.profile | None = None
        self.n_windows, self.n_ticks, self.step = 0, 0, 0
        self.written: tuple[Path, ...] = ()
        self._begin()

    def tick(self, step: int) -> tuple[Path, ...]:
        """A step was made: on to the next one. Gives what a trace that ended here left."""
        self.written = ()
        if self.profile is None:
            return ()
        self.step, self.n_ticks = step, self.n_ticks + 1
        with self._harmlessly("tracing"):
            self.profile.step()
        if self.profile is not None and self.n_recorded == self.config.steps:
            self._stop()
            self.n_windows += 1
            if self.n_windows < self.config.repeat:
                self._begin()
        return self.written

    def end(self) -> None:
        """No more steps will come."""
        if self.profile is not None:
            n_recorded = self.n_recorded
            self._stop()
            payload = {"recorded_steps": n_recorded, "wanted_steps": self.config.steps, "at_step": self.step}
            self.emit(Event("profile.cut_short", payload, "warning"))

    @property
    def n_recorded(self) -> int:
        """How many whole steps are in this trace."""
        return max(0, self.n_ticks - self.config.wait - self.config.warmup)

    def _begin(self) -> None:
        """A tracer for each trace: one for all would keep the numbers of those before it."""
        self.n_ticks, part = 0, self.config
        with self._harmlessly("starting"):
            self.profile = torch.profiler.profile(
                activities=self.traced,
                schedule=torch.profiler.schedule(wait=part.wait, warmup=part.warmup, active=part.steps, repeat=1),
                on_trace_ready=self._save,
            )
            self.profile.start()

    def _stop(self) -> None:
        with self._harmlessly("stopping"):
            if self.profile is not None:
                self.profile.stop()
        self.profile = None

    def _save(self, profile: torch.profiler.profile) -> None:
        if not self.n_recorded:
            return
        trace, text = (self.into / f"step-{self.step:06d}.{ending}" for ending in ("json", "txt"))
        names = " and ".join(activity.name.lower() for activity in self.traced)
        title = f"{self.n_recorded} steps up to step {self.step}, traced on {names}; the trace is {trace.name}"
        with self._harmlessly("writing"):
            self.into.mkdir(parents=True, exist_ok=True)
            write_atomic(text, table(profile, self.n_recorded, title).encode())
            _export(profile, trace)
            self.written = (trace, text)
        if self.written:
            payload = {
                "trace": str(trace),
                "table": str(text),
                "steps": self.n_recorded,
                "traced": names.split(" and "),
            }
            self.emit(Event("profile.written", payload))

    @contextlib.contextmanager
    def _harmlessly(self, what: str) -> Iterator[None]:
        """Tell what goes wrong in the block, and trace no more."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the tracer and the disk are foreign; training goes on without them
            self.profile = None
            payload = {"while": what, "type": type(error).__name__, "message": str(error), "at_step": self.step}
            self.emit(Event("profile.failed", payload, "warning"))
