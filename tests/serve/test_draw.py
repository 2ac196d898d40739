"""Rows that are drawn together are drawn as alone, each by its own settings and its own random numbers."""

import math
from random import Random

import pytest
import torch

from meristem.errors import NonFinite
from meristem.models.generate import LIKELIEST, UNDRAWN, Sampling, Samplings, choose_rows
from meristem.serve.draw import Drawn, Draws, Wanted

N_IDS = 1037
"""More than are put in order at first, and no multiple of a register."""

SETTINGS = (
    Sampling(temperature=0),
    Sampling(temperature=1),
    Sampling(temperature=0.3),
    Sampling(temperature=1, top_p=0.9),
    Sampling(temperature=40, top_p=0.99),
    Sampling(temperature=1, top_p=5e-324),
    Sampling(temperature=1, top_k=7),
    Sampling(temperature=9, top_k=700, top_p=0.8),
    Sampling(temperature=9, top_k=1),
    Sampling(temperature=9, top_k=10 * N_IDS),
)


def predictions(n_rows: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n_rows, N_IDS, generator=torch.Generator().manual_seed(5)) * scale


def wanted(n_rows: int) -> list[Wanted]:
    return [Wanted(SETTINGS[row % len(SETTINGS)], Random(row), None) for row in range(n_rows)]


def test_s3_a_draw_does_not_depend_on_its_batch():
    """Alone and in batches of every composition, with and without rows that have no finite prediction."""
    logits_bo = predictions(50)
    alone = [Draws([each]).draw(logits_bo[row : row + 1])[0] for row, each in enumerate(wanted(50))]
    shuffled = Random(3)
    for n_rows in (2, 3, 17, 49, 50):
        rows = shuffled.sample(range(50), n_rows)
        each = wanted(50)
        bad_bo, bad = torch.full((1, N_IDS), math.nan), Wanted(SETTINGS[1], Random(0), None)
        draws = Draws([*(each[row] for row in rows), bad])
        *found, spoilt = draws.draw(torch.cat([logits_bo[rows], bad_bo]))
        assert found == [alone[row] for row in rows]
        assert isinstance(spoilt, NonFinite)
    assert all(isinstance(each, Drawn) for each in alone)
    assert [each.token_id for each in alone[::10]] == logits_bo[::10].argmax(-1).tolist()


def test_every_token_takes_one_number():
    """At any temperature, so that rows of one session stay where they are when its settings change."""
    each = Wanted(Sampling(temperature=0), Random(4), None)
    Draws([each]).draw(predictions(1))
    other = Random(4)
    other.random()
    assert each.random.random() == other.random()


def test_no_number_leaves_the_ids_that_are_kept():
    """From 0 to the last number below 1, and for top_p that no sum of shares is below."""
    logits_bo = predictions(len(SETTINGS))
    logits_bo[:, [0, -1]] = -torch.inf
    for uniform in (0.0, 0.5, 1 - 2**-53):
        for row, token_id in enumerate(choose_rows(logits_bo, Samplings(SETTINGS), [uniform] * len(SETTINGS))):
            sampling = SETTINGS[row]
            order = logits_bo[row].argsort(descending=True).tolist()
            assert order.index(token_id) < min(sampling.top_k or N_IDS, N_IDS - 2)
            assert sampling.top_p > 0.1 or order.index(token_id) == 0


@pytest.mark.parametrize("sampling", [Sampling(temperature=2), Sampling(temperature=2, top_p=0.6, top_k=500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_the_shares_that_are_kept(sampling, dtype):
    """Of a number that rises evenly each id gets its share; the nucleus is wider than what is put in order at first.
    In float32 the native core draws where nothing is cut off and it is there, else torch."""
    n = 8_000
    logits_o = predictions(1, 1.5)[0].to(dtype)
    share_o = (logits_o.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        in_order = share_o.argsort(descending=True)
        n_kept = int((share_o[in_order].cumsum(-1) < sampling.top_p).sum()) + 1
        assert LIKELIEST < n_kept < 500
        share_o[in_order[n_kept:]] = 0
    drawn = [
        token_id
        for first in range(0, n, 1000)
        for token_id in choose_rows(
            logits_o.expand(1000, -1),
            Samplings([sampling] * 1000),
            [(at + 0.5) / n for at in range(first, first + 1000)],
        )
    ]
    assert drawn == sorted(drawn)
    found_o = torch.tensor(drawn).bincount(minlength=N_IDS) / n
    torch.testing.assert_close(found_o.double(), share_o / share_o.sum(), rtol=0, atol=1.01 / n)


@pytest.mark.parametrize("n_ids", [1, 15, 63, 64, 65, 130])
def test_draws_in_float32_are_those_of_torch(n_ids):
    """Whatever the size of the vocabulary; but where a number lies within the rounding of their sums."""
    generator = torch.Generator().manual_seed(n_ids)
    logits_bo = torch.randn(400, n_ids, generator=generator) * 4
    logits_bo[::7, n_ids // 2] = -torch.inf
    logits_bo[torch.arange(0, 400, 5), torch.arange(80) % n_ids] = torch.tensor([math.nan, torch.inf, -4, 4.0]).repeat(
        20
    )
    samplings = Samplings([(SETTINGS[0], SETTINGS[1], SETTINGS[2])[row % 3] for row in range(400)])
    uniforms = torch.rand(400, dtype=torch.float64, generator=generator).tolist()
    found, wide = (choose_rows(each, samplings, uniforms) for each in (logits_bo, logits_bo.double()))
    is_finite = logits_bo.amax(-1).isfinite().tolist()
    assert [token_id != UNDRAWN for token_id in found] == is_finite
    assert sum(one != other for one, other in zip(found, wide, strict=True)) <= 1
