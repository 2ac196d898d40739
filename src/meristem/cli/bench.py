"""`meristem bench`: how fast it is here and what its components are worth, each figure measured against another."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from meristem.cli.answer import Json, json_line
from meristem.cli.sample import AnyCheckpoint
from meristem.errors import WrongValue

if TYPE_CHECKING:
    from meristem.bench.measure import Row

_VERDICTS: Final = {True: "met", False: "missed", None: ""}

app = typer.Typer()

Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Measurements behind each median.")]
Widths = Annotated[
    list[int] | None, typer.Option("--width", min=1, help="Width of the rules' layers; 128. May be repeated.")
]
Windows = Annotated[
    list[int] | None, typer.Option("--window", min=1, help="Tokens that the rules read; 512. May be repeated.")
]
Picture = Annotated[
    Path | None, typer.Option("--picture", help="PNG to draw the training speed of every rule and form in.")
]


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure speeds on this machine, and what the components of a model are worth. Alone it measures all speeds."""
    if context.invoked_subcommand is None:
        everything()


@app.command("all")
def everything(
    repeats: Repeats = 5,
    width: Widths = None,
    window: Windows = None,
    picture: Picture = None,
    out: Annotated[Path | None, typer.Option("--out", help="A page to write; JSON stands beside it.")] = None,
    limits: Annotated[
        Path | None, typer.Option("--limits", help="YAML file with the reason beside each figure that falls short.")
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option("--part", help="Measure this alone, and keep the rest of the page. May be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure memory forms, models, decoding, snapshots, growing, texts, trackers, finetuning, start: a table and JSON.

    Exit code 1 when a target is missed. Its parts are memory, rules, model, compositions, hope, levels, decode, data,
    snapshot, seeds, prepare, trackers, finetune and start; a page is written after each.

    \b
    Examples:
      meristem bench all
      meristem bench all --repeats 3 --json
      meristem bench all --out docs/benchmarks.md --limits docs/benchmarks.yaml
      meristem bench all --part decode --part model --out docs/benchmarks.md --limits docs/benchmarks.yaml
    """
    from meristem.bench.speeds import PARTS, read_limits
    from meristem.checkpoint.atomic import require_replaceable

    PARTS.require(part or ())
    reasons = {} if limits is None else read_limits(limits)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        require_replaceable(out)
    names = [name for name in PARTS.names if part is None or name in part]
    page = None if out is None else (out, reasons, bool(part))
    _speeds(names, repeats, as_json, layers=(width, window), picture=picture, page=page)


@app.command()
def memory(
    repeats: Repeats = 5,
    width: Widths = None,
    window: Windows = None,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """Measure memory forms and layers: a table, then one JSON line. Exit code 1 when a target is missed.

    It ends with a table of every rule in every form that takes it: tokens/s of training and reading, bytes of state and
    peak, the share of the machine's matrix products, and how much faster than by its scan it trains. At one width and
    one length it takes a few minutes.

    \b
    Examples:
      meristem bench memory --picture rules.png
      meristem bench memory --width 64 --width 128 --width 256 --window 512 --window 2048
    """
    _speeds(("memory", "rules"), repeats, as_json, layers=(width, window), picture=picture)


_MISSED: Final = "Exit code 1 when a target is missed."
_SECTIONS: Final = {
    "model": f"Measure training of the default model against a transformer. {_MISSED}",
    "training": f"""Measure training of the default preset by the native core against tensor code. {_MISSED}

Whole steps on one thread, in time of the processor, interleaved; and a memory layer against its own projections.""",
    "compositions": f"""Measure training with a memory as context, gate and layer. {_MISSED}

Two layers, sequences of 512 tokens, whole steps, interleaved with a transformer of the same width and depth.""",
    "hope": f"Measure training and decoding of hope, memories written. {_MISSED}",
    "levels": f"Measure what four levels cost over one in training. {_MISSED}",
    "decode": f"Measure how fast a session writes. {_MISSED}",
    "data": f"""Measure what reading the text costs a training. {_MISSED}

A step of the default preset over what it takes without taking its batches: those are read beside it, or when they are
needed. Where the machine is loaded, in CPU time of the thread that trains.""",
    "snapshot": f"""Measure snapshots in memory, and what they and the guard cost. {_MISSED}

How long a run of 100 million parameters with moments waits for a snapshot and for a rollback, and the share of the
machine's copy bandwidth that is (this needs 6 GB of RAM); then the share of the steps of the default preset that guard,
events and snapshots take, and how long a save keeps it waiting.""",
    "seeds": f"Measure blends, gates, slots, changes of structure and slot scores of a model that grows. {_MISSED}",
    "trackers": f"""Measure what it costs to write a run down and to show it to all trackers. {_MISSED}

In time of the processor, as a share of the steps of the default preset, one of ten of which is recorded.""",
    "finetune": f"""Measure a step of fine-tuning a small Llama against a plain torch loop that does the same. {_MISSED}

In time of the processor, interleaved; it needs `pip install 'meristem[hf]'`.""",
    "start": f"Measure how long the program takes to start. {_MISSED}",
}
"""What is measured by a verb of its own and without more choices: its help."""


def _verb(name: str) -> Callable[..., None]:
    def measured(repeats: Repeats = 5, as_json: Json = False) -> None:
        _speeds((name,), repeats, as_json)

    return measured


for _name, _help in _SECTIONS.items():
    app.command(_name, help=f"{_help}\n\n\b\nExample:\n  meristem bench {_name} --repeats 9 --json")(_verb(_name))


@app.command()
def prepare(
    size_mb: Annotated[int, typer.Option("--size-mb", min=1, help="Megabytes of text.")] = 256,
    repeats: Repeats = 5,
    as_json: Json = False,
) -> None:
    """Measure preparing a text against reading and writing it, and against the tokenizers library alone.

    Exit code 1 when a target is missed. The text is source code in documents of 256 KiB, made in a temporary folder.

    \b
    Example:
      meristem bench prepare --size-mb 1000 --repeats 3
    """
    _speeds(("prepare",), repeats, as_json, text_bytes=size_mb * 1_000_000)


@app.command()
def evidence(
    config: Annotated[Path, typer.Option("--config", help="YAML file that lists the tables.")] = Path(
        "docs/evidence.yaml"
    ),
    out: Annotated[Path, typer.Option("--out", help="The page; JSON and pictures stand beside it.")] = Path(
        "docs/evidence.md"
    ),
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A table to run; all by default. May be repeated.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at once, one thread each.")] = 1,
    as_json: Json = False,
) -> None:
    """Train variants of one size on the same text from several seeds, and write what each is worth.

    Every variant is tried at several learning rates, and runs with its best. The page gives bits per byte, recall by
    distance, what learning while reading brings, tokens/s and bytes of a session, each with a 95 % interval, and says
    in plain words what has an effect and what has none. What was measured goes into the JSON beside it: run again, it
    measures only what is missing.

    \b
    Examples:
      meristem bench evidence --jobs 2
      meristem bench evidence --only memory --only reading
      meristem bench evidence --config mine.yaml --out mine.md --json
    """
    from meristem.bench.study import study
    from meristem.checkpoint.atomic import require_replaceable

    out.parent.mkdir(parents=True, exist_ok=True)
    require_replaceable(out)
    say = (lambda line: None) if as_json else typer.echo
    command = f"meristem bench evidence --config {config}" + "".join(f" --only {table}" for table in only or ())
    known = study(config, out, only=only or (), jobs=jobs, command=f"{command} --jobs {jobs}", say=say)
    if as_json:
        json_line(known)


@app.command()
def growth(
    config: Annotated[Path, typer.Option("--config", help="YAML file that lists arms and budgets.")] = Path(
        "docs/growth.yaml"
    ),
    out: Annotated[Path, typer.Option("--out", help="The page; JSON and picture stand beside it.")] = Path(
        "docs/growth-evidence.md"
    ),
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at once, one thread each.")] = 1,
    as_json: Json = False,
) -> None:
    """Train small, large and grown models at equal cost from several seeds, and write whether growing pays.

    Exit code 1 where it does not. Every arm is tried at several learning rates, and runs with its best, which falls to
    the end of its budget. The page gives bits per byte with 95 % intervals, differences paired by seed, what is saved
    on the way to the loss of the large model, and says from which budget on growth wins. What was measured goes into
    the JSON beside it: run again, it measures only what is missing.

    \b
    Examples:
      meristem bench growth --jobs 2
      meristem bench growth --config mine.yaml --out mine.md --json
    """
    from meristem.bench.growth_study import growth_study
    from meristem.checkpoint.atomic import require_replaceable

    out.parent.mkdir(parents=True, exist_ok=True)
    require_replaceable(out)
    say = (lambda line: None) if as_json else typer.echo
    command = f"meristem bench growth --config {config} --jobs {jobs}"
    known = growth_study(config, out, jobs=jobs, command=command, say=say)
    if as_json:
        json_line(known)
    if not known["is_worth_it"]:
        raise typer.Exit(1)


@app.command()
def continual(
    config: Annotated[Path, typer.Option("--config", help="YAML file that lists texts, hosts and arms.")] = Path(
        "docs/continual.yaml"
    ),
    out: Annotated[Path, typer.Option("--out", help="The page; JSON and picture stand beside it.")] = Path(
        "docs/continual.md"
    ),
    as_json: Json = False,
) -> None:
    """Train models on one text, let them learn a second, and write what is learned of it and what forgotten.

    All weights learn, or adapters and grown parts of one size beside a frozen host, each with the best of its learning
    rates, from several seeds. With the parts switched off the first text has to be the same bits as before: exit code 1
    where it is not. What was measured goes into the JSON beside the page, and is not measured again. A host of Hugging
    Face needs transformers (meristem[hf]).

    \b
    Examples:
      meristem bench continual
      meristem bench continual --config mine.yaml --out mine.md --json
    """
    from meristem.bench.continual.study import continual as study
    from meristem.bench.continual.study import is_kept
    from meristem.checkpoint.atomic import require_replaceable

    out.parent.mkdir(parents=True, exist_ok=True)
    require_replaceable(out)
    say = (lambda line: None) if as_json else typer.echo
    report = study(config, out, command=f"meristem bench continual --config {config}", say=say)
    if as_json:
        json_line(report)
    if not is_kept(report):
        raise typer.Exit(1)


@app.command()
def stability(
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps of every cell.")] = 300,
    out: Annotated[Path, typer.Option("--out", help="The table.")] = Path("stability.md"),
    as_json: Json = False,
) -> None:
    """Train eight rules in mag, mac and mal with one, two and four levels, and write which stay finite and learn.

    Exit code 1 when a cell is not finite, or fewer than four in five end below where they began. 300 steps take about
    a quarter of an hour on one core.

    \b
    Examples:
      meristem bench stability
      meristem bench stability --steps 100000 --out nightly.md
    """
    from meristem.bench import stability as grid
    from meristem.checkpoint.atomic import require_replaceable, write_atomic

    require_replaceable(out)

    cells = []
    for cell in grid.sweep(steps):
        cells.append(cell)
        write_atomic(out, grid.table(cells, steps).encode())
        if not as_json:
            typer.echo(cell.line)
    if as_json:
        json_line(grid.to_json(cells, steps))
    if not grid.is_stable(cells):
        raise typer.Exit(1)


@app.command()
def serve(
    checkpoint: AnyCheckpoint = None,
    out: Annotated[Path, typer.Option("--out", help="The page; JSON stands beside it.")] = Path("serve-bench.md"),
    session: Annotated[
        list[int] | None,
        typer.Option("--sessions", min=1, help="Sessions that write together; 1, 8 and 64. May be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Tokens that each of them writes.")] = 200,
    long: Annotated[
        int, typer.Option("--long", min=0, help="Tokens that one session reads; 0 leaves it out.")
    ] = 100_000,
    text: Annotated[
        int, typer.Option("--text", min=0, help="Bytes that are read while the most sessions write; 0 leaves it out.")
    ] = 1_000_000,
    requests: Annotated[
        int, typer.Option("--requests", min=0, help="Requests over which memory is watched; 0 leaves it out.")
    ] = 100_000,
    idle: Annotated[
        int, typer.Option("--idle", min=0, help="Sessions on the disk that nobody uses, some 0.6 MB each; 0 for none.")
    ] = 10_000,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measurements behind each median of tokens/s.")] = 3,
    part: Annotated[
        list[str] | None,
        typer.Option("--part", help="Measure this alone, and keep the rest of the page. May be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a server under load from a second process, and write a page. Exit code 1 when a target is missed.

    Tokens/s and the time from token to token of 1, 8 and 64 sessions, beside the same batch without a server; time per
    token at the beginning and at the end of a long session; /healthz while a long text is read; memory over many
    requests; going on with one of many idle sessions, which need 6 GB in $TMPDIR. It takes most of an hour. Its parts
    are speeds, long, health, requests and idle; the page is written after each.

    \b
    Examples:
      meristem bench serve --out docs/serve-bench.md
      meristem bench serve --part speeds --part health --out docs/serve-bench.md
      meristem bench serve --long 10000 --idle 100 --requests 1000 --text 100000
      meristem bench serve runs/latest --sessions 1 --sessions 16 --json
    """
    from meristem.bench.parts import write
    from meristem.bench.serving.study import PARTS, Sizes, measure, page
    from meristem.checkpoint.atomic import require_replaceable

    PARTS.require(part or ())
    out.parent.mkdir(parents=True, exist_ok=True)
    require_replaceable(out)
    sizes = Sizes(tuple(sorted(session or Sizes.sessions)), tokens, long, text, requests, idle, repeats)
    earlier, command = PARTS.read(out) if part else None, _command()
    say = (lambda line: None) if as_json else typer.echo
    parts: list[dict[str, Any]] = []
    for found in measure(sizes, part or [*PARTS.names], checkpoint, say, lambda row: say(_line(row))):
        parts.append(found)
        report = PARTS.report(parts, command, earlier)
        write(out, report, page(report))
    if not parts:
        raise WrongValue("every part is left out. Give one of them a size above 0.", key="part")
    if as_json:
        json_line(report)
    if any(row["is_met"] is False for found in parts for row in found["rows"]):
        raise typer.Exit(1)


def _command() -> str:
    """This command, as it was typed."""
    return " ".join(["meristem", *sys.argv[1:]])


def _speeds(
    names: Sequence[str],
    repeats: int,
    as_json: bool,
    *,
    layers: tuple[list[int] | None, list[int] | None] = (None, None),
    picture: Path | None = None,
    text_bytes: int | None = None,
    page: tuple[Path, Mapping[str, str], bool] | None = None,
) -> None:
    """The rows of these sections as they are measured, then all in one line.

    page: the file to write after each section, why figures fall short, and whether to keep its other parts.
    """
    # torch's profiler, which sees the peaks, writes a line to stderr whenever it starts and stops, unless set before.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from meristem.bench import parts, speeds
    from meristem.bench.suite import measure, to_json
    from meristem.checkpoint.atomic import require_replaceable

    if picture is not None:
        require_replaceable(picture)
    width, window = layers
    rows: list[Row] = []

    def heard(row: "Row") -> None:
        rows.append(row)
        if not as_json:
            typer.echo(_line(row))

    sizes = {"widths": width or (128,), "windows": window or (512,)}
    earlier, found = speeds.PARTS.read(page[0]) if page and page[2] else None, []
    for name in names:
        measuring = measure((name,), n_repeats=repeats, **sizes, text_bytes=text_bytes)
        found.append(parts.measured(name, repeats, measuring, heard))
        if page is not None:
            report = speeds.PARTS.report(found, _command(), earlier)
            parts.write(page[0], report, speeds.page(report, page[1]))
    json_line(to_json(rows, n_repeats=repeats))
    if picture is not None:
        from meristem.bench.picture import plot_speeds

        plot_speeds(picture, [row.figures for row in rows])
    if any(row.is_met is False for row in rows):
        raise typer.Exit(1)


def _line(row: "Row") -> str:
    """One row of the table; rows come minutes apart, so their widths are fixed."""
    number = "-" if row.measured is None else f"{row.measured:{',.0f' if row.measured >= 1000 else '.4g'}}"
    measured = number if row.measured is None else f"{number} {row.unit}"
    target = "" if row.target is None else f"{row.sense} {row.target:g}"
    return f"{row.name:<64} {measured:>18}  {target:<14} {_VERDICTS[row.is_met]:<7} {row.note}".rstrip()
