"""`meristem eval`: how well a checkpoint predicts held-out text, what its memory recalls, what it gains by reading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from meristem.cli.answer import Json, Overrides, answer, columns, progress_bytes, tell
from meristem.cli.sample import AnyCheckpoint
from meristem.errors import CapabilityError, WrongValue

if TYPE_CHECKING:
    from torch import nn

    from meristem.checkpoint.store import Checkpoint as Found
    from meristem.data.corpus import Corpus
    from meristem.data.tokenizer import Tokenizer
    from meristem.device.resolve import Device
    from meristem.runs.config import Config

VERSION: Final = "1"
"""Of the metrics: another number means that older figures do not compare."""

N_WINDOWS: Final = 128
"""Of each task of recall, unless given."""

SMALLER_IS_BETTER: Final = ("nats", "perplexity", "bits_per_byte")
"""How the names of metrics end of which less is better; of a gain, as of an accuracy, more is."""

DRAWN: Final = ("adaptation", "remember")
"""Suites with a picture."""

Learn = Literal["none", "memory", "levels", "weights"]


Picture = Annotated[
    Path | None,
    typer.Option(
        "--picture",
        help="Where adaptation draws bits per byte over the tokens read, and remember what is remembered over the "
        "distance, as a PNG.",
        show_default=False,
    ),
]


def evaluate(
    checkpoint: AnyCheckpoint = None,
    overrides: Overrides = None,
    suite: Annotated[
        Literal["likelihood", "recall", "adaptation", "remember"], typer.Option("--suite", help="What to measure.")
    ] = "likelihood",
    learn: Annotated[
        Learn | None,
        typer.Option(
            "--learn",
            help="What learns while it reads: nothing, the memory, feed-forward levels or weights as well. By default "
            "the memory; adaptation compares off with memory.",
            show_default=False,
        ),
    ] = None,
    max_windows: Annotated[
        int | None,
        typer.Option(
            "--max-windows",
            min=1,
            max=1_000_000,
            help=f"Sequences to read; by default the whole held-out text, or {N_WINDOWS} of each task of recall. "
            "Documents of adaptation, texts of remember; by default 32.",
            show_default=False,
        ),
    ] = None,
    picture: Picture = None,
    device_name: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="Where it runs: auto, cpu, mps, cuda or cuda:N. By default as the run was set.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint: how well it predicts held-out text, what it recalls, or what it gains by reading.

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

    \b
    Examples:
      meristem eval --suite remember --picture remembered.png
      meristem eval runs/latest --suite likelihood
      meristem eval runs/latest data.source=other.txt data.validation=0.9 --json
      meristem eval runs/latest --suite recall data.seq_len=1024
      meristem eval runs/latest --suite adaptation --learn weights learn.which=head
      meristem eval runs/latest --suite remember --max-windows 8
    """
    if checkpoint is not None and "=" in checkpoint.name and not checkpoint.exists():
        checkpoint, overrides = None, [str(checkpoint), *(overrides or ())]
    if picture is not None and suite not in DRAWN:
        drawn = " and ".join(DRAWN)
        raise WrongValue(f"--picture draws {drawn}, and --suite is {suite}. Leave it out.", key="picture")
    found, loaded = _opened(checkpoint, overrides or (), device_name, picture)
    suites = {"likelihood": _likelihood, "recall": _recall, "adaptation": _adaptation, "remember": _remember}
    tasks = suites[suite](loaded, learn, max_windows)
    summary = {"schema": "meristem.evaluation/1", "checkpoint": str(found.path), "suite": suite, "tasks": tasks}
    answer(summary, as_json, _words)


def _opened(
    checkpoint: Path | None, overrides: Sequence[str], device_name: str | None, picture: Path | None
) -> "tuple[Found, _Loaded]":
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
    return found, _Loaded(model.to(device.device), tokenizer, config, device, is_its_own, picture)


@dataclass(frozen=True)
class _Loaded:
    """What is measured, and on what, and where it is drawn.

    is_its_own: on the text that it was trained beside, or on another.
    """

    model: "nn.Module"
    tokenizer: "Tokenizer"
    config: "Config"
    device: "Device"
    is_its_own: bool
    picture: Path | None

    def corpus(self) -> "Corpus":
        """The text; its own has been prepared already, another is cut by the checkpoint's tokenizer."""
        from meristem.data.prepare import prepare

        data, tokenizer = self.config.data, self.tokenizer
        with progress_bytes("preparing") as progress:
            corpus = prepare(data, self.config.tokenizer if self.is_its_own else tokenizer, tell, progress)
            if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
                corpus = prepare(data, tokenizer, tell, progress)
        return corpus

    def reading(self, learn: Learn, batch: int) -> dict[str, Any]:
        """How it is read: who reads, how many texts at once, on which device, and what counts."""
        from meristem.models.online import online_reader
        from meristem.train.loss import cross_entropy

        learning = self.config.learn
        reader = online_reader(self.model, learn, cross_entropy, learning)
        # Levels learn from one text, in a copy of their own, and so do most weights.
        is_alone = learn == "levels" or (learn == "weights" and learning.which in ("mlp", "all"))
        return {
            "reader": reader,
            "batch": 1 if is_alone else batch,
            "device": self.device,
            "loss": cross_entropy,
        }


def _likelihood(loaded: _Loaded, learn: Learn | None, max_windows: int | None) -> list[dict[str, Any]]:
    """Every sequence from a fresh memory, and whole documents through which it is carried."""
    from meristem.data.stream import held_out, held_out_documents
    from meristem.evaluate.likelihood import likelihood

    how = loaded.reading(learn or "memory", loaded.config.eval.batch_size)
    corpus, reader, tasks = loaded.corpus(), how.pop("reader"), []
    cut = {"window": loaded.config.data.seq_len, "batch": how.pop("batch"), "max_windows": max_windows}
    for name, batches in (("likelihood", held_out), ("likelihood/documents", held_out_documents)):
        measured = likelihood(reader, batches(corpus, "val", **cut), **how)
        figures = {metric: getattr(measured, metric) for metric in ("nats", "perplexity", "bits_per_byte")}
        tasks.append(_task(name, corpus.fingerprint, measured.n_tokens, figures))
    return tasks


def _recall(loaded: _Loaded, learn: Learn | None, n_windows: int | None) -> list[dict[str, Any]]:
    """Every task of recall that fits, its ids drawn from the vocabulary of the checkpoint."""
    from meristem.evaluate.recall import HELD_OUT, recall, suite

    how = loaded.reading(learn or "memory", loaded.config.eval.batch_size)
    reader, tasks = how.pop("reader"), []
    for task in suite(loaded.tokenizer.vocab_size, loaded.config.data.seq_len):
        questions = task.questions(n_windows or N_WINDOWS, HELD_OUT)
        measured = recall(reader, questions, **how)
        figures = {"accuracy": measured.accuracy, "nats": measured.nats}
        tasks.append(_task(task.name, questions.fingerprint, measured.n, figures))
    return tasks


def _adaptation(loaded: _Loaded, learn: Learn | None, n_documents: int | None) -> list[dict[str, Any]]:
    """A task for every way to read, and for every point of the longest document; all read the same."""
    from meristem.evaluate.adaptation import N_DOCUMENTS, adaptation, documents, longest, reading
    from meristem.evaluate.adaptation import N_WINDOWS as WINDOWS
    from meristem.evaluate.picture import Point, draw_reading

    config = loaded.config
    length = WINDOWS * config.data.seq_len
    both: tuple[Learn, ...] = ("none", "memory")
    ways = both if learn is None else (*both, learn) if learn == "weights" else (learn,)
    readings = {way: loaded.reading(way, config.eval.batch_size) for way in ways}
    corpus = loaded.corpus()
    chosen, whole = documents(corpus, "val", length=length, most=n_documents or N_DOCUMENTS), longest(corpus, "val")
    tasks, points = [], []
    curves: dict[str, list[Point]] = {}
    for way, how in readings.items():
        reader, batch = how.pop("reader"), how.pop("batch")
        measured = adaptation(reader, chosen, piece=config.data.seq_len, batch=batch, **how)
        tasks.append(_task(f"adaptation/{way}", chosen.fingerprint, measured.whole.n_tokens, measured.figures()))
        read = reading(reader, whole, piece=config.data.seq_len, **how)
        for n, found in read:
            figures = {"bits_per_byte": found.bits_per_byte}
            points.append(_task(f"reading/{way}/{n}", whole.fingerprint, found.n_tokens, figures))
        curves[way] = [(n, found.bits_per_byte) for n, found in read]
    if loaded.picture is not None:
        draw_reading(loaded.picture, curves)
    return tasks + points


def _remember(loaded: _Loaded, learn: Learn | None, n_texts: int | None) -> list[dict[str, Any]]:
    """A task for every way to remember and every distance; all read the same."""
    from meristem.evaluate import remember as suite
    from meristem.evaluate.picture import Share, draw_remembered

    data, model = loaded.config.data, loaded.config.model
    span = (model.sliding_window if "sliding_window" in model.reads else None) or data.seq_len
    how_many = span, n_texts or suite.N_TEXTS, data.validation
    texts = {"remember": suite.tell_facts(loaded.tokenizer, *how_many)}
    in_known_words = {"remember-known": suite.tell_facts(loaded.tokenizer, *how_many, is_new=False)}
    chosen = suite.held_out_documents(data.notebook, data.validation, n_texts or suite.N_DOCUMENTS)
    tasks: list[dict[str, Any]] = []
    told: dict[str, list[Share]] = {}
    returned: dict[str, list[Share]] = {}
    for name, mode in suite.MODES.items():
        if learn not in (None, mode.learn):
            continue
        try:
            how = loaded.reading(mode.learn, loaded.config.eval.batch_size) | {"piece": max(data.seq_len, suite.PIECE)}
        except CapabilityError:
            # A model without weights that learn while it reads has one way less, unless that is the one given.
            if learn is not None:
                raise
            continue
        reader, batch = how.pop("reader"), how.pop("batch")
        how.pop("loss")
        for task, facts in (texts | in_known_words if name == "memory" else texts).items():
            found = suite.remember(reader, facts, is_reset=mode.is_reset, batch=batch, **how)
            label = name if task in texts else f"{name}, known words"
            for times, measured in zip(suite.SPANS, found, strict=True):
                figures = measured.figures()
                told.setdefault(label, []).append((span * times, *_interval(figures, "choice")))
                tasks.append(_task(f"{task}/{name}/{times}", facts.fingerprint, measured.n, figures))
        if mode.is_reset:
            continue
        fingerprint = suite.fingerprint(chosen)
        for distance, (n, n_right) in suite.mentions(reader, chosen, loaded.tokenizer, **how).items():
            figures = suite.share("greedy", n_right, n)
            returned.setdefault(name, []).append((distance, *_interval(figures, "greedy")))
            tasks.append(_task(f"mentions/{name}/{distance}", fingerprint, n, figures))
    if loaded.picture is not None:
        draw_remembered(loaded.picture, told, returned, chance=1 / suite.N_FACTS)
    return tasks


def _interval(figures: Mapping[str, float], name: str) -> tuple[float, float, float]:
    return figures[name], figures[f"{name}_low"], figures[f"{name}_high"]


def _task(name: str, dataset_fingerprint: str, n: int, figures: dict[str, float]) -> dict[str, Any]:
    """What one task came to; ``n`` tokens were predicted."""
    metrics = {
        metric: {"value": value, "version": VERSION, "direction": _direction(metric)}
        for metric, value in figures.items()
    }
    return {"name": name, "dataset_fingerprint": dataset_fingerprint, "n": n, "metrics": metrics}


def _direction(metric: str) -> str:
    is_cost = metric.endswith(SMALLER_IS_BETTER) and not metric.startswith("gain")
    return "min" if is_cost else "max"


def _words(summary: dict[str, Any]) -> list[str]:
    rows = [
        (task["name"], name, metric["value"], task["n"])
        for task in summary["tasks"]
        for name, metric in task["metrics"].items()
    ]
    return [summary["checkpoint"], *columns(("task", "metric", "value", "n"), rows)]
