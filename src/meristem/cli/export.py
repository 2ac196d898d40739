"""`meristem export`: a trained model for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from meristem.cli.answer import Json, answer, pairs, tell
from meristem.cli.sample import Checkpoint

app = typer.Typer(help="Write a trained model for other programs.")


@app.callback()
def export() -> None:
    """Write a trained model for other programs."""


@app.command()
def hf(
    run: Checkpoint,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write; it must not exist.")],
    form: Annotated[
        Literal["auto", "plain", "meristem"],
        typer.Option("--form", help="plain: a Llama or Mistral; meristem: ours; auto: plain where it is one."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Write a folder that transformers loads, and load it once to compare; it needs the extra hf.

    \b
    Examples:
      meristem export hf runs/latest --to exported
      meristem export hf runs/latest/checkpoints/step-00000500 --to exported --form meristem
    """
    from meristem.export import hf as folders

    made = folders.export(run, to, form=form, emit=tell)
    answer(made._asdict() | {"path": str(made.path)}, as_json, pairs)
