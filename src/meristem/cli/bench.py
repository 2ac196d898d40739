"""`meristem bench`: how fast it is here, measured side by side in one run."""

from typing import Annotated, Literal

import typer

from meristem.cli.answer import Json, columns, json_line


def bench(
    what: Annotated[
        Literal["memory", "model", "decode", "start", "all"], typer.Argument(help="What to measure.")
    ] = "all",
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of each candidate; their median counts.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure the memory forms, the models and decoding on this machine: a table and one JSON line.

    What is compared takes turns in one run. Exit code 1 says that some figure was not reached.

    \b
    Examples:
      meristem bench
      meristem bench decode --json
    """
    from meristem.recipes.bench.suite import SECTIONS, measure, to_json

    rows = []
    for row in measure(list(SECTIONS) if what == "all" else [what], n_repeats=repeats):
        rows.append(row)
        if not as_json:
            typer.echo(f"{row.name} ...", err=True)
    if not as_json:
        titles = ("figure", "measured", "unit", "asked", "met", "note")
        cells = [
            (
                row.name,
                "-" if row.measured is None else f"{row.measured:,.4g}",
                row.unit,
                "" if row.target is None else f"{row.sense} {row.target:g}",
                {True: "yes", False: "no", None: ""}[row.is_met],
                row.note,
            )
            for row in rows
        ]
        for line in columns(titles, cells):
            typer.echo(line)
    json_line(to_json(rows, n_repeats=repeats))
    if any(row.is_met is False for row in rows):
        raise typer.Exit(1)
