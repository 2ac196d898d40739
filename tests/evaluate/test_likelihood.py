"""Likelihood over held-out documents."""

import math
from pathlib import Path

import pytest
import torch

from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.corpus import Corpus
from meristem.data.prepare import prepare
from meristem.data.stream import held_out, held_out_documents
from meristem.device.config import DeviceConfig
from meristem.device.resolve import resolve
from meristem.evaluate.likelihood import Likelihood, likelihood
from meristem.events import silent
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.train.loss import cross_entropy

DEVICE = resolve(DeviceConfig(device="cpu", dtype="fp32", threads=1), silent)


@pytest.fixture(scope="module", params=["byte", "bpe"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    place: Path = tmp_path_factory.mktemp("text")
    (place / "documents").mkdir()
    for number in range(40):
        words = "".join(f"document {number} has the line {line}\n" for line in range(number % 7 + 1))
        (place / "documents" / f"{number}.txt").write_text(words)
    part = DataConfig(source=str(place / "documents"), root=place, validation=0.3)
    return prepare(part, TokenizerConfig(kind=request.param, vocab_size=300))


def model_of(corpus: Corpus) -> torch.nn.Module:
    return build(ModelConfig(name="chargru", dim=7, n_layers=2), MemoryConfig(), corpus.tokenizer.vocab_size, 0)


def measured(corpus: Corpus, *, window: int, batch: int, max_windows: int | None = None) -> Likelihood:
    batches = held_out(corpus, "val", window=window, batch=batch, max_windows=max_windows)
    return likelihood(model_of(corpus), batches, device=DEVICE, loss=cross_entropy)


def test_equals_the_definition_token_by_token(corpus):
    """Each document in windows of 9 from a fresh state; every token but the first of a document counted once."""
    model = model_of(corpus).double()
    tokens, edges = torch.from_numpy(corpus.tokens("val")[:].astype("int64")), corpus.documents("val")
    nats, n_tokens, n_bytes = 0.0, 0, 0
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        for place in range(start, stop - 1):
            first = start + (place - start) // 9 * 9
            with torch.no_grad():
                logits_bto, _ = model(tokens[None, first : place + 1])
            target = int(tokens[place + 1])
            nats -= float(logits_bto[0, -1].log_softmax(-1)[target])
            n_tokens += 1
            n_bytes += len(corpus.tokenizer.tokens[target])
    found = measured(corpus, window=9, batch=5)
    assert (found.n_tokens, found.n_bytes) == (n_tokens, n_bytes)
    assert found.total_nats == pytest.approx(nats, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_batches_merge_exactly(corpus, batch):
    """However the windows are put together, the sums are those of the whole."""
    whole, found = measured(corpus, window=9, batch=1000), measured(corpus, window=9, batch=batch)
    assert (found.n_tokens, found.n_bytes) == (whole.n_tokens, whole.n_bytes)
    assert found.total_nats == pytest.approx(whole.total_nats, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 7])
def test_a_memory_is_carried_through_documents(corpus, batch):
    """Each document read whole from a fresh state, whatever the sequences and however many are read at once."""
    model = model_of(corpus).double()
    tokens, edges = torch.from_numpy(corpus.tokens("val")[:].astype("int64")), corpus.documents("val").tolist()
    nats = 0.0
    for start, stop in zip(edges, edges[1:], strict=False):
        with torch.no_grad():
            logits_bto, _ = model(tokens[None, start : stop - 1])
        nats += float(cross_entropy(logits_bto, tokens[None, start + 1 : stop]))
    batches = held_out_documents(corpus, "val", window=9, batch=batch)
    found = likelihood(model, batches, device=DEVICE, loss=cross_entropy)
    fresh = measured(corpus, window=9, batch=5)
    assert (found.n_tokens, found.n_bytes) == (fresh.n_tokens, fresh.n_bytes)
    assert found.total_nats == pytest.approx(nats, rel=1e-6) and found.total_nats != pytest.approx(fresh.total_nats)


def test_parts_add_up_and_never_average():
    """Ten tokens at 1 nat and thirty at 2 make 1.75 per token, not 1.5."""
    both = Likelihood(10.0, 10, 20) + Likelihood(60.0, 30, 50)
    assert (both.nats, both.n_bytes) == (1.75, 70)
    assert both.perplexity == pytest.approx(math.exp(1.75))
    assert both.bits_per_byte == pytest.approx(1 / math.log(2))


def test_some_windows_are_the_same_every_time(corpus):
    first, second = (measured(corpus, window=9, batch=5, max_windows=6) for _ in range(2))
    assert first == second
    assert 0 < first.n_tokens < measured(corpus, window=9, batch=5).n_tokens
