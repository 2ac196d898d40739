"""A curriculum over documents: the easiest first, their share rising to the cap, each found by its number alone."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.config import identity
from meristem.data.config import DataConfig, DifficultyConfig, TokenizerConfig
from meristem.data.difficulty import N_STAGES, Stages, by_document
from meristem.data.prepare import prepare
from meristem.data.stream import Stream
from meristem.errors import ConflictingKeys, DataError, DeadKey

SHARES = st.floats(0.01, 1)


@st.composite
def hows(draw):
    """Settings whose share rises."""
    low, high = sorted((draw(SHARES), draw(SHARES)))
    return DifficultyConfig(score="length", start=low, cap=high, epochs=draw(st.floats(0.05, 4)))


def share(how, stage):
    return math.sqrt(how.start**2 + (how.cap**2 - how.start**2) * stage / N_STAGES)


@given(n_items=st.integers(1, 300), how=hows(), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_cx_8_the_share_that_is_read_rises_to_the_cap(n_items, how, key):
    """Of each stage no item beyond its share, and every admitted one once before any twice."""
    stages = Stages.rising(n_items, how)
    n_ramp = int(stages.begins[-1])
    assert abs(n_ramp - how.epochs * stages.n_admitted[-1]) <= 1
    taken = stages.items(np.arange(n_ramp + 2 * n_items), key)
    edges = [*stages.begins.tolist(), len(taken)]
    for stage, (first, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        n_admitted = int(stages.n_admitted[stage])
        assert abs(n_admitted - share(how, stage) * n_items) <= 1
        counts = np.bincount(taken[first:stop], minlength=n_admitted)
        assert len(counts) == n_admitted and (stop - first == 0 or np.ptp(counts) <= 1)
    assert stages.items(np.array([n_ramp + n_items - 1]), key)[0] == taken[n_ramp + n_items - 1]


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40), how=hows(), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_cx_8_shares_of_whole_documents_are_of_their_sizes(sizes, how, key):
    """A stage ends with the document that reaches its end in tokens; what is admitted holds its share of all tokens."""
    sizes = np.sort(np.array(sizes))
    stages, whole = Stages.rising_by_size(sizes, how, key), int(sizes.sum())
    for stage, n_admitted in enumerate(stages.n_admitted.tolist()):
        exact = share(how, stage) * whole
        assert sizes[: n_admitted - 1].sum() < exact + 1e-6 and sizes[:n_admitted].sum() >= exact - 1e-6
    size_of_ramp = max(1, round(how.epochs * int(sizes[: stages.n_admitted[-1]].sum())))
    read = np.cumsum(sizes[stages.items(np.arange(int(stages.begins[-1])), key)])
    for stage, begin in enumerate(stages.begins.tolist()):
        due = size_of_ramp * stage // N_STAGES
        assert (read[begin - 1] if begin else 0) >= due and (begin < 2 or read[begin - 2] < due)


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz01234567"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Records of 5 to 64 bytes, each of a letter of its own and, at every third place, a full stop."""
    root = tmp_path_factory.mktemp("records")
    texts = ["".join("." if at % 3 == 2 else LETTERS[number] for at in range(5 + number)) for number in range(60)]
    (root / "all.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return prepare(DataConfig(source=str(root / "all.jsonl"), root=root / "cache", validation=0.0), TokenizerConfig())


def read(corpus, how, n_batches, **more):
    """The stream, and of each batch the documents that it begins to read; with ``within`` those of its sequences."""
    corpus = dataclasses.replace(corpus, difficulty=DifficultyConfig(**how))
    stream = Stream(corpus, "train", **{"window": 4, "batch": 2, "random_seed": 3, "documents": "within"} | more)
    cursor, found = stream.start(), []
    for _ in range(n_batches):
        batch, cursor = stream.next(cursor)
        if more.get("order") == "documents":
            letters = batch.tokens_bt[batch.reset_mask_bt].tolist()
        else:
            letters = [next(each for each in row if each != ord(".")) for row in batch.tokens_bt.tolist()]
        found.append([LETTERS.index(chr(letter)) for letter in letters])
    return stream, found


def test_cx_8_short_documents_are_read_first(corpus):
    """Of sequences: the first stage, a tenth of an epoch long, has none of a longer document; in the end all are."""
    n_windows = sum((4 + number) // 4 for number in range(60))
    stream, found = read(corpus, {"score": "length", "start": 0.1, "epochs": 2}, n_windows * 3 // 2)
    assert stream.n_windows == n_windows
    read_n = np.concatenate(found)
    n_admitted = np.searchsorted(np.cumsum([(4 + number) // 4 for number in range(60)]), 0.1 * n_windows) + 1
    first, last = (set(part.tolist()) for part in (read_n[: n_windows // 10], read_n[-n_windows:]))
    assert first == set(range(n_admitted))
    assert last == set(range(60))


def test_cx_8_the_cap_leaves_the_most_difficult_out(corpus):
    """An epoch is of what is read in the end, and has each sequence of it once."""
    stream, found = read(corpus, {"score": "length", "start": 0.2, "cap": 0.5, "epochs": 0.5}, 400)
    n_of = np.array([(4 + number) // 4 for number in range(60)])
    assert stream.n_windows == math.ceil(0.5 * n_of.sum())
    edge = int(np.searchsorted(np.cumsum(n_of), 0.5 * n_of.sum()))
    first = round(0.5 * stream.n_windows)
    epoch = np.bincount(np.concatenate(found)[first : first + stream.n_windows], minlength=60)
    assert epoch[:edge].tolist() == n_of[:edge].tolist() and not epoch[edge + 1 :].any()
    cursor = dataclasses.replace(stream.start(), position=stream.n_windows)
    assert stream.epoch(cursor) == stream.read(cursor)[0].epochs == 2


def test_cx_8_whole_documents_rise_too(corpus):
    """The first stage, half an epoch long, has the easiest third of the text and all of it; the last has everything."""
    n_inputs = np.array([4 + number for number in range(60)])
    order = np.argsort(bits_per_token(corpus), kind="stable")
    easiest = order[: np.searchsorted(np.cumsum(n_inputs[order]), n_inputs.sum() / 3) + 1]
    n_batches = int(n_inputs.sum()) // 8
    how = {"score": "rarity", "start": 1 / 3, "epochs": 10}
    stream, found = read(corpus, how, 11 * n_batches + 16, order="documents", documents="join")
    assert set(np.concatenate(found[: n_batches // 2 - 8]).astype(int)) == set(easiest.tolist())
    assert set(np.concatenate(found[-n_batches - 16 :]).astype(int)) == set(range(60))
    assert stream.batches_per_epoch == -(-n_inputs.sum() // 8)


def bits_per_token(corpus):
    """Of each document, were each byte drawn by itself as often as it is in the text."""
    texts = [document(corpus, number) for number in range(60)]
    counts = Counter(b"".join(texts))
    bits = {letter: -math.log2(n / counts.total()) for letter, n in counts.items()}
    return [sum(bits[letter] for letter in text) / len(text) for text in texts]


def document(corpus, number):
    edges = corpus.documents("train").tolist()
    return bytes(corpus.tokens("train")[edges[number] : edges[number + 1]].tolist())


def test_difficulties_are_those_of_their_equations(corpus, monkeypatch):
    """Also where the text is counted in several parts, whose edges fall into documents."""
    monkeypatch.setattr("meristem.data.difficulty._CHUNK", 37)
    scored = dataclasses.replace(corpus, difficulty=DifficultyConfig(score="length"))
    assert by_document(scored, "train").tolist() == list(range(5, 65))
    scored = dataclasses.replace(corpus, difficulty=DifficultyConfig(score="rarity"))
    np.testing.assert_allclose(by_document(scored, "train") / (1 << 16), bits_per_token(corpus), rtol=1e-4)


def test_a_text_of_one_document_has_no_order(tmp_path):
    (tmp_path / "one.txt").write_text("One text that goes on. " * 30)
    data = DataConfig(source=str(tmp_path / "one.txt"), root=tmp_path / "cache", difficulty={"score": "length"})
    with pytest.raises(
        DataError, match=r"orders documents, and 'one.txt' has one document in split 'train'. Give it as"
    ):
        Stream(prepare(data, TokenizerConfig()), "train", window=8, batch=2, random_seed=1)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (
            {"difficulty": {"score": "length", "start": 0.5, "cap": 0.2}},
            ConflictingKeys,
            "start=0.5 is more than .*cap=0.2",
        ),
        ({"difficulty": {"start": 0.5}}, DeadKey, r"data.difficulty.start is 0.5, but .*score=none orders nothing"),
        ({"difficulty": {"score": "rarity"}, "order": "curriculum"}, ConflictingKeys, "Set data.order to shuffled or"),
        (
            {"difficulty": {"score": "rarity"}, "order": "sequential"},
            ConflictingKeys,
            "data.order=sequential has an ord",
        ),
        ({"difficulty": {"score": "rarity"}, "order": "random"}, ConflictingKeys, "data.order=random has an order of"),
    ],
)
def test_settings_that_say_nothing_are_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        DataConfig(**wrong)


def test_a_run_without_difficulty_is_the_run_that_it_was():
    plain, rising = (DataConfig(difficulty=DifficultyConfig(score=score)) for score in ("none", "length"))
    assert identity(plain) == identity(DataConfig()) != identity(rising)
