"""`meristem bench`: how fast it is here, each figure measured against another in one run."""

from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from meristem.cli.answer import Json, json_line

if TYPE_CHECKING:
    from meristem.recipes.bench.measure import Row

_VERDICTS: Final = {True: "met", False: "missed", None: ""}


def bench(
    what: Annotated[
        Literal["memory", "model", "decode", "start", "all"], typer.Argument(metavar="WHAT", help="What to measure.")
    ] = "all",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measurements behind each median.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure memory forms, models, decoding and start-up on this machine: a table, then one JSON line.

    WHAT is memory, model, decode, start or all. Exit code 1 when a target is missed.

    \b
    Examples:
      meristem bench
      meristem bench decode --repeats 3 --json
    """
    from meristem.recipes.bench.suite import SECTIONS, measure, to_json

    rows: list[Row] = []
    for row in measure(list(SECTIONS) if what == "all" else [what], n_repeats=repeats):
        rows.append(row)
        if not as_json:
            typer.echo(_line(row))
    json_line(to_json(rows, n_repeats=repeats))
    if any(row.is_met is False for row in rows):
        raise typer.Exit(1)


def _line(row: "Row") -> str:
    """One row of the table; rows come minutes apart, so their widths are fixed."""
    measured = "-" if row.measured is None else f"{row.measured:.4g} {row.unit}"
    target = "" if row.target is None else f"{row.sense} {row.target:g}"
    return f"{row.name:<64} {measured:>18}  {target:<14} {_VERDICTS[row.is_met]:<7} {row.note}".rstrip()
