"""What is remembered of facts that a text gave once: asked after multiples of the attention span, in words held out,
and beside it in words that were trained on.

Every text tells ``N_FACTS`` facts of one attribute about as many people, with prose of held-out topics before and
behind. Who knows the values and not whose they are is right once in ``N_FACTS``. Beside it ``mentions`` scores the
held-out documents of ``data.source=notebook`` by how far back each value stands.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from meristem.checkpoint.atomic import sha256
from meristem.data.config import NotebookConfig
from meristem.data.notebook import Dice, Notebook, documents, names, paragraphs, wordings
from meristem.data.notebook_words import ATTRIBUTES
from meristem.data.tokenizer import Tokenizer
from meristem.device.resolve import Device
from meristem.evaluate.likelihood import Reader
from meristem.memory.state import State
from meristem.models.online import Learn
from meristem.shapes import Tokens

N_FACTS: Final = 8
SPANS: Final = (1, 5, 10, 50)
"""After how many attention spans is asked."""

N_TEXTS: Final = 32
"""Texts of ``N_FACTS`` facts, unless given."""

PIECE: Final = 1024
"""Tokens that are read at once, or data.seq_len where that is more; the state goes from piece to piece."""

N_DOCUMENTS: Final = 8
"""Held-out documents of the notebook that are read, unless given."""


@dataclass(frozen=True)
class Mode:
    """A way to remember: what learns while it reads, and whether all that was read is dropped before the question."""

    learn: Learn
    is_reset: bool = False


MODES: Final[Mapping[str, Mode]] = {
    "memory": Mode("memory"),
    "frozen": Mode("none"),
    "reset": Mode("memory", is_reset=True),
    "weights": Mode("weights"),
}
"""By name."""


@dataclass(frozen=True)
class Question:
    """A question with its answer by candidate. ids: one row each; first: its first id that has a part of the value."""

    ids: tuple[tuple[int, ...], ...]
    first: int
    last: int
    right: int


@dataclass(frozen=True)
class FactTexts:
    """Facts among prose, ``distances`` tokens of prose behind them, and the questions."""

    tokens_bt: Tokens
    distances: tuple[int, ...]
    questions: tuple[tuple[Question, ...], ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all ids."""
        asked = repr([[question.ids for question in row] for row in self.questions]).encode()
        return sha256(self.tokens_bt.numpy().tobytes() + asked)


@dataclass(frozen=True)
class Remembered:
    """Of ``n`` facts, for how many the greedy continuation, and the likeliest candidate, was the value."""

    n: int
    n_greedy: int
    n_chosen: int

    def figures(self) -> dict[str, float]:
        """Shares with their Wilson intervals of 95 %, and the chance level of the choice."""
        scores = share("greedy", self.n_greedy, self.n) | share("choice", self.n_chosen, self.n)
        return {"chance": 1 / N_FACTS} | scores


def share(name: str, n_right: int, n: int) -> dict[str, float]:
    """A share under its name, with the bounds of its interval."""
    low, high = wilson(n_right, n)
    return {name: n_right / n, f"{name}_low": low, f"{name}_high": high}


def wilson(n_right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n) (Wilson 1927)."""
    middle, scale = n_right / n, 1 + z * z / n
    spread = middle * (1 - middle)
    middle = (middle + z * z / (2 * n)) / scale
    half = z * math.sqrt(spread / n + z * z / (4 * n * n)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def tell_facts(
    tokenizer: Tokenizer, span: int, n_texts: int, validation: float, *, is_new: bool = True, random_seed: int = 0
) -> FactTexts:
    """Texts of one length: prose, the facts, and prose of ``SPANS[-1] * span`` tokens; the same ones for a seed.

    is_new: in wordings that no training text has. The names are held out either way. A question is a paragraph of its
    own.
    """
    rows, questions, distances = [], [], tuple(span * times for times in SPANS)
    asked_of = [attribute for attribute in ATTRIBUTES if len(attribute.values) >= N_FACTS]
    for number in range(n_texts):
        dice = Dice(f"remember/{random_seed}/{number}")
        attribute = asked_of[number % len(asked_of)]
        people = _distinct(dice, names(is_held_out=True), N_FACTS)
        values = _distinct(dice, attribute.values, N_FACTS)
        prose = paragraphs(validation > 0, validation)
        facts, asked = "", []
        for place, person in enumerate(people):
            statement = dice.pick(wordings(attribute.statements, is_new))
            facts += statement.format(s=person, v=values[place]) + " "
            query = dice.pick(wordings(attribute.questions, is_new)).format(s=person, v="{v}")
            asked.append(_question(tokenizer, f"\n\n{query}", values, place))
        behind = _prose(dice, prose, tokenizer, distances[-1])
        before = _prose(dice, prose, tokenizer, 64)
        rows.append((before, tokenizer.encode("\n\n" + facts + "\n\n"), behind[: distances[-1]]))
        questions.append(tuple(asked))
    longest = max(len(told) for _, told, _ in rows)
    padded = [[*([*before, *before] * longest)[: longest - len(told)], *told, *behind] for before, told, behind in rows]
    return FactTexts(torch.tensor(padded), distances, tuple(questions))


def _distinct(dice: Dice, choices: Sequence[str], n: int) -> list[str]:
    left = list(choices)
    return [left.pop(int(dice.share() * len(left))) for _ in range(n)]


def _prose(dice: Dice, prose: Sequence[str], tokenizer: Tokenizer, n: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < n:
        ids += tokenizer.encode(dice.pick(prose) + "\n\n")
    return ids


def _question(tokenizer: Tokenizer, query: str, values: Sequence[str], right: int) -> Question:
    ids = [tuple(tokenizer.encode(query.format(v=value))) for value in values]
    start = len(query.split("{v}")[0].encode())
    ends = np.cumsum(tokenizer.byte_lengths[list(ids[right])])
    first, last = _tokens_of(ends, start, len(values[right].encode()))
    return Question(tuple(ids), first, last, right)


def held_out_documents(settings: NotebookConfig, validation: float, most: int) -> list[Notebook]:
    """The first held-out documents of the text that these settings make."""
    made = (one for one in documents(settings, validation) if one.is_held_out)
    return list(itertools.islice(made, most))


def fingerprint(chosen: Sequence[Notebook]) -> str:
    """SHA-256 of the documents, one behind the other."""
    return sha256(b"".join(one.text for one in chosen))


@torch.no_grad()
def mentions(
    reader: Reader, chosen: Sequence[Notebook], tokenizer: Tokenizer, *, piece: int, device: Device
) -> dict[int, tuple[int, int]]:
    """Values that come back in documents: by distance, how many, and how many of them are the greedy continuation.

    The distances are powers of two in bytes: at d those from d / 2 up to d. Each document is read from a fresh memory,
    ``piece`` tokens at a time. A value counts where it and nothing else is predicted at each of its tokens.
    """
    found: dict[int, tuple[int, int]] = {}
    for one in chosen:
        ids = tokenizer.encode_bytes(one.text)
        ends = np.cumsum(tokenizer.byte_lengths[ids])
        is_top = np.zeros(len(ids), dtype=bool)
        state = None
        for start in range(0, len(ids) - 1, piece):
            part = ids[start : start + piece + 1]
            (tokens_bt,) = device.move(torch.tensor([part]))
            with device.autocast():
                logits_bto, state = reader(tokens_bt[:, :-1], state)
            is_top[start + 1 : start + len(part)] = (logits_bto.argmax(-1) == tokens_bt[:, 1:])[0].cpu().numpy()
        for recall in one.recalls:
            first, last = _tokens_of(ends, recall.start, len(recall.value.encode()))
            distance = 1 << (recall.distance.bit_length())
            n, n_right = found.get(distance, (0, 0))
            found[distance] = (n + 1, n_right + bool(is_top[first : last + 1].all()))
    return dict(sorted(found.items()))


def _tokens_of(ends: np.ndarray, start: int, n_bytes: int) -> tuple[int, int]:
    """The first and the last token that hold some of the bytes from ``start`` on."""
    return int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, start + n_bytes, side="left"))


@torch.no_grad()
def remember(
    reader: Reader, texts: FactTexts, *, is_reset: bool, piece: int, batch: int, device: Device
) -> tuple[Remembered, ...]:
    """How much is remembered after each distance. A question is read from the state there, and leaves it as it was.

    piece: most tokens read at once; batch: texts read side by side. is_reset: questions are read
    from a fresh state, as if no text had been read.
    """
    sums = np.zeros((len(texts.distances), 3), dtype=int)
    for start in range(0, len(texts.tokens_bt), batch):
        (tokens_bt,) = device.move(texts.tokens_bt[start : start + batch])
        questions, at, state = texts.questions[start : start + batch], 0, None
        for number, distance in enumerate(texts.distances):
            stop = tokens_bt.shape[1] - texts.distances[-1] + distance
            while at < stop and not is_reset:
                part_bt = tokens_bt[:, at : min(at + piece, stop)]
                with device.autocast():
                    _, state = reader(part_bt, state)
                at += part_bt.shape[1]
            sums[number] += _asked(reader, state, questions, device)
    return tuple(Remembered(*map(int, row)) for row in sums)


def _asked(
    reader: Reader, state: State | None, questions: Sequence[Sequence[Question]], device: Device
) -> tuple[int, int, int]:
    """Facts asked, those whose greedy continuation is the value, those whose value is the likeliest candidate."""
    n = n_greedy = n_chosen = 0
    for column in zip(*questions, strict=True):
        found: list[list[float]] = [[] for _ in column]
        for choice in range(N_FACTS):
            ids = [question.ids[choice] for question in column]
            length = max(map(len, ids))
            padded_bt = torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in ids])
            (tokens_bt,) = device.move(padded_bt)
            with device.autocast():
                logits_bto, _ = reader(tokens_bt, state)
            logits_bto = logits_bto.float()
            nats_bt = -logits_bto[:, :-1].log_softmax(-1).gather(-1, tokens_bt[:, 1:, None])[..., 0]
            is_top_bt = logits_bto[:, :-1].argmax(-1) == tokens_bt[:, 1:]
            for row, question in enumerate(column):
                found[row].append(float(nats_bt[row, : len(ids[row]) - 1].sum()))
                if choice == question.right:
                    n_greedy += bool(is_top_bt[row, question.first - 1 : question.last].all())
        for nats, question in zip(found, column, strict=True):
            n, n_chosen = n + 1, n_chosen + (min(range(len(nats)), key=nats.__getitem__) == question.right)
    return n, n_greedy, n_chosen
