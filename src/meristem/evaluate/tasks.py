"""Tasks by which a model is examined: examples, how they are asked, and the metrics of the answers.

A task comes from a file that describes it (``read_task``), or from a plug-in (``meristem.task``).
"""

import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

import orjson
from pydantic import Field, ValidationError

from meristem.checkpoint.atomic import sha256
from meristem.config import ConfigSection, read_yaml
from meristem.config.mistakes import explain
from meristem.data import files
from meristem.errors import BadRecords, ConfigError, DataError, WrongValue
from meristem.evaluate.metric import NEEDS, Metric, Need
from meristem.evaluate.metrics import metrics
from meristem.plugins import Registry, spelled

Kind = Literal["likelihood", "choice", "generate"]
"""Whether an answer is read and its likelihood measured, one of several is chosen, or a text is generated."""

GIVES: Final[Mapping[Kind, frozenset[Need]]] = {
    "likelihood": frozenset({"scored", "answers"}),
    "choice": frozenset({"scored", "right", "answers", "distance"}),
    "generate": frozenset({"text", "answers", "distance"}),
}
"""What there is in the predictions of each kind; without answers, neither ``answers`` nor ``distance``."""

USUAL: Final[Mapping[Kind, tuple[str, ...]]] = {
    "likelihood": ("bits_per_byte", "nats", "perplexity", "token_accuracy"),
    "choice": ("accuracy", "accuracy_per_byte", "calibration_error"),
    "generate": ("exact_match", "f1"),
}
"""The metrics of each kind, unless given."""


class TaskConfig(ConfigSection):
    """A task file. ``{name}`` in a text stands for a field of the record; ``{{`` and ``}}`` for braces.

    A text that is one field alone, as ``"{answer}"``, gives the field as it is: a text, a whole number, or a list of
    texts.
    """

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="by default the file's")
    kind: str = Field(description="likelihood, choice, generate, or a task of a plug-in")
    data: Path | None = Field(default=None, description="JSON lines, one record for each example; beside this file")
    id: str | None = Field(default=None, description="of an example; by default the number of its line")
    prompt: str = Field(default="", description="what is read first")
    answer: str | None = Field(default=None, description="what should follow; of choices a number from 0, or the text")
    choices: str | list[str] | None = Field(default=None, description="a field with a list, or texts")
    delimiter: str = Field(default=" ", description="between prompt and answer, where there is a prompt")
    metrics: list[str] | None = Field(default=None, min_length=1, description="by default the usual ones of the kind")
    max_tokens: int = Field(default=64, ge=1, description="generated at most")
    stop: list[str] = Field(default=["\n"], description="texts before which a generated text ends")


@dataclass(frozen=True)
class Example:
    """One question. answers: that are right, where it is known. right: the number of the right choice."""

    id: str
    prompt: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: int | None = None


@dataclass(frozen=True)
class Task:
    """What is asked, and what is measured. metrics: as a task file spells them; none for the usual ones.

    delimiter: stands between a prompt that is not empty and the answer. max_tokens, stop: of generated texts.
    """

    name: str
    kind: Kind
    examples: tuple[Example, ...]
    metrics: tuple[str, ...] = ()
    delimiter: str = " "
    max_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        if not self.examples:
            raise DataError(f"the task '{self.name}' has no examples. Give it one or more.", task=self.name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that a model is shown and judged by: predictions with the same can be compared."""
        return sha256(
            orjson.dumps(
                [self.kind, self.delimiter, self.max_tokens, self.stop, [asdict(one) for one in self.examples]]
            )
        )

    @cached_property
    def measures(self) -> tuple[tuple[str, Metric], ...]:
        """Its metrics as they are spelled; bits per byte stand beside what does not compare across tokenizers.

        WrongValue where one needs what the predictions lack.
        """
        has_answers = all(example.answers for example in self.examples)
        names = list(self.metrics or USUAL[self.kind])
        if {"nats", "perplexity"} & set(names) and "bits_per_byte" not in names:
            names.append("bits_per_byte")
        found = [spelled(metrics, name) for name in names]
        gives = GIVES[self.kind] - (frozenset() if has_answers else {"answers", "distance"})
        for metric in found:
            if lacking := sorted(metric.needs - gives):
                raise WrongValue(
                    f"the metric {metric.name} of task '{self.name}' needs {NEEDS[lacking[0]]}, which a task of kind "
                    f"{self.kind} {'does' if has_answers else 'without answers does'} not have. Choose another metric "
                    f"(such as {', '.join(_fitting(gives))}), or another kind.",
                    metric=metric.name,
                    kind=self.kind,
                )
        if twice := {metric.name for metric in found if [each.name for each in found].count(metric.name) > 1}:
            raise WrongValue(f"task '{self.name}' has the metric {twice.pop()} twice. Leave one out.", task=self.name)
        return tuple(zip(names, found, strict=True))

    def first(self, n: int | None) -> "Task":
        """The task with its first ``n`` examples."""
        kept = self.examples[:n]
        return self if kept == self.examples else replace(self, examples=kept)


def _fitting(gives: frozenset[Need]) -> list[str]:
    return [name for name in metrics.names() if spelled(metrics, name).needs <= gives][:4]


def _from_file(kind: Kind, config: TaskConfig) -> Task:
    """A task of one of the three kinds, from the records of its data."""
    name = config.name or kind
    if config.data is None:
        raise WrongValue(
            f"the task '{name}' of kind {kind} has no data. Write a task file with the key data: a file of JSON lines.",
            path="data",
        )
    if (config.choices is None) != (kind != "choice"):
        raise WrongValue(
            f"the task '{name}' is of kind {kind} and has {'no' if config.choices is None else 'the key'} choices. "
            f"Give choices with kind: choice, and with no other.",
            path="choices",
        )
    if config.answer is None and kind != "generate":
        raise WrongValue(
            f"the task '{name}' of kind {kind} has no answer. Give the key answer, as '{{answer}}' for a field of that "
            f"name.",
            path="answer",
        )
    examples = tuple(_example(config, number, record) for number, record in _records(config.data))
    if not examples:
        raise DataError(
            f"{config.data} holds no record. Give one line of JSON for each example.", path=str(config.data)
        )
    return Task(
        name=name,
        kind=kind,
        examples=examples,
        metrics=tuple(config.metrics or ()),
        delimiter=config.delimiter,
        max_tokens=config.max_tokens,
        stop=tuple(config.stop),
    )


tasks: Final[Registry[Callable[[TaskConfig], Task]]] = Registry(
    "task", {kind: partial(_from_file, kind) for kind in get_args(Kind)}
)
"""By kind; each makes a task from a task file. That of a plug-in may have examples of its own and read no data."""


def open_task(place: str) -> Task:
    """The task of a file, or of a plug-in by its name; its metrics are there and fit it, or an error says what not."""
    path = Path(place)
    is_name = place.casefold() in tasks.names() and not path.exists()
    config = TaskConfig(kind=place, name=place.casefold()) if is_name else _read(path)
    task = tasks.get(config.kind)(config)
    _ = task.measures
    return task


def _read(path: Path) -> TaskConfig:
    """The settings of a task file; ConfigError where they are none."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        known = ", ".join(sorted(set(tasks.names()) - set(GIVES))) or "none is installed"
        raise WrongValue(
            f"'{path}' is neither a task file, whose name ends in .yaml, nor a task of a plug-in ({known}). "
            f"docs/evaluation.md shows how a task is written.",
            value=str(path),
        )
    try:
        said = read_yaml(files.read(path).decode("utf-8"), f"task {path}")
        config = TaskConfig.model_validate({"name": path.stem} | said)
    except UnicodeDecodeError as cause:
        raise ConfigError(f"the task {path} is no UTF-8 text. Give a YAML file.", path=str(path)) from cause
    except ValidationError as cause:
        raise explain(cause, TaskConfig, lambda key: f"task {path}") from None
    return config if config.data is None else config.model_copy(update={"data": path.parent / config.data})


def _records(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """The records of JSON lines and the numbers of their lines; empty lines are passed over."""
    for number, line in enumerate(files.read(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as cause:
            raise BadRecords(
                f"line {number} of {path} is no JSON: {cause}. Correct or remove it.", line=number
            ) from None
        if not isinstance(record, dict):
            raise BadRecords(
                f"line {number} of {path} is a JSON {type(record).__name__}; expected an object. Correct or remove it.",
                line=number,
            )
        yield number, record


def _example(config: TaskConfig, number: int, record: Mapping[str, Any]) -> Example:
    """The example of one record; BadRecords says which line and field is wrong."""
    place = f"line {number} of {config.data}"
    prompt = _text(_filled(config.prompt, record, place, "prompt"), place, "prompt")
    name = str(number) if config.id is None else str(_filled(config.id, record, place, "id"))
    if config.kind == "choice":
        return _choice(config, record, place, (name, prompt))
    answers = () if config.answer is None else _texts(_filled(config.answer, record, place, "answer"), place, "answer")
    if config.kind == "likelihood" and len(answers) > 1:
        raise BadRecords(f"{place} has {len(answers)} answers; kind likelihood measures one. Give one.", place=place)
    return Example(name, prompt, answers)


def _choice(config: TaskConfig, record: Mapping[str, Any], place: str, of: tuple[str, str]) -> Example:
    """An example with choices. of: its id and its prompt."""
    given = config.choices or ()
    if isinstance(given, str):
        found = _filled(given, record, place, "choices")
        if not isinstance(found, list):
            raise BadRecords(
                f"the choices of {place} are {found!r:.60}; expected a list of texts. Name a field that holds one, as "
                f"'{{choices}}'.",
                place=place,
            )
        choices = _texts(found, place, "choices")
    else:
        choices = tuple(_text(_filled(each, record, place, "choices"), place, "choices") for each in given)
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise BadRecords(
            f"{place} has the choices {list(choices)!r:.80}; expected two or more, no two alike. Correct it.",
            place=place,
        )
    answer = _filled(str(config.answer), record, place, "answer")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadRecords(
            f"the answer of {place} is {answer!r:.60}; expected one of its choices {list(choices)!r:.80}, or "
            f"the number of one from 0 to {len(choices) - 1}. Correct it.",
            place=place,
        )
    return Example(*of, (choices[answer],), choices, answer)


def _filled(template: str, record: Mapping[str, Any], place: str, key: str) -> Any:
    """A text with the fields of a record in it, or the value of the one field that it names and nothing else."""
    parts = _parts(template, key)
    for _, name in parts:
        if name is not None and name not in record:
            raise BadRecords(
                f"{place} has no field '{name}', which {key} names; it has {', '.join(sorted(record)[:8]) or 'none'}. "
                f"Correct the record, or {key}.",
                place=place,
                field=name,
            )
    if len(parts) == 1 and parts[0][0] == "" and parts[0][1] is not None:
        return record[parts[0][1]]
    return "".join(literal + ("" if name is None else str(_text(record[name], place, name))) for literal, name in parts)


def _parts(template: str, key: str) -> list[tuple[str, str | None]]:
    """The literal texts of a template, each with the field behind it."""
    try:
        found = [(text, name, spec, how) for text, name, spec, how in string.Formatter().parse(template)]
        if any(name is not None and (not name.isidentifier() or spec or how) for _, name, spec, how in found):
            raise ValueError("only the name of a field may stand in braces")
    except ValueError as cause:
        raise WrongValue(
            f"{key} is {template!r:.80}, which is no template: {cause}. Write {{name}} for a field, {{{{ and }}}} for "
            f"braces.",
            path=key,
            value=template,
        ) from None
    return [(text, name) for text, name, _, _ in found]


def _text(value: object, place: str, name: str) -> str:
    """A text, or a number as text."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise BadRecords(
        f"'{name}' of {place} is {value!r:.60}; expected a text or a number. Correct the record.", place=place
    )


def _texts(value: object, place: str, name: str) -> tuple[str, ...]:
    """One text or a list of them, none empty."""
    found = tuple(_text(each, place, name) for each in (value if isinstance(value, list) else [value]))
    if not found or not all(each.strip() for each in found):
        raise BadRecords(
            f"'{name}' of {place} is {value!r:.60}; expected a text that is not empty, or a list of such. Correct it.",
            place=place,
        )
    return found
