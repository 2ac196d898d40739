"""`meristem bench`: how fast it is here, each figure measured against another in one run."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from meristem.cli.answer import Json, json_line
from meristem.errors import WrongValue

if TYPE_CHECKING:
    from meristem.recipes.bench.measure import Row

_VERDICTS: Final = {True: "met", False: "missed", None: ""}


def bench(
    what: Annotated[
        Literal["memory", "model", "decode", "start", "all"], typer.Argument(metavar="WHAT", help="What to measure.")
    ] = "all",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measurements behind each median.")] = 5,
    width: Annotated[
        list[int] | None, typer.Option("--width", min=1, help="Width of the rules' layers; 128. May be repeated.")
    ] = None,
    window: Annotated[
        list[int] | None, typer.Option("--window", min=1, help="Tokens that the rules read; 512. May be repeated.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="PNG to draw the training speed of every rule and form in.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure memory forms, models, decoding and start-up on this machine: a table, then one JSON line.

    WHAT is memory, model, decode, start or all. Exit code 1 when a target is missed.

    memory ends with a table of every rule in every form that takes it: tokens/s of training and reading, bytes of state
    and peak, the share of the machine's matrix products, and how much faster than by its scan it trains. At one width
    and one window it takes a few minutes.

    \b
    Examples:
      meristem bench
      meristem bench memory --picture rules.png
      meristem bench memory --width 64 --width 128 --width 256 --window 512 --window 2048
      meristem bench decode --repeats 3 --json
    """
    if picture is not None and what not in ("memory", "all"):
        raise WrongValue(f"'{what}' measures no rule, so {picture} would be empty. Ask for memory or all.", value=what)
    # torch's profiler, which sees the peaks, writes a line to stderr whenever it starts and stops, unless told before.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from meristem.recipes.bench.suite import SECTIONS, measure, to_json

    names = list(SECTIONS) if what == "all" else [what]
    rows: list[Row] = []
    for row in measure(names, n_repeats=repeats, widths=width or (128,), windows=window or (512,)):
        rows.append(row)
        if not as_json:
            typer.echo(_line(row))
    json_line(to_json(rows, n_repeats=repeats))
    if picture is not None:
        from meristem.recipes.bench.picture import draw_speeds

        draw_speeds(picture, [row.figures for row in rows])
    if any(row.is_met is False for row in rows):
        raise typer.Exit(1)


def _line(row: "Row") -> str:
    """One row of the table; rows come minutes apart, so their widths are fixed."""
    number = "-" if row.measured is None else f"{row.measured:{',.0f' if row.measured >= 1000 else '.4g'}}"
    measured = number if row.measured is None else f"{number} {row.unit}"
    target = "" if row.target is None else f"{row.sense} {row.target:g}"
    return f"{row.name:<64} {measured:>18}  {target:<14} {_VERDICTS[row.is_met]:<7} {row.note}".rstrip()
