"""`meristem eval`: how well a checkpoint predicts held-out text."""

from typing import Annotated, Any, Final, Literal

import typer

from meristem.cli.answer import Json, Overrides, answer, columns, progress_bytes, tell
from meristem.cli.sample import Checkpoint

VERSION: Final = "1"
"""Of the metrics: another number means that older figures do not compare."""


def evaluate(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    suite: Annotated[Literal["likelihood"], typer.Option("--suite", help="What to measure.")] = "likelihood",
    max_windows: Annotated[
        int | None, typer.Option("--max-windows", min=1, help="Windows to read; all by default.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint on held-out text: nats per token, perplexity, bits per byte.

    \b
    Examples:
      meristem eval runs/latest --suite likelihood
      meristem eval runs/latest data.source=other.txt data.validation=0.9 --json
    """
    from meristem.checkpoint.store import find
    from meristem.data.prepare import prepare
    from meristem.device.resolve import resolve
    from meristem.evaluate.likelihood import likelihood
    from meristem.models.load import load
    from meristem.recipes.config import load_config
    from meristem.recipes.resume import as_it_was
    from meristem.train.loss import cross_entropy

    found = find(checkpoint, tell)
    config = load_config(str(found.path / "config.yaml"), overrides or ()).tree
    model, tokenizer = load(found.path)
    device = resolve(as_it_was(config.device, found), tell)
    with progress_bytes("preparing") as progress:
        # Its own text has been prepared already; another text is cut by the checkpoint's tokenizer.
        corpus = prepare(config.data, tokenizer if overrides else config.tokenizer, tell, progress)
        if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
            corpus = prepare(config.data, tokenizer, tell, progress)
    measured = likelihood(
        model.to(device.device),
        corpus,
        "val",
        window=config.data.window,
        batch=config.evaluate.batch,
        max_windows=max_windows,
        device=device,
        loss=cross_entropy,
    )
    figures = {name: getattr(measured, name) for name in ("nats", "perplexity", "bits_per_byte")}
    task = {
        "name": suite,
        "dataset_fingerprint": corpus.fingerprint,
        "n": measured.n_tokens,
        "metrics": {name: {"value": value, "version": VERSION, "direction": "min"} for name, value in figures.items()},
    }
    summary = {"schema": "meristem.evaluation/1", "checkpoint": str(found.path), "suite": suite, "tasks": [task]}
    answer(summary, as_json, _words)


def _words(summary: dict[str, Any]) -> list[str]:
    rows = [
        (task["name"], name, metric["value"], task["n"])
        for task in summary["tasks"]
        for name, metric in task["metrics"].items()
    ]
    return [summary["checkpoint"], *columns(("task", "metric", "value", "tokens"), rows)]
