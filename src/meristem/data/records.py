"""Files of records, each of which holds a text or a chat: JSON lines, CSV and TSV, Parquet, and Arrow.

They are streamed, one record or one batch of a column at a time. A record that holds no text is handed on as one that
is ``bad``, with the reason, so that whoever reads can count it.
"""

import csv
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from meristem.data.chat import as_json, messages_of
from meristem.data.files import opened, refused
from meristem.errors import DataError
from meristem.extras import needed, require

LONGEST: Final = 1 << 26
"""Bytes that a record may have: what has to be in memory at once."""

SUFFIXES: Final[Mapping[str, str]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""The format of a file by the end of its name."""

_ROWS: Final = 1024


class Record(NamedTuple):
    """One record: where it stands, counted from 1, and its text, of a chat its messages as JSON; or, with no text, why
    it is ``bad``."""

    number: int
    text: bytes
    bad: str | None = None


def read(path: Path, format: str, field: str) -> Iterator[Record]:
    """The records of a file in their order; ``number`` is the line of JSON lines and CSV, the row of the others.

    format: one of the values of ``SUFFIXES``, or ``chat``. field: the key or column whose value is the text.
    Raises DataError for a file that cannot be read at all, or has no such column.
    """
    return _READERS[format](path, field)


def require_library(format: str) -> None:
    """MissingExtra, with the command that installs it, where the format needs a library that is not here."""
    if format in ("parquet", "arrow"):
        require("pyarrow", f"data.source in the format {format}")


def _json_lines(path: Path, field: str, read_value: "_ReadValue") -> Iterator[Record]:
    """Lines end at a line feed and nowhere else: U+2028 and U+0085 may stand in a text. Empty lines are passed over."""
    with opened(path) as (descriptor, _), open(descriptor, "rb", closefd=False) as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST)
                yield Record(number, b"", f"a line of more than {LONGEST:,} bytes")
            elif line.strip():
                yield _json_line(number, line, field, read_value)


def _json_line(number: int, line: bytes, field: str, read_value: "_ReadValue") -> Record:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as cause:
        return Record(number, b"", f"no JSON ({cause})")
    if not isinstance(found, dict):
        return Record(number, b"", f"a JSON {type(found).__name__}, expected an object")
    if field not in found:
        return Record(number, b"", f"no '{field}' among its keys {', '.join(sorted(found)[:8]) or '(it has none)'}")
    return read_value(number, found[field], field)


def _chat(number: int, value: object, field: str) -> Record:
    try:
        return Record(number, as_json(messages_of(value)))
    except ValueError as cause:
        return Record(number, b"", f"'{field}': {cause}")


def _value(number: int, value: object, field: str) -> Record:
    if isinstance(value, str):
        return Record(number, value.encode())
    if isinstance(value, bytes):
        return Record(number, value)
    return Record(number, b"", f"'{field}' is {'null' if value is None else f'a {type(value).__name__}'}, no text")


def _separated(path: Path, field: str, delimiter: str) -> Iterator[Record]:
    """CSV as RFC 4180 has it, with a line of names; the number is that of a record's last line."""
    # The library counts what a field may hold once for the whole process; more than a record may have is bad here.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    with (
        opened(path) as (descriptor, _),
        open(descriptor, encoding="utf-8", errors="surrogateescape", newline="", closefd=False) as file,
    ):
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
        except csv.Error as cause:
            raise DataError(f"the first line of {path} is no {delimiter!r}-separated line: {cause}.") from cause
        column = _column(path, [name.removeprefix("\ufeff") for name in names], field)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as cause:
                yield Record(rows.line_num, b"", str(cause))
                continue
            if len(row) == len(names):
                yield _utf8(rows.line_num, row[column])
            elif row:
                yield Record(rows.line_num, b"", f"{len(row)} values under {len(names)} names")


def _utf8(number: int, text: str) -> Record:
    try:
        return Record(number, text.encode())
    except UnicodeEncodeError as cause:
        return Record(number, b"", f"no UTF-8 at character {cause.start} of its text")


def _column(path: Path, names: list[str], field: str) -> int:
    if field not in names:
        raise DataError(
            f"{path} has no column '{field}'. Set data.field to one of {', '.join(map(repr, names[:12])) or 'none'}.",
            found=field,
            accepted=names,
        )
    return names.index(field)


def _parquet(path: Path, field: str) -> Iterator[Record]:
    with needed("a file of Parquet"):
        import pyarrow.parquet

    with opened(path) as (descriptor, _), open(descriptor, "rb", closefd=False) as raw:
        try:
            file = pyarrow.parquet.ParquetFile(raw)
        except (pyarrow.ArrowException, OSError) as cause:
            raise _not_of_format(path, "Parquet", cause) from cause
        _require_text(path, file.schema_arrow, field)
        yield from _rows(path, file.iter_batches(batch_size=_ROWS, columns=[field]), field)


def _arrow(path: Path, field: str) -> Iterator[Record]:
    """The format of files, which begins with ``ARROW1``, and that of streams, which the library datasets writes."""
    with needed("a file of Arrow"):
        import pyarrow

    with opened(path) as (descriptor, _), open(descriptor, "rb", closefd=False) as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        try:
            file = pyarrow.ipc.open_file(raw) if is_file else pyarrow.ipc.open_stream(raw)
        except (pyarrow.ArrowException, OSError) as cause:
            raise _not_of_format(path, "Arrow", cause) from cause
        _require_text(path, file.schema, field)
        batches = map(file.get_batch, range(file.num_record_batches)) if is_file else iter(file)
        yield from _rows(path, batches, field)


def _rows(path: Path, batches: Iterator[Any], field: str) -> Iterator[Record]:
    with needed("rows of Arrow"):
        import pyarrow

    number = 0
    try:
        for batch in batches:
            column = batch.column(batch.schema.get_field_index(field))
            for first in range(0, len(column), _ROWS):
                for value in column.slice(first, _ROWS).to_pylist():
                    number += 1
                    yield _value(number, value, field)
    except (pyarrow.ArrowException, OSError) as cause:
        raise refused("read", path, OSError(None, f"after row {number}: {cause}")) from cause


def _require_text(path: Path, schema: Any, field: str) -> None:
    with needed("rows of Arrow"):
        import pyarrow.types as types

    kind = schema.field(_column(path, list(schema.names), field)).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(test(value) for test in tests):
        raise DataError(
            f"column '{field}' of {path} holds {kind}, no text. Set data.field to a column of text.", found=str(kind)
        )


def _not_of_format(path: Path, name: str, cause: Exception) -> DataError:
    return DataError(f"{path} is no {name} file: {cause}. Check it, or set data.format.", path=str(path))


_ReadValue = Callable[[int, object, str], Record]
_READERS: Final[Mapping[str, Callable[[Path, str], Iterator[Record]]]] = {
    "jsonl": lambda path, field: _json_lines(path, field, _value),
    "chat": lambda path, field: _json_lines(path, field, _chat),
    "csv": lambda path, field: _separated(path, field, ","),
    "tsv": lambda path, field: _separated(path, field, "\t"),
    "parquet": _parquet,
    "arrow": _arrow,
}
