"""The metrics of a run as one table: CSV, Parquet or SQLite."""

import csv
import io
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from meristem.extras import needed

Format = Literal["csv", "parquet", "sqlite"]
ENDINGS: Final[Mapping[str, Format]] = {
    ".csv": "csv",
    ".parquet": "parquet",
    ".sqlite": "sqlite",
    ".sqlite3": "sqlite",
    ".db": "sqlite",
}
"""What a file is taken for by its name."""

NAME: Final = "metrics"
"""Of the table in SQLite."""

_FIXED: Final = {"step": "INTEGER", "tokens": "INTEGER", "epoch": "REAL", "split": "TEXT", "task": "TEXT"}


def table(records: Sequence[Mapping[str, Any]], kind: Format) -> bytes:
    """Metrics records as a table: one line for each, and a column for every metric that any of them has.

    What is not finite stays so in CSV and Parquet; SQLite has no value for NaN and holds null there.
    MissingExtra for Parquet without pyarrow.
    """
    titles = [*_FIXED, *sorted({name for record in records for name in record["metrics"]})]
    rows = [_row(record, titles) for record in records]
    if kind == "parquet":
        return _parquet(titles, rows)
    return _sqlite(titles, rows) if kind == "sqlite" else _csv(titles, rows)


def _row(record: Mapping[str, Any], titles: Sequence[str]) -> list[Any]:
    values = record["metrics"] | {name: float(text) for name, text in record.get("nonfinite", {}).items()}
    return [record[name] if name in _FIXED else values.get(name) for name in titles]


def _csv(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([titles, *rows])
    return written.getvalue().encode()


def _parquet(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    with needed("a table in Parquet"):
        import pyarrow
        import pyarrow.parquet

    kinds = {"INTEGER": pyarrow.int64(), "REAL": pyarrow.float64(), "TEXT": pyarrow.string()}
    fields = [(title, kinds[_FIXED.get(title, "REAL")]) for title in titles]
    columns = [pyarrow.array([row[place] for row in rows], kind) for place, (_, kind) in enumerate(fields)]
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(fields)), written)
    return written.getvalue()


def _sqlite(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """In memory first, since a database cannot be put in place of another as it is written."""
    quoted = ['"' + title.replace('"', '""') + '"' for title in titles]
    columns = ", ".join(f"{name} {_FIXED.get(title, 'REAL')}" for name, title in zip(quoted, titles, strict=True))
    database = sqlite3.connect(":memory:")
    try:
        database.execute(f"CREATE TABLE {NAME} ({columns})")
        database.executemany(f"INSERT INTO {NAME} VALUES ({', '.join('?' * len(titles))})", rows)
        database.commit()
        return database.serialize()
    finally:
        database.close()
