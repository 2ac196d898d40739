"""The rate over the run."""

import math
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.data.stream import Stream
from meristem.device.config import DeviceConfig
from meristem.device.resolve import resolve
from meristem.errors import ConflictingKeys, DeadKey, WrongValue
from meristem.events import silent
from meristem.models.build import build as build_model
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.optim.config import OptimConfig, ScheduleConfig, Shape
from meristem.optim.groups import build
from meristem.optim.schedule import SHAPES, ScheduleProgress, rate_factor, set_rates
from meristem.runs.config import load_config
from meristem.train.config import TrainConfig
from meristem.train.loop import steps
from meristem.train.progress import Progress
from meristem.train.state import Held
from optim.levels import Levelled, equal, weights

PART = ScheduleConfig(shape="cosine", warmup=0.1, floor=0.2)
P = 40
"""The period of schedules that count; of them a quarter is warm-up where there is one."""

every_shape = pytest.mark.parametrize("shape", get_args(Shape))
every_unit = pytest.mark.parametrize("unit", ["steps", "tokens"])


def at(share: float) -> ScheduleProgress:
    """A run of 1000 steps of 50 tokens of which ``share`` is done."""
    return ScheduleProgress(share=share, step=round(1000 * share), tokens=round(50_000 * share))


def counted(shape: str, unit: str = "steps", **settings: object) -> ScheduleConfig:
    """A schedule of period P, without warm-up and down to 0.2 unless said."""
    settings = {"warmup": 0.0} | settings
    floor = {} if shape == "constant" else {"floor": 0.2}
    return ScheduleConfig.model_validate({"shape": shape, "unit": unit, "period": P} | floor | settings)


def after(config: ScheduleConfig, count: int) -> float:
    """The factor when so much is done, in the unit of the schedule; the other unit is far ahead."""
    return rate_factor(config, ScheduleProgress(share=0.9, **({"step": 7777, "tokens": 8888} | {name(config): count})))


def name(config: ScheduleConfig) -> str:
    return {"steps": "step", "tokens": "tokens"}[config.unit]


@pytest.mark.parametrize(("progress", "factor"), [(0.05, 0.505), (0.1, 1.0), (0.55, 0.6), (1.0, 0.2), (1.7, 0.2)])
def test_golden_values(progress, factor):
    """Half of the warm-up, its end, the middle of the cosine, its end, and beyond."""
    assert rate_factor(PART, at(progress)) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("shape", "factors"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2]),
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("step", [1.0, 1.0, math.sqrt(0.2), 0.2, 0.2]),
    ],
)
def test_every_shape_at_the_quarters_of_its_period(shape, factors):
    assert [after(counted(shape), count) for count in range(0, P + 1, P // 4)] == pytest.approx(factors)
    assert SHAPES.keys() == set(get_args(Shape))


@pytest.mark.parametrize("stairs", [2, 3, 7, 49])
def test_every_stair_begins_where_it_should(stairs):
    """Whatever the rounding of a share of the period, stair k begins at k periods over the number of stairs."""
    part = ScheduleConfig(shape="step", unit="steps", period=3 * stairs, warmup=0, stairs=stairs)
    ratio = 0.1 ** (1 / (stairs - 1))
    assert [after(part, count) for count in range(3 * stairs)] == pytest.approx(
        [ratio ** (k // 3) for k in range(3 * stairs)]
    )


def test_constant_holds_after_warmup():
    part = ScheduleConfig(shape="constant", warmup=0.1)
    assert [rate_factor(part, at(progress)) for progress in (0.1, 0.5, 1.0)] == [1.0, 1.0, 1.0]


@given(st.floats(0, 1), st.floats(0, 0.9), st.floats(0, 1))
def test_factor_is_positive_until_the_floor_and_never_above_one(progress, warmup, floor):
    factor = rate_factor(ScheduleConfig(warmup=warmup, floor=floor), at(progress))
    assert min(floor, 0.01) <= factor <= 1


@given(st.floats(0.1, 1), st.floats(0.1, 1))
def test_rate_never_rises_after_warmup(one, other):
    early, late = sorted((one, other))
    assert rate_factor(PART, at(early)) >= rate_factor(PART, at(late))


@given(st.floats(0, 2), st.sampled_from([0.0, 0.02, 0.3]), st.floats(0, 1))
def test_a_share_of_the_run_gives_the_bits_it_always_gave(share, warmup, floor):
    """The schedule of every run before there were units, written out."""
    if share < warmup:
        expected = 0.01 + (1 - 0.01) * share / warmup
    else:
        course = min(1.0, (share - warmup) / (1 - warmup))
        expected = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * course))
    assert rate_factor(ScheduleConfig(warmup=warmup, floor=floor), at(share)) == expected


# After the period


@every_shape
@every_unit
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_l9_hold_stays_where_the_period_ends(shape, unit, warmup):
    """From the period on nothing moves, and the last step before it is hardly higher."""
    part = counted(shape, unit, warmup=warmup)
    end = 1.0 if shape == "constant" else 0.2
    assert [after(part, count) for count in (P, P + 1, 2 * P, 9 * P)] == [end] * 4
    assert 0 <= after(part, P - 1) - end <= 0.8 / (P * (1 - warmup)) + 1e-12


@every_shape
@every_unit
def test_l9_restart_begins_the_period_again(shape, unit):
    """At the period and at twice of it the rate is the highest, and between them what it was."""
    part = counted(shape, unit, after="restart")
    first = [after(part, count) for count in range(P)]
    assert [after(part, count) for count in range(P, 3 * P)] == first + first
    assert after(part, P) == after(part, 2 * P) == 1.0
    assert after(part, P - 1) == after(counted(shape, unit), P - 1)


@every_shape
@every_unit
def test_l9_no_second_warm_up_follows_a_restart(shape, unit):
    """A period that begins again takes all of itself to fall, as one without a warm-up."""
    part, bare = counted(shape, unit, after="restart", warmup=0.25), counted(shape, unit)
    assert after(part, 0) == 0.01 and after(part, P // 4) == 1.0
    assert [after(part, count) for count in range(P, 2 * P)] == [after(bare, count) for count in range(P)]


@every_shape
@every_unit
@pytest.mark.parametrize("count", [P, P + 1, 2 * P])
def test_l9_error_refuses_to_go_beyond(shape, unit, count):
    """The last step of a period is made; the next one is not, and the message says how to have one."""
    part = counted(shape, unit, after="error")
    assert after(part, P - 1) == after(counted(shape, unit), P - 1)
    message = rf"schedule.period is {P} {unit}, and the run goes on after {count}; .* to hold or restart"
    with pytest.raises(ConflictingKeys, match=message):
        after(part, count)


# The warm-up


@every_shape
@pytest.mark.parametrize("unit", ["share", "steps", "tokens"])
@pytest.mark.parametrize("start", [0.0, 0.01, 0.1, 1.0])
def test_l10_the_warm_up_rises_linearly_from_where_it_is_told(shape, unit, start):
    """From the given share of the rate, which may be none of it, to all of it; the shape follows."""
    period = {} if unit == "share" else {"period": 1000 if unit == "steps" else 50_000}
    part = ScheduleConfig.model_validate({"shape": shape, "unit": unit, "warmup": 0.1, "warmup_start": start} | period)
    found = [rate_factor(part, at(share)) for share in (0.0, 0.02, 0.05, 0.08, 0.1)]
    assert found == pytest.approx([start + (1 - start) * done for done in (0, 0.2, 0.5, 0.8, 1)])
    assert found[0] == start and found[-1] == 1.0


# Names, units, keys


def test_l11_an_unknown_shape_is_refused_with_those_that_there_are():
    with pytest.raises(WrongValue, match=r"schedule.shape: found 'cosnie' \(command line .*expected one of constant, "):
        load_config("lmm", ["schedule.shape=cosnie"], {})
    with pytest.raises(ValidationError, match=r"one of constant, cosine, linear, step; nearest is cosine"):
        ScheduleConfig(shape="cosnie")  # type: ignore[arg-type]


def test_l12_an_unknown_unit_is_refused():
    with pytest.raises(WrongValue, match=r"schedule.unit: found 'epochs' .*expected 'share', 'steps' or 'tokens'"):
        load_config("lmm", ["schedule.unit=epochs"], {})


@every_unit
def test_l12_a_count_needs_a_period(unit):
    with pytest.raises(ConflictingKeys, match=rf"schedule.unit is '{unit}', but schedule.period is not set. Set"):
        ScheduleConfig(unit=unit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"period": 100}, r"schedule.period is 100, but a schedule of shape 'cosine' with unit 'share'"),
        (
            {"after": "restart"},
            r"schedule.after is 'restart', but .* unit 'share' .* it reads floor, shape, unit, ",
        ),
        ({"shape": "constant", "floor": 0.2}, r"schedule.floor is 0.2, but a schedule of shape 'constant'"),
        ({"stairs": 4}, r"schedule.stairs is 4, but a schedule of shape 'cosine'"),
        ({"warmup": 0.0, "warmup_start": 0.5}, r"schedule.warmup_start is 0.5, but .* warmup 0.0 does not read it"),
    ],
)
def test_l12_a_key_that_the_schedule_does_not_read_is_refused(settings, message):
    with pytest.raises(DeadKey, match=message):
        ScheduleConfig(**settings)


def test_a_step_to_zero_is_refused():
    with pytest.raises(ConflictingKeys, match="schedule.floor is 0, and every stair"):
        ScheduleConfig(shape="step", floor=0)


def test_every_key_is_read_by_some_schedule():
    every = [ScheduleConfig(), ScheduleConfig(shape="step", unit="steps", period=3)]
    assert frozenset.union(*(part.reads for part in every)) == ScheduleConfig.model_fields.keys()


@given(st.sampled_from(get_args(Shape)), st.sampled_from(["hold", "restart"]), st.integers(0, 5 * P), st.floats(0, 1))
def test_l12_a_schedule_looks_at_its_own_unit_alone(shape, then, count, share):
    """However fast the others count, tokens give what as many steps give."""
    by_steps, by_tokens = (counted(shape, unit, after=then, warmup=0.25) for unit in ("steps", "tokens"))
    found = rate_factor(by_steps, ScheduleProgress(share=share, step=count, tokens=13 * count))
    assert found == rate_factor(by_tokens, ScheduleProgress(share=1 - share, step=count // 3, tokens=count))


DEVICE = resolve(DeviceConfig(device="cpu", dtype="fp32", threads=1), silent)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    place: Path = tmp_path_factory.mktemp("text")
    (place / "text.txt").write_text("".join(f"{number} squared is {number * number}.\n" for number in range(200)))
    corpus = prepare(DataConfig(source=str(place / "text.txt"), root=place), TokenizerConfig())
    return Stream(corpus, "train", window=13, batch=3, order="shuffled", random_seed=5)


def trained(stream, part, *cuts, n_steps=11):
    """Rates and weights of a run that was stopped and taken up again at each of the cuts."""
    model = build_model(ModelConfig(name="chargru", dim=7, n_layers=1), MemoryConfig(), 256, random_seed=1)
    optimizer, now, rates = build(model, OptimConfig(lr=0.01)), Progress(cursor=stream.start()), []
    for until in (*cuts, n_steps):
        schedule, limit = partial(rate_factor, part), TrainConfig(steps=n_steps, max_time=None)
        made = steps(Held.alone(model, optimizer, now), stream, schedule, config=limit, device=DEVICE)
        for step in made:
            now = step.progress
            rates.append(step.rate)
            if now.step == until:
                break
        now = Progress.from_json(now.to_json(), now.cursor, None)
    return rates, weights(model)


@pytest.mark.parametrize("unit", ["share", "steps", "tokens"])
@pytest.mark.parametrize("then", ["hold", "restart"])
def test_l12_a_run_taken_up_inside_a_period_has_the_same_rates(stream, unit, then):
    """In the warm-up, in the first period and in the second: rates and weights are those of the run in one piece."""
    period = {} if unit == "share" else {"period": 6 if unit == "steps" else 6 * 3 * 13, "after": then}
    part = ScheduleConfig.model_validate({"unit": unit, "warmup": 0.4, "shape": "linear"} | period)
    whole_rates, whole = trained(stream, part)
    rates, cut = trained(stream, part, 1, 5, 8)
    assert rates == whole_rates and len(set(rates)) > 4
    assert equal(cut, whole)


# Writing rates


@given(st.floats(0, 1), st.floats(0, 1))
def test_ratios_between_groups_are_those_they_were_built_with(one, other):
    """rate_g = rate * scale_g, whatever was set before."""
    part = OptimConfig(lr=0.01, level_rates={2: 0.3, 5: 2.5})
    optimizer = build(Levelled(2, 5), part)
    set_rates(optimizer, one)
    set_rates(optimizer, other)
    for group in optimizer.param_groups:
        assert group["lr"] == part.lr * part.level_rate(group["period"]) * other


class Watched(dict[str, Any]):
    """A group that notes when its rate is written."""

    def __init__(self, group, seen):
        super().__init__(group)
        self.seen = seen

    def __setitem__(self, key, value):
        if key == "lr":
            self.seen.append(self["name"])
        super().__setitem__(key, value)


def test_every_rate_is_written_once_before_its_step(stream):
    """One owner of rates: no group is left out, none is written twice, and nothing is written after a step."""
    model = build_model(ModelConfig(name="chargru", dim=7, n_layers=1), MemoryConfig(), 256, random_seed=1)
    optimizer, seen = build(model, OptimConfig(lr=0.01)), []
    (inner,) = optimizer.parts
    optimizer.param_groups[:] = inner.param_groups[:] = [Watched(group, seen) for group in optimizer.param_groups]
    inner.register_step_pre_hook(lambda *_: seen.append("step"))
    limit, start = TrainConfig(steps=3, max_time=None), Progress(cursor=stream.start())
    made = list(
        steps(Held.alone(model, optimizer, start), stream, lambda done: 1 - done.share, config=limit, device=DEVICE)
    )
    assert [step.rate for step in made] == pytest.approx([0.01, 0.02 / 3, 0.01 / 3])
    assert seen == [*(group["name"] for group in optimizer.param_groups), "step"] * 3


def test_l8_a_group_without_a_rate_is_named():
    """And no other group was given another rate."""
    optimizer = build(Levelled(2), OptimConfig())
    rates = [group["lr"] for group in optimizer.param_groups]
    del optimizer.param_groups[1]["rate"]
    with pytest.raises(WrongValue, match=r"group level:2:decay of the optimizer has no rate; found .*Give it"):
        set_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == rates
