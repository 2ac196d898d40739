"""Several sources in given shares: prepared once, each divided by itself, and read so that any row is found at once."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.data.config import MIXED_ROWS, DataConfig, TokenizerConfig
from meristem.data.mixture import Mixture
from meristem.data.prepare import prepare
from meristem.data.stream import Stream
from meristem.errors import ConflictingKeys, CorpusTooShort, DataError, WrongValue

WEIGHTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=6)


@given(weights=WEIGHTS, key=st.integers(0, 2**64 - 1), n_rows=st.integers(0, 3 * MIXED_ROWS))
@settings(max_examples=30, deadline=None)
def test_dd1_rows_are_shared_by_weight_and_found_by_number(weights, key, n_rows):
    """DD-1: a row's source and place follow from its number; each source has its share of every ``MIXED_ROWS`` rows."""
    mixture = Mixture(weights, key)
    source_n, before_n = mixture.take(np.arange(n_rows))
    for source in range(len(weights)):
        assert before_n[source_n == source].tolist() == list(range(int((source_n == source).sum())))
    counts = mixture.counts(n_rows)
    assert counts.tolist() == np.bincount(source_n, minlength=len(weights)).tolist()
    exact = np.array(weights) / sum(weights) * MIXED_ROWS
    assert np.abs(mixture.counts(MIXED_ROWS) - exact).max() <= 1 + 1e-9
    assert mixture.counts(7 * MIXED_ROWS).tolist() == (7 * mixture.counts(MIXED_ROWS)).tolist()
    if n_rows:
        again, before = Mixture(weights, key).take(np.array([n_rows - 1]))
        assert (again[0], before[0]) == (source_n[-1], before_n[-1])


def test_few_rows_have_about_their_share_and_another_key_another_order():
    shares = [Mixture([3, 1], key).counts(400)[1] / 400 for key in range(20)]
    assert 0.15 < min(shares) < max(shares) < 0.35
    first, second = (Mixture([3, 1], key).take(np.arange(400))[0].tolist() for key in (1, 2))
    assert first != second


@pytest.fixture
def places(tmp_path):
    """A directory of many documents, a file, and records in two files of one name."""
    (tmp_path / "new").mkdir()
    for number in range(40):
        (tmp_path / "new" / f"{number:02}.txt").write_text(
            "".join(f"New {number} says {n}. " for n in range(2 + number % 7))
        )
    (tmp_path / "old.txt").write_text("".join(f"Old sentence {number}.\n" for number in range(100)))
    for number, name in enumerate(("en", "de")):
        (tmp_path / name).mkdir()
        lines = [f'{{"text": "{name} {record} says something."}}\n' for record in range(30 + number)]
        (tmp_path / name / "train.jsonl").write_text("".join(lines))
    return tmp_path


def mixture(places, *names, weights, **more):
    source = "+".join(str(places / name) for name in names)
    data = DataConfig(source=source, weights=weights, root=places / "cache", **{"validation": 0.2, **more})
    return prepare(data, TokenizerConfig())


def of_source(corpus, split):
    """The text of each source in a split."""
    tokens, edges = corpus.tokens(split), corpus.documents(split)
    return {
        name: corpus.tokenizer.decode(tokens[int(edges[own.start]) : int(edges[own.stop])].tolist())
        for name, own in corpus.sources(split).items()
    }


def test_cx_8_1_each_source_is_divided_by_itself(places):
    """A file of its own is cut, so that text of it is held out too; documents of the other go by their names."""
    corpus = mixture(places, "new", "old.txt", weights=(3, 1))
    assert (corpus.name, corpus.weights) == ("new+old.txt", (3, 1))
    train, val = (of_source(corpus, split) for split in ("train", "val"))
    old = (places / "old.txt").read_text()
    assert train["old.txt"] + val["old.txt"] == old
    assert abs(len(val["old.txt"]) / len(old) - 0.2) < 0.01
    alone = prepare(DataConfig(source=str(places / "new"), root=places / "cache", validation=0.2), TokenizerConfig())
    assert (train["new"], val["new"]) == tuple(alone.text(split).decode() for split in ("train", "val"))


def test_sources_of_one_name_are_told_apart_and_weights_change_no_corpus(places):
    corpus = mixture(places, "en/train.jsonl", "de/train.jsonl", weights=(1, 1))
    assert list(corpus.sources("train")) == ["train.jsonl", "train.jsonl (2)"]
    assert all(
        text.startswith(name) for name, text in zip(("en", "de"), of_source(corpus, "train").values(), strict=True)
    )
    assert [entry["uri"] for entry in corpus.manifest["sources"]] == ["train.jsonl"] * 2
    again = mixture(places, "en/train.jsonl", "de/train.jsonl", weights=(5, 1))
    assert (again.path, again.weights) == (corpus.path, (5, 1))


def test_a_copy_in_another_source_is_held_out_with_the_first(places):
    """CX-8.1: groups never straddle, whatever source they are of."""
    (places / "again").mkdir()
    for path in (places / "new").iterdir():
        (places / "again" / f"other-{path.name}").write_bytes(path.read_bytes())
    corpus = mixture(places, "new", "again", weights=(1, 1))
    for split in ("train", "val"):
        texts = of_source(corpus, split)
        assert texts["new"] and texts["new"] == texts["again"]


def rows_of(stream, n_batches):
    cursor = stream.start()
    for _ in range(n_batches):
        batch, cursor = stream.next(cursor)
        yield from zip(batch.tokens_bt.tolist(), batch.targets_bt[:, -1].tolist(), strict=True)


def test_each_source_has_epochs_of_its_own(places):
    """Of 3 to 1 rows the small source comes round more often; each of its windows once before any twice."""
    corpus = mixture(places, "new", "old.txt", weights=(3, 1))
    stream = Stream(corpus, "train", window=16, batch=8, random_seed=3)
    tokens, edges, spans = corpus.tokens("train"), corpus.documents("train"), corpus.sources("train")
    every = {
        name: {tuple(tokens[at : at + 17].tolist()) for at in range(start, stop - 16, 16)}
        for name, own in spans.items()
        for start, stop in [(int(edges[own.start]), int(edges[own.stop]))]
    }
    read = [(*row, last) for row, last in rows_of(stream, 256)]
    found = {name: [row for row in read if row in windows] for name, windows in every.items()}
    assert len(found["new"]) + len(found["old.txt"]) == len(read) == 2048
    cursor = replace(stream.start(), position=256)
    for each in stream.read(cursor):
        own, n_windows = found[each.name], len(every[each.name])
        assert (each.n_tokens, each.epochs) == (16 * len(own), len(own) / n_windows)
        assert max(Counter(own).values()) - min(Counter(own)[row] for row in every[each.name]) <= 1
    shares = [each.n_tokens / (16 * 2048) for each in stream.read(cursor)]
    assert abs(shares[1] - 0.25) < 0.02
    whole = replace(stream.start(), position=MIXED_ROWS // 8)
    assert [each.n_tokens for each in stream.read(whole)] == [16 * 3072, 16 * 1024]


def test_documents_of_sources_are_read_whole_in_shares_of_tokens(places):
    corpus = mixture(places, "new", "en/train.jsonl", weights=(1, 4), format="auto")
    stream = Stream(corpus, "train", window=16, batch=4, order="documents", random_seed=3)
    cursor, n_begun = stream.start(), Counter()
    for _ in range(300):
        batch, cursor = stream.next(cursor)
        for row, at in batch.reset_mask_bt.nonzero().tolist():
            n_begun["en" if chr(batch.tokens_bt[row, at]) == "e" else "new"] += 1
    new, en = stream.read(cursor)
    assert new.n_tokens + en.n_tokens == 300 * 4 * 16
    assert abs(en.n_tokens / (new.n_tokens + en.n_tokens) - 0.8) < 0.01
    n_documents = {name: own.stop - own.start for name, own in corpus.sources("train").items()}
    assert n_begun["en"] / n_documents["train.jsonl"] == pytest.approx(en.epochs, abs=0.2)
    assert n_begun["new"] / n_documents["new"] == pytest.approx(new.epochs, abs=0.2)


def test_a_source_too_short_for_a_window_is_named(places):
    (places / "tiny.txt").write_text("So short.")
    corpus = mixture(places, "new", "tiny.txt", weights=(1, 1))
    with pytest.raises(CorpusTooShort, match=r"'tiny.txt' holds 7 tokens .* a sequence of 16 needs at least 17"):
        Stream(corpus, "train", window=16, batch=4, random_seed=0)
    (places / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty.txt' holds no text"):
        mixture(places, "new", "empty.txt", weights=(1, 1))


@pytest.mark.parametrize(
    "given, error, match",
    [
        ({"source": "a+b", "weights": (1, 2, 3)}, ConflictingKeys, "3 numbers, and data.source joins 2 sources.*a, b"),
        ({"source": "a", "weights": (1, 2)}, ConflictingKeys, "2 numbers, and data.source joins 1"),
        ({"source": "a+", "weights": (1, 2)}, ConflictingKeys, "Give one weight for each"),
        ({"source": "a+a", "weights": (1, 2)}, ConflictingKeys, "names a source twice"),
        ({"source": "a+b", "weights": (1, 9999)}, ConflictingKeys, "0.0001 of the rows, less than one in 4096"),
        ({"source": "a+b", "weights": (1, 2), "order": "sequential"}, ConflictingKeys, "set data.order=documents"),
        ({"source": "a+b", "weights": (1, 0)}, WrongValue, "each has to be a number above 0"),
    ],
    ids=str,
)
def test_weights_that_mean_nothing_are_refused(given, error, match):
    with pytest.raises(error, match=match):
        DataConfig(**given)
