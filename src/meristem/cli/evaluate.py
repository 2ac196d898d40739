"""`meristem eval`: how well a checkpoint predicts held-out text, and what its memory recalls."""

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from meristem.cli.answer import Json, Overrides, answer, columns, progress_bytes, tell
from meristem.cli.sample import Checkpoint

if TYPE_CHECKING:
    from torch import nn

    from meristem.data.tokenizer import Tokenizer
    from meristem.device.resolve import Device
    from meristem.recipes.config import Config

VERSION: Final = "1"
"""Of the metrics: another number means that older figures do not compare."""

N_WINDOWS: Final = 128
"""Of each task of recall, unless asked otherwise."""

DIRECTIONS: Final = {"nats": "min", "perplexity": "min", "bits_per_byte": "min", "accuracy": "max"}


def evaluate(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    suite: Annotated[Literal["likelihood", "recall"], typer.Option("--suite", help="What to measure.")] = "likelihood",
    max_windows: Annotated[
        int | None,
        typer.Option(
            "--max-windows",
            min=1,
            help=f"Windows to read; by default the whole held-out text, or {N_WINDOWS} of each task of recall.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint: how well it predicts held-out text, or what it recalls of generated windows.

    likelihood gives nats per token, perplexity and bits per byte. recall asks for random ids that stood earlier in the
    window (values of keys, a copied sequence, a needle at a distance), as far as data.window and the vocabulary reach,
    and gives the share of right answers and nats per answer.

    \b
    Examples:
      meristem eval runs/latest --suite likelihood
      meristem eval runs/latest data.source=other.txt data.validation=0.9 --json
      meristem eval runs/latest --suite recall data.window=1024
    """
    from meristem.checkpoint.store import find
    from meristem.device.resolve import resolve
    from meristem.models.load import load
    from meristem.recipes.config import load_config
    from meristem.recipes.resume import as_it_was

    found = find(checkpoint, tell)
    config = load_config(str(found.path / "config.yaml"), overrides or ()).tree
    model, tokenizer = load(found.path)
    device = resolve(as_it_was(config.device, found), tell)
    model = model.to(device.device)
    if suite == "recall":
        tasks = _recall(model, tokenizer, config, device, max_windows or N_WINDOWS)
    else:
        tasks = [_likelihood(model, tokenizer, config, device, max_windows, is_its_own=not overrides)]
    summary = {"schema": "meristem.evaluation/1", "checkpoint": str(found.path), "suite": suite, "tasks": tasks}
    answer(summary, as_json, _words)


def _likelihood(
    model: "nn.Module",
    tokenizer: "Tokenizer",
    config: "Config",
    device: "Device",
    max_windows: int | None,
    *,
    is_its_own: bool,
) -> dict[str, Any]:
    """One task, on the text that it was trained beside (``is_its_own``), or on another."""
    from meristem.data.prepare import prepare
    from meristem.evaluate.likelihood import likelihood
    from meristem.train.loss import cross_entropy

    with progress_bytes("preparing") as progress:
        # Its own text has been prepared already; another text is cut by the checkpoint's tokenizer.
        corpus = prepare(config.data, config.tokenizer if is_its_own else tokenizer, tell, progress)
        if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
            corpus = prepare(config.data, tokenizer, tell, progress)
    measured = likelihood(
        model,
        corpus,
        "val",
        window=config.data.window,
        batch=config.evaluate.batch,
        max_windows=max_windows,
        device=device,
        loss=cross_entropy,
    )
    figures = {name: getattr(measured, name) for name in ("nats", "perplexity", "bits_per_byte")}
    return _task("likelihood", corpus.fingerprint, measured.n_tokens, figures)


def _recall(
    model: "nn.Module", tokenizer: "Tokenizer", config: "Config", device: "Device", n_windows: int
) -> list[dict[str, Any]]:
    """Every task of recall that fits, its ids drawn from the vocabulary of the checkpoint."""
    from meristem.evaluate.recall import HELD_OUT, recall, suite
    from meristem.train.loss import cross_entropy

    tasks = []
    for task in suite(tokenizer.vocab_size, config.data.window):
        questions = task.questions(n_windows, HELD_OUT)
        measured = recall(model, questions, batch=config.evaluate.batch, device=device, loss=cross_entropy)
        figures = {"accuracy": measured.accuracy, "nats": measured.nats}
        tasks.append(_task(task.name, questions.fingerprint, measured.n, figures))
    return tasks


def _task(name: str, dataset_fingerprint: str, n: int, figures: dict[str, float]) -> dict[str, Any]:
    """What one task came to; ``n`` tokens were predicted."""
    metrics = {
        metric: {"value": value, "version": VERSION, "direction": DIRECTIONS[metric]}
        for metric, value in figures.items()
    }
    return {"name": name, "dataset_fingerprint": dataset_fingerprint, "n": n, "metrics": metrics}


def _words(summary: dict[str, Any]) -> list[str]:
    rows = [
        (task["name"], name, metric["value"], task["n"])
        for task in summary["tasks"]
        for name, metric in task["metrics"].items()
    ]
    return [summary["checkpoint"], *columns(("task", "metric", "value", "tokens"), rows)]
