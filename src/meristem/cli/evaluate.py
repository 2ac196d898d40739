"""`meristem eval`: how well a checkpoint predicts held-out text, recalls, gains by reading, and answers questions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from meristem.cli.answer import Json, Overrides, answer, columns, tell
from meristem.cli.sample import AnyCheckpoint
from meristem.cli.suites import N_WINDOWS, SUITES, Learn, Loaded
from meristem.errors import WrongValue

if TYPE_CHECKING:
    from meristem.checkpoint.store import Checkpoint as Found
    from meristem.evaluate.asking import Reading
    from meristem.evaluate.metric import Prediction
    from meristem.evaluate.results import Shard
    from meristem.evaluate.tasks import Task

DRAWN: Final = ("adaptation", "remember")
"""Suites with a picture."""

Picture = Annotated[
    Path | None,
    typer.Option(
        "--picture",
        help="Where adaptation draws bits per byte over the tokens read, and remember what is remembered over the "
        "distance, as a PNG.",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="A task file (YAML), or a task of a plug-in; may be given several times. Instead of --suite.",
        show_default=False,
    ),
]
Harness = Annotated[
    list[str] | None,
    typer.Option(
        "--lm-eval",
        help="A task file of lm-eval, or the name of one of its tasks, whose data is then downloaded.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="A new directory for evaluation.json, scores.csv and, of tasks, predictions.ndjson.",
        show_default=False,
    ),
]
ShardText = Annotated[
    str | None,
    typer.Option("--shard", help="Ask the examples of one part alone, as 1/4; --merge joins them.", show_default=False),
]
Suite = Annotated[
    Literal["likelihood", "recall", "adaptation", "remember"], typer.Option("--suite", help="What to measure.")
]
LearnName = Annotated[
    Learn | None,
    typer.Option(
        "--learn",
        help="What learns while it reads: nothing, the memory, feed-forward levels or weights as well. By default "
        "the memory; adaptation compares off with memory.",
        show_default=False,
    ),
]
MaxWindows = Annotated[
    int | None,
    typer.Option(
        "--max-windows",
        min=1,
        max=1_000_000,
        help=f"Sequences to read; by default the whole held-out text, or {N_WINDOWS} of each task of recall. "
        "Documents of adaptation, texts of remember; by default 32. The first examples of each --task.",
        show_default=False,
    ),
]
IsMerge = Annotated[
    bool, typer.Option("--merge", help="Join the directories of all shards, which are given in place of CKPT.")
]
IsContinual = Annotated[
    bool,
    typer.Option(
        "--continual",
        help="Average accuracy, backward transfer and forgetting, from directories of the same tasks after each of "
        "them was learned, in place of CKPT.",
    ),
]
Score = Annotated[
    str | None, typer.Option("--metric", help="The score of --continual; by default the first.", show_default=False)
]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where it runs: auto, cpu, mps, cuda or cuda:N. By default as the run was set.",
        show_default=False,
    ),
]


def evaluate(
    checkpoint: AnyCheckpoint = None,
    overrides: Overrides = None,
    suite: Suite = "likelihood",
    task: Tasks = None,
    lm_eval: Harness = None,
    learn: LearnName = None,
    max_windows: MaxWindows = None,
    picture: Picture = None,
    out: Out = None,
    shard: ShardText = None,
    merge: IsMerge = False,
    continual: IsContinual = False,
    metric: Score = None,
    device_name: DeviceName = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint: how well it predicts held-out text, what it recalls, what it gains by reading, or how it
    answers questions of yours.

    likelihood gives nats per token, perplexity and bits per byte, once of sequences that are each read from a fresh
    memory, and once of whole documents through which the memory is carried. recall tests random ids that stood earlier
    in the window (values of keys, a copied sequence, a needle at a distance), as far as data.seq_len and the
    vocabulary allow, and gives the share of right predictions and their nats. adaptation reads the beginnings of long
    documents, four windows each: the second half against the first, and all of it a second time with the memory
    carried over or reset; and the longest document to its end: bits per byte of its first 1024, 2048, 4096, ... tokens.
    With --learn weights it is read without a memory that is written, with one, and with weights that learn.
    remember tells eight facts in words of `data.source=notebook` that were held out, and asks after 1, 5, 10 and 50
    attention spans of prose: with the memory, with it frozen, with all that was read dropped, and with weights that
    learn; and with the memory in words that were trained on too. It also reads held-out documents of that text: how
    many values were predicted where they came back, by distance in bytes.
    --task asks the examples of a file: the likelihood of answers, the likeliest of choices, or generated texts.

    \b
    Examples:
      meristem eval --suite remember --picture remembered.png
      meristem eval runs/latest --suite likelihood
      meristem eval runs/latest data.source=other.txt data.validation=0.9 --json
      meristem eval runs/latest --suite recall data.seq_len=1024
      meristem eval runs/latest --suite adaptation --learn weights learn.which=head
      meristem eval runs/latest --suite remember --max-windows 8
      meristem eval runs/latest --task capitals.yaml --out capitals
      meristem eval runs/latest --lm-eval choose.yaml
      meristem eval runs/latest --task capitals.yaml --shard 1/2 --out shards/1
      meristem eval --merge shards/1 shards/2 --out whole
      meristem eval --continual after/1 after/2 --metric accuracy
    """
    _require_fitting(
        {"suite": suite, "task": task, "picture": picture, "shard": shard, "merge": merge, "continual": continual}
        | {
            "metric": metric,
            "lm-eval": lm_eval,
            "learn": learn,
            "max-windows": max_windows,
            "device": device_name,
            "out": out,
        }
    )
    if merge or continual:
        places = [Path(place) for place in (checkpoint, *(overrides or ())) if place is not None]
        answer(_joined(places, metric if continual else None, out, is_merge=merge), as_json, _words)
        return
    if checkpoint is not None and "=" in checkpoint.name and not checkpoint.exists():
        checkpoint, overrides = None, [str(checkpoint), *(overrides or ())]
    chosen = _chosen(task or (), lm_eval or (), max_windows, shard)
    if out is not None:
        from meristem.evaluate.results import require_free

        require_free(out)
    found, loaded = _opened(checkpoint, overrides or (), device_name, picture)
    measured = (
        {"suite": suite, "tasks": SUITES[suite](loaded, learn, max_windows)}
        if chosen is None
        else _asked(loaded, learn or "memory", chosen, out)
    )
    answer(_whole(found, measured, out), as_json, _words)


def _whole(found: "Found", measured: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """The summary of what was measured of a checkpoint, which is written as well where there is a place for it."""
    summary = {"schema": "meristem.evaluation/1", "checkpoint": str(found.path)}
    summary |= {"checkpoint_sha256": found.manifest["manifest_sha256"]} | measured
    if out is not None:
        from meristem.evaluate.results import write_summary

        write_summary(out, summary)
    return summary


def _require_fitting(options: dict[str, Any]) -> None:
    """Refuse, as a WrongValue, an option that nothing would read."""
    given = {name for name, value in options.items() if value not in (None, False, [])}
    suite = options["suite"]
    drawn = " and ".join(DRAWN)
    asked = sorted(given & {"task", "lm-eval"})
    if "picture" in given and (suite not in DRAWN or asked):
        of = f"--{asked[0]} is given" if asked else f"--suite is {suite}"
        raise WrongValue(f"--picture draws {drawn}, and {of}. Leave it out.", key="picture")
    ways = given & {"merge", "continual"}
    if len(ways) > 1:
        raise WrongValue("--merge and --continual are two things. Give one of them.", key="merge")
    read = {"merge": {"out"}, "continual": {"out", "metric"}}
    for way in ways:
        if unread := sorted(given - {"suite", way} - read[way]):
            raise WrongValue(
                f"--{way} reads directories of results, and no --{unread[0]}. Leave it out.", key=unread[0]
            )
    if not ways and "metric" in given:
        raise WrongValue("--metric chooses the score of --continual. Leave it out.", key="metric")
    if "shard" in given and "task" not in given:
        raise WrongValue("--shard divides the examples of --task, and none is given. Leave it out.", key="shard")
    if "shard" in given and "lm-eval" in given:
        raise WrongValue("--shard divides the examples of --task, not those of --lm-eval. Leave it out.", key="shard")
    if "shard" in given and "out" not in given:
        raise WrongValue("a shard is merged from its directory, and no --out is given. Give one.", key="out")


@dataclass(frozen=True)
class _Chosen:
    """What is asked: tasks, which part of their examples, tasks of lm-eval, and how many examples of those."""

    tasks: "Sequence[Task]"
    shard: "Shard"
    harness: Sequence[str]
    most: int | None


def _chosen(places: Sequence[str], harness: Sequence[str], most: int | None, shard: str | None) -> _Chosen | None:
    """What is asked, with metrics that fit and libraries that are here; None for nothing."""
    if not places and not harness:
        return None
    from meristem.evaluate.results import Shard, shard_of
    from meristem.evaluate.tasks import open_task

    own = Shard() if shard is None else shard_of(shard)
    tasks = [open_task(place).first(most) for place in places]
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise WrongValue(f"two tasks are called '{twice[0]}'. Give one another name.", key="task", value=twice[0])
    if harness:
        from meristem.evaluate.harness import require_library

        require_library(harness)
    return _Chosen(tasks, own, harness, most)


def _asked(loaded: Loaded, learn: Learn, chosen: _Chosen, out: Path | None) -> dict[str, Any]:
    """What the summary says of tasks; their predictions are written before anything is made of them."""
    from meristem.evaluate.asking import Reading, ask
    from meristem.evaluate.results import entry, write_predictions

    config, shard = loaded.config, chosen.shard
    how = loaded.reading(learn, config.eval.batch_size)
    reading = Reading(how["reader"], loaded.tokenizer, loaded.device, how["batch"], config.data.seq_len)
    found: dict[str, list[Prediction]] = {}
    for task in chosen.tasks:
        numbers = shard.numbers(len(task.examples))
        found[task.name] = list(_shown(task.name, ask(reading, task, numbers), len(numbers)))
        if out is not None:
            write_predictions(out, (one for predictions in found.values() for one in predictions))
    entries = [entry(task, found[task.name], shard) for task in chosen.tasks]
    if chosen.harness:
        from meristem.evaluate.harness import examine

        entries += examine(reading, chosen.harness, chosen.most)
    described = {"reading": _described(reading, learn, loaded), "shard": str(shard)}
    return {"suite": "tasks", **described, "tasks": entries}


def _described(reading: "Reading", learn: Learn, loaded: Loaded) -> dict[str, Any]:
    """What the predictions depend on besides checkpoint and tasks."""
    from meristem.device.resolve import NAMES

    return {
        "learn": learn,
        "learning": loaded.config.learn.model_dump(mode="json") if learn == "weights" else None,
        "device": loaded.device.device.type,
        "dtype": NAMES[loaded.device.dtype],
        "batch": reading.batch,
        "piece": reading.piece,
    }


def _shown(name: str, predictions: "Iterator[Prediction]", n: int) -> "Iterator[Prediction]":
    """The same, with a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(predictions, name, total=n, console=console, transient=True, disable=not console.is_terminal)


def _joined(places: Sequence[Path], metric: str | None, out: Path | None, *, is_merge: bool) -> dict[str, Any]:
    """The summary that shards, or evaluations after each task, come to together."""
    from meristem.evaluate import results

    way = "--merge" if is_merge else "--continual"
    if not places:
        raise WrongValue(f"{way} reads directories of results, and none is given. Give all of them.", key=way)
    if len(set(places)) < len(places):
        raise WrongValue(f"a directory is given to {way} twice. Give each once.", key=way)
    summary, predictions = results.merge(places) if is_merge else (results.continual(places, metric), [])
    if out is not None:
        results.require_free(out)
        if is_merge:
            results.write_predictions(out, predictions)
        results.write_summary(out, summary)
    return summary


def _opened(
    checkpoint: Path | None, overrides: Sequence[str], device_name: str | None, picture: Path | None
) -> "tuple[Found, Loaded]":
    """A checkpoint, or the one that comes along, and its model with the settings that it is measured under.

    Of the text that was made for the latter 2 MB are made again, not 200.
    """
    from meristem.checkpoint.store import find
    from meristem.device.resolve import resolve
    from meristem.models.shipped import DIRECTORY
    from meristem.runs.config import load_config
    from meristem.runs.open import load_opened
    from meristem.runs.resume import from_checkpoint

    found = find(checkpoint or DIRECTORY, tell)
    place, text = str(found.path / "config.yaml"), found.file("config.yaml").decode()
    less = ["data.notebook.size_bytes=2000000"] if checkpoint is None else []
    told = [*less, *overrides, *([f"device.device={device_name}"] if device_name is not None else [])]
    config = load_config(place, told, text=text).tree
    model, tokenizer = load_opened(found)
    device = resolve(from_checkpoint(config.device, found), tell)
    is_its_own = checkpoint is not None and not overrides
    return found, Loaded(model.to(device.device), tokenizer, config, device, is_its_own, picture)


def _words(summary: dict[str, Any]) -> list[str]:
    rows = [
        (task["name"], name, metric["value"], task["n"])
        for task in summary["tasks"]
        for name, metric in task["metrics"].items()
    ]
    return [summary["checkpoint"], *columns(("task", "metric", "value", "n"), rows)]
