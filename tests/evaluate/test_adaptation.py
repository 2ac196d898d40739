"""Adaptation: what a reader gains from what it has read, told apart from texts that only become easier."""

import math

import pytest
import torch
from torch.nn import functional

from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.corpus import Corpus
from meristem.data.prepare import prepare
from meristem.device.resolve import Device
from meristem.errors import CorpusTooShort
from meristem.evaluate import adaptation as suite
from meristem.evaluate.adaptation import Adaptation, Documents, adaptation, documents
from meristem.evaluate.learn_rate import FACTORS, find_learn_rates, n_documents
from meristem.evaluate.likelihood import Likelihood
from meristem.models.config import LearnConfig
from meristem.models.online import online_reader
from meristem.models.weights import RATES
from zoo import VOCABULARY, ZOO, moved

CPU = Device(torch.device("cpu"), torch.float64, torch.float32)
IDS = 11


class Successors(torch.nn.Module):
    """Remembers for every id what followed it last, and expects that; before it has seen anything all are alike."""

    def __init__(self):
        super().__init__()
        self.is_writing = True

    def forward(self, tokens_bt, state):
        n_rows = len(tokens_bt)
        state = state or {"memory_bos": torch.zeros(n_rows, IDS, IDS), "last_b": torch.full((n_rows,), -1)}
        memory_bos, last_b, logits = state["memory_bos"].clone(), state["last_b"], []
        for now_b in tokens_bt.unbind(1):
            for row in range(n_rows):
                if self.is_writing and last_b[row] >= 0:
                    memory_bos[row, last_b[row]] = 4.0 * functional.one_hot(now_b[row], IDS)
            logits.append(memory_bos[torch.arange(n_rows), now_b])
            last_b = now_b
        return torch.stack(logits, dim=1), {"memory_bos": memory_bos, "last_b": last_b}


def copied(n_rows=3, n_copied=IDS, more=1):
    """Random orders of all ids, written twice: the second half of the text is a copy of the first."""
    generator = torch.Generator().manual_seed(0)
    order_bt = torch.rand(n_rows, n_copied, generator=generator).argsort(dim=1)
    tokens_bt = torch.cat([order_bt, order_bt, order_bt[:, :more]], dim=1)
    return Documents(tokens_bt, torch.ones_like(tokens_bt))


def nats_of(logits_bto, targets_bt):
    """In the precision of the logits; that of training rounds to float32."""
    return functional.cross_entropy(logits_bto.double().flatten(0, 1), targets_bt.flatten(), reduction="sum")


def measured(reader, chosen, piece=4, batch=2):
    return adaptation(reader, chosen, piece=piece, batch=batch, device=CPU, loss=nats_of)


def test_a_memory_learns_to_copy_and_one_that_stands_still_does_not():
    """The first half says nothing of itself, the second half is in the memory; off, both cost what a guess costs."""
    on, off = (measured(online_reader(Successors(), learn, nats_of), copied()) for learn in ("memory", "none"))
    guess, known = math.log(IDS), math.log(1 + (IDS - 1) * math.exp(-4))
    assert off.first.nats == off.second.nats == pytest.approx(guess) and off.gain_nats == 0
    assert on.first.nats == pytest.approx(guess) and on.second.nats == pytest.approx(known)
    assert on.gain_nats == pytest.approx(guess - known)
    assert on.gain_bits_per_byte == pytest.approx((guess - known) / math.log(2))


def test_a_second_reading_is_cheaper_where_the_memory_was_kept():
    """Reset between, it is the first one again; kept, all but nothing is left to learn."""
    on, off = (measured(online_reader(Successors(), learn, nats_of), copied(more=1)) for learn in ("memory", "none"))
    assert on.again.nats < 0.5 * on.whole.nats
    assert off.again.total_nats == pytest.approx(off.whole.total_nats)
    again = measured(online_reader(Successors(), "memory", nats_of), copied(more=1))
    assert again == on


def random_documents(n_rows=5, length=19):
    generator = torch.Generator().manual_seed(2)
    tokens_bt = torch.randint(VOCABULARY, (n_rows, length + 1), generator=generator)
    return Documents(tokens_bt, tokens_bt % 3 + 1)


@pytest.mark.parametrize("name", ["preset-titans-mag", "preset-titans-mac", "preset-attention", "preset-hope"])
@pytest.mark.parametrize("piece, batch", [(1, 5), (3, 2), (100, 1)])
def test_pieces_and_batches_add_up_to_the_whole(name, piece, batch):
    """The halves together are the document read at once, each token in one of them; cut however."""
    model, chosen = moved(*ZOO[name]), random_documents()
    found = measured(model, chosen, piece=piece, batch=batch)
    with torch.no_grad():
        logits_bto, _ = model(chosen.tokens_bt[:, :-1], None)
    nats = [float(nats_of(logits_bto[:, half], chosen.tokens_bt[:, 1:][:, half])) for half in HALVES]
    assert (found.first.total_nats, found.second.total_nats) == pytest.approx(tuple(nats), rel=1e-9)
    assert (found.first.n_tokens, found.second.n_tokens, found.again.n_tokens) == (5 * 9, 5 * 10, 5 * 19)
    assert found.first.n_bytes == int(chosen.bytes_bt[:, 1:10].sum())
    assert found.whole.n_bytes == found.again.n_bytes == int(chosen.bytes_bt[:, 1:].sum())


HALVES = (slice(0, 9), slice(9, 19))


def test_attention_alone_reads_the_same_with_and_without_a_memory():
    """Nothing of it is written: bitwise."""
    model, chosen = moved(*ZOO["preset-attention"]), random_documents()
    assert measured(online_reader(model, "none", nats_of), chosen) == measured(model, chosen)


def test_a_memory_that_writes_reads_otherwise_than_one_that_does_not():
    model, chosen = moved(*ZOO["preset-titans-mag"]), random_documents()
    assert measured(online_reader(model, "none", nats_of), chosen) != measured(model, chosen)


@pytest.mark.parametrize("name", [name for name, (m, _) in ZOO.items() if m.name == "lm" and m.mlp == "levels"][:2])
def test_levels_learn_one_document_at_a_time(name):
    """Each from the weights of the model, whatever was read before: the sum of documents measured alone."""
    reader, chosen = online_reader(moved(*ZOO[name]), "levels", nats_of), random_documents(n_rows=2, length=150)
    alone = [
        measured(reader, Documents(chosen.tokens_bt[row : row + 1], chosen.bytes_bt[row : row + 1]), 40, 1)
        for row in range(2)
    ]
    both = measured(reader, chosen, piece=40, batch=1)
    assert both == alone[0] + alone[1]
    assert both.again != measured(online_reader(reader.model, "memory", nats_of), chosen, 40, 1).again


def test_one_document_is_read_to_its_end():
    """At every point the sum over all that was read, however it was cut; the last point is the end."""
    model, chosen = moved(*ZOO["preset-titans-mag"]), random_documents(n_rows=1, length=19)
    found = suite.reading(model, chosen, piece=5, device=CPU, loss=nats_of, first=4)
    assert [(n, likelihood.n_tokens) for n, likelihood in found] == [(n, n) for n in (4, 8, 16, 19)]
    for n, likelihood in found:
        with torch.no_grad():
            logits_bto, _ = model(chosen.tokens_bt[:, :n])
        assert likelihood.total_nats == pytest.approx(float(nats_of(logits_bto, chosen.tokens_bt[:, 1 : n + 1])))
        assert likelihood.n_bytes == int(chosen.bytes_bt[:, 1 : n + 1].sum())


def test_rates_are_found_for_what_a_model_has():
    """One of those tried, for each kind of weights; the recurrent model has no feed-forward layers."""
    chosen = random_documents(n_rows=2, length=40)
    for name, kinds in (("preset-titans-mag", ["mlp", "head"]), ("preset-chargru", ["head"])):
        found = find_learn_rates(moved(*ZOO[name]), chosen, LearnConfig(chunk=8), piece=13, device=CPU, loss=nats_of)
        assert list(found) == kinds and all(found[which] / RATES[which] in FACTORS for which in kinds)
    assert [n_documents(n) for n in (10**5, 10**6, 10**9)] == [0, 1, 2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Forty documents of 16 to 106 bytes."""
    place = tmp_path_factory.mktemp("text")
    (place / "documents").mkdir()
    for number in range(40):
        text = "".join(f"line {line} of {number:02d}.\n" for line in range(number % 7 + 1))
        (place / "documents" / f"{number}.txt").write_text(text)
    part = DataConfig(source=str(place / "documents"), root=place, validation=0.4)
    return prepare(part, TokenizerConfig())


def test_documents_are_the_beginnings_of_those_that_are_long_enough(corpus):
    """The same ones every time, evenly spread, none of them cut short or joined with its neighbour."""
    edges = corpus.documents("val")
    texts = [corpus.tokens("val")[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    long = [text[:51].tolist() for text in texts if len(text) > 50]
    found = documents(corpus, "val", length=50)
    assert found.tokens_bt.tolist() == long and 1 < len(long) < len(texts)
    assert found.bytes_bt.tolist() == torch.ones_like(found.tokens_bt).tolist()
    few, again = (documents(corpus, "val", length=50, most=2) for _ in range(2))
    assert few.tokens_bt.tolist() == [long[0], long[len(long) // 2]]
    assert few.fingerprint == again.fingerprint != found.fingerprint


def test_documents_that_are_too_short_are_refused(corpus):
    with pytest.raises(CorpusTooShort, match=r"no document.*holds 1001 tokens; the longest.*data.seq_len to 2\d"):
        documents(corpus, "val", length=1000)


def test_sums_are_added_and_means_never_averaged():
    one = Adaptation(Likelihood(10.0, 2, 4), Likelihood(4.0, 2, 4), Likelihood(8.0, 4, 8))
    other = Adaptation(Likelihood(2.0, 6, 4), Likelihood(2.0, 6, 4), Likelihood(4.0, 12, 8))
    assert (one + other).first.nats == 12 / 8 and (one + other).gain_nats == 12 / 8 - 6 / 8
