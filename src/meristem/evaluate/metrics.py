"""The metrics that a task may name: ours, and those of plug-ins (``meristem.metric``)."""

from collections.abc import Callable
from typing import Final

from meristem.evaluate import scores, text
from meristem.evaluate.metric import Metric
from meristem.plugins import Registry

metrics: Final[Registry[Callable[..., Metric]]] = Registry(
    "metric",
    {
        "nats": scores.nats,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
        "token_accuracy": scores.token_accuracy,
        "sequence_accuracy": scores.sequence_accuracy,
        "accuracy": scores.accuracy,
        "accuracy_per_byte": scores.accuracy_per_byte,
        "calibration_error": scores.calibration_error,
        "recall_by_distance": scores.recall_by_distance,
        "exact_match": text.exact_match,
        "f1": text.f1,
        "distinct": text.distinct,
        "repetition": text.repetition,
    },
)
"""By name; each makes a metric, from values that may be given as in ``distinct(n=3)``."""
