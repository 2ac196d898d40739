"""Durations and limits."""

import pytest
from pydantic import ValidationError

from meristem.train.config import TrainConfig


@pytest.mark.parametrize(
    ("text", "seconds"), [("180s", 180), ("3m", 180), ("1.5h", 5400), ("2d", 172800), (" 45 ", 45), (7, 7), (0.5, 0.5)]
)
def test_durations(text, seconds):
    assert TrainConfig(max_time=text).max_time == seconds


@pytest.mark.parametrize("text", ["3 weeks", "s", "-3s", "1h30m", ""])
def test_no_duration_is_refused(text):
    with pytest.raises(ValidationError, match="no duration; write 180s, 3m"):
        TrainConfig(max_time=text)


def test_dump_reads_back():
    part = TrainConfig(max_time="3m", steps=7)
    assert TrainConfig.model_validate(part.model_dump(mode="json")) == part


def test_a_run_without_end_is_refused():
    with pytest.raises(ValidationError, match="set train.steps, train.tokens, train.flops or train.max_time"):
        TrainConfig(max_time=None)
