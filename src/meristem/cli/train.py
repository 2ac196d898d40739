"""`meristem train` and `meristem plan`: a run, and what it would be."""

import contextlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meristem.cli.answer import Json, Overrides, Preset, columns, json_line
from meristem.errors import RunError

if TYPE_CHECKING:
    from meristem.recipes.plan.report import PlanReport
    from meristem.runs.config import Config
    from meristem.sinks.console import Console


Resume = Annotated[
    str, typer.Option("--resume", metavar="auto|must|never|PATH", help="Whether to go on from a checkpoint.")
]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Where the run is written; by default one under run.dir.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan and stop, as `meristem plan` does.")]
NoPlan = Annotated[bool, typer.Option("--no-plan", help="Start without a check whether it can work.")]
Processes = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine that share each batch.")]


def train(
    preset: Preset,
    overrides: Overrides = None,
    resume: Resume = "auto",
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    no_plan: NoPlan = False,
    n_processes: Processes = 1,
    as_json: Json = False,
) -> None:
    """Prepare the text, train, evaluate, keep checkpoints, write samples. Ctrl-C leaves a checkpoint to go on from.

    \b
    Examples:
      meristem train default
      meristem train default data.source=book.txt train.max_time=10m
      meristem train charformer --run-dir runs/small --resume must
      meristem train default --nproc 2
    """
    from meristem.runs.config import load_config

    config = load_config(preset, overrides or ()).tree
    if dry_run:
        _plan(config, as_json)
        return
    if n_processes > 1:
        words = [preset, *(overrides or ()), *(["--no-plan"] if no_plan else []), *(["--json"] if as_json else [])]
        raise typer.Exit(_launched(config, words, n_processes, run_dir, resume))
    raise typer.Exit(_trained(config, run_dir, resume, no_plan=no_plan, as_json=as_json))


def _trained(config: "Config", run_dir: Path | None, resume: str, *, no_plan: bool, as_json: bool) -> int:
    """Train in this process, which may be one of several; of these only the first prints."""
    from dataclasses import asdict

    from meristem.distributed.world import launched_rank, recorded_errors
    from meristem.recipes.grow import grow
    from meristem.recipes.pretrain import pretrain
    from meristem.sinks.console import Console

    view, is_first = Console(json=as_json), launched_rank() == 0
    if is_first:
        place = _place(config, run_dir, resume)
        run_dir = run_dir and place  # where none was given the run chooses, which knows whether it was started again
    is_finetuning = config.finetune.base is not None
    planned = None if no_plan or is_finetuning or not is_first else _looked_ahead(config, view)
    with recorded_errors():
        if is_finetuning:
            from meristem.recipes.finetune import finetune

            result = finetune(config, run_dir=run_dir, resume=resume, view=view)
        else:
            recipe = grow if config.grow.enabled else pretrain
            result = recipe(config, run_dir=run_dir, resume=resume, view=view, planned=planned)
    if as_json and is_first:
        json_line(asdict(result))
    return result.exit_code


def _place(config: "Config", run_dir: Path | None, resume: str) -> Path:
    """Where the run is written: refused here, before any work, where that cannot be."""
    from meristem.checkpoint.run import require_writable, run_of
    from meristem.runs.directory import directory_for

    place = run_dir or directory_for(config, resume)
    with contextlib.suppress(RunError):
        place = run_of(place)  # as `meristem checkpoint` takes it: the checkpoints of a run mean the run
    require_writable(place)
    return place


def _launched(config: "Config", words: list[str], n_processes: int, run_dir: Path | None, resume: str) -> int:
    """Train in several processes, each of which is this command without ``--nproc``."""
    from meristem.distributed.launch import launch
    from meristem.distributed.world import require_not_launched
    from meristem.runs.resume import after_restart

    require_not_launched()
    place = _place(config, run_dir, resume)

    def command(n_restarts: int) -> list[str]:
        way = after_restart(resume, place, n_restarts)
        return ["-m", "meristem", "train", *words, "--resume", way, "--run-dir", str(place)]

    return launch(
        command,
        n_processes,
        config.distributed,
        on_restart=lambda text: typer.secho(f"warning: {text}", fg="yellow", err=True),
        on_output=partial(typer.echo, nl=False) if "--json" in words else None,
    )


def plan(preset: Preset, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what a run would be, without allocating it: shapes, parameters, FLOPs, peak memory, bytes per session.

    \b
    Example:
      meristem plan default model.dim=512
    """
    from meristem.runs.config import load_config

    _plan(load_config(preset, overrides or ()).tree, as_json)


def _looked_ahead(config: "Config", view: "Console") -> "PlanReport":
    """What the run will need, in three lines; a run that cannot work is refused before anything is made."""
    from meristem.recipes.plan.dry_run import plan
    from meristem.recipes.plan.report import brief

    view.start("planning")
    report = plan(config, until="steps")
    view.stop()
    report.refuse()
    for line in brief(report):
        view.note(line)
    return report


def _plan(config: "Config", as_json: bool) -> None:
    """Print the report; its exit code is that of the first part that failed."""
    from meristem.recipes.plan.dry_run import plan
    from meristem.recipes.plan.report import sections

    report = plan(config)
    if as_json:
        json_line(report.model_dump(mode="json"))
        raise typer.Exit(report.exit_code)
    for section in sections(report):
        typer.echo("\n".join((section.title, *columns(section.columns, section.rows), "")))
    report.refuse()
