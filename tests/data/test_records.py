"""Files of records as a text: what each format holds, what is counted as bad, and what is refused."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.data import records
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.data.sources import documents
from meristem.errors import DataError, MissingExtra

ODD = [
    "one",
    "a line\nand another",
    'quoted "so", with commas',
    "U+2028 \u2028 and U+0085 \x85 inside",
    "tab\there",
    "é",
]


def settings(source: Path, tmp_path: Path, **others: object) -> DataConfig:
    return DataConfig(source=str(source), root=tmp_path / "store", validation=0, **others)


def texts(source: Path, **others: object) -> list[str]:
    return [document.text.decode() for document in documents(DataConfig(source=str(source), **others))]


def json_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def separated(path: Path, rows: list[list[str]], delimiter: str) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def test_unicode_separators_do_not_end_a_line(tmp_path: Path) -> None:
    """CX-8.3."""
    assert texts(json_lines(tmp_path / "a.jsonl", [{"text": text} for text in ODD])) == ODD


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_quoted_values_keep_their_lines(name: str, delimiter: str, tmp_path: Path) -> None:
    path = separated(tmp_path / name, [["id", "body"], *([str(n), text] for n, text in enumerate(ODD))], delimiter)
    assert texts(path, field="body") == ODD


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_any_texts_come_back(tmp_path_factory: pytest.TempPathFactory, written: list[str]) -> None:
    place = tmp_path_factory.mktemp("any")
    assert texts(json_lines(place / "a.jsonl", [{"text": text} for text in written])) == written
    # A reader of CSV makes one line end of another inside a quoted value only where nobody said newline="".
    assert texts(separated(place / "a.csv", [["text"], *([text] for text in written)], ",")) == written


def test_a_directory_of_one_format_is_read_as_records(tmp_path: Path) -> None:
    json_lines(tmp_path / "b.jsonl", [{"text": "two"}])
    json_lines(tmp_path / "a.ndjson", [{"text": "one"}])
    assert texts(tmp_path) == ["one", "two"]
    (tmp_path / "notes.txt").write_text("plain")
    assert sorted(texts(tmp_path)) == ["plain", '{"text": "one"}\n', '{"text": "two"}\n']
    assert texts(tmp_path, include=("*.jsonl",)) == ["two"]
    assert texts(tmp_path / "b.jsonl", format="text") == ['{"text": "two"}\n']


BAD = {
    "not json": ("{broken", "no JSON"),
    "no object": ("[1, 2]", "a JSON list, expected an object"),
    "no such key": ('{"body": "x"}', "no 'text' among its keys body"),
    "a number": ('{"text": 7}', "'text' is a int, no text"),
    "null": ('{"text": null}', "'text' is null, no text"),
}


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_a_bad_record_is_refused_with_its_line(line: str, reason: str, tmp_path: Path) -> None:
    """CX-8.6: one bad line in a thousand, by its number."""
    rows = [json.dumps({"text": f"line {number}"}) for number in range(1, 1001)]
    rows[499] = line
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"1 of the first 500 records hold no text") as caught:
        prepare(settings(path, tmp_path), TokenizerConfig())
    assert f"a.jsonl#500: {reason}" in str(caught.value)


def test_a_key_that_no_record_has_is_said_at_the_first(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"body": "line", "day": 3}] * 3)
    with pytest.raises(
        DataError, match=r"^the first record holds no text, .*a.jsonl#1: no 'text' among its keys body, day"
    ):
        prepare(settings(path, tmp_path), TokenizerConfig())


def test_bad_records_that_are_allowed_are_counted_and_shown(tmp_path: Path) -> None:
    """CX-8.6."""
    rows: list[object] = [{"text": f"line {number}"} for number in range(100)]
    path = json_lines(tmp_path / "a.jsonl", [*rows, *([None] * 7)])
    corpus = prepare(settings(path, tmp_path, max_bad_fraction=0.1), TokenizerConfig())
    quality = corpus.manifest["quality"]
    assert (quality["bad"], quality["empty"], corpus.manifest["counts"]["train"]["records"]) == (7, 0, 100)
    assert quality["examples"] == [
        f"a.jsonl#{number}: a JSON NoneType, expected an object" for number in range(101, 106)
    ]
    with pytest.raises(DataError, match=r"7 of the first 107 .* data\.max_bad_fraction is 0\.05"):
        prepare(settings(path, tmp_path, max_bad_fraction=0.05), TokenizerConfig())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text,id\na,1\nb\nc,3\n", "a.csv#3: 1 values under 2 names"),
        ('text,id\na,1\n"b"c,2\nc,3\n', "a.csv#3: ',' expected after '\"'"),
        (b"text,id\na,1\n\xff,2\nc,3\n", "a.csv#3: no UTF-8 at character 0"),
    ],
)
def test_bad_lines_of_csv_do_not_end_the_others(content: str | bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = list(records.read(path, "csv", "text"))
    assert [record.text for record in found if record.bad is None] == [b"a", b"c"]
    with pytest.raises(DataError) as caught:
        prepare(settings(path, tmp_path), TokenizerConfig())
    assert reason in str(caught.value)


def test_a_line_longer_than_a_record_may_be_is_bad_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST", 64)
    path = json_lines(tmp_path / "a.jsonl", [{"text": "x" * 500}, {"text": "short"}])
    first, second = records.read(path, "jsonl", "text")
    assert first.bad == "a line of more than 64 bytes" and second == records.Record(2, b"short")


def test_an_unknown_column_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path = separated(tmp_path / "a.csv", [["title", "body"], ["a", "b"]], ",")
    with pytest.raises(DataError, match=r"has no column 'text'\. Set data\.field to one of 'title', 'body'"):
        texts(path)


def test_another_field_is_another_corpus(tmp_path: Path) -> None:
    """CX-8.4: each argument changes the key."""
    path = json_lines(tmp_path / "a.jsonl", [{"text": "first", "other": "second"}])
    found = [prepare(settings(path, tmp_path, field=name), TokenizerConfig()) for name in ("text", "other")]
    assert found[0].path != found[1].path and found[0].fingerprint != found[1].fingerprint


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
def test_a_missing_library_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meristem.extras.find_spec", lambda name: None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(MissingExtra, match=r"pip install 'meristem\[arrow\]'"):
        texts(tmp_path / name)


@pytest.mark.extras
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
def test_columns_of_text_are_read_in_batches(name: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    written = [f"row {number}" for number in range(3000)]
    table = pa.table({"id": list(range(3000)), "body": written})
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(table, path)
    elif name.endswith("feather"):
        pyarrow.feather.write_feather(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:  # what the library datasets writes
            stream.write_table(table)
    assert texts(path, field="body") == written
    with pytest.raises(DataError, match=r"column 'id' of .* holds int64, no text"):
        texts(path, field="id")
    with pytest.raises(DataError, match=r"has no column 'text'"):
        texts(path)


@pytest.mark.extras
def test_null_is_bad_and_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
    found = list(records.read(tmp_path / "a.parquet", "parquet", "text"))
    assert found[1] == records.Record(2, b"", "'text' is null, no text")
    for name, kind in (("b.parquet", "Parquet"), ("b.arrow", "Arrow")):
        (tmp_path / name).write_bytes(b"no such file at all")
        with pytest.raises(DataError, match=f"is no {kind} file"):
            texts(tmp_path / name)
