"""`meristem bench`: how fast it is here, measured side by side in one run."""

from typing import Annotated, Literal

import typer

from meristem.cli.answer import Json


def bench(
    what: Annotated[Literal["memory", "model", "decode", "all"], typer.Argument(help="What to measure.")] = "all",
    as_json: Json = False,
) -> None:
    """Measure the chunk forms, the models and decoding on this machine: a table and one JSON line.

    \b
    Examples:
      meristem bench
      meristem bench decode --json
    """
