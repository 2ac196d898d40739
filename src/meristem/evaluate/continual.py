"""Metrics of a model that learns one task after the other, from its scores on all tasks after each of them.

``scores[i][j]``: on task j after task i was learned, more being better, both from 0; N tasks in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from meristem.errors import DataError
from meristem.plugins import Registry

Scores = Sequence[Sequence[float]]


@dataclass(frozen=True)
class ContinualMetric:
    """A number over the scores after each task, and ``before`` any; ``needs_before`` where it reads the latter."""

    name: str
    direction: Literal["min", "max"]
    value: Callable[[Scores, Sequence[float]], float]
    least_tasks: int = 2
    needs_before: bool = False
    version: str = "1"


def average_accuracy() -> ContinualMetric:
    """The mean score after the last task: mean_j R[N, j]."""
    return ContinualMetric("average_accuracy", "max", lambda after, _: _mean(after[-1]), least_tasks=1)


def backward_transfer() -> ContinualMetric:
    """What later tasks changed of earlier ones: mean_(j < N) R[N, j] - R[j, j] (Lopez-Paz and Ranzato 2017)."""

    def value(after: Scores, _: Sequence[float]) -> float:
        return _mean([after[-1][task] - after[task][task] for task in range(len(after) - 1)])

    return ContinualMetric("backward_transfer", "max", value)


def forgetting() -> ContinualMetric:
    """What was lost of the best score of each task: mean_(j < N) max_(i < N) R[i, j] - R[N, j] (Chaudhry 2018)."""

    def value(after: Scores, _: Sequence[float]) -> float:
        return _mean([max(row[task] for row in after[:-1]) - after[-1][task] for task in range(len(after) - 1)])

    return ContinualMetric("forgetting", "min", value)


def forward_transfer() -> ContinualMetric:
    """What earlier tasks brought to a task before it was learned: mean_(j > 1) R[j - 1, j] - b_j, b_j before any."""

    def value(after: Scores, before: Sequence[float]) -> float:
        return _mean([after[task - 1][task] - before[task] for task in range(1, len(after))])

    return ContinualMetric("forward_transfer", "max", value, needs_before=True)


continual_metrics: Final[Registry[Callable[[], ContinualMetric]]] = Registry(
    "continual_metric",
    {
        "average_accuracy": average_accuracy,
        "backward_transfer": backward_transfer,
        "forgetting": forgetting,
        "forward_transfer": forward_transfer,
    },
)


def measure_continual(rows: Scores) -> list[tuple[ContinualMetric, float]]:
    """Every metric that the scores allow.

    rows: scores on N tasks after each of the N tasks was learned, in the same order; one row more at the beginning is
    that of the model before any. DataError for another number of rows, or rows that are not equally long.
    """
    n_tasks = len(rows[0]) if rows else 0
    if not n_tasks or any(len(row) != n_tasks for row in rows) or len(rows) not in (n_tasks, n_tasks + 1):
        raise DataError(
            f"found {len(rows)} evaluations with {', '.join(str(len(row)) for row in rows) or 'no'} tasks each; "
            f"expected N of N tasks each, one after each task was learned, or one more at the beginning, before any. "
            f"Evaluate every task after each.",
            found=[len(row) for row in rows],
        )
    before, after = (rows[0], rows[1:]) if len(rows) > n_tasks else ((), rows)
    chosen = [continual_metrics.get(name)() for name in continual_metrics.names()]
    return [
        (metric, metric.value(after, before))
        for metric in chosen
        if n_tasks >= metric.least_tasks and (before or not metric.needs_before)
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
