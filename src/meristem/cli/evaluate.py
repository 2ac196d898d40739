"""`meristem eval`: how well a checkpoint predicts held-out text."""

from typing import Annotated, Literal

import typer

from meristem.cli.answer import Json, Overrides
from meristem.cli.sample import Checkpoint


def evaluate(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    suite: Annotated[Literal["likelihood"], typer.Option("--suite", help="What to measure.")] = "likelihood",
    split: Annotated[Literal["val", "test"], typer.Option("--split", help="Which held-out part.")] = "val",
    max_windows: Annotated[
        int | None, typer.Option("--max-windows", min=1, help="Windows to read; all by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint on held-out text: nats per token and bits per byte.

    \b
    Examples:
      meristem eval runs/latest --suite likelihood
      meristem eval runs/latest data.source=other.txt --json
    """
