"""Stages of a seed: the table, and lives as values (growth.md 6, K9)."""

from enum import IntEnum
from itertools import product
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.errors import IllegalTransition
from meristem.events import Event
from meristem.growth.seed import Origin
from meristem.growth.stage import TRANSITIONS, Life, Paired, Stage, move, require_whole

ORIGIN = Origin.of("low_rank", {"rank": 2}, blend="residual", random_seed=3)


def born(stage: Stage = Stage.DORMANT) -> Life:
    return Life(seed="blocks.1#0", slot="blocks.1", origin=ORIGIN, born=0, stage=stage)


@pytest.mark.parametrize(("before", "after"), list(product(Stage, Stage)))
def test_k9_every_pair_of_stages_is_as_the_table_says(before: Stage, after: Stage) -> None:
    heard: list[Event] = []
    life = born(before)
    if after in TRANSITIONS[before]:
        moved = move(life, after, step=1, reason="asked", gate="G1", emit=heard.append)
        assert (moved.stage, moved.since, moved.history[-1].gate) == (after, 1, "G1")
        assert heard[0].name == "slot.stage_changed"
        assert life == born(before)
        return
    with pytest.raises(IllegalTransition, match=before.name):
        move(life, after, step=1, reason="asked", emit=heard.append)
    assert [each.name for each in heard] == ["slot.stage_refused"]


def test_k9_a_stage_without_a_row_fails() -> None:
    class More(IntEnum):
        ONE = 1
        TWO = 2

    with pytest.raises(IllegalTransition, match="TWO"):
        require_whole(More, {More.ONE: frozenset()})


def test_two_stages_at_one_step_are_refused() -> None:
    life = move(born(), Stage.GERMINATED, step=5, reason="asked")
    with pytest.raises(IllegalTransition, match="step 5"):
        move(life, Stage.TRAINING, step=5, reason="asked")


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=400))
def test_paired_differences_have_the_mean_and_spread_of_all(differences: list[float]) -> None:
    paired = Paired()
    for each in differences:
        paired = paired.add(each)
    half = 1.65 * stdev(differences) / len(differences) ** 0.5
    assert paired.mean == pytest.approx(mean(differences), abs=1e-12)
    assert paired.upper() == pytest.approx(mean(differences) + half, abs=1e-9)
    assert paired.lower() == pytest.approx(mean(differences) - half, abs=1e-9)
    assert paired.recent == tuple(differences[-256:])
    assert Paired().add(1.0).upper() is None
    with pytest.raises(IllegalTransition):
        paired.add(float("nan"))


def test_a_life_is_saved_and_read() -> None:
    life = move(born(), Stage.GERMINATED, step=5, reason="asked", gate="G0")
    life = Life.from_json(life.to_json() | {"paired": {"n": 1, "mean": 0.5, "squares": 0.0, "recent": [0.5]}})
    assert Life.from_json(life.to_json()) == life
    assert life.paired.mean == 0.5
    assert life.history[0].after is Stage.GERMINATED
