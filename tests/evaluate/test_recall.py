"""Recall: tasks whose answers stand in the window, and the score of a model that looks them up."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meristem.data.stream import IGNORED
from meristem.device.resolve import Device
from meristem.errors import WrongValue
from meristem.evaluate.recall import SHORTEST, Associative, Copying, Needle, Questions, recall, suite
from meristem.train.loss import cross_entropy

CPU = Device(torch.device("cpu"), torch.float32, torch.float32)
TASKS = (
    Associative(23, 37, 5),
    Associative(10, 15, 5),
    Copying(7, 11),
    Copying(3, 1),
    Needle(13, 29, 17),
    Needle(5, 3, 2),
    Needle(5, 9, 8),
)
each_task = pytest.mark.parametrize("task", TASKS, ids=repr)


class Lookup(torch.nn.Module):
    """Answers from the tokens before and no more: what followed the same id at its first appearance, or, from the
    separator on, the copied sequence from its start."""

    def __init__(self, vocabulary, separator=None):
        super().__init__()
        self.vocabulary, self.separator = vocabulary, separator

    def forward(self, tokens_bt, state):
        answers = [[self.answer(row[: place + 1]) for place in range(len(row))] for row in tokens_bt.tolist()]
        return 4.0 * torch.nn.functional.one_hot(torch.tensor(answers), self.vocabulary), state

    def answer(self, read):
        if self.separator in read:
            return read[len(read) - 1 - read.index(self.separator)]
        first = read.index(read[-1])
        return read[first + 1] if first + 1 < len(read) else 0


def lookup(task):
    return Lookup(task.vocabulary, getattr(task, "separator", None))


def score(model, questions, batch=7):
    return recall(model, questions, batch=batch, device=CPU, loss=cross_entropy)


@each_task
def test_who_looks_it_up_is_always_right(task):
    """And each answer costs what its logit says."""
    found = score(lookup(task), task.questions(50, 1))
    assert (found.accuracy, found.n_right) == (1.0, found.n)
    assert found.nats == pytest.approx(math.log(1 + (task.vocabulary - 1) * math.exp(-4)), rel=1e-5)


@each_task
def test_right_answers_to_other_questions_are_right_by_chance(task):
    """All answers, dealt out anew: as often right as ``chance`` says, within five deviations."""
    questions = task.questions(2000, 1)
    is_asked_bt = questions.targets_bt != IGNORED
    answers = questions.targets_bt[is_asked_bt]
    dealt = answers[torch.randperm(len(answers), generator=torch.Generator().manual_seed(0))]
    logits_bto = torch.zeros(*questions.tokens_bt.shape, task.vocabulary)
    logits_bto[is_asked_bt] = torch.nn.functional.one_hot(dealt, task.vocabulary).float()
    found = score(lambda tokens_bt, state: (logits_bto, state), questions, batch=2000)
    deviation = math.sqrt(task.chance * (1 - task.chance) / found.n)
    assert found.accuracy == pytest.approx(task.chance, abs=5 * deviation)


@each_task
def test_the_seed_says_which_questions(task):
    """Same seed, same ids; another seed, others; what is drawn elsewhere changes nothing."""
    first = task.questions(50, 3)
    torch.rand(5)
    again, other = task.questions(50, 3), task.questions(50, 4)
    assert torch.equal(first.tokens_bt, again.tokens_bt) and torch.equal(first.targets_bt, again.targets_bt)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert not torch.equal(first.tokens_bt, other.tokens_bt)


@pytest.mark.parametrize("task", suite(256, 2500), ids=lambda task: task.name)
def test_ids_are_of_the_vocabulary(task):
    """Every id is, and where something is asked the target is too."""
    questions = task.questions(9, 0)
    asked = questions.targets_bt[questions.targets_bt != IGNORED]
    assert questions.tokens_bt.shape == questions.targets_bt.shape
    for ids in (questions.tokens_bt, asked):
        assert ids.dtype == torch.int64 and 0 <= int(ids.min()) and int(ids.max()) < 256
    assert questions.n == len(asked)


@given(
    n_pairs=st.integers(1, 6), more_time=st.integers(0, 9), more_ids=st.integers(0, 5), random_seed=st.integers(0, 9)
)
def test_associative_asks_every_key_once_and_nothing_else(n_pairs, more_time, more_ids, random_seed):
    """Pairs of distinct keys and values come first; after them a key of the row stands exactly where it is asked."""
    task = Associative(2 * n_pairs + more_ids, 3 * n_pairs + more_time, n_pairs)
    questions = task.questions(4, random_seed)
    for tokens, targets in zip(questions.tokens_bt.tolist(), questions.targets_bt.tolist(), strict=True):
        value_of = dict(zip(tokens[: 2 * n_pairs : 2], tokens[1 : 2 * n_pairs : 2], strict=True))
        assert len(value_of) == len(set(value_of.values())) == n_pairs
        assert all(key % 2 == 0 and value % 2 == 1 for key, value in value_of.items())
        assert targets[: 2 * n_pairs] == [IGNORED] * (2 * n_pairs)
        assert targets[2 * n_pairs :] == [value_of.get(token, IGNORED) for token in tokens[2 * n_pairs :]]
        assert sorted(token for token in tokens[2 * n_pairs :] if token in value_of) == sorted(value_of)


def test_associative_spreads_order_and_places():
    """Keys are asked in all orders, at all places behind the pairs."""
    questions = Associative(8, 9, 2).questions(400, 0)
    is_asked_bt = questions.targets_bt != IGNORED
    assert is_asked_bt.any(dim=0).tolist() == [False] * 4 + [True] * 5
    first_asked = questions.tokens_bt.gather(1, is_asked_bt.int().argmax(dim=1, keepdim=True))
    assert 120 < int((first_asked == questions.tokens_bt[:, :1]).sum()) < 280


def test_copying_repeats_after_the_separator():
    """The sequence, one separator, the sequence but its last token; from the separator on each x is asked in turn."""
    task = Copying(7, 5)
    questions = task.questions(60, 0)
    copied_bt = questions.tokens_bt[:, :5]
    assert torch.equal(questions.tokens_bt[:, 6:], copied_bt[:, :4])
    assert torch.equal(questions.targets_bt[:, 5:], copied_bt)
    assert (questions.targets_bt[:, :5] == IGNORED).all() and (questions.tokens_bt[:, 5] == task.separator).all()
    assert sorted(set(copied_bt.flatten().tolist())) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("distance", [2, 3, 8, 18])
def test_needle_lies_at_its_distance(distance):
    """The last token stood once before, so far away; what followed it there is all that is asked."""
    questions = Needle(6, 19, distance).questions(60, 0)
    for tokens, targets in zip(questions.tokens_bt.tolist(), questions.targets_bt.tolist(), strict=True):
        assert [place for place, token in enumerate(tokens) if token == tokens[-1]] == [18 - distance, 18]
        assert targets == [IGNORED] * 18 + [tokens[19 - distance]]


def test_the_suite_takes_what_fits():
    """The sizes grow with the window, and the pairs with the vocabulary."""

    def names(*sizes):
        return [task.name for task in suite(*sizes)]

    assert names(256, SHORTEST) == ["associative/4", "copying/8", "needle/8"]
    assert names(256, 256) == [
        *("associative/4", "associative/16", "associative/64"),
        *("copying/8", "copying/32", "copying/128"),
        *("needle/8", "needle/32", "needle/128"),
    ]
    assert names(256, 4096)[-1] == "needle/2048"
    assert names(100, 256)[:3] == ["associative/4", "associative/16", "copying/8"]


def test_batches_merge_exactly():
    """However many windows are read at once, the sums are those of the whole."""
    task = TASKS[0]
    questions = task.questions(50, 2)
    model = torch.nn.Embedding(task.vocabulary, task.vocabulary)
    whole, parts = (score(lambda tokens_bt, state: (model(tokens_bt), state), questions, n) for n in (50, 7))
    assert (whole.n, whole.n_right) == (parts.n, parts.n_right) and 0 < whole.n_right < whole.n
    assert whole.total_nats == pytest.approx(parts.total_nats, rel=1e-6)


def test_questions_count_what_is_asked():
    questions = Questions(torch.tensor([[1, 2, 3]]), torch.tensor([[IGNORED, 0, 4]]))
    assert questions.n == 2
    assert questions.fingerprint != replace(questions, targets_bt=torch.tensor([[0, IGNORED, 4]])).fingerprint


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Associative(9, 99, 5), r"5 pairs need 10 ids, found a vocabulary of 9. Set 4 pairs or fewer"),
        (lambda: Associative(99, 14, 5), r"5 pairs .* sequence of 15 tokens, found 14. Set 4 pairs or fewer"),
        (lambda: Associative(99, 99, 0), r"n_pairs is 0, expected 1 or more. Set n_pairs to at least 1."),
        (lambda: Copying(2, 5), r"vocabulary is 2, expected 3 or more. Set vocabulary to at least 3."),
        (lambda: Copying(9, 0), r"n_copied is 0, expected 1 or more"),
        (lambda: Needle(2, 9, 5), r"vocabulary is 2, expected 3 or more"),
        (lambda: Needle(9, 9, 1), r"distance is 1, expected 2 or more"),
        (lambda: Needle(9, 9, 9), r"needs 10 tokens, found 9. Set the distance to 8 or less"),
        (lambda: suite(256, 15), r"need a sequence of 16 tokens, found 15. Set data.seq_len to 16 or more."),
    ],
)
def test_what_cannot_be_asked_is_refused(make, message):
    """With what was found, what is needed, and what to change."""
    with pytest.raises(WrongValue, match=message) as refusal:
        make()
    assert refusal.value.fields["found"] < refusal.value.fields["expected"]
