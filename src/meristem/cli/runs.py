"""`meristem runs`: what was run, how it went and what was different; reads run directories alone."""

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from meristem.cli import complete
from meristem.cli.answer import Json, answer, columns, pairs, tell
from meristem.errors import MeristemError, RunError, WrongValue

COMPARED: Final = ("val/bits_per_byte", "train/bits_per_byte")
"""What curves are drawn of, unless given."""

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
def compare(
    chosen: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", autocompletion=complete.run_directories, help="Run directories."),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help=f"As split/metric; may be given several times. By default {' and '.join(COMPARED)}.",
            show_default=False,
        ),
    ] = None,
    along: Annotated[
        Literal["tokens", "steps"], typer.Option("--along", help="What the picture counts from left to right.")
    ] = "tokens",
    picture: Annotated[Path, typer.Option("--picture", help="Where the curves are drawn, as a PNG.")] = Path(
        "compare.png"
    ),
    as_json: Json = False,
) -> None:
    """Draw the curves of several runs into one picture, and print where each began, ended and was least.

    Steps that a run abandoned are left out.

    \b
    Examples:
      meristem runs compare runs/a runs/b
      meristem runs compare runs/a runs/b runs/c --metric val/nats --along steps --picture nats.png
    """
    from meristem.checkpoint.atomic import require_replaceable
    from meristem.checkpoint.run import run_of
    from meristem.evaluate.picture import draw_runs
    from meristem.sinks.records import history

    places = [run_of(place) for place in chosen]
    names = _names(places)
    require_replaceable(picture)
    histories = {name: history(place, emit=tell) for name, place in zip(names, places, strict=True)}
    curves = {name: _curves(records, along) for name, records in histories.items()}
    known = sorted({key for own in curves.values() for key in own})
    wanted = list(dict.fromkeys(metric or [key for key in COMPARED if key in known]))
    if not wanted or set(wanted) - set(known):
        raise RunError(
            f"no run of these has {', '.join(sorted(set(wanted) - set(known))) or ' or '.join(COMPARED)}; they have "
            f"{', '.join(known[:12]) or 'no metrics'}. Give one of these with --metric.",
            found=known,
        )
    panels = {key: {name: own[key] for name, own in curves.items() if key in own} for key in wanted}
    draw_runs(picture, panels, "tokens read" if along == "tokens" else "steps")
    rows = [_ends(name, key, points) for key, own in panels.items() for name, points in own.items()]
    found = {"picture": str(picture), "along": along, "runs": rows}

    def words(found: dict[str, Any]) -> list[str]:
        titles = ("run", "metric", "first", "last", "at", "least", "least_at")
        return [*columns(titles, [[row[title] for title in titles] for row in rows]), str(picture)]

    answer(found, as_json, words)


def _ends(run: str, metric: str, points: list[tuple[int, float]]) -> dict[str, object]:
    """Where a curve begins, ends and is least."""
    at, last = points[-1]
    least_at, least = min(points, key=lambda point: point[1])
    return {
        "run": run,
        "metric": metric,
        "first": points[0][1],
        "last": last,
        "at": at,
        "least": least,
        "least_at": least_at,
    }


def _names(places: list[Path]) -> list[str]:
    """The names of runs; the paths of those whose name is not theirs alone."""
    from meristem.checkpoint import run as runs

    manifests = [runs.read(place) for place in places]
    names = [str(manifest["name"] or manifest["id"]) for manifest in manifests]
    found = [name if names.count(name) == 1 else str(place) for name, place in zip(names, places, strict=True)]
    if len(set(found)) < len(found):
        raise RunError("a run is given twice. Give each once.", runs=[str(place) for place in places])
    return found


def _curves(records: list[dict[str, Any]], along: str) -> dict[str, list[tuple[int, float]]]:
    """The finite values of every metric over tokens or steps, by split, task where there is one, and name."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        above = record["split"] if record["task"] is None else f"{record['split']}/{record['task']}"
        for name, value in record["metrics"].items():
            if value is not None:
                at = record["tokens"] if along == "tokens" else record["step"]
                curves.setdefault(f"{above}/{name}", []).append((at, value))
    return curves


@app.command()
def export(
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; stdout, as CSV, when left out.", show_default=False)
    ] = None,
    to: Annotated[
        Literal["csv", "parquet", "sqlite"] | None,
        typer.Option("--to", help="What to write; by default what the name of the file says.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the metrics of a run as a table, one line per step and split, abandoned steps left out.

    In SQLite the table is called metrics. Parquet needs the extra arrow.

    \b
    Examples:
      meristem runs export runs/latest --out book.csv
      meristem runs export runs/latest --out book.parquet
      meristem runs export runs/latest --to sqlite --out book.db
    """
    from meristem.checkpoint.atomic import require_replaceable, write_atomic
    from meristem.checkpoint.run import run_of
    from meristem.sinks.records import history
    from meristem.sinks.table import ENDINGS, table

    kind = to or (ENDINGS.get(out.suffix.lower(), "csv") if out is not None else "csv")
    if out is None and kind != "csv":
        raise WrongValue(f"--to {kind} writes a file, and none is named. Add --out FILE.", key="out")
    records = history(run_of(run), emit=tell)
    if out is not None:
        require_replaceable(out)
    if as_json and out is None:
        answer(records, as_json, lambda records: ())
        return
    written = table(records, kind)
    if out is None:
        typer.echo(written.decode(), nl=False)
        return
    write_atomic(out, written)
    answer({"path": str(out), "format": kind, "rows": len(records)}, as_json, pairs)
