"""`meristem runs`: what was run, how it went and what was different; reads run directories alone."""

import csv
import io
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from meristem.cli import complete
from meristem.cli.answer import Json, answer, columns, pairs, tell
from meristem.errors import MeristemError, RunError

app = typer.Typer(help="List runs, show them, compare them, export their metrics.")
Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        autocompletion=complete.run_directories,
        help="A run directory.",
    ),
]


@app.command()
def ls(
    root: Annotated[Path, typer.Argument(help="The directory that holds the runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs below a directory; one that stopped without a word shows as died, a broken one with the reason.

    \b
    Example:
      meristem runs ls
    """
    from meristem.checkpoint import run as runs

    if not os.path.isdir(root):
        raise RunError(f"there is no directory {root} with runs in it. Give the one that holds them.", path=str(root))
    places = [root / name for name in sorted(os.listdir(root)) if os.path.lexists(root / name / runs.FILE)]
    rows = [_row(place) for place in places if not place.is_symlink()]
    titles = ("name", "status", "started", "step", "best", "path")

    def words(rows: list[dict[str, object]]) -> list[str]:
        table = columns(titles, [[row[title] for title in titles] for row in rows if "reason" not in row])
        return [*table, *(f"{row['path']}: {row['reason']}" for row in rows if "reason" in row)]

    answer(rows, as_json, words)


def _row(place: Path) -> dict[str, object]:
    """What is shown of a run; of one that cannot be read, the ``reason``."""
    from meristem.checkpoint import run as runs

    row: dict[str, object] = {"name": place.name, "status": "unreadable", "started": None, "step": None, "best": None}
    row["path"] = str(place)
    try:
        manifest = runs.read(place)
        row |= {"name": manifest["name"] or manifest["id"], "status": manifest["status"]}
        row |= {"started": manifest["started"], "best": manifest["best"].get("value")}
        return row | {"step": _last_step(place)}
    except (MeristemError, OSError) as error:
        return row | {"reason": str(error)}


def _last_step(run: Path) -> int | None:
    from meristem.sinks.records import history

    if not (run / "metrics.ndjson").exists():
        return None
    return max((record["step"] for record in history(run, emit=tell)), default=None)


@app.command()
def show(run: Run, as_json: Json = False) -> None:
    """Print the manifest of a run, its last metrics, its emergency level and its number of rollbacks.

    \b
    Example:
      meristem runs show runs/latest
    """
    from meristem.checkpoint import run as runs
    from meristem.sinks.jsonl import read_records
    from meristem.sinks.records import history
    from meristem.train import emergency

    run = runs.run_of(run)
    report = dict(runs.read(run))
    if (run / "metrics.ndjson").exists():
        records = history(run, emit=tell)
        report["metrics"] = {record["split"]: {"step": record["step"], **record["metrics"]} for record in records}
    if (run / emergency.FILE).exists():
        now = emergency.read_shared(run / emergency.FILE)
        report["emergency"] = {"level": int(now.level), "reason": now.reason, "origin": now.origin}
    if (run / "events.ndjson").exists():
        events = read_records(run / "events.ndjson", tell)
        report["rollbacks"] = sum(event["name"] == "rollback.done" for event in events)
    answer(report, as_json, pairs)


@app.command()
def diff(first: Run, second: Run, as_json: Json = False) -> None:
    """Print the settings in which two runs differ, and what came of it; exit code 1 when they do.

    \b
    Example:
      meristem runs diff runs/a runs/b
    """
    from meristem.checkpoint import run as runs

    places = [runs.run_of(run) for run in (first, second)]
    settings = [_settings(run) for run in places]
    keys = [key for key in sorted({**settings[0], **settings[1]}) if settings[0].get(key) != settings[1].get(key)]
    differing = {key: [side.get(key) for side in settings] for key in keys}
    best = [runs.read(run)["best"] for run in places]
    rows = [(key, *values) for key, values in differing.items()]
    outcome = (f"best {best[0].get('metric')}", *(each.get("value") for each in best))
    titles = ("", str(first), str(second))
    answer({"settings": differing, "best": best}, as_json, lambda report: columns(titles, [*rows, outcome]))
    if keys:
        raise typer.Exit(1)


def _settings(run: Path) -> dict[str, object]:
    from meristem.config import leaves
    from meristem.runs.config import config_of

    return leaves(config_of(run).model_dump(mode="json"))


@app.command()
def export(
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", help="The CSV file; stdout when left out.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the metrics of a run as a table, one line per step and split, abandoned steps left out.

    \b
    Example:
      meristem runs export runs/latest --out book.csv
    """
    from meristem.checkpoint.atomic import require_replaceable, write_atomic
    from meristem.checkpoint.run import run_of
    from meristem.sinks.records import history

    records = history(run_of(run), emit=tell)
    if out is not None:
        require_replaceable(out)
    if as_json and out is None:
        answer(records, as_json, lambda records: ())
        return
    text = _table(records)
    if out is None:
        typer.echo(text, nl=False)
        return
    write_atomic(out, text.encode())
    answer({"path": str(out), "rows": len(records)}, as_json, pairs)


def _table(records: list[dict[str, Any]]) -> str:
    """CSV with a column for every metric that any record has."""
    fixed = ("step", "tokens", "epoch", "split", "task")
    names = sorted({name for record in records for name in record["metrics"]})
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow([*fixed, *names])
    for record in records:
        table.writerow([*(record[name] for name in fixed), *(record["metrics"].get(name) for name in names)])
    return written.getvalue()
