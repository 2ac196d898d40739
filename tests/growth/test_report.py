"""The log of reports: whole records come back, whatever happened to the others (growth.md 18): T11, T12."""

import datetime
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.errors import ReportInvalid
from meristem.events import Event
from meristem.growth.report import GrowthReport, append, outcome_of, read
from meristem.growth.seed import Origin
from meristem.growth.stage import Life, Stage, move

NOW = datetime.datetime(2026, 11, 28, 12, 0, tzinfo=datetime.UTC)


def report(number: int) -> GrowthReport:
    made = GrowthReport(
        seed=f"blocks.1#{number}",
        slot="blocks.1",
        blueprint="norm",
        run_id="run",
        outcome="neutral",
        born=number,
        ended=number + 10,
        flops_spent=1e9,
        metrics={"gained": {"mean": 0.1}, "rent": None},
    )
    return made.issued(NOW)


def written(path: Path, n: int = 5) -> list[int]:
    """A log of n reports; where each begins, and the end."""
    places = [0]
    for number in range(n):
        append(path, report(number))
        places.append(path.stat().st_size)
    return places


def test_t11_what_was_written_comes_back(tmp_path: Path) -> None:
    written(tmp_path / "log")
    assert read(tmp_path / "log") == [report(number) for number in range(5)]
    assert read(tmp_path / "none") == []


def test_t11_a_damaged_record_is_skipped_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    places = written(path)
    text = bytearray(path.read_bytes())
    for at in (2, 11, 30):
        text[places[2] + at] ^= 0xFF
    path.write_bytes(text)
    heard: list[Event] = []
    assert [each.born for each in read(path, heard.append)] == [0, 1, 3, 4]
    assert [(event.name, event.payload["offset"]) for event in heard] == [("report.corrupt", places[2])]


@given(st.data())
def test_t11_no_damage_takes_a_whole_record_away(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes flipped anywhere in one record, or any torn end: all others come back."""
    path = tmp_path_factory.mktemp("log") / "log"
    places = written(path, 3)
    text = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(places[2], places[3] - 1))
        path.write_bytes(text[:cut])
        assert [each.born for each in read(path)] == [0, 1]
        return
    for at in data.draw(st.lists(st.integers(places[1], places[2] - 1), min_size=1, max_size=4, unique=True)):
        text[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(text)
    found = {each.born for each in read(path)}
    assert {0, 2} <= found


def test_t12_a_report_without_a_time_is_refused_where_it_is_written_and_read(tmp_path: Path) -> None:
    bare = replace(report(0), issued_at="")
    with pytest.raises(ReportInvalid, match="issued_at"):
        append(tmp_path / "log", bare)
    assert not (tmp_path / "log").exists()
    body = orjson.dumps(bare.to_json())
    (tmp_path / "log").write_bytes(struct.pack("<II", len(body), zlib.crc32(body)) + body)
    append(tmp_path / "log", report(1))
    heard: list[Event] = []
    assert [each.born for each in read(tmp_path / "log", heard.append)] == [1]
    assert "issued_at" in str(heard[0].payload["why"])


def test_a_report_that_is_written_again_counts_once(tmp_path: Path) -> None:
    written(tmp_path / "log", 2)
    append(tmp_path / "log", report(0))
    assert [each.born for each in read(tmp_path / "log")] == [1, 0]


def test_what_a_seed_came_to() -> None:
    """One that the model never used changed nothing; of the others the evaluations decide."""
    life = Life("blocks.1#0", "blocks.1", Origin.of("norm", {}, blend="residual", random_seed=0), born=0)
    stages = [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY]
    tried = life
    for step, stage in enumerate(stages[:2]):
        tried = move(tried, stage, step=step, reason="")
    used = tried
    for step, stage in enumerate(stages[2:], start=2):
        used = move(used, stage, step=step, reason="")
    kept, culled = (move(used, stage, step=9, reason="") for stage in (Stage.FOSSILIZED, Stage.CULLED))
    assert outcome_of(move(tried, Stage.CULLED, step=9, reason=""), [0.5]) == "neutral"
    assert [outcome_of(kept, [each]) for each in (-0.1, 0.01, 0.1)] == ["success", "neutral", "regression"]
    assert [outcome_of(culled, [each]) for each in (-0.1, 0.1)] == ["neutral", "regression"]
