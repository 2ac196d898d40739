"""Models learn: a first loss near ln 256 says little, for two initialisations that start there never learn more than
byte frequencies. Text: the topics of Python's own help, which stand wherever Python does."""

import functools
from pydoc_data import topics

import pytest
import torch
import torch.nn.functional as F

from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

N_STEPS, N_ROWS, WINDOW = 272, 16, 256


@functools.cache
def text():
    """Nine tenths to learn from, one tenth to be judged on; bytes."""
    joined = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    text_t = torch.tensor(list(joined.encode()))
    return text_t[: len(text_t) * 9 // 10], text_t[len(text_t) * 9 // 10 :]


def loss_of(model, text_t, starts):
    windows_bt = torch.stack([text_t[start : start + WINDOW + 1] for start in starts])
    logits_bto, _ = model(windows_bt[:, :-1])
    return F.cross_entropy(logits_bto.flatten(0, 1), windows_bt[:, 1:].flatten())


def learned(part, rate):
    """Validation loss in nats per byte after 272 steps of 4096 bytes, as the reference numbers were made."""
    learn_t, judge_t = text()
    model = build(part, MemoryConfig(), 256, random_seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.999), weight_decay=0.01)
    generator = torch.Generator().manual_seed(42)
    for _ in range(N_STEPS):
        starts = torch.randint(len(learn_t) - WINDOW, (N_ROWS,), generator=generator)
        optimizer.zero_grad()
        loss_of(model, learn_t, starts).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss_of(model, judge_t, range(0, len(judge_t) - WINDOW, WINDOW)))


@pytest.mark.parametrize(
    "name, rate, threshold", [("charformer", 1e-3, 2.15), ("charrnn", 3e-3, 1.75), ("chargru", 3e-3, 2.4)]
)
def test_reference_models_learn(name, rate, threshold):
    assert learned(ModelConfig(name=name), rate) <= threshold


def test_scaled_first_weights_beat_unscaled_ones():
    default, unscaled = (learned(ModelConfig(name="charformer", init=init), 3e-4) for init in ("default", "unscaled"))
    assert default < unscaled - 0.3
