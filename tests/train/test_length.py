"""A length that is given is the length: nothing that was not given ends a run before it."""

from types import SimpleNamespace

import pytest

from meristem.config import fingerprint, identity, load
from meristem.data.stream import Cursor
from meristem.optim.config import ScheduleConfig
from meristem.optim.schedule import ScheduleProgress, rate_factor
from meristem.runs.config import Config, load_config
from meristem.runs.report import go_on
from meristem.train.config import TrainConfig
from meristem.train.progress import Progress


def test_a_budget_of_operations_is_a_length():
    """It replaces others, and the share of the run goes by it. While it is null it is no part of what a run is, so that
    runs of before there was such a key go on."""
    own = load_config("default", ["train.flops=1e12"], environment={}).tree.train
    assert (own.flops, *limits(own)) == (1e12, None, None, None)
    both = load_config("default", ["train.flops=1e12", "train.steps=5"], environment={}).tree.train
    assert (both.flops, both.steps) == (1e12, 5) and limits(TrainConfig(flops=1.0)) == (None, None, None)
    done = Progress(cursor=Cursor(0, "", "")).spent(2.5e11)
    assert done.share(own) == 0.25 and not done.is_over(own) and done.spent(7.5e11).is_over(own)
    before = TrainConfig(steps=5).model_dump(mode="json", exclude={"flops", *TrainConfig.outside_identity})
    assert identity(TrainConfig(steps=5)) == fingerprint(before) and identity(own) != identity(TrainConfig(flops=2e12))


def limits(config: TrainConfig) -> tuple[object, object, object]:
    return config.steps, config.tokens, config.max_time


@pytest.mark.parametrize("preset", ["titans-mag", "titans-mag-micro", "hope", "charformer"])
def test_gr13_steps_on_the_command_line_end_every_limit_below(preset):
    loaded = load_config(preset, ["train.steps=100000"], environment={})
    assert limits(loaded.tree.train) == (100_000, None, None)
    assert loaded.why["train.max_time"] == "command line train.steps=100000"


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ((), (None, None, 180.0)),
        (("train.tokens=1e6",), (None, 1_000_000, None)),
        (("train.steps=5", "train.tokens=7"), (5, 7, None)),
        (("train.steps=5", "train.max_time=60s"), (5, None, 60.0)),
        (("train.max_time=60s", "train.steps=5"), (5, None, 60.0)),
        (("train.max_time=10m",), (None, None, 600.0)),
        (("train.steps=null",), (None, None, 180.0)),
        (("train={steps: 5}",), (5, None, None)),
    ],
)
def test_gr13_what_is_given_together_holds_together(overrides, expected):
    for tree in (load(Config, overrides=overrides).tree, load_config("titans-mag", overrides, environment={}).tree):
        assert limits(tree.train) == expected


def test_gr13_each_layer_may_give_the_length(tmp_path):
    """Above a file, the environment; above that, the command line: the highest that gives a length gives all limits."""
    (tmp_path / "my.yaml").write_text("train: {steps: 5, max_time: 10m}")
    file, environment = str(tmp_path / "my.yaml"), {"MERISTEM__TRAIN__TOKENS": "7"}
    assert limits(load_config(file, environment={}).tree.train) == (5, None, 600.0)
    assert limits(load_config(file, environment=environment).tree.train) == (None, 7, None)
    assert limits(load_config(file, ["train.steps=9"], environment=environment).tree.train) == (9, None, None)
    shorter = load_config(file, ["train.max_time=1m"], environment={})
    assert limits(shorter.tree.train) == (5, None, 60.0)
    assert shorter.why["train.max_time"] == "command line train.max_time=1m"


def test_gr13_a_part_made_in_python_follows():
    assert limits(TrainConfig(steps=5)) == (5, None, None)
    assert limits(TrainConfig(steps=5, max_time="3m")) == (5, None, 180.0)
    assert limits(TrainConfig()) == (None, None, 180.0)


def test_gr13_the_schedule_goes_to_the_given_length():
    """After an hour the run is not over, and the rate is where its steps are, not at the end."""
    part = load_config("titans-mag", ["train.steps=100000"], environment={}).tree.train
    late = Progress(cursor=Cursor(0, "", ""), step=50_000, seconds_used=3600.0)
    assert not late.is_over(part)
    assert late.share(part) == 0.5
    factor = rate_factor(ScheduleConfig(shape="cosine"), ScheduleProgress(late.share(part), late.step, late.tokens))
    assert 0.4 < factor < 0.7
    assert Progress(cursor=Cursor(0, "", ""), step=100_000).is_over(part)


def test_gr13_the_way_to_train_for_longer_changes_what_ended_the_run(tmp_path):
    run = SimpleNamespace(directory=tmp_path)
    for part, setting in ((TrainConfig(), "train.max_time=30m"), (TrainConfig(steps=5), "train.steps=10")):
        assert any(f" {setting} " in command for command, _ in go_on(run, part))
