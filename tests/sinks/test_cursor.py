"""Records that are read a portion at a time are those that a reader of the whole gets, whatever the writer did."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.errors import BadRecords
from meristem.sinks import cursor as cursors
from meristem.sinks.cursor import Cursor, read_portion
from meristem.sinks.jsonl import JsonLines, rotated


def numbers(portion):
    return [record["n"] for record in portion.records]


def line(number: int, width: int = 0) -> dict[str, object]:
    return {"n": number, "x": "x" * width}


@settings(max_examples=60, deadline=None)
@given(
    acts=st.lists(st.one_of(st.integers(0, 90).map(lambda width: ("write", width)), st.just(("read", 0))), max_size=30),
    most_bytes=st.integers(1, 200),
    rotate_size_bytes=st.integers(1, 300),
)
def test_each_record_is_read_once_in_order(tmp_path_factory, acts, most_bytes, rotate_size_bytes) -> None:
    path = tmp_path_factory.mktemp("records") / "metrics.ndjson"
    lines, cursor, found, n_written = JsonLines(path, rotate_size_bytes), Cursor(), [], 0
    for act, width in [*acts, *[("read", 0)] * 200]:
        if act == "write":
            lines.append(line(n_written, width))
            n_written += 1
            continue
        portion = read_portion(path, cursor, most_bytes)
        assert portion is not None and portion.n_unreadable == 0
        # A portion goes on until there is nothing left, or until it has read as much as it may.
        assert portion.records or portion.is_end or portion.after.file > cursor.file
        cursor, found = portion.after, [*found, *numbers(portion)]
    assert found == list(range(n_written))
    assert portion.is_end


def test_it_says_whether_it_has_read_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.ndjson"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n{"n": 3}\n')
    for most_bytes, found, is_end in [(3, [1], False), (9, [1], False), (10, [1, 2], False), (27, [1, 2, 3], True)]:
        portion = read_portion(path, Cursor(), most_bytes)
        assert portion is not None and (numbers(portion), portion.is_end) == (found, is_end)


def test_a_line_that_is_half_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.ndjson"
    path.write_bytes(b'{"n": 1}\n{"n": 2')
    portion = read_portion(path, Cursor(), 1000)
    assert portion is not None
    assert (numbers(portion), portion.is_end, portion.n_unreadable) == ([1], True, 0)
    with open(path, "ab") as file:
        file.write(b"2}\n")
    rest = read_portion(path, portion.after, 1000)
    assert rest is not None and numbers(rest) == [22]


def test_no_file_yet_is_nothing_yet(tmp_path: Path) -> None:
    portion = read_portion(tmp_path / "metrics.ndjson", Cursor(), 1000)
    assert portion is not None and (portion.records, portion.after, portion.is_end) == ((), Cursor(), True)


def test_what_is_no_record_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.ndjson"
    path.write_bytes(b'{"n": 1}\nnonsense\n[3]\n{"n": 4}\n')
    portion = read_portion(path, Cursor(), 1000)
    assert portion is not None and (numbers(portion), portion.n_unreadable) == ([1, 4], 2)


@pytest.mark.parametrize("cursor", [Cursor(0, 10), Cursor(1, 0), Cursor(2, 3)])
def test_files_that_end_before_the_cursor_are_others(tmp_path: Path, cursor: Cursor) -> None:
    path = tmp_path / "metrics.ndjson"
    path.write_bytes(b'{"n": 1}\n')
    assert read_portion(path, cursor, 1000) is None
    path.unlink()
    assert read_portion(path, cursor, 1000) is None


def test_a_file_that_is_set_aside_while_it_is_opened_is_read_under_its_new_name(tmp_path: Path, monkeypatch) -> None:
    """The writer sets the file aside between the search for its number and the search for its name."""
    path = tmp_path / "metrics.ndjson"
    lines = JsonLines(path, 1)
    lines.append(line(0))
    really = cursors._open

    def opens(asked: Path):
        if asked == path and not rotated(path):
            lines.append(line(1))
        return really(asked)

    monkeypatch.setattr(cursors, "_open", opens)
    portion = read_portion(path, Cursor(), 1000)
    assert portion is not None and (numbers(portion), portion.after.file) == ([0, 1], 1)


def test_a_missing_file_among_those_set_aside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.ndjson"
    lines = JsonLines(path, 1)
    for number in range(3):
        lines.append(line(number))
    os.remove(tmp_path / "metrics.0001.ndjson")
    os.rename(tmp_path / "metrics.0002.ndjson", tmp_path / "metrics.0003.ndjson")
    with pytest.raises(BadRecords, match=r"metrics\.0001\.ndjson is missing"):
        read_portion(path, Cursor(), 1000)
