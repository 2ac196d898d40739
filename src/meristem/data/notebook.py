"""``data.source=notebook``: English in which facts come back at many distances, and where in it each value stands.

A document is a pure function of the settings and its number. It tells facts (a person, an attribute, a value), comes
back to each after a gap drawn log-uniformly between ``NEAREST`` and ``FARTHEST`` bytes, as a question with its answer
or as a statement, corrects some of them, and fills the rest with paragraphs of ``stdlib-docs``. Half of the documents
are conversations: a line that one says, a line that the other answers, a blank line. Which split a document belongs to
is known from its name, so that held-out names, wordings and distances stay out of the training text.
"""

import heapq
import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, TypeVar

from meristem.data.config import NotebookConfig
from meristem.data.notebook_names import CITIES, IN_USE, NAMES, PLACES
from meristem.data.notebook_phrases import CORRECTIONS, ECHOES, LEADS, NEWS, REPLIES, TITLES, UNTOLD
from meristem.data.notebook_words import ATTRIBUTES, HELD_OUT, OWN, Attribute
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

FEWEST_ATTRIBUTES: Final = 1
"""Least number of attributes that a document is about, drawn log-uniformly up to all: where there are few of them only
the person tells one fact from another."""

CHANGED: Final = 0.15
RETURNS: Final = 0.75
STATED: Final = 0.3
"""Of the times a fact comes back: shares that correct it, that are followed by another, that are statements."""

NAMED: Final = 0.5
"""Share of the corrections that name the value that was."""

TALKED: Final = 0.5
"""Share of the documents that are conversations."""

LED: Final = 0.3
KNOWN: Final = 0.2
SELF: Final = 0.15
TITLED: Final = 0.15
"""Shares of the sentences that have a lead, of the new facts that are about somebody of whom one is known, and, in a
conversation, of those that are about whoever speaks, and of the sentences that have a title before the name."""

USUAL: Final = 0.5
"""Share of the names that are names in use, and least share of the homes that are towns that there are."""

SPEAKER: Final = "I"
"""The subject of these."""

ECHOED: Final = 0.1
"""Share of the sentences that are followed by their value at once; in a conversation, of the answers: REPEATED."""

REPEATED: Final = 0.5
ENDED: Final = 0.7
ASKED_UNTOLD: Final = 0.1
"""In a conversation: shares of the statements that end a line, and of the questions about what was not said."""

ANSWER: Final = re.compile(r'(?<=[?.]) (?=\S)|(?<=[?.]") ')
"""Where in a question with its answer the answer begins."""

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

    def some(self, choices: Sequence[T], n: int) -> list[T]:
        """So many of them, all as likely, none twice."""
        left = list(choices)
        return [left.pop(int(self.share() * len(left))) for _ in range(n)]

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
    is_talk = dice.share() < TALKED
    attributes = dice.some(ATTRIBUTES, round(dice.between(FEWEST_ATTRIBUTES, len(ATTRIBUTES))))
    writer = _Writer(dice, paragraphs(is_held_out, validation), is_held_out, n_facts, is_talk, attributes)
    writer.write(writer.dice.between(SHORTEST, LONGEST), share)
    return Notebook(name, "".join(writer.parts).encode(), is_held_out, tuple(writer.recalls))


@cache
def names(is_held_out: bool, is_in_use: bool | None = None) -> tuple[str, ...]:
    """The names of one side of the split; all, or those that are in use, or those that are not."""
    first = len(NAMES) - len(IN_USE)
    return tuple(
        name
        for number, name in enumerate(NAMES)
        if (number % 8 == 3) == is_held_out and is_in_use in (None, number >= first)
    )


@cache
def _held_out_names() -> frozenset[str]:
    return frozenset(names(is_held_out=True))


def wordings(choices: Sequence[str], is_held_out: bool) -> Sequence[str]:
    """The wordings of one side of the split."""
    return choices[-HELD_OUT:] if is_held_out else choices[:-HELD_OUT]


def _behind(lead: str, wording: str) -> str:
    first = wording[0] if wording.startswith("I ") else wording[0].lower()
    return f"{lead} {first}{wording[1:]}"


@dataclass
class _Writer:
    """A document while it is written. at: its bytes so far; fact_bytes: those that are about facts."""

    dice: Dice
    prose: Sequence[str]
    is_held_out: bool
    most_facts: int
    is_talk: bool
    attributes: Sequence[Attribute]
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
                self._digress()
        if self.is_talk and not self.parts[-1].endswith("\n"):
            self._put(f"\n{self.dice.pick(REPLIES)}\n\n", is_fact=True)

    def _digress(self) -> None:
        """A paragraph of prose: in a conversation one line, and what is answered."""
        text = self.dice.pick(self.prose)
        if self.is_talk:
            self._put(f"{' '.join(text.split())}\n{self.dice.pick(REPLIES)}\n\n")
        else:
            self._put(f"\n\n{text}\n\n")

    def _wording(self, choices: Sequence[str]) -> tuple[str, bool]:
        """One that this document may use, and whether it is held out: every second one of a held-out document is."""
        is_new = self.is_held_out and self.dice.share() < 0.5
        return self.dice.pick(wordings(choices, is_new)), is_new

    def _sentence(self, choices: Sequence[str]) -> tuple[str, bool]:
        """The same, at times behind a lead, and with a title before the name."""
        wording, is_new = self._wording(choices)
        if self.dice.share() < TITLED:
            title = self.dice.pick(TITLES)
            wording = wording.replace("{s}", f"{title.capitalize() if wording.startswith('{s}') else title} {{s}}")
        if self.dice.share() < LED:
            wording = _behind(self.dice.pick(LEADS), wording)
        return wording, is_new

    def _tell(self) -> bool:
        """A new fact, or one of those that the document has; False where all stand at a distance that is held out."""
        subject, attribute = self._topic()
        known = self.facts.get((subject, attribute.name))
        if known is not None or len(self.facts) >= self.most_facts:
            told, first = list(self.facts.values()), int(self.dice.share() * len(self.facts))
            mentionable = (fact for fact in told[first:] + told[:first] if not self._is_forbidden(fact))
            return any(self._mention(fact) for fact in itertools.islice(mentionable, 1))
        fact = self.facts[subject, attribute.name] = _Fact(subject, attribute, self._value(attribute))
        fact.last = self._append(self._sentence(attribute.statements)[0] + self._ending(), fact)
        self._respond(fact)
        self._schedule(fact)
        return True

    def _topic(self) -> tuple[str, Attribute]:
        """Of whom something may be said or asked, and what."""
        if self.is_talk and self.dice.share() < SELF:
            return SPEAKER, self.dice.pick(OWN)
        others = [subject for subject, _ in self.facts if subject != SPEAKER]
        if others and self.dice.share() < KNOWN:
            return self.dice.pick(others), self.dice.pick(self.attributes)
        return self._name(), self.dice.pick(self.attributes)

    def _name(self) -> str:
        is_new = self.is_held_out and self.dice.share() < 0.5
        return self.dice.pick(names(is_new, is_in_use=self.dice.share() < USUAL))

    def _value(self, attribute: Attribute, but: str = "") -> str:
        """One that the attribute may have, another than the one given."""
        found = but
        while found == but:
            values: Sequence[str] = attribute.values
            if values is PLACES and self.dice.share() < USUAL:
                values = CITIES
            found = self.dice.pick(values) if values else self._name()
        return found

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
        if self.dice.share() < CHANGED:
            self._correct(fact)
        elif self.dice.share() < STATED:
            wording, is_new = self._sentence(fact.attribute.statements)
            self._recall(wording + self._ending(), fact, is_new)
        else:
            wording, is_new = self._sentence(fact.attribute.questions)
            if not self.is_talk:
                self._recall(f"{wording} ", fact, is_new)
            else:
                question, answer = ANSWER.split(wording, maxsplit=1)
                self._recall(f"{question}\n{answer}\n\n", fact, is_new)
                if self.dice.share() < ASKED_UNTOLD:
                    self._ask_untold()
                return True
        self._respond(fact)
        return True

    def _correct(self, fact: _Fact) -> None:
        """The value has changed: the old one is named first, or the new one is stated alone."""
        opening, statement = "", self._wording(fact.attribute.statements)[0]
        if self.dice.share() < NAMED:
            opening, is_new = self._wording(CORRECTIONS)
            name = fact.attribute.name
            about = f"my {name}" if fact.subject == SPEAKER else f"the {name} of {{s}}"
            self._recall(f"About {about}, {opening} ", fact, is_new)
        else:
            statement = _behind(self.dice.pick(NEWS), statement)
        fact.value = self._value(fact.attribute, fact.value)
        fact.last = self._append(statement + self._ending(), fact)

    def _ask_untold(self) -> None:
        """A question, in a conversation, of which nothing was said, and that one does not know."""
        subject, attribute = self._topic()
        if (subject, attribute.name) not in self.facts:
            question = ANSWER.split(self._sentence(attribute.questions)[0], maxsplit=1)[0]
            self._put(f"{question.format(s=subject)}\n{self.dice.pick(UNTOLD)}\n\n", is_fact=True)

    def _ending(self) -> str:
        """What stands behind a statement: the next sentence follows, or the other one answers."""
        return "\n" if self.is_talk and self.dice.share() < ENDED else " "

    def _respond(self, fact: _Fact) -> None:
        """At times the value once more at once, the shortest distances; the answer to a line that has ended."""
        if self.is_talk:
            if self.parts[-1].endswith("\n"):
                if self.dice.share() < REPEATED:
                    self._recall(f"{self.dice.pick(ECHOES)}\n\n", fact, False)
                else:
                    self._put(f"{self.dice.pick(REPLIES)}\n\n", is_fact=True)
        elif self.dice.share() < ECHOED:
            self._recall(f"{self.dice.pick(ECHOES)} ", fact, False)

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
        value, start = fact.value, self._append(wording, fact)
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

    def _append(self, wording: str, fact: _Fact) -> int:
        """Write a sentence about a fact; the place of the value in the document."""
        before, after = wording.replace("{s}", fact.subject).split("{v}")
        start = self.at + len(before.encode())
        self._put(f"{before}{fact.value}{after}", is_fact=True)
        return start

    def _put(self, text: str, *, is_fact: bool = False) -> None:
        n_bytes = len(text.encode())
        self.parts.append(text)
        self.at += n_bytes
        self.fact_bytes += n_bytes if is_fact else 0
