"""The log of reports: what is broken is skipped and counted, what has no time is refused."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.errors import ReportInvalid, RunError
from meristem.growth.library import Library
from meristem.growth.report_log import FRAME, Report, append_report, read_reports


def report(number: int, **fields: object) -> Report:
    given = {"seed": f"blocks.1#{number}", "blueprint": "small", "slot": "blocks.1", "outcome": "success"}
    return Report(f"r{number}", "run", **(given | {"issued_at": 1e9 + number, "span_steps": 40} | fields))


def written(path: Path, n: int = 5) -> list[Report]:
    reports = [report(number, metrics={"gain_nats": 0.01 * number, "rent_nats": None}) for number in range(n)]
    for each in reports:
        append_report(path, each)
    return reports


def test_t11_a_record_that_was_altered_or_cut_is_skipped_and_counted(tmp_path: Path) -> None:
    """Bytes of the third of five flipped: four come back, one is reported with its offset; a cut tail is another."""
    log, events = tmp_path / "reports.log", []
    reports = written(log)
    assert read_reports(log) == (reports, 0)
    content = log.read_bytes()
    ends = [0]
    for _ in reports:
        ends.append(ends[-1] + FRAME.size + FRAME.unpack_from(content, ends[-1])[0])
    for harmed in (ends[2] + 20, ends[2] + 1, ends[2] + 5):
        log.write_bytes(content[:harmed] + bytes([content[harmed] ^ 0xFF]) + content[harmed + 1 :])
        events.clear()
        assert read_reports(log, emit=events.append) == ([*reports[:2], *reports[3:]], 1)
        assert [(each.name, each.payload["offset"]) for each in events] == [("report.corrupt", ends[2])]
    log.write_bytes(content[:-3])
    assert read_reports(log) == (reports[:-1], 1)
    append_report(log, reports[-1])
    assert read_reports(log) == (reports, 1), "what is appended behind a torn tail is found"


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_t11_any_bytes_can_be_read(tmp_path_factory: pytest.TempPathFactory, noise: bytes, length: int) -> None:
    log = tmp_path_factory.mktemp("log") / "reports.log"
    log.write_bytes(FRAME.pack(length, 0) + noise)
    append_report(log, report(1))
    assert read_reports(log)[0][-1] == report(1)


@pytest.mark.parametrize("issued_at", [None, 0, -1.0, float("nan"), float("inf"), "yesterday"])
def test_t12_a_report_without_a_time_is_refused(issued_at: object, tmp_path: Path) -> None:
    """Where it is made and where it is read."""
    with pytest.raises(ReportInvalid, match="issued_at"):
        report(1, issued_at=issued_at)
    with pytest.raises(ReportInvalid, match="issued_at"):
        Report.from_json(report(1).to_json() | {"issued_at": issued_at})
    body = json.dumps(report(1).to_json() | {"issued_at": None}).encode()
    (tmp_path / "log").write_bytes(FRAME.pack(len(body), zlib.crc32(body)) + body)
    assert read_reports(tmp_path / "log") == ([], 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda saved: saved | {"version": 2}, "of version 2"),
        (lambda saved: saved | {"extra": 1}, "extra"),
        (lambda saved: {key: saved[key] for key in saved if key != "issued_at"}, "issued_at"),
        (lambda saved: saved | {"outcome": "fine"}, "the outcome 'fine'"),
        (lambda saved: saved | {"seed": ""}, "valid value of seed"),
    ],
)
def test_a_report_of_another_form_is_refused(change: Callable[[dict], dict], message: str) -> None:
    assert Report.from_json(report(1).to_json()) == report(1)
    with pytest.raises(ReportInvalid, match=message):
        Report.from_json(change(report(1).to_json()))


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportInvalid, match="cannot be written"):
        append_report(tmp_path / "log", report(1, metrics={"gain": float("nan")}))
    with pytest.raises(ReportInvalid, match="has .* bytes"):
        append_report(tmp_path / "log", report(1, notes="x" * (1 << 20)))
    with pytest.raises(RunError, match="cannot be written"):
        append_report(tmp_path, report(1))
    with pytest.raises(RunError, match="cannot be read"):
        read_reports(tmp_path / "none")
    assert [*tmp_path.iterdir()] == []


def test_t12_a_library_gathers_reports_by_their_time_alone(tmp_path: Path) -> None:
    """Each once, in the order in which they were issued, from any number of logs."""
    reports = written(tmp_path / "log")
    with Library(tmp_path / "library") as library:
        assert library.gather_reports(tmp_path / "log", since=reports[2].issued_at) == 3
        assert library.reports() == reports[2:]
        assert library.gather_reports(tmp_path / "log") == 2 and library.gather_reports(tmp_path / "log") == 0
        assert library.reports("small") == reports and library.reports("other") == []
