"""Whatever the temperature, a token is drawn; the colder, the likelier it is."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meristem.errors import NonFinite
from meristem.models.generate import Sampling, choose

SMALLEST = 5e-324


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=9, unique=True),
    temperature=st.floats(SMALLEST, 1e-9),
    top_k=st.integers(0, 9),
    top_p=st.floats(SMALLEST, 1),
)
@example(logits=[1.0, 30.0, -2.0], temperature=1e-45, top_k=0, top_p=1.0)
@example(logits=[1.0, 30.0, -2.0], temperature=1e-40, top_k=0, top_p=1.0)
@example(logits=[1.0, 30.0, -2.0], temperature=1e-38, top_k=0, top_p=1.0)
@example(logits=[0.0, 3e38, -3e38], temperature=SMALLEST, top_k=2, top_p=SMALLEST)
@settings(max_examples=300, deadline=None)
def test_gr1_the_smallest_temperatures_take_the_likeliest_token(logits, temperature, top_k, top_p):
    """From the smallest positive number up: a gap of 1,000 temperatures leaves the second a share of exp(-1000)."""
    first, second = sorted(logits)[:-3:-1]
    logits_bo = torch.tensor([logits]) if first - second > 1000 * temperature else torch.tensor([[0.0, 1.0]])
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for dtype in (torch.float32, torch.float64):
        drawn_b = choose(logits_bo.to(dtype), sampling, torch.Generator().manual_seed(1))
        assert torch.equal(drawn_b, logits_bo.argmax(-1))


@given(temperature=st.floats(SMALLEST, 1.7e308), scale=st.floats(1e-30, 1e38))
@settings(max_examples=300, deadline=None)
def test_gr1_any_temperature_gives_shares(temperature, scale):
    """No quotient of any size ends in a share that is not a number."""
    logits_bo = torch.linspace(-1, 1, 7)[None] * scale
    assert 0 <= int(choose(logits_bo, Sampling(temperature=temperature), torch.Generator().manual_seed(1))) < 7


def test_gr1_a_forbidden_token_is_never_drawn():
    """A logit of -inf has no share, and spoils none."""
    logits_bo = torch.tensor([[0.0, -torch.inf, 0.0]]).expand(200, -1)
    assert choose(logits_bo, Sampling(temperature=9.0), torch.Generator().manual_seed(1)).unique().tolist() == [0, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(temperature=1e-40)])
def test_gr1_a_prediction_that_is_not_finite_is_our_error(value, sampling):
    """A model with spoilt weights writes nothing, at any temperature."""
    with pytest.raises(NonFinite, match="not finite"):
        choose(torch.tensor([[0.0, value]]), sampling, torch.Generator().manual_seed(1))
