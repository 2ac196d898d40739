"""`meristem grow`: a run that grows, and the life of every seed of one."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from meristem.cli import complete, library
from meristem.cli import train as training
from meristem.cli.answer import Json, Overrides, Preset, columns, json_line, tell
from meristem.cli.train import DryRun, NoPlan, Processes, Resume, RunDir

DEMO: Final = (
    "train.max_time=3m",
    "train.log_every=5",
    "device.threads=1",
    "schedule.shape=constant",
    "tokenizer.vocab_size=512",
    "data.seq_len=128",
    "data.batch_size=4",
    "model.dim=64",
    "model.n_layers=1",
    "model.sliding_window=4",
    "eval.every=25",
    "eval.every_s=null",
    "eval.n_windows=16",
    "grow.boundary_every=10",
    "grow.seed_warmup=20",
    "grow.shadow_every=1",
    "grow.policy.settings={blueprints: {attention: {n_heads: 4, head_dim: 16, sliding_window: 64}, "
    "gated_feedforward: {hidden: 128}}, flat_nats: 0.05, span: 16}",
    "grow.blend_steps=40",
    "grow.embargo_steps=60",
    "grow.min_age=80",
    "grow.gates.training_steps=160",
    "grow.gates.holding_steps=30",
    "grow.gates.quiet_steps=20",
    "grow.gates.impact_nats=0.1",
    "grow.gates.probation_steps=100",
    "grow.gates.recovery_steps=40",
    "grow.gates.recovery=if_room",
)
"""Settings by which seeds are tried and judged within three minutes of the default text.

The attention of the model sees four tokens: of the two blueprints that are tried, one brings what it lacks.
"""


class _WithDefault(TyperGroup):
    """A verb below which `run` may be left out: any word that is no verb begins its arguments."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # the types are private to typer
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_WithDefault,
    help=r"Train with growth: `meristem grow PRESET_OR_FILE \[a.b=c ...]`, which is short for `grow run`.",
    no_args_is_help=True,
)
app.add_typer(library.app, name="library")


@app.command("run")
def run(
    preset: Preset,
    overrides: Overrides = None,
    demo: Annotated[bool, typer.Option("--demo", help="A small model for three minutes, and short lives.")] = False,
    resume: Resume = "auto",
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    no_plan: NoPlan = False,
    n_processes: Processes = 1,
    as_json: Json = False,
) -> None:
    """Train as `meristem train` does, and give the model new parts where they help. The word `run` may be left out.

    \b
    Examples:
      meristem grow run titans-mag --demo
      meristem grow run default "grow.slots=[blocks.1]" "grow.policy.settings={flat_nats: 0.01}"
      meristem grow run default grow.policy.name=schedule "grow.policy.settings={steps: [500]}"
    """
    settings = ["grow.enabled=true", *(DEMO if demo else ()), *(overrides or ())]
    training.train(
        preset,
        settings,
        resume=resume,
        run_dir=run_dir,
        dry_run=dry_run,
        no_plan=no_plan,
        n_processes=n_processes,
        as_json=as_json,
    )


@app.command("report")
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", autocompletion=complete.run_directories, help="A run directory.")
    ],
    gates: Annotated[bool, typer.Option("--gates", help="Every check of every gate, with its value.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="PNG of the timeline; by default growth.png in the run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the life of every seed of a run: a table, what the gates asked and found, and a timeline as a picture.

    \b
    Examples:
      meristem grow report runs/latest
      meristem grow report runs/latest --gates --picture lives.png
    """
    from meristem.checkpoint.run import run_of
    from meristem.runs.growth import draw_lives, gate_lines, lives_of, table

    place = run_of(run)
    lives = lives_of(place, tell)
    path = picture or place / "growth.png"
    draw_lives(path, place, lives, tell)
    if as_json:
        json_line({"seeds": [each.to_json() for each in lives], "picture": str(path)})
        return
    for line in columns(*table(lives)) if lives else ("no seed was put in",):
        typer.echo(line)
    if gates:
        typer.echo(
            "\n" + "\n".join(columns(("seed", "gate", "step", "check", "value", "asked", "status"), gate_lines(lives)))
        )
    typer.echo(f"\nthe timeline is {path}")


@app.command("request")
def request(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", autocompletion=complete.run_directories, help="A run directory.")
    ],
    why: Annotated[str, typer.Option("--why", help="What it is wanted for; it is written down.")] = "",
    as_json: Json = False,
) -> None:
    """Ask a run that grows for a seed: its policy `heuristic` puts one in at the next boundary at which a slot is free.

    \b
    Examples:
      meristem grow request runs/latest --why "it reads another kind of text now"
    """
    from meristem.checkpoint.run import read, run_of
    from meristem.errors import RunError
    from meristem.growth.request import request as ask
    from meristem.runs.config import config_of

    place = run_of(run)
    status = read(place)["status"]
    if not config_of(place).grow.enabled:
        raise RunError(f"{place} is no run that grows. Train one with `meristem grow`, or grow.enabled=true.")
    made = ask(place, why=why)
    if as_json:
        json_line(made.to_json() | {"status": status})
        return
    typer.echo(f"{made.number}: the next boundary of {place} reads it; the run is {status}")
