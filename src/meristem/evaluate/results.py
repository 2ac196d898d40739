"""What an evaluation leaves: a prediction for each example, a row for each score, and a summary of both.

A shard leaves predictions and no scores; the shards of an evaluation merge to what one run of the whole leaves, to the
bit, since scores are made of predictions alone.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.checkpoint.atomic import require_replaceable, sha256, write_atomic
from meristem.data import files
from meristem.errors import BadRecords, DataError, RunError, WrongValue
from meristem.evaluate.continual import measure_continual
from meristem.evaluate.metric import Metric, Prediction, measure, prediction_of
from meristem.evaluate.metrics import metrics
from meristem.evaluate.tasks import Task
from meristem.plugins import spelled
from meristem.sinks.jsonl import read_records

SCHEMA: Final = "meristem.evaluation/1"
SUMMARY: Final = "evaluation.json"
PREDICTIONS: Final = "predictions.ndjson"
SCORES: Final = "scores.csv"
COLUMNS: Final = ("task", "metric", "value", "version", "direction", "n", "dataset_fingerprint")
"""Of the table of scores."""


@dataclass(frozen=True)
class Shard:
    """One of ``of`` parts of every task: the examples ``number - 1``, ``number - 1 + of``, and so on, from 0."""

    number: int = 1
    of: int = 1

    def numbers(self, n: int) -> range:
        """Which of ``n`` examples are its own."""
        return range(self.number - 1, n, self.of)

    @property
    def is_whole(self) -> bool:
        """Whether it is all there is."""
        return self.of == 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def shard_of(text: str) -> Shard:
    """The shard that ``2/4`` means; WrongValue for what means none."""
    number, _, of = text.partition("/")
    # Digits of other scripts are no numbers here, and neither are signs.
    if all(part.isascii() and part.isdecimal() and len(part) < 7 for part in (number, of)):
        if 1 <= int(number) <= int(of):
            return Shard(int(number), int(of))
    raise WrongValue(f"'{text}' is no shard. Write the second of four as 2/4, counted from 1.", value=text)


def entry(task: Task, predictions: Sequence[Prediction], shard: Shard) -> dict[str, Any]:
    """What the summary says of a task; a shard has no metrics."""
    described = {
        "name": task.name,
        "kind": task.kind,
        "dataset_fingerprint": task.fingerprint,
        "n": len(predictions),
        "n_examples": len(task.examples),
        "measures": [spelling for spelling, _ in task.measures],
    }
    return described | {"metrics": _measured(task.name, task.measures, predictions) if shard.is_whole else {}}


def _measured(
    task: str, measures: Iterable[tuple[str, Metric]], predictions: Sequence[Prediction]
) -> dict[str, dict[str, Any]]:
    return {
        name: figure(value, metric.version, metric.direction) | {"range": [_finite(metric.low), _finite(metric.high)]}
        for _, metric in measures
        for name, value in measure(metric, predictions, task).items()
    }


def figure(value: float, version: str, direction: str) -> dict[str, Any]:
    """What a summary says of a metric."""
    return {"value": value, "version": version, "direction": direction}


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None


def require_free(out: Path) -> None:
    """Make the directory of results, or say in a RunError why it cannot be; one with results stays as it is."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as cause:
        raise RunError(f"{out} cannot be made: {cause.strerror}. Choose another directory.", path=str(out)) from cause
    if (out / SUMMARY).exists():
        raise RunError(f"{out} holds an evaluation already. Give another directory, or remove it.", path=str(out))
    for name in (PREDICTIONS, SCORES, SUMMARY):
        require_replaceable(out / name)


def write_predictions(out: Path, predictions: Iterable[Prediction]) -> None:
    """Put the predictions of all tasks, which come in the order of their tasks and examples, into a directory."""
    lines = [orjson.dumps(found.to_json(), option=orjson.OPT_APPEND_NEWLINE) for found in predictions]
    write_atomic(out / PREDICTIONS, b"".join(lines))


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Put the summary of an evaluation and the table of its scores into a directory."""
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(COLUMNS)
    for task in summary["tasks"]:
        for name, found in task["metrics"].items():
            row = {"task": task["name"], "metric": name, **found, "n": task["n"]}
            row["dataset_fingerprint"] = task["dataset_fingerprint"]
            table.writerow([row[column] for column in COLUMNS])
    write_atomic(out / SCORES, rows.getvalue().encode())
    write_atomic(out / SUMMARY, orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_summary(out: Path) -> dict[str, Any]:
    """The summary in a directory of results; BadRecords where it is none."""
    path = out / SUMMARY
    try:
        found = orjson.loads(files.read(path))
    except orjson.JSONDecodeError as cause:
        raise BadRecords(f"{path} is no JSON: {cause}. Evaluate again.", path=str(path)) from None
    tasks = found.get("tasks") if isinstance(found, dict) and found.get("schema") == SCHEMA else None
    if not isinstance(tasks, list) or not all(map(_is_task, tasks)):
        raise BadRecords(f"{path} is no summary of the schema {SCHEMA}. Evaluate again.", path=str(path))
    return found


def _is_task(found: object) -> bool:
    return isinstance(found, dict) and isinstance(found.get("metrics"), dict) and isinstance(found.get("name"), str)


def merge(places: Sequence[Path]) -> tuple[dict[str, Any], list[Prediction]]:
    """The summary and the predictions of the whole, from directories of all its shards, in any order.

    DataError where one is missing, comes twice, or is of another checkpoint, task or way to read.
    """
    summaries = {place: read_summary(place) for place in places}
    first, whole = places[0], summaries[places[0]]
    for place, found in summaries.items():
        if "shard" not in found or not all("measures" in task for task in found["tasks"]):
            raise DataError(
                f"{place} holds an evaluation without parts: only that of --task has any. Give directories of --shard.",
                path=str(place),
            )
    shards = {place: shard_of(found["shard"]) for place, found in summaries.items()}
    for place, found in summaries.items():
        if differing := [key for key in ("suite", "checkpoint_sha256", "reading") if found.get(key) != whole.get(key)]:
            raise DataError(
                f"{place} and {first} differ in {differing[0]}: {found.get(differing[0])!r:.80} and "
                f"{whole.get(differing[0])!r:.80}. Merge shards of one evaluation.",
                path=str(place),
            )
        if _tasks(found) != _tasks(whole):
            raise DataError(
                f"{place} and {first} are of other tasks, or of tasks that have changed. Merge shards of one "
                f"evaluation.",
                path=str(place),
            )
    _require_all(shards)
    predictions = [found for place in places for found in _predictions(place)]
    merged, tasks = [], []
    for task in whole["tasks"]:
        own = sorted((one for one in predictions if one.task == task["name"]), key=lambda one: one.example)
        if [one.example for one in own] != list(range(task["n_examples"])):
            raise DataError(
                f"the shards hold {len(own)} predictions of task '{task['name']}', which has {task['n_examples']} "
                f"examples. Evaluate the shards again.",
                task=task["name"],
            )
        measures = [(name, spelled(metrics, name)) for name in task["measures"]]
        tasks.append(task | {"n": len(own), "metrics": _measured(task["name"], measures, own)})
        merged += own
    return whole | {"shard": str(Shard()), "tasks": tasks}, merged


def _tasks(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What all shards of an evaluation say of its tasks."""
    own = ("n", "metrics")
    return [{key: value for key, value in task.items() if key not in own} for task in summary["tasks"]]


def _require_all(shards: Mapping[Path, Shard]) -> None:
    of = max(shard.of for shard in shards.values())
    found = sorted(str(shard) for shard in shards.values())
    expected = [str(Shard(number, of)) for number in range(1, of + 1)]
    if found != sorted(expected):
        missing = [text for text in expected if text not in found]
        raise DataError(
            f"found the shards {', '.join(found)}; expected each of {expected[0]} to {expected[-1]} once"
            f"{', of which ' + ', '.join(missing[:8]) + ' is missing' if missing else ''}. Give a directory for each.",
            found=found,
        )


def _predictions(place: Path) -> list[Prediction]:
    try:
        return [prediction_of(record) for record in read_records(place / PREDICTIONS)]
    except OSError as cause:
        raise files.refused("read", place / PREDICTIONS, cause) from cause


def continual(places: Sequence[Path], metric: str | None) -> dict[str, Any]:
    """The summary of a model that learned tasks one after the other, from its evaluations in their order.

    metric: the score on each task, more being better; by default the first of the first task. DataError where an
    evaluation lacks it, or is of other tasks.
    """
    summaries = [read_summary(place) for place in places]
    tasks = _tasks(summaries[0])
    name = metric or next(iter(summaries[0]["tasks"][0]["metrics"]), "") if tasks else ""
    rows = []
    for place, found in zip(places, summaries, strict=True):
        if _tasks(found) != tasks:
            raise DataError(
                f"{place} is of other tasks than {places[0]}. Evaluate the same after each.", path=str(place)
            )
        scores = [task["metrics"].get(name) for task in found["tasks"]]
        if not all(score and score["direction"] == "max" for score in scores):
            known = sorted(
                {key for task in found["tasks"] for key, of in task["metrics"].items() if of["direction"] == "max"}
            )
            raise DataError(
                f"'{name}' is no score on every task of {place} of which more is better. Give another with --metric: "
                f"{', '.join(known) or 'there is none'}.",
                path=str(place),
            )
        rows.append([float(score["value"]) for score in scores])
    figures = {each.name: figure(value, each.version, each.direction) for each, value in measure_continual(rows)}
    fingerprint = orjson.dumps([task.get("dataset_fingerprint") for task in tasks])
    task = {
        "name": f"continual/{name}",
        "dataset_fingerprint": sha256(fingerprint),
        "n": len(tasks),
        "scores": rows,
        "metrics": figures,
    }
    return {"schema": SCHEMA, "checkpoint": str(summaries[-1]["checkpoint"]), "suite": "continual", "tasks": [task]}
