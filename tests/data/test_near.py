"""Documents that are nearly the same are found, whatever split they stand in; others are not."""

import random
import re

import numpy as np
import pytest

from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.near import near_duplicates, near_firsts, sketch
from meristem.data.prepare import prepare

WORDS = [f"{a}{b}{c}" for a in "bdfglmnprst" for b in "aeiou" for c in ("ndor", "l", "rim", "sk")]


def prose(seed, n_words=400):
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def with_changes(text, n_changes, seed=0):
    words = text.split()
    for place in random.Random(seed).sample(range(len(words)), n_changes):
        words[place] = "changed"
    return " ".join(words)


def jaccard(one, other):
    runs = [{text[at : at + 16] for at in range(len(text) - 15)} for text in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


@pytest.mark.parametrize("n_changes", [0, 4, 12, 40, 400])
@pytest.mark.parametrize("n_words", [30, 400])
def test_sketches_agree_as_much_as_the_texts(n_words, n_changes):
    """Measured against all runs of both texts; the standard error of 128 numbers is 0.044 at most."""
    found, true = [], []
    for seed in range(12):
        one = prose(seed, n_words)
        other = with_changes(one, min(n_changes, n_words), seed)
        found.append(float((sketch(one.encode()) == sketch(other.encode())).mean()))
        true.append(jaccard(one, other))
    assert np.abs(np.subtract(found, true)).max() < (0.15 if n_words == 400 else 0.3)
    assert abs(np.mean(found) - np.mean(true)) < 0.05


def test_case_and_white_space_count_nowhere_and_long_texts_are_read_in_portions(monkeypatch):
    text = prose(1, 3000)
    whole = sketch(text.encode())
    assert (sketch(re.sub(" ", "\n\t ", text.upper()).encode()) == whole).all()
    monkeypatch.setattr("meristem.data.near._PORTION", 1000)
    assert (sketch(text.encode()) == whole).all()
    assert (sketch(b"") == sketch(b" \n")).all() and (sketch(b"a") != sketch(b"b")).any()


def test_groups_are_found_and_nothing_else():
    texts = [prose(seed) for seed in range(150)]
    copies = {40: 3, 41: 3, 99: 17, 120: 119}
    for number, first in copies.items():
        texts[number] = with_changes(texts[first], 8, number)
    firsts = near_firsts(np.array([sketch(text.encode()) for text in texts]))
    assert firsts.tolist() == [copies.get(number, number) for number in range(150)]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        text = with_changes(prose(5), 6, number) if number % 6 == 0 else prose(100 + number)
        (folder / f"{number:02}.txt").write_text(text)
    return prepare(DataConfig(source=str(folder), root=tmp_path, validation=0.3), TokenizerConfig())


def test_held_out_documents_near_the_training_text_are_told(corpus):
    """By the splits that hold them: what is held out and stands in the training text too makes a run look better."""
    alike = {
        split: [number for number, text in enumerate(documents) if "changed" in text]
        for split in corpus.splits
        for documents in [split_documents(corpus, split)]
    }
    assert all(alike.values()), "both splits hold some"
    found = near_duplicates(corpus, 1000)
    assert (found.n_documents, found.n_all, found.n_near) == (60, 60, 9)
    assert found.n_held_out == len(alike["val"])
    (group,) = found.groups
    assert group["count"] == 10 and len(group["begins"]) == 60
    assert group["documents"] == [f"train#{number}" for number in alike["train"]][:5]
    some = near_duplicates(corpus, 30)
    assert (some.n_documents, some.n_all) == (30, 60) and some.n_near < 9


def split_documents(corpus, split):
    tokens, edges = corpus.tokens(split), corpus.documents(split).tolist()
    return [corpus.tokenizer.decode(tokens[start:stop].tolist()) for start, stop in zip(edges, edges[1:], strict=False)]
