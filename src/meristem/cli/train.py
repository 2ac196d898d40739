"""`meristem train` and `meristem plan`: a run, and what it would be."""

from pathlib import Path
from typing import Annotated

import typer

from meristem.cli.answer import Json, Overrides, Preset


def train(
    preset: Preset,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option("--resume", metavar="auto|must|never|PATH", help="Go on from a checkpoint of the run directory."),
    ] = "auto",
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where the run is written; by default a new directory under runs/.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and stop, as `meristem plan` does.")] = False,
    as_json: Json = False,
) -> None:
    """Prepare the text, train, evaluate, keep checkpoints, write samples. Ctrl-C leaves a checkpoint to go on from.

    \b
    Examples:
      meristem train titans-mag
      meristem train titans-mag data.source=book.txt train.budget=10m --run-dir runs/book
      meristem train titans-mag --run-dir runs/book --resume must
    """


def plan(preset: Preset, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what a run would be, without allocating it: shapes, parameters, FLOPs, peak memory, bytes per session.

    \b
    Example:
      meristem plan titans-mag model.width=512
    """
