"""`meristem finetune`: training that begins from weights."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from meristem.cli import complete
from meristem.cli.answer import Json, json_line
from meristem.cli.train import Resume, RunDir


def finetune(
    base: Annotated[
        str,
        typer.Argument(
            metavar="CKPT_OR_HF",
            autocompletion=complete.run_directories,
            help="A checkpoint, a run, a folder of transformers, or name@commit of the hub.",
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA|FILE.yaml|KEY=VALUE]...",
            help="Texts, as data.source takes them; YAML files; settings, as optim.lr=1e-4.",
            show_default=False,
        ),
    ] = None,
    how: Annotated[
        Literal["full", "lora", "memory", "levels"],
        typer.Option("--how", help="What is trained: all, low-rank matrices, memories beside a host, or levels."),
    ] = "full",
    resume: Resume = "auto",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Train on from a checkpoint, or from a model of transformers, which needs the extra hf.

    \b
    Examples:
      meristem finetune runs/book letters.txt optim.lr=1e-4
      meristem finetune runs/book letters.txt --how lora finetune.rank=4
      meristem finetune models/gpt2 letters.txt --how memory finetune.layers=[5,8]
      meristem finetune runs/gelu letters.txt --how levels model.levels.count=3
    """
    from dataclasses import asdict

    from meristem.checkpoint.run import require_writable
    from meristem.recipes import finetune as recipe
    from meristem.runs.directory import directory_for
    from meristem.sinks.console import Console

    given = words or []
    overrides = [word for word in given if "=" in word or Path(word).suffix in (".yaml", ".yml")]
    data = [word for word in given if word not in overrides]
    config = recipe.settled(base, data, how, overrides)
    require_writable(run_dir or directory_for(config, resume))
    result = recipe.finetune(config, run_dir=run_dir, resume=resume, view=Console(json=as_json))
    if as_json:
        json_line(asdict(result))
    raise typer.Exit(result.exit_code)
