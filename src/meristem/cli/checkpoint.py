"""`meristem checkpoint`: list checkpoints, compare, check, thin out and convert them; only the last builds a model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from meristem.cli import complete
from meristem.cli.answer import Json, answer, columns, pairs, tell
from meristem.cli.sample import Checkpoint

app = typer.Typer(help="List checkpoints, compare, check, thin out and convert them.")
Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", autocompletion=complete.run_directories, help="A run directory, or its checkpoints directory."
    ),
]


@app.command()
def ls(run: Run, as_json: Json = False) -> None:
    """List the checkpoints of a run.

    \b
    Example:
      meristem checkpoint ls runs/latest
    """
    from meristem.checkpoint.run import FILE
    from meristem.checkpoint.store import entries, root_of
    from meristem.errors import NoCheckpoint

    found = entries(root_of(run))
    if not found and not (run / FILE).is_file():
        raise NoCheckpoint(
            f"{run} is no run and holds no checkpoint. `meristem runs ls` shows the runs.", path=str(run)
        )
    rows = [
        {"step": e.step, "path": str(e.path), "created": e.created, "pinned": e.pinned, "metrics": dict(e.metrics)}
        for e in found
    ]
    titles = ("step", "created", "pinned", "metrics", "path")
    answer(rows, as_json, lambda rows: columns(titles, [[row[title] for title in titles] for row in rows]))


@app.command()
def show(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Print what a checkpoint says about itself.

    \b
    Example:
      meristem checkpoint show runs/latest
    """
    from meristem.checkpoint.store import find

    answer(dict(find(checkpoint, tell).manifest), as_json, pairs)


@app.command()
def verify(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Compare every file of a checkpoint with its hash; exit code 1 names those that differ.

    \b
    Example:
      meristem checkpoint verify runs/latest/checkpoints/step-00000500
    """
    from meristem.checkpoint import store

    place = checkpoint if store.is_checkpoint(checkpoint) else store.find(checkpoint, tell).path
    faults = store.verify(place)
    report = {"path": str(place), "intact": not faults, "faults": faults}
    answer(report, as_json, lambda report: faults or [f"{place} is intact"])
    if faults:
        raise typer.Exit(1)


@app.command()
def diff(first: Checkpoint, second: Checkpoint, as_json: Json = False) -> None:
    """Say in what two checkpoints differ; exit code 1 when they do.

    \b
    Example:
      meristem checkpoint diff runs/a runs/b
    """
    from meristem.checkpoint import store

    difference = store.diff(*(store.find(path, tell) for path in (first, second)))
    differs = any(difference.values())
    words = [name for name in difference if difference[name]]
    answer(
        difference, as_json, lambda difference: pairs({n: difference[n] for n in words}) or ["the two hold the same"]
    )
    if differs:
        raise typer.Exit(1)


@app.command()
def pin(
    checkpoint: Checkpoint,
    remove: Annotated[bool, typer.Option("--remove", help="Take the pin away.")] = False,
    as_json: Json = False,
) -> None:
    """Keep a checkpoint whatever the retention says. The run may not be training meanwhile.

    \b
    Examples:
      meristem checkpoint pin runs/latest/checkpoints/step-00000500
      meristem checkpoint pin runs/latest/checkpoints/step-00000500 --remove
    """
    from meristem.checkpoint import store
    from meristem.checkpoint.run import RunLock, run_of

    with RunLock(run_of(checkpoint)):
        path = store.find(checkpoint, tell).path
        (store.unpin if remove else store.pin)(path)
    answer({"path": str(path), "pinned": not remove}, as_json, pairs)


@app.command()
def prune(
    run: Run,
    last: Annotated[int, typer.Option("--last", min=1, help="How many of the newest stay.")] = 3,
    best: Annotated[int, typer.Option("--best", min=0, help="How many of the best by the metric stay.")] = 2,
    metric: Annotated[str, typer.Option("--metric", help="Name of the metric that ranks them.")] = "val/bits_per_byte",
    direction: Annotated[
        Literal["min", "max"], typer.Option("--direction", help="Whether small or large is good.")
    ] = "min",
    every: Annotated[int, typer.Option("--every", min=0, help="Steps at whose multiples one stays; 0 for none.")] = 0,
    as_json: Json = False,
) -> None:
    """Delete the checkpoints of a run that neither age, rank nor a pin keeps. It may not be training meanwhile.

    \b
    Example:
      meristem checkpoint prune runs/latest --last 1 --best 1
    """
    from meristem.checkpoint import prune
    from meristem.checkpoint.run import CHECKPOINTS, RunLock, run_of

    place = run_of(run)
    with RunLock(place):
        root = place / CHECKPOINTS
        deleted = prune.prune(root, last=last, best=best, metric=metric, direction=direction, every=every)
    report = {"deleted": [str(path) for path in deleted]}
    answer(report, as_json, lambda report: report["deleted"] or ["nothing to delete"])


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="CKPT_OR_FOLDER", help="A checkpoint, a run, or a folder of transformers.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="What to write; it must not exist.")],
    as_json: Json = False,
) -> None:
    """Make a folder of transformers from a checkpoint, or a checkpoint from such a folder.

    \b
    Examples:
      meristem checkpoint convert runs/latest --to exported
      meristem checkpoint convert exported --to imported
    """
    from meristem.adapters.remote import is_folder as is_of_transformers
    from meristem.export import convert as folders
    from meristem.export import hf

    is_folder = is_of_transformers(source)
    path = folders.to_checkpoint(source, to) if is_folder else hf.export(source, to, form="auto", emit=tell).path
    answer({"path": str(path), "kind": "checkpoint" if is_folder else "folder of transformers"}, as_json, pairs)
