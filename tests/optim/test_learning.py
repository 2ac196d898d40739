"""What an optimizer is good for: how far it comes, each at its best rate of one grid."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from meristem.models.build import build as build_model
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.m3 import EmaM3

TEXT = "".join(f"{number} squared is {number * number}, and so on.\n" for number in range(100, 400))
DATA = torch.tensor(list(TEXT.encode()))
RATES = (0.03, 0.1, 0.3)
"""The best of each kind lies inside a wider grid, from 0.001 to 1: at 0.03, 0.3 and 0.1 for adamw, sgd and m3."""


def losses(rate: float, n_steps: int = 50, **settings: object) -> list[float]:
    """Of a small attention model that learns the text, step by step."""
    settings_of_model = ModelConfig(mixer="attention", dim=12, n_layers=2, n_heads=2, mlp_dim=17, sliding_window=None)
    model = build_model(settings_of_model, MemoryConfig(), 256, random_seed=0)
    optimizer = build(model, OptimConfig(lr=rate, weight_decay=0.0, **settings))
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(n_steps):
        starts = torch.randint(len(DATA) - 33, (8,), generator=generator)
        window_bt = torch.stack([DATA[start : start + 33] for start in starts.tolist()])
        logits_bto, _ = model(window_bt[:, :-1])
        loss = functional.cross_entropy(logits_bto.flatten(0, 1), window_bt[:, 1:].flatten())
        loss.backward()
        optimizer.step(loss.detach())
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def by_sgd() -> list[list[float]]:
    return [losses(rate, name="sgd", momentum=0.9) for rate in RATES]


def test_adamw_reaches_the_threshold_before_sgd(by_sgd):
    """S4-M12: both at their best rate of one grid, to 1.2 nats a byte."""

    def n_steps_to(threshold: float, runs: list[list[float]]) -> int:
        reached = [[step for step, loss in enumerate(run) if loss < threshold] for run in runs]
        return min(steps[0] for steps in reached if steps)

    by_adamw = [losses(rate) for rate in RATES]
    assert n_steps_to(1.2, by_adamw) < n_steps_to(1.2, by_sgd)


def test_decaying_momenta_learn_as_well_as_sgd(by_sgd):
    """S3-M2, small LM: the mean loss of the last ten steps, both at their best rate of one grid.

    Embeddings and head are AdamW's under ``m3``, as with every optimizer of matrices.
    """
    by_m3 = [losses(rate, name="m3", m3_ema=True) for rate in RATES]
    assert min(sum(run[-10:]) for run in by_m3) <= min(sum(run[-10:]) for run in by_sgd)


def test_a_second_memory_helps_where_a_valley_is_flat():
    """S3-M2, quadratic of condition 1000, 20 steps: momenta of the periods (1, 8) come at least as far as SGD."""
    generator = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (7, 5)]
    map_fd = turns[0][:, :5] * torch.logspace(0, -3, 5, dtype=torch.float64) @ turns[1]
    target_fo = map_fd @ torch.randn(5, 3, generator=generator, dtype=torch.float64)

    def left(make) -> float:
        weight_do = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
        optimizer = make([weight_do])
        for _ in range(20):
            optimizer.zero_grad()
            (map_fd @ weight_do - target_fo).square().sum().div(2).backward()
            optimizer.step()
        return (map_fd @ weight_do - target_fo).square().sum().item() / 2

    settings = {"periods": (1, 8), "kept": (0.9, 0.95), "written": (0.1, 0.05)}
    rates = (0.01, *RATES, 1.0, 3.0, 10.0)
    two = min(left(lambda p, rate=rate: EmaM3(p, rate=rate, **settings)) for rate in rates)
    sgd = min(left(lambda p, rate=rate: torch.optim.SGD(p, rate, momentum=0.9)) for rate in rates)
    assert two <= sgd
