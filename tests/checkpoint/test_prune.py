"""What stays is exactly the last, the best, the pinned and the periodic; the newest always."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.checkpoint.config import CheckpointConfig
from meristem.checkpoint.prune import keep, prune
from meristem.checkpoint.store import Entry, entries, pin

from .sample import save_sample

METRIC = "val/bits_per_byte"
values = st.sampled_from([None, math.nan, math.inf, -math.inf, 1.0, 2.0, 2.0, 3.0])


def entry(step, value, pinned=False):
    metrics = {} if value is None else {METRIC: value}
    return Entry(Path(f"step-{step:08d}"), step, metrics, f"2026-11-21T00:00:{step % 60:02d}", pinned, seq=step)


def better(a, b, direction):
    """Whether ``a`` outranks ``b``, in the plainest words: a number beats none, then the value, then youth."""
    x, y = (e.metrics.get(METRIC) for e in (a, b))
    has_x, has_y = (v is not None and math.isfinite(v) for v in (x, y))
    if has_x != has_y:
        return has_x
    if has_x and x != y:
        return x < y if direction == "min" else x > y
    return a.step > b.step


@given(
    rows=st.dictionaries(st.integers(0, 40), st.tuples(values, st.booleans()), max_size=9),
    last=st.integers(0, 4),
    best=st.integers(0, 4),
    every=st.integers(0, 5),
    direction=st.sampled_from(["min", "max"]),
    order=st.randoms(use_true_random=False),
)
def test_keep_is_the_naive_model(rows, last, best, every, direction, order):
    """CX-7.6, A8.2: Each entry is judged alone by counting how many are newer and how many are better."""
    found = [entry(step, *row) for step, row in rows.items()]
    order.shuffle(found)
    expected = {
        e.path
        for e in found
        if e.pinned
        or (every > 0 and e.step % every == 0)
        or sum(other.step > e.step for other in found) < max(last, 1)
        or sum(better(other, e, direction) for other in found) < best
    }
    assert keep(found, last=last, best=best, metric=METRIC, direction=direction, every=every) == expected


def test_a8_5_what_was_not_measured_is_saved_and_ranks_worst():
    """A8.5: without any figure the newest stay; one that was measured is better than all that were not."""
    unmeasured = [entry(step, None) for step in (1, 2, 3)]
    kept = keep(unmeasured, last=2, best=1, metric=METRIC, direction="min", every=0)
    assert kept == {unmeasured[1].path, unmeasured[2].path}
    measured = entry(0, 9.0)
    kept = keep([measured, *unmeasured], last=1, best=1, metric=METRIC, direction="min", every=0)
    assert kept == {measured.path, unmeasured[2].path}


def test_the_excess_is_deleted(tmp_path):
    """After ten saves with pruning, the directories on disk are the three last, the two best and the pinned one.

    A8.1.
    """
    part = CheckpointConfig()
    for step, value in enumerate([9.0, 8.0, 1.0, 7.0, 2.0, math.nan, 5.0, 5.0, None, 6.0], start=1):
        save_sample(tmp_path, step, metrics={} if value is None else {METRIC: value})
        if step == 1:
            pin(tmp_path / "step-00000001")
        prune(
            tmp_path,
            last=part.last,
            best=part.best,
            metric=part.metric,
            direction=part.direction,
            every=part.keep_every,
        )
    assert [e.step for e in entries(tmp_path)] == [1, 3, 5, 8, 9, 10]
    assert len(list(tmp_path.iterdir())) == 7


def test_prune_names_what_it_deleted_and_leaves_damage(tmp_path):
    """A damaged directory is evidence: it is neither counted nor deleted."""
    for step in (1, 2, 3):
        save_sample(tmp_path, step)
    (tmp_path / "step-00000002" / "model.safetensors").unlink()
    deleted = prune(tmp_path, last=1, best=0, metric=METRIC, direction="min", every=0)
    assert [path.name for path in deleted] == ["step-00000001"]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("key, value", [("last", 0), ("best", -1), ("every", 0), ("direction", "down")])
def test_part_refuses_what_cannot_be(key, value):
    """A run that keeps nothing, or saves every zero steps, is refused at the door."""
    with pytest.raises(ValueError, match=key):
        CheckpointConfig.model_validate({key: value})
