"""`meristem export`: a trained model for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from meristem.cli.answer import Json, answer, pairs, tell
from meristem.cli.sample import AnyCheckpoint, Checkpoint

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
    padding_side: Annotated[
        Literal["left", "right"] | None,
        typer.Option("--padding-side", help="Where the tokenizer fills up rows of a batch; left unless a base says."),
    ] = None,
    pad_token: Annotated[
        str | None,
        typer.Option("--pad-token", metavar="TOKEN", help="With which special token; <pad> or one like it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a folder that transformers loads, and load it once to compare; it needs the extra hf.

    \b
    Examples:
      meristem export hf runs/latest --to exported
      meristem export hf runs/latest/checkpoints/step-00000500 --to exported --form meristem
    """
    from meristem.export import hf as folders

    made = folders.export(run, to, form=form, emit=tell, padding=folders.Padding(padding_side, pad_token))
    answer(made._asdict() | {"path": str(made.path)}, as_json, pairs)


@app.command()
def edge(
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write; it must not exist.")],
    run: AnyCheckpoint = None,
    web: Annotated[bool, typer.Option("--web", help="With a page that goes on with a session in a browser.")] = False,
    as_json: Json = False,
) -> None:
    """Write a folder that reads on without Python: weights, a C library with one header, an example, a page.

    \b
    Examples:
      meristem export edge runs/latest --to edge
      meristem export edge --web --to edge
    """
    from meristem.export import edge as folders
    from meristem.models.shipped import DIRECTORY

    made = folders.export(run or DIRECTORY, to, web=web, emit=tell)
    answer(made._asdict() | {"path": str(made.path)}, as_json, pairs)


@app.command()
def onnx(
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The file to write; it must not exist.")],
    run: AnyCheckpoint = None,
    as_json: Json = False,
) -> None:
    """Write one ONNX file with its state in and out, and compare it with torch; it needs the extra onnx.

    \b
    Examples:
      meristem export onnx runs/latest --to model.onnx
      meristem export onnx --to model.onnx
    """
    from meristem.export import onnx as graphs
    from meristem.models.shipped import DIRECTORY

    made = graphs.export(run or DIRECTORY, to, emit=tell)
    answer(made._asdict() | {"path": str(made.path)}, as_json, pairs)
