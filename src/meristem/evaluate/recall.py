"""What a memory can recall of generated sequences: associative recall, copying, a needle at a distance.

A task is a value, and its questions are a pure function of it, their number and a random seed. Ids are just ids: they
are drawn from the whole vocabulary and stand for nothing. A language model that was not trained on a task shows what it
recalls in context of ids that it has hardly seen in such an order (and never predicts an id that its text lacked, as
half of the bytes); a model that was trained on it (``recipes.bench.learn``) shows what its memory can be made to hold.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol

import torch

from meristem.checkpoint.atomic import sha256
from meristem.data.stream import IGNORED
from meristem.device.random import stream
from meristem.device.resolve import Device
from meristem.errors import WrongValue
from meristem.evaluate.likelihood import Loss, Reader
from meristem.shapes import Targets, Tokens

PAIRS: Final = (4, 16, 64)
LENGTHS: Final = (8, 32, 128)
DISTANCES: Final = (8, 32, 128, 512, 2048)
"""The sizes of the tasks in ``suite``: pairs, copied tokens, and tokens between a needle and its query."""

SHORTEST: Final = 2 * LENGTHS[0]
"""The shortest sequence in which every kind of task has a size that fits."""

HELD_OUT: Final = 0
"""The random seed of the questions that models are compared by: the same ones for every model."""


@dataclass(frozen=True)
class Questions:
    """Sequences with their targets; ``IGNORED`` where there is none."""

    tokens_bt: Tokens
    targets_bt: Targets

    @property
    def n(self) -> int:
        """How many targets there are."""
        return int((self.targets_bt != IGNORED).sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all ids: models with the same tasks can be compared."""
        return sha256(torch.stack([self.tokens_bt, self.targets_bt]).numpy().tobytes())


class Task(Protocol):
    """What questions are drawn from."""

    @property
    def name(self) -> str:
        """The kind and its size."""

    @property
    def chance(self) -> float:
        """The accuracy of a guess among all ids that can be a target, made without having read the sequence."""

    def questions(self, n_rows: int, random_seed: int) -> Questions:
        """That many sequences: the same ones for the same seed."""


@dataclass(frozen=True)
class Associative:
    """Pairs of a key and its value come first; then every key is queried once, in random order among filler.

    The target at the place of a query is the value of its key. Keys are even ids and values odd ones, each at most once
    in a row of pairs; filler, which also follows a query in place of its value, is any id but a key of the row. Who
    knows which values the sequence holds and not which belongs where is right once in ``n_pairs``.
    Source: Arora et al. 2023 (Zoology, arXiv 2312.04927), multi-query associative recall. There the two alphabets are
    halves of the vocabulary, and queries come early by a power law; here their places are uniform over what is left.
    """

    vocabulary: int
    window: int
    n_pairs: int

    def __post_init__(self) -> None:
        _require_at_least("n_pairs", self.n_pairs, 1)
        if self.vocabulary < 2 * self.n_pairs:
            raise WrongValue(
                f"{self.n_pairs} pairs need {2 * self.n_pairs} ids, found a vocabulary of {self.vocabulary}. "
                f"Set {self.vocabulary // 2} pairs or fewer, or enlarge the vocabulary.",
                found=self.vocabulary,
                expected=2 * self.n_pairs,
            )
        if self.window < 3 * self.n_pairs:
            raise WrongValue(
                f"{self.n_pairs} pairs and their queries need a sequence of {3 * self.n_pairs} tokens, found "
                f"{self.window}. Set {self.window // 3} pairs or fewer, or a longer sequence.",
                found=self.window,
                expected=3 * self.n_pairs,
            )

    @property
    def name(self) -> str:
        """As ``associative/16``: the number of pairs."""
        return f"associative/{self.n_pairs}"

    @property
    def chance(self) -> float:
        """One value out of all."""
        return 1 / (self.vocabulary // 2)

    def questions(self, n_rows: int, random_seed: int) -> Questions:
        """Sequences with ``n_pairs`` targets each; s counts the pairs."""
        generator = stream(random_seed, "recall.associative")
        n_pairs, n_even, n_odd = self.n_pairs, (self.vocabulary + 1) // 2, self.vocabulary // 2
        keys_bs = 2 * _distinct(n_rows, n_pairs, n_even, generator)
        values_bs = 2 * _distinct(n_rows, n_pairs, n_odd, generator) + 1
        places_bs = 2 * n_pairs + _distinct(n_rows, n_pairs, self.window - 2 * n_pairs, generator)
        is_filler_bo = torch.ones(n_rows, self.vocabulary).scatter_(1, keys_bs, 0.0)
        tokens_bt = torch.multinomial(is_filler_bo, self.window, replacement=True, generator=generator)
        tokens_bt[:, : 2 * n_pairs : 2] = keys_bs
        tokens_bt[:, 1 : 2 * n_pairs : 2] = values_bs
        tokens_bt.scatter_(1, places_bs, keys_bs)
        return Questions(tokens_bt, torch.full_like(tokens_bt, IGNORED).scatter_(1, places_bs, values_bs))


@dataclass(frozen=True)
class Copying:
    """A random sequence and a separator, the last id of the vocabulary; from there on the sequence is the target again.

    x_1 .. x_n separator x_1 .. x_(n-1), each x any other id: at the separator and after it the target is the next x.
    Source: Jelassi et al. 2024 (Repeat After Me, arXiv 2402.01032), the copy task.
    """

    vocabulary: int
    n_copied: int

    def __post_init__(self) -> None:
        _require_at_least("n_copied", self.n_copied, 1)
        _require_at_least("vocabulary", self.vocabulary, 3)

    @property
    def name(self) -> str:
        """As ``copying/32``: the length of the sequence."""
        return f"copying/{self.n_copied}"

    @property
    def chance(self) -> float:
        """One id out of all but the separator."""
        return 1 / self.separator

    @property
    def separator(self) -> int:
        """The id between the sequence and its repetition."""
        return self.vocabulary - 1

    def questions(self, n_rows: int, random_seed: int) -> Questions:
        """Sequences of ``2 * n_copied`` tokens with ``n_copied`` targets each."""
        generator = stream(random_seed, "recall.copying")
        copied_bt = torch.randint(self.separator, (n_rows, self.n_copied), generator=generator)
        separator_bt = torch.full((n_rows, 1), self.separator)
        tokens_bt = torch.cat([copied_bt, separator_bt, copied_bt[:, :-1]], dim=1)
        return Questions(tokens_bt, torch.cat([torch.full_like(copied_bt, IGNORED), copied_bt], dim=1))


@dataclass(frozen=True)
class Needle:
    """One pair hidden in random filler, and its key again as the last token of the sequence; the target is its value.

    distance: tokens from the pair's key to the query, so 2 where the query follows the pair. Filler and value are any
    id but the key: nothing but the key distinguishes the pair from what surrounds it.
    """

    vocabulary: int
    window: int
    distance: int

    def __post_init__(self) -> None:
        _require_at_least("vocabulary", self.vocabulary, 3)
        _require_at_least("distance", self.distance, 2)
        if self.window <= self.distance:
            raise WrongValue(
                f"a needle {self.distance} tokens before its query needs {self.distance + 1} tokens, found "
                f"{self.window}. Set the distance to {self.window - 1} or less, or a longer sequence.",
                found=self.window,
                expected=self.distance + 1,
            )

    @property
    def name(self) -> str:
        """As ``needle/128``: the distance."""
        return f"needle/{self.distance}"

    @property
    def chance(self) -> float:
        """One id out of all."""
        return 1 / self.vocabulary

    def questions(self, n_rows: int, random_seed: int) -> Questions:
        """Sequences with one target each, at their end."""
        generator = stream(random_seed, "recall.needle")
        key_bt = torch.randint(self.vocabulary, (n_rows, 1), generator=generator)
        beyond_bt = torch.randint(1, self.vocabulary, (n_rows, self.window), generator=generator)
        tokens_bt = (key_bt + beyond_bt) % self.vocabulary
        place = self.window - 1 - self.distance
        tokens_bt[:, [place, -1]] = key_bt
        targets_bt = torch.full_like(tokens_bt, IGNORED)
        targets_bt[:, -1] = tokens_bt[:, place + 1]
        return Questions(tokens_bt, targets_bt)


def suite(vocabulary: int, window: int) -> tuple[Task, ...]:
    """The tasks by which a trained model is measured: of each kind the sizes that fit its vocabulary and sequence
    length."""
    if window < SHORTEST:
        raise WrongValue(
            f"the smallest tasks of recall need a sequence of {SHORTEST} tokens, found {window}. "
            f"Set data.seq_len to {SHORTEST} or more.",
            found=window,
            expected=SHORTEST,
        )
    most_pairs = min(window // 3, vocabulary // 2)
    return (
        *(Associative(vocabulary, window, n_pairs) for n_pairs in PAIRS if n_pairs <= most_pairs),
        *(Copying(vocabulary, n_copied) for n_copied in LENGTHS if 2 * n_copied <= window),
        *(Needle(vocabulary, window, distance) for distance in DISTANCES if distance < window),
    )


@dataclass(frozen=True)
class RecallScore:
    """Of ``n`` targets, how many had the highest logit, and the nats of all of them."""

    n: int
    n_right: int
    total_nats: float

    @property
    def accuracy(self) -> float:
        """The share of right predictions."""
        return self.n_right / self.n

    @property
    def nats(self) -> float:
        """Nats per target."""
        return self.total_nats / self.n


@torch.no_grad()
def recall(reader: Reader, questions: Questions, *, batch: int, device: Device, loss: Loss) -> RecallScore:
    """How many of the targets ``reader`` predicts, each sequence read from a fresh memory, ``batch`` of them at
    once."""
    n_right, total_nats = 0, 0.0
    for rows in zip(questions.tokens_bt.split(batch), questions.targets_bt.split(batch), strict=True):
        tokens_bt, targets_bt = device.move(*rows)
        with device.autocast():
            logits_bto, _ = reader(tokens_bt, None)
        n_right += int((logits_bto.argmax(-1) == targets_bt).sum())
        total_nats += float(loss(logits_bto, targets_bt))
    return RecallScore(questions.n, n_right, total_nats)


def _distinct(n_rows: int, n_drawn: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """For each row that many different numbers of 0 .. n - 1, in random order."""
    return torch.rand(n_rows, n, generator=generator).argsort(dim=1)[:, :n_drawn]


def _require_at_least(name: str, found: int, least: int) -> None:
    if found < least:
        raise WrongValue(
            f"{name} is {found}, expected {least} or more. Set {name} to at least {least}.", found=found, expected=least
        )
