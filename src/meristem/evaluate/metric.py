"""What a metric is: a count of every prediction, and what the sums of the counts come to.

The counts are exact, whole numbers and fractions, so that their sums depend on neither order nor grouping: shards of an
evaluation merge to the bits of the whole.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Final, Literal, TypeAlias

from meristem.errors import BadRecords, DataError

Tally: TypeAlias = Mapping[Hashable, Fraction]
"""Exact sums by what they are the sums of."""

Need = Literal["scored", "right", "text", "answers", "distance"]
"""A field of a prediction that a metric reads. ``scored`` alone is of texts that are given, ``text`` is generated."""

NEEDS: Final[Mapping[Need, str]] = {
    "scored": "texts whose likelihood is measured",
    "right": "choices, one of them right",
    "text": "a generated text",
    "answers": "an answer",
    "distance": "an answer",
}
"""In words."""

SCHEMA: Final = "meristem.prediction/1"


@dataclass(frozen=True)
class Scored:
    """A text that was given after a prompt. nats: of all its tokens; n_top: how many of them were the likeliest."""

    text: str
    nats: float
    n_tokens: int
    n_bytes: int
    n_top: int


@dataclass(frozen=True)
class Prediction:
    """What a model made of one example.

    example: its number in the task, from 0. scored: the answer, or every choice. right: the number of the right choice,
    None where there are none. text: what was generated, None where nothing was. distance: tokens from where the answer
    stands last in the prompt to the end of the prompt, None where it does not stand there.
    """

    task: str
    example: int
    id: str
    prompt: str
    answers: tuple[str, ...]
    scored: tuple[Scored, ...] = ()
    right: int | None = None
    text: str | None = None
    distance: int | None = None

    @property
    def target(self) -> Scored:
        """The text that should have been predicted."""
        return self.scored[self.right or 0]

    @property
    def chosen(self) -> int:
        """The likeliest choice; of equal ones the first."""
        return min(range(len(self.scored)), key=lambda number: self.scored[number].nats)

    @property
    def is_right(self) -> bool:
        """Whether the right choice is the likeliest, or what was generated is an answer but for its white space."""
        if self.text is None:
            return self.chosen == self.right
        words = self.text.split()
        return any(words == answer.split() for answer in self.answers)

    def to_json(self) -> dict[str, Any]:
        """A record of the schema ``prediction``."""
        return {"schema": SCHEMA} | asdict(self)


def prediction_of(record: Mapping[str, Any]) -> Prediction:
    """The prediction that a record holds; BadRecords where it is none."""
    try:
        fields = dict(record)
        if fields.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is {record['schema']!r}, expected {SCHEMA!r}")
        fields["scored"] = tuple(Scored(**each) for each in fields["scored"])
        fields["answers"] = tuple(fields["answers"])
        return Prediction(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise BadRecords(f"a record holds no prediction: {cause}. Evaluate again.") from cause


@dataclass(frozen=True)
class Metric:
    """A number, or several by name, over the predictions of a task.

    needs: fields of a prediction that it reads. direction: whether less or more is better. low, high: its range.
    count: what one prediction adds. value: what the sums over all predictions come to.
    version: another one means that older figures do not compare.
    """

    name: str
    needs: frozenset[Need]
    direction: Literal["min", "max"]
    low: float
    high: float
    count: Callable[[Prediction], Tally]
    value: Callable[[Tally], Mapping[str, float]]
    version: str = "1"


def ratio(
    name: str,
    needs: Sequence[Need],
    of: Callable[[Prediction], tuple[Fraction | int, Fraction | int]],
    direction: Literal["min", "max"] = "max",
    high: float = 1.0,
) -> Metric:
    """The sum of parts by the sum of wholes, from 0 up; ``of`` gives both for one prediction."""

    def count(prediction: Prediction) -> Tally:
        part, whole = of(prediction)
        return {"part": Fraction(part), "whole": Fraction(whole)}

    def value(sums: Tally) -> Mapping[str, float]:
        return {name: float(sums["part"] / sums["whole"])}

    return Metric(name, frozenset(needs), direction, 0.0, high, count, value)


def mean(name: str, needs: Sequence[Need], of: Callable[[Prediction], Fraction | int]) -> Metric:
    """The mean over examples of what ``of`` gives, a number from 0 to 1."""
    return ratio(name, needs, lambda prediction: (of(prediction), 1))


def measure(metric: Metric, predictions: Iterable[Prediction], task: str) -> dict[str, float]:
    """What a metric comes to over all predictions of a task; DataError where there is nothing to count."""
    sums: dict[Hashable, Fraction] = {}
    for prediction in predictions:
        for key, number in metric.count(prediction).items():
            sums[key] = sums.get(key, Fraction(0)) + number
    if not any(sums.values()):
        raise DataError(
            f"the metric {metric.name} found nothing to count in the predictions of task '{task}', so it has no value. "
            f"Leave it out of the metrics of the task, or give examples that it is about.",
            metric=metric.name,
            task=task,
        )
    return dict(metric.value(sums))
