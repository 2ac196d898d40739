"""Whether a run is still sound: each step is held against those just before it, and what is odd is named.

guard, verdict = observe(guard, config, stats, uniform_nats=math.log(vocab_size))

A guard is a value, the history that steps are compared with. Steps that are odd never enter it: they would raise
the baseline until nothing were an outlier any more. What a panic leads to is not decided here (growth.md 19, 20).
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self, TypeAlias

from meristem.events import Event, Severity
from meristem.train.config import GuardConfig

Figures: TypeAlias = Mapping[str, float]
"""What a detector saw and the limit that this went over, by name."""

_NORMAL_MAD: Final = 0.6745
"""The median distance from the median of a normal distribution, in standard deviations."""

# Limits of the detectors: growth.md 19, with floors for runs that have converged. They are no settings: they do not
# depend on model or text, and what does is in ``GuardConfig``.
LEAST_SHARE: Final = 0.4  # of guard.span, that must have been seen before anything is compared: 20 steps of 50
IN_ROW: Final = 3  # odd steps that are a panic: one or two may be a strange batch
TIMES_MEDIAN: Final = 1.5  # the usual loss that a divergence is at least: a quiet run may become a little less quiet
FLOOR_NATS: Final = 0.05  # least distance and least loss of the baseline, for runs near a loss of 0
TIMES_SEVERE: Final = 15.0  # the usual loss, that are a panic at once
COLLAPSE: Final = 0.065  # distance from the loss of a uniform guess, as a share of it
COLLAPSE_FROM: Final = 0.6  # share of that loss which the mean had fallen below: who knew nothing forgets nothing
TIMES_NORM: Final = 20.0  # the usual gradient norm, that are a spike
FLOOR_NORM: Final = 0.01  # least gradient norm of the baseline, for runs that have converged
UPDATE_RATIO: Final = 0.1  # share of itself by which a tensor may move in one step before a warning
HELD_OUT_SPAN: Final = 5  # evaluations through which a line is drawn to the next
HELD_OUT_MARGIN_NATS: Final = 0.05  # by which an evaluation may lie above it, and above the best of them
HELD_OUT_IN_ROW: Final = 2  # such evaluations before a warning: one may be noise of a few windows

SKIPPED_SPAN: Final = 200
"""Steps, the present one last, in which skipped ones are counted wherever they lie."""

SKIPPED_SHARE: Final = 0.01
"""Share of those steps that may be skipped; one more is a panic."""

_SEVERITY: Final[Mapping[str, Severity]] = {"ok": "debug", "warn": "warning", "panic": "error"}


@dataclass(frozen=True)
class StepStats:
    """What was measured of one step.

    loss_nats, grad_norm: may be NaN.
    is_skipped: loss or gradient was not finite, and the optimizer changed nothing.
    update_ratio: how far the tensor that moved most moved, as a share of its size; None where that was not measured.
    is_rescaled: it was skipped since the loss scale of fp16 was too large, which then was halved.
    """

    step: int
    loss_nats: float
    grad_norm: float
    is_skipped: bool
    update_ratio: float | None = None
    is_rescaled: bool = False

    @property
    def is_finite(self) -> bool:
        """It can be compared with others."""
        return not self.is_skipped and math.isfinite(self.loss_nats) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Verdict:
    """What to think of one step.

    level: ``warn`` for whatever is odd, so that no step is kept out of the history in silence; ``panic`` where rolling
        on would harm the run.
    detectors: those that fire. figures: what they saw; ``name.in_row`` and ``name.panics_at`` where they count.
    """

    level: Literal["ok", "warn", "panic"]
    step: int
    detectors: tuple[str, ...] = ()
    figures: Figures = field(default_factory=dict)

    @property
    def event(self) -> Event:
        """The verdict as a record."""
        payload = {"step": self.step, "level": self.level, "detectors": list(self.detectors), **self.figures}
        return Event("guard.verdict", payload, _SEVERITY[self.level])


@dataclass(frozen=True)
class Guard:
    """What later steps are compared with.

    losses, norms: of the last sound steps, newest last.
    in_row: for how many steps without a break a detector has spoken; those that are silent are left out.
    held_out: (step, nats) of the last sound evaluations; n_held_out_above: those since that lay too high.
    skipped: those of the last ``SKIPPED_SPAN`` steps that were skipped, newest last.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    in_row: Mapping[str, int] = field(default_factory=dict)
    held_out: tuple[tuple[int, float], ...] = ()
    n_held_out_above: int = 0
    skipped: tuple[int, ...] = ()

    @property
    def is_quiet(self) -> bool:
        """No detector that can panic is counting: the run may roll back to this state.

        Those that only warn do not matter here. What they say may be true for the rest of the run, and would keep it
        from ever having a state to roll back to.
        """
        return not any(detector.is_anomaly and detector.name in self.in_row for detector in DETECTORS)

    def to_json(self) -> dict[str, Any]:
        """Plain values, all finite; ``from_json`` makes the very same guard of them."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "in_row": dict(self.in_row),
            "held_out": [list(point) for point in self.held_out],
            "n_held_out_above": self.n_held_out_above,
            "skipped": list(self.skipped),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        values = cls().to_json() | dict(values)
        return cls(
            losses=tuple(values["losses"]),
            norms=tuple(values["norms"]),
            in_row=dict(values["in_row"]),
            held_out=tuple((step, nats) for step, nats in values["held_out"]),
            n_held_out_above=values["n_held_out_above"],
            # Guards saved before skipped steps were counted have none.
            skipped=tuple(values.get("skipped", ())),
        )


@dataclass(frozen=True)
class Baseline:
    """What the last sound steps had in common.

    spread_nats: the median distance from the median, but never below ``FLOOR_NATS``. A run that has learned its
    text by heart has losses of thousandths of a nat that differ by less, and any stumble would be hundreds of spreads
    away. What counts there is not how unusual a rise is but whether it matters; at ``guard.z`` = 6 it takes 0.44 nats.
    """

    median_nats: float
    spread_nats: float
    mean_nats: float
    norm: float

    @classmethod
    def of(cls, guard: Guard, config: GuardConfig) -> Self | None:
        """None while there are too few steps to speak of what is usual."""
        losses = guard.losses[-config.span :]
        if len(losses) < max(3, round(LEAST_SHARE * config.span)):
            return None
        median = statistics.median(losses)
        return cls(
            median_nats=median,
            spread_nats=max(statistics.median([abs(loss - median) for loss in losses]), FLOOR_NATS),
            mean_nats=sum(losses) / len(losses),
            norm=statistics.median(guard.norms[-config.span :]),
        )


@dataclass(frozen=True)
class History:
    """A step and what it is held against.

    baseline: None where nothing can be compared: too little was seen, or the step itself is not finite.
    uniform_nats: the loss of a guess that gives every token the same chance; None where there is no such thing.
    n_skipped: of the last ``SKIPPED_SPAN`` steps, those that were skipped.
    """

    stats: StepStats
    config: GuardConfig
    baseline: Baseline | None
    uniform_nats: float | None
    n_skipped: int = 0


@dataclass(frozen=True)
class Detector:
    """One way in which a step can be odd.

    finds: what was seen, or None where nothing is odd.
    panics_at: how many in a row are a panic; None for a detector that only warns.
    is_anomaly: the step stays out of the history. True for all that can panic.
    """

    name: str
    finds: Callable[[History], Figures | None]
    panics_at: Callable[[History], int | None]
    is_anomaly: bool = True


def _nonfinite(history: History) -> Figures | None:
    """Loss or gradient is infinite or NaN."""
    stats = history.stats
    return None if stats.is_finite else {"loss_nats": stats.loss_nats, "grad_norm": stats.grad_norm}


def _skipped(history: History) -> Figures | None:
    """Too many of the last steps were skipped, though never so many in a row: what is wrong comes back each time."""
    limit = SKIPPED_SHARE * SKIPPED_SPAN
    if not history.stats.is_skipped or history.n_skipped <= limit:
        return None
    return {"n_skipped": history.n_skipped, "n_skipped_limit": limit, "n_steps": SKIPPED_SPAN}


def _divergence(history: History) -> Figures | None:
    """The loss is far above the baseline, by its usual deviation and by its size.

    z = 0.6745 (loss - median) / MAD, with the median of the distances from the median (MAD), which a few wild values
    do not move. The second condition leaves alone a quiet run that becomes a little less quiet.
    """
    baseline, loss = history.baseline, history.stats.loss_nats
    if baseline is None:
        return None
    robust_z = _NORMAL_MAD * (loss - baseline.median_nats) / baseline.spread_nats
    limit_nats = TIMES_MEDIAN * baseline.median_nats
    if not (robust_z > history.config.z and loss > limit_nats):
        return None
    return {
        "loss_nats": loss,
        "loss_limit_nats": limit_nats,
        "robust_z": robust_z,
        "robust_z_limit": history.config.z,
        "median_nats": baseline.median_nats,
        "spread_nats": baseline.spread_nats,
    }


def _collapse(history: History) -> Figures | None:
    """The loss is that of a model that has forgotten everything, and it had been much lower.

    Growth.md 19 has it panic at once. Where a batch is a single row, one that holds a table of numbers costs just as
    much: of 3,000 such steps on the default text of this package seven did, and nothing was wrong. A model that has
    really forgotten everything costs it three times in a row.
    """
    baseline, uniform, loss = history.baseline, history.uniform_nats, history.stats.loss_nats
    if baseline is None or uniform is None or baseline.mean_nats >= COLLAPSE_FROM * uniform:
        return None
    margin_nats = COLLAPSE * uniform
    if abs(loss - uniform) >= margin_nats:
        return None
    return {"loss_nats": loss, "uniform_nats": uniform, "margin_nats": margin_nats, "mean_nats": baseline.mean_nats}


def _gradient(history: History) -> Figures | None:
    """The gradient is many times the baseline.

    The usual norm has a floor as the loss has: where most batches have a gradient near 0, the one that has is many
    times the median and yet small beside the norms at which steps are clipped.
    """
    baseline, norm = history.baseline, history.stats.grad_norm
    if baseline is None:
        return None
    limit = TIMES_NORM * max(baseline.norm, FLOOR_NORM)
    return {"grad_norm": norm, "grad_norm_limit": limit} if norm > limit else None


def _severe(history: History) -> Figures | None:
    """The loss is so many times the baseline that waiting for a second such step would only do harm.

    And more than a uniform guess costs. Below that a text of another kind may be all there is to it: after a memory of
    hundreds of equal lines an ordinary one costs many times as much. Divergence waits for three of these.
    """
    baseline, loss = history.baseline, history.stats.loss_nats
    if baseline is None:
        return None
    floor_nats = max(baseline.median_nats, FLOOR_NATS)
    limit_nats = max(TIMES_SEVERE * floor_nats, history.uniform_nats or 0.0)
    return {"loss_nats": loss, "severe_limit_nats": limit_nats} if loss > limit_nats else None


def _update(history: History) -> Figures | None:
    """A step moved some tensor by a large share of what it was."""
    ratio, limit = history.stats.update_ratio, UPDATE_RATIO
    return {"update_ratio": ratio, "update_ratio_limit": limit} if ratio is not None and not ratio <= limit else None


DETECTORS: Final = (
    Detector(
        "nonfinite", _nonfinite, lambda history: history.config.nonfinite_steps if history.stats.is_skipped else 1
    ),
    Detector("skipped", _skipped, lambda _: 1),
    Detector("divergence", _divergence, lambda _: IN_ROW),
    Detector("collapse", _collapse, lambda _: IN_ROW),
    Detector("gradient", _gradient, lambda _: IN_ROW),
    Detector("severe", _severe, lambda _: 1),
    Detector("update", _update, lambda _: None, is_anomaly=False),
)
"""Growth.md 19, but for the wide form of divergence, which is too lax for language models near their floor."""


def observe(
    guard: Guard, config: GuardConfig, stats: StepStats, *, uniform_nats: float | None
) -> tuple[Guard, Verdict]:
    """Take one step into account.

    uniform_nats: the logarithm of the number of tokens; None where a uniform guess means nothing.

    A step that is not finite warns, and is a panic only when ``config.nonfinite_steps`` follow each other. Growth.md 19
    has it panic at once, for it thinks of weights that are spoilt. Here the optimizer skips such a step, so that
    weights and moments are to the bit what they were; a rollback would restore what is there already, and one bad batch
    in an hour is no reason to lose a hundred steps (platform.md 7). Steps that go on being skipped learn nothing, and
    then the run must change: in a row, or more than ``SKIPPED_SHARE`` of the last ``SKIPPED_SPAN``. Where the step was
    not skipped its weights are lost, and it is a panic at once.

    It ends no row of another detector either: what it would have been is not known. A step that only lowered the loss
    scale is not taken into account at all.
    """
    if not config.enabled or stats.is_rescaled:
        return guard, Verdict("ok", stats.step)
    skipped = tuple(step for step in guard.skipped if 0 < stats.step - step < SKIPPED_SPAN)
    skipped += (stats.step,) if stats.is_skipped else ()
    history = History(
        stats, config, Baseline.of(guard, config) if stats.is_finite else None, uniform_nats, len(skipped)
    )
    found = {detector: figures for detector in DETECTORS if (figures := detector.finds(history)) is not None}
    in_row = {} if stats.is_finite else dict(guard.in_row)
    in_row |= {detector.name: guard.in_row.get(detector.name, 0) + 1 for detector in found}
    after = replace(guard, in_row=in_row, skipped=skipped)
    if not any(detector.is_anomaly for detector in found):
        after = replace(
            after,
            losses=(*guard.losses, stats.loss_nats)[-config.span :],
            norms=(*guard.norms, stats.grad_norm)[-config.span :],
        )
    return after, _verdict(history, found, in_row)


def _verdict(history: History, found: Mapping[Detector, Figures], in_row: Mapping[str, int]) -> Verdict:
    figures: dict[str, float] = {}
    is_panic = False
    for detector, seen in found.items():
        figures |= seen
        panics_at = detector.panics_at(history)
        if panics_at is not None:
            figures |= {f"{detector.name}.in_row": in_row[detector.name], f"{detector.name}.panics_at": panics_at}
            is_panic = is_panic or in_row[detector.name] >= panics_at
    level: Literal["ok", "warn", "panic"] = "panic" if is_panic else "warn" if found else "ok"
    return Verdict(level, history.stats.step, tuple(detector.name for detector in found), figures)


def observe_held_out(guard: Guard, config: GuardConfig, step: int, nats: float) -> tuple[Guard, Verdict]:
    """Take one evaluation into account; it can warn and never panics.

    Too high is what lies by ``HELD_OUT_MARGIN_NATS`` above the line of least squares through the evaluations before,
    and above the lowest of them: a curve that flattens always lies above its line, and that alone is no step back.
    A loss that rises slowly takes the line with it; that shows in which checkpoint is the best. What lay too high
    draws no line. Of evaluations that are not finite the first is reported.
    """
    if not config.enabled:
        return guard, Verdict("ok", step)
    before = tuple(point for point in guard.held_out if point[0] < step)[-HELD_OUT_SPAN:]
    limit_nats = _held_out_limit(before, step)
    if math.isfinite(nats) and (limit_nats is None or nats <= limit_nats):
        held_out = (*before, (step, nats))[-HELD_OUT_SPAN:]
        return replace(guard, held_out=held_out, n_held_out_above=0), Verdict("ok", step)
    n_above = guard.n_held_out_above + 1
    after = replace(guard, n_held_out_above=n_above)
    if math.isfinite(nats) and n_above < HELD_OUT_IN_ROW:
        return after, Verdict("ok", step)
    figures = {"held_out_nats": nats, "held_out.in_row": n_above}
    figures |= {} if limit_nats is None else {"held_out_limit_nats": limit_nats}
    return after, Verdict("warn", step, ("held_out",), figures)


def _held_out_limit(before: tuple[tuple[int, float], ...], step: int) -> float | None:
    """The most that an evaluation at ``step`` may be; None while there are fewer than three to draw a line through."""
    if len(before) < 3:
        return None
    slope, offset = statistics.linear_regression([point[0] for point in before], [point[1] for point in before])
    lowest = min(nats for _, nats in before)
    return max(offset + slope * step, lowest) + HELD_OUT_MARGIN_NATS
