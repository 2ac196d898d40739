"""What the guard says of a step, when, and that nothing odd ever becomes what is usual."""

import json
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.train import guard as limits
from meristem.train.config import GuardConfig
from meristem.train.guard import DETECTORS, Baseline, Guard, StepStats, Verdict, observe, observe_held_out

PART = GuardConfig()
UNIFORM_NATS = math.log(256)
BAD = (math.nan, math.inf, -math.inf)


def watch(
    losses: list[float],
    *,
    norms: list[float] | None = None,
    config: GuardConfig = PART,
    guard: Guard | None = None,
    uniform_nats: float | None = UNIFORM_NATS,
) -> tuple[Guard, list[Verdict]]:
    """The guard after these losses, and what it said of each; steps that are not finite were skipped."""
    guard = guard or Guard()
    verdicts = []
    for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True)):
        is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        guard, verdict = observe(guard, config, StepStats(step, loss, norm, is_skipped), uniform_nats=uniform_nats)
        verdicts.append(verdict)
    return guard, verdicts


def sound(level_nats: float = 2.0, spread: float = 0.05, n: int = 60) -> list[float]:
    """Losses around a level, each of them once above it and once below."""
    draw = random.Random(5)
    offsets = [draw.uniform(0, 2 * spread) for _ in range(n // 2)]
    return [level_nats + sign * offset for offset in offsets for sign in (1, -1)]


def levels(verdicts: list[Verdict]) -> str:
    """o, w and p for each verdict."""
    return "".join(verdict.level[0] for verdict in verdicts)


BEFORE, _ = watch(sound())
"""A guard that has seen sixty sound steps around 2 nats."""

# numbers that a float32 can be
numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)
nonfinite = st.sampled_from(BAD)
losses_or_not = st.one_of(st.floats(1.5, 2.5), st.floats(2.5, 100), st.floats(0, 1e-3), numbers, nonfinite)
norms_or_not = st.one_of(st.floats(0.5, 1.5), st.floats(10, 1e4), numbers, nonfinite)
ratios = st.one_of(st.none(), st.floats(0, 1), nonfinite)


@st.composite
def measured(draw: st.DrawFn) -> StepStats:
    loss, norm = draw(losses_or_not), draw(norms_or_not)
    is_spoilt = not (math.isfinite(loss) and math.isfinite(norm))
    return StepStats(draw(st.integers(0, 10**6)), loss, norm, is_spoilt and draw(st.booleans()), draw(ratios))


SMALL = GuardConfig(span=8)
ANOMALIES = {detector.name for detector in DETECTORS if detector.is_anomaly}


@given(st.lists(measured(), max_size=40))
@settings(max_examples=200, deadline=None)
def test_nothing_odd_enters_the_history(sequence):
    """Whatever comes, what later steps are compared with is finite, and of steps in which nothing panicked or might."""
    guard = Guard()
    for stats in sequence:
        after, verdict = observe(guard, SMALL, stats, uniform_nats=UNIFORM_NATS)
        if ANOMALIES & set(verdict.detectors):
            assert (after.losses, after.norms) == (guard.losses, guard.norms)
            assert not after.is_quiet
        else:
            assert after.losses == (*guard.losses, stats.loss_nats)[-8:]
            assert after.norms == (*guard.norms, stats.grad_norm)[-8:]
            assert after.is_quiet
        assert (verdict.level == "ok") == (not verdict.detectors)
        guard = after
        assert all(map(math.isfinite, guard.losses + guard.norms)) and len(guard.losses) == len(guard.norms) <= 8


@given(st.lists(measured(), max_size=40), st.lists(numbers, max_size=8), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_json_in_the_middle_changes_nothing(sequence, evaluations, cut):
    """A guard that was saved and read back says of every later step and evaluation what the other one says."""
    kept = restored = Guard()
    for number, stats in enumerate(sequence):
        if number == cut:
            restored = Guard.from_json(json.loads(json.dumps(kept.to_json(), allow_nan=False)))
            assert restored == kept
        kept, verdict = observe(kept, SMALL, stats, uniform_nats=UNIFORM_NATS)
        restored, its = observe(restored, SMALL, stats, uniform_nats=UNIFORM_NATS)
        assert repr(verdict) == repr(its)
        if number < len(evaluations):
            kept, verdict = observe_held_out(kept, SMALL, number, evaluations[number])
            restored, its = observe_held_out(restored, SMALL, number, evaluations[number])
            assert repr(verdict) == repr(its)
    assert kept == restored


def falling(random_seed: int, noise: float, n_steps: int = 2_000) -> tuple[list[float], list[float]]:
    """A clean run: ln V at first, steeply down, then ever more slowly; each batch is harder or easier by ``noise``.

    Losses and gradient norms; these start high, fall with the loss and differ by a factor from batch to batch.
    """
    draw = random.Random(random_seed)
    curve = [
        1.2 + 2.0 * math.exp(-step / 15) + (UNIFORM_NATS - 3.2) * (1 + step / 50) ** -0.7 for step in range(n_steps)
    ]
    losses = [loss * max(0.0, 1 + draw.gauss(0, noise)) for loss in curve]
    norms = [(0.3 + 8 * math.exp(-step / 40)) * draw.lognormvariate(0, 0.5) for step in range(n_steps)]
    return losses, norms


@pytest.mark.parametrize("random_seed", range(4))
@pytest.mark.parametrize("noise", [0.0, 0.003, 0.03, 0.1, 0.2])
def test_clean_run_gives_no_alarm(noise, random_seed):
    """Two thousand steps from the first on, with a steep descent and batches that differ by a fifth."""
    losses, norms = falling(random_seed, noise)
    guard, verdicts = watch(losses, norms=norms)
    assert "p" not in levels(verdicts)
    assert levels(verdicts).count("w") <= 2
    assert guard.is_quiet


def stumbling(level_nats: float) -> tuple[list[float], list[float]]:
    """A run that knows its text by heart: losses and gradients of many times the usual, and yet nothing is wrong."""
    draw = random.Random(3)
    losses = [level_nats * draw.lognormvariate(0, 1.0) for _ in range(2_000)]
    norms = [1e-4 * draw.lognormvariate(0, 2.5) for _ in range(2_000)]
    for step in range(100, 2_000, 50):
        losses[step : step + 4] = [level_nats + 0.2] * 4
    return losses, norms


@pytest.mark.parametrize("level_nats", [0.0, 1e-6, 1e-3, 0.02])
def test_converged_run_gives_no_panic(monkeypatch, level_nats):
    """The floors under what is usual see to it: without them the same run panics."""
    losses, norms = stumbling(level_nats)
    _, verdicts = watch(losses, norms=norms)
    assert "p" not in levels(verdicts)
    assert levels(verdicts).count("w") <= 10
    monkeypatch.setattr(limits, "FLOOR_NATS", 1e-9)
    monkeypatch.setattr(limits, "FLOOR_NORM", 0.0)
    _, verdicts = watch(losses, norms=norms)
    assert "p" in levels(verdicts)


def test_what_is_usual_is_median_and_mad():
    """By their definition; and a handful of wild values moves neither."""
    losses = [2.0, 1.0, 4.0, 1.5, 3.0]
    usual = Baseline.of(Guard(tuple(losses), (1.0, 2.0, 9.0, 1.0, 2.0)), GuardConfig(span=12))
    assert usual is not None
    assert (usual.median_nats, usual.spread_nats, usual.norm) == (2.0, 1.0, 2.0)
    assert usual.mean_nats == statistics.fmean(losses)
    quiet = Baseline.of(Guard((2.0,) * 20, (1.0,) * 20), PART)
    assert quiet is not None and quiet.spread_nats == limits.FLOOR_NATS
    assert Baseline.of(Guard((2.0,) * 19, (1.0,) * 19), PART) is None


def test_divergence_panics_at_the_third_step_in_a_row():
    """The first two are told, and do not become usual; a sound step in between begins a new row."""
    _, verdicts = watch([4.0, 4.2, 2.0, 4.0, 4.1, 4.2, 4.3], guard=BEFORE)
    assert levels(verdicts) == "wwowwpp"
    assert verdicts[0].detectors == ("divergence",)
    figures = verdicts[5].figures
    assert figures["divergence.in_row"] == figures["divergence.panics_at"] == 3
    assert figures["loss_limit_nats"] == pytest.approx(1.5 * figures["median_nats"])
    distance = 4.2 - figures["median_nats"]
    assert figures["robust_z"] == pytest.approx(0.6745 * distance / figures["spread_nats"])


@pytest.mark.parametrize(
    "spread, loss, is_odd",
    [
        (0.02, 2.9, False),  # 12 distances away, but not half as high again
        (0.02, 3.1, True),
        (0.7, 3.5, False),  # high, but batches differ that much
        (0.2, 3.1, False),
        (0.1, 3.2, True),
    ],
)
def test_divergence_needs_both_conditions(spread, loss, is_odd):
    guard, _ = watch(sound(spread=spread))
    _, (verdict,) = watch([loss], guard=guard)
    assert (verdict.level == "warn") is is_odd


def test_a_step_up_is_not_forgotten():
    """The odd steps stay out of what is usual, so that a run that went wrong never looks right by lasting."""
    guard, verdicts = watch([4.0] * 200, guard=BEFORE)
    assert levels(verdicts) == "ww" + "p" * 198
    assert guard.losses == BEFORE.losses


def test_severe_panics_at_once():
    _, verdicts = watch([29.0, 31.0], guard=BEFORE, uniform_nats=None)
    assert levels(verdicts) == "wp"
    assert verdicts[1].detectors == ("divergence", "severe")
    assert verdicts[1].figures["severe_limit_nats"] == pytest.approx(30, rel=0.05)


def test_severe_is_above_a_uniform_guess():
    """After text that costs almost nothing, ordinary text does; only what no text costs does not wait for a second."""
    guard, _ = watch(sound(level_nats=0.02, spread=0.001))
    assert levels(watch([3.0, 3.0, 0.02], guard=guard)[1]) == "wwo"
    assert levels(watch([5.7], guard=guard)[1]) == "p"
    _, (verdict,) = watch([0.8], guard=guard, uniform_nats=None)
    assert verdict.figures["severe_limit_nats"] == pytest.approx(15 * 0.05)


@pytest.mark.parametrize(
    "loss, is_collapse", [(UNIFORM_NATS, True), (5.2, True), (5.9, True), (5.15, False), (5.95, False)]
)
def test_collapse_to_uniform(loss, is_collapse):
    """A panic at the third step within 6.5 % of the logarithm of the vocabulary."""
    _, verdicts = watch([loss, loss, 2.0, *[loss] * 3], guard=BEFORE)
    assert levels(verdicts) == "wwowwp"
    assert ["collapse" in verdict.detectors for verdict in verdicts[3:]] == [is_collapse] * 3


def test_collapse_needs_something_learned():
    """A run that has not come far from a uniform guess has nothing to fall back from."""
    above, _ = watch(sound(level_nats=0.62 * UNIFORM_NATS))
    below, _ = watch(sound(level_nats=0.58 * UNIFORM_NATS))
    for guard, expected in ((above, False), (below, True)):
        _, (verdict,) = watch([UNIFORM_NATS], guard=guard)
        assert ("collapse" in verdict.detectors) is expected
    _, (verdict,) = watch([UNIFORM_NATS], guard=BEFORE, uniform_nats=None)
    assert verdict.detectors == ("divergence",)


def test_gradient_spikes_warn_and_panic_when_repeated():
    guard, verdicts = watch([2.0] * 6, norms=[19.0, 21.0, 1.0, 21.0, 1e3, 1e6], guard=BEFORE)
    assert levels(verdicts) == "owowwp"
    assert verdicts[1].figures == {
        "grad_norm": 21.0,
        "grad_norm_limit": 20.0,
        "gradient.in_row": 1,
        "gradient.panics_at": 3,
    }
    assert max(guard.norms) == 19.0


@pytest.mark.parametrize(
    "ratio, level", [(None, "ok"), (0.1, "ok"), (0.11, "warn"), (math.inf, "warn"), (math.nan, "warn")]
)
def test_large_update_only_warns(ratio, level):
    """And it is no reason to keep the step out of the history, or the run from having a state to go back to."""
    guard, verdict = observe(BEFORE, PART, StepStats(7, 2.0, 1.0, False, ratio), uniform_nats=UNIFORM_NATS)
    assert verdict.level == level
    assert guard.is_quiet and guard.losses[-1] == 2.0


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["loss", "gradient", "both"])
def test_skipped_steps_panic_at_the_third_in_a_row(bad, where):
    """One alone changed nothing and only warns (platform.md 7); the figures say what was found."""
    loss, norm = (2.0 if where == "gradient" else bad), (1.0 if where == "loss" else bad)
    bad_losses, bad_norms = [loss] * 3, [norm] * 3
    guard, verdicts = watch([loss, 2.0, *bad_losses], norms=[norm, 1.0, *bad_norms], guard=BEFORE)
    assert levels(verdicts) == "wowpp"
    assert verdicts[2].detectors == ("nonfinite",)
    assert verdicts[3].detectors == ("nonfinite", "skipped"), "the third of 200, though the second in a row"
    assert verdicts[4].figures["nonfinite.in_row"] == verdicts[4].figures["nonfinite.panics_at"] == 3
    assert repr(verdicts[-1].figures["loss_nats"]) == repr(loss)
    assert guard.losses == (*BEFORE.losses, 2.0)[-50:]


@pytest.mark.parametrize(
    "at, said", [((10, 70, 199), "p"), ((10, 70), "w"), ((10, 70, 210), "w"), ((10, 70, 209), "p")]
)
def test_more_than_one_skipped_step_in_a_hundred_panics(at, said):
    """Of any 200 steps two may be skipped, wherever they lie; the third is a panic."""
    losses = sound(n=212)
    for step in at:
        losses[step] = math.nan
    _, verdicts = watch(losses)
    told = [levels(verdicts)[step] for step in at]
    assert told == ["w"] * (len(at) - 1) + [said]
    assert ("skipped" in verdicts[at[-1]].detectors) == (said == "p")


def test_skipped_steps_are_saved_and_a_guard_saved_without_them_loads():
    """A run that goes on panics at the same step; one of before this count begins it at 0."""
    guard, _ = watch([*sound(), math.nan, 2.0, math.nan, 2.0])
    again = Guard.from_json(json.loads(json.dumps(guard.to_json())))
    assert again == guard and again.skipped == (60, 62)
    older = {name: value for name, value in guard.to_json().items() if name != "skipped"}
    assert Guard.from_json(older).skipped == ()


def test_step_that_is_not_finite_and_was_taken_panics_at_once():
    """Its weights are lost; there is nothing to wait for."""
    for loss, norm in ((math.nan, 1.0), (2.0, math.inf)):
        _, verdict = observe(Guard(), PART, StepStats(1, loss, norm, is_skipped=False), uniform_nats=None)
        assert (verdict.level, verdict.detectors) == ("panic", ("nonfinite",))


def test_skipped_step_ends_no_row_of_another():
    """It is not known what the loss would have been."""
    guard, verdicts = watch([4.0, 4.0, math.nan], guard=BEFORE)
    assert levels(verdicts) == "www" and guard.in_row == {"divergence": 2, "nonfinite": 1}
    _, verdicts = watch([4.0], guard=guard)
    assert levels(verdicts) == "p"


def test_quiet_again_after_a_sound_step():
    guard, _ = watch([4.0], guard=BEFORE)
    assert not guard.is_quiet
    guard, _ = watch([2.0], guard=guard)
    assert guard.is_quiet


def test_nothing_is_compared_before_there_is_enough():
    """But what is not finite is seen from the first step on."""
    _, verdicts = watch([2.0] * 19 + [80.0, math.nan], norms=[1.0] * 19 + [1e6, 1.0])
    assert levels(verdicts) == "o" * 20 + "w"


def test_event_tells_what_was_found_and_the_limit():
    _, (ok, warn, _, panic) = watch([2.0, 4.0, 4.0, 4.0], guard=BEFORE)
    assert (ok.event.name, ok.event.severity, warn.event.severity) == ("guard.verdict", "debug", "warning")
    assert panic.event.severity == "error"
    assert panic.event.payload.items() >= {"step": 3, "level": "panic", "detectors": ["divergence"]}.items()
    assert {"loss_nats", "loss_limit_nats", "robust_z", "robust_z_limit"} <= panic.event.payload.keys()


def test_guard_that_is_off_looks_at_nothing():
    part = GuardConfig(enabled=False)
    guard, verdicts = watch([2.0, math.nan] * 40, config=part)
    assert (guard, set(levels(verdicts))) == (Guard(), {"o"})
    assert observe_held_out(guard, part, 1, math.nan) == (Guard(), Verdict("ok", 1))


def evaluate(curve: list[float]) -> tuple[Guard, list[Verdict]]:
    guard, verdicts = Guard(), []
    for number, nats in enumerate(curve):
        guard, verdict = observe_held_out(guard, PART, 250 * (number + 1), nats)
        verdicts.append(verdict)
    return guard, verdicts


@pytest.mark.parametrize(
    "curve, said",
    [
        ([5.0, 3.0, 2.4, 2.2, 2.1, 2.05, 2.04, 2.04, 2.05, 2.04], "oooooooooo"),  # flattens, as they all do
        ([3.0, 2.8, 2.6, 2.4, 2.43, 2.2], "oooooo"),  # one that is a little high
        ([3.0, 2.8, 2.6, 2.4, 2.9, 2.2], "oooooo"),  # one that is far too high, alone
        ([3.0, 2.8, 2.6, 2.4, 2.9, 2.9, 2.9, 2.2, 2.9], "ooooowwoo"),  # it stays; and is over
        ([3.0, 3.1, 9.0, 3.0], "oooo"),  # too few for a line
        ([3.0, math.nan, 2.8, math.inf], "owow"),  # no number at all
    ],
)
def test_held_out_regression_warns_at_the_second_evaluation(curve, said):
    guard, verdicts = evaluate(curve)
    assert levels(verdicts) == said
    assert all(map(math.isfinite, [nats for _, nats in guard.held_out]))
    assert guard.is_quiet


def test_held_out_limit_is_the_line_and_a_margin():
    """Through a rising line of evaluations, which it continues."""
    rising = [2.0, 2.04, 2.08, 2.12]
    _, verdicts = evaluate([*rising, 2.9, 2.251])
    assert verdicts[-1].figures == {
        "held_out_nats": 2.251,
        "held_out_limit_nats": pytest.approx(2.25),
        "held_out.in_row": 2,
    }
    assert evaluate([*rising, 2.9, 2.249])[1][-1].level == "ok"


def test_an_evaluation_made_again_replaces_the_first():
    """As after a step back in the same run: only what lies before it draws the line."""
    guard, _ = evaluate([3.0, 2.8, 2.6])
    guard, _ = observe_held_out(guard, PART, 500, 2.79)
    assert guard.held_out == ((250, 3.0), (500, 2.79))
