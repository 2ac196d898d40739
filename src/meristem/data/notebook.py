"""``data.source=notebook``: English in which facts come back at many distances, and where in it each value stands.

A document is a pure function of the settings and its number. It tells facts (a person, an attribute, a value), comes
back to each after a gap drawn log-uniformly between ``NEAREST`` and ``FARTHEST`` bytes, as a question with its answer
or as a statement, corrects some of them, and fills the rest with paragraphs of ``stdlib-docs``. Which split a document
belongs to is known from its name, so that held-out names, wordings and distances stay out of the training text.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, TypeVar

from meristem.data.config import NotebookConfig
from meristem.data.notebook_words import ATTRIBUTES, CORRECTIONS, ECHOES, HELD_OUT, NAMES, Attribute
from meristem.data.split import assign, ratios_for
from meristem.errors import DataError

NEAREST: Final = 20
FARTHEST: Final = 80_000
"""Bounds of the gaps in bytes; text like this has about four bytes to a token of a vocabulary of 2,048."""

HELD_OUT_GAP: Final = (6_000, 12_000)
"""Distances in bytes, the second bound excluded, at which no value comes back in a training document."""

SHORTEST: Final = 4_000
LONGEST: Final = 160_000
"""Bounds of the lengths of documents in bytes, drawn log-uniformly: 42,000 on average."""

FEWEST: Final = 2
MOST: Final = 128
"""Bounds of the number of facts of a document, drawn log-uniformly; fewer where its length does not allow them."""

CHANGED: Final = 0.15
RETURNS: Final = 0.75
STATED: Final = 0.3
"""Of the times a fact comes back: shares that correct it, that are followed by another, that are statements."""

T = TypeVar("T")


@dataclass(frozen=True)
class Recall:
    """A place where a value that was given before stands again.

    start: of the value's first byte in the document. distance: bytes since the first byte of the newest statement or
    mention of it. The flags say what of it is in no training document.
    """

    start: int
    distance: int
    value: str
    subject: str
    attribute: str
    is_wording_held_out: bool
    is_name_held_out: bool


@dataclass(frozen=True)
class Notebook:
    """One document and its recalls, in the order in which they stand in it."""

    id: str
    text: bytes
    is_held_out: bool
    recalls: tuple[Recall, ...]


@dataclass
class _Fact:
    subject: str
    attribute: Attribute
    value: str
    last: int = 0


class Dice:
    """Draws that are the same in every version of Python: of ``random`` only ``random()`` is promised to be."""

    def __init__(self, seed: str) -> None:
        self.share = random.Random(seed).random

    def pick(self, choices: Sequence[T]) -> T:
        """One of them, all as likely."""
        return choices[int(self.share() * len(choices))]

    def between(self, low: float, high: float) -> float:
        """Log-uniform."""
        return low * math.exp(self.share() * math.log(high / low))


@cache
def paragraphs(is_held_out: bool, validation: float) -> tuple[str, ...]:
    """The prose between the facts: paragraphs of the topics on one side of the split."""
    from pydoc_data.topics import topics

    ratios = ratios_for(validation)
    chosen = [text for name, text in sorted(topics.items()) if bool(assign(name, ratios)) == is_held_out]
    found = tuple(part.strip("\n") for text in chosen for part in text.split("\n\n") if part.strip())
    if not found:
        raise DataError(
            f"data.validation={validation:g} leaves no prose of stdlib-docs for one side of data.source=notebook. "
            f"Set data.validation between 0.05 and 0.9, or to 0.",
            found=validation,
        )
    return found


def documents(settings: NotebookConfig, validation: float) -> Iterator[Notebook]:
    """Documents until they hold ``settings.size_bytes`` bytes; facts are frequent in the first ones."""
    size_bytes = number = 0
    while size_bytes < settings.size_bytes:
        made = document(settings, validation, number, size_bytes / settings.size_bytes)
        yield made
        size_bytes, number = size_bytes + len(made.text), number + 1


def document(settings: NotebookConfig, validation: float, number: int, done: float) -> Notebook:
    """Document ``number``, before which the share ``done`` of the text stands."""
    name = f"notebook/{settings.seed}/{number}"
    is_held_out = bool(assign(name, ratios_for(validation)))
    share = settings.first_share * (settings.last_share / settings.first_share) ** done
    dice = Dice(name)
    n_facts = round(dice.between(FEWEST, MOST))
    writer = _Writer(dice, paragraphs(is_held_out, validation), is_held_out, n_facts)
    writer.write(writer.dice.between(SHORTEST, LONGEST), share)
    return Notebook(name, "".join(writer.parts).encode(), is_held_out, tuple(writer.recalls))


@cache
def names(is_held_out: bool) -> tuple[str, ...]:
    """The names of one side of the split."""
    return tuple(name for number, name in enumerate(NAMES) if (number % 8 == 0) == is_held_out)


@cache
def _held_out_names() -> frozenset[str]:
    return frozenset(names(is_held_out=True))


def wordings(choices: Sequence[str], is_held_out: bool) -> Sequence[str]:
    """The wordings of one side of the split."""
    return choices[-HELD_OUT:] if is_held_out else choices[:-HELD_OUT]


@dataclass
class _Writer:
    """A document while it is written. at: its bytes so far; fact_bytes: those that are about facts."""

    dice: Dice
    prose: Sequence[str]
    is_held_out: bool
    most_facts: int
    parts: list[str] = field(default_factory=list)
    recalls: list[Recall] = field(default_factory=list)
    facts: dict[tuple[str, str], _Fact] = field(default_factory=dict)
    due: list[tuple[float, int, _Fact]] = field(default_factory=list)
    at: int = 0
    fact_bytes: int = 0
    n_due: int = 0

    def write(self, length: float, share: float) -> None:
        """Facts that are due first; while facts are less than their share of the bytes new ones, and where the
        document has all of them any that it has; else prose."""
        while self.at < length:
            if self.due and self.due[0][0] <= self.at:
                self._come_back(heapq.heappop(self.due)[2])
            elif self.fact_bytes < share * (self.at + 1) and self._tell():
                continue
            else:
                text = f"\n\n{self.dice.pick(self.prose)}\n\n"
                self.parts.append(text)
                self.at += len(text.encode())

    def _wording(self, choices: Sequence[str]) -> tuple[str, bool]:
        """One that this document may use, and whether it is held out: every second one of a held-out document is."""
        is_new = self.is_held_out and self.dice.share() < 0.5
        return self.dice.pick(wordings(choices, is_new)), is_new

    def _tell(self) -> bool:
        """A new fact, or one of those that the document has; False where all stand at a distance that is held out."""
        is_new = self.is_held_out and self.dice.share() < 0.5
        subject, attribute = self.dice.pick(names(is_new)), self.dice.pick(ATTRIBUTES)
        known = self.facts.get((subject, attribute.name))
        if known is not None or len(self.facts) >= self.most_facts:
            told, first = list(self.facts.values()), int(self.dice.share() * len(self.facts))
            mentionable = (fact for fact in told[first:] + told[:first] if not self._is_forbidden(fact))
            return any(self._mention(fact) for fact in itertools.islice(mentionable, 1))
        fact = self.facts[subject, attribute.name] = _Fact(subject, attribute, self.dice.pick(attribute.values))
        wording, _ = self._wording(attribute.statements)
        start, _ = self._append(wording, fact)
        fact.last = start
        self._echo(fact)
        self._schedule(fact)
        return True

    def _come_back(self, fact: _Fact) -> None:
        """What is due; later where that would be at a distance that is held out."""
        if self._is_forbidden(fact):
            heapq.heappush(self.due, (fact.last + HELD_OUT_GAP[1], self._next(), fact))
            return
        self._mention(fact)
        if self.dice.share() < RETURNS:
            self._schedule(fact)

    def _mention(self, fact: _Fact) -> bool:
        """The value again, or that it has changed. Always True: something was written."""
        statements, questions = fact.attribute.statements, fact.attribute.questions
        if self.dice.share() < CHANGED:
            opening, is_new = self._wording(CORRECTIONS)
            self._recall(f"About the {fact.attribute.name} of {{s}}, {opening}", fact, is_new)
            fact.value = self.dice.pick([value for value in fact.attribute.values if value != fact.value])
            fact.last, _ = self._append(self._wording(statements)[0], fact)
        else:
            wording, is_new = self._wording(statements if self.dice.share() < STATED else questions)
            self._recall(wording, fact, is_new)
        self._echo(fact)
        return True

    def _echo(self, fact: _Fact) -> None:
        """At times the value once more at once: the shortest distances."""
        if self.dice.share() < 0.1:
            self._recall(self.dice.pick(ECHOES), fact, False)

    def _is_forbidden(self, fact: _Fact) -> bool:
        """Whether the value could come back at a held-out distance: no sentence before it is longer than 200 bytes."""
        low, high = HELD_OUT_GAP
        return not self.is_held_out and low - 200 <= self.at - fact.last < high

    def _schedule(self, fact: _Fact) -> None:
        heapq.heappush(self.due, (fact.last + self.dice.between(NEAREST, FARTHEST), self._next(), fact))

    def _next(self) -> int:
        """A number that orders what is due at the same byte."""
        self.n_due += 1
        return self.n_due

    def _recall(self, wording: str, fact: _Fact, is_wording_held_out: bool) -> None:
        start, value = self._append(wording, fact)
        is_new_name = fact.subject in _held_out_names()
        self.recalls.append(
            Recall(
                start,
                start - fact.last,
                value,
                fact.subject,
                fact.attribute.name,
                is_wording_held_out,
                is_new_name,
            )
        )
        fact.last = start

    def _append(self, wording: str, fact: _Fact) -> tuple[int, str]:
        """Write a sentence; the place of the value in the document, and the value."""
        before, after = wording.replace("{s}", fact.subject).split("{v}")
        start = self.at + len(before.encode())
        text = f"{before}{fact.value}{after} "
        self.parts.append(text)
        self.at += len(text.encode())
        self.fact_bytes += len(text.encode())
        return start, fact.value
