"""`meristem runs`: what was run, how it went and what was different; reads run directories alone."""

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from meristem.cli.answer import Json, answer, columns, pairs, tell
from meristem.errors import RunError

app = typer.Typer(help="List runs, look at them, compare them, export their metrics.")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


@app.command()
def ls(
    root: Annotated[Path, typer.Argument(help="The directory that holds the runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs below a directory; one that stopped without a word shows as died.

    \b
    Example:
      meristem runs ls
    """
    from meristem.checkpoint import run as runs

    places = sorted(path.parent for path in root.glob(f"*/{runs.FILE}") if not path.parent.is_symlink())
    titles = ("name", "status", "started", "step", "best", "path")
    rows = [dict(zip(titles, _row(place, runs.read(place)), strict=True)) for place in places]
    answer(rows, as_json, lambda rows: columns(titles, [list(row.values()) for row in rows]))


def _row(place: Path, manifest: dict[str, Any]) -> tuple[object, ...]:
    name, best = manifest["name"] or manifest["id"], manifest["best"]["value"]
    return name, manifest["status"], manifest["started"], _last_step(place), best, str(place)


def _last_step(run: Path) -> int | None:
    from meristem.sinks.records import history

    if not (run / "metrics.ndjson").exists():
        return None
    return max((record["step"] for record in history(run, emit=tell)), default=None)


@app.command()
def show(run: Run, as_json: Json = False) -> None:
    """Print the manifest of a run, its last metrics, its emergency level and how often it went back.

    \b
    Example:
      meristem runs show runs/latest
    """
    from meristem.checkpoint import run as runs
    from meristem.sinks.jsonl import read_records
    from meristem.sinks.records import history
    from meristem.train import emergency

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

    settings = [_settings(run) for run in (first, second)]
    keys = [key for key in sorted({**settings[0], **settings[1]}) if settings[0].get(key) != settings[1].get(key)]
    differing = {key: [side.get(key) for side in settings] for key in keys}
    best = [runs.read(run)["best"] for run in (first, second)]
    rows = [(key, *values) for key, values in differing.items()]
    outcome = (f"best {best[0]['metric']}", *(each["value"] for each in best))
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
    from meristem.checkpoint.atomic import write_atomic
    from meristem.sinks.records import history

    records = history(run, emit=tell)
    if as_json and out is None:
        answer(records, as_json, lambda records: ())
        return
    text = _table(records)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        write_atomic(out, text.encode())
    except OSError as cause:
        raise RunError(f"{out} cannot be written: {cause.strerror}. Choose another --out.", path=str(out)) from cause
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
