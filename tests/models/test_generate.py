"""Drawing tokens: settings act, and the loop hands over a state that can be gone on from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meristem.errors import ShapeError, WrongValue
from meristem.models.generate import Sampling, choose, generate
from zoo import VOCABULARY, ZOO, grown, ids


def draws(sampling, n_draws=400, n_ids=11):
    """Ids drawn from one fixed row of logits."""
    logits_bo = torch.linspace(-2, 2, n_ids).expand(n_draws, -1)
    return choose(logits_bo, sampling, torch.Generator().manual_seed(3))


def test_temperature_makes_draws_narrower_or_wider():
    n_different = [len(draws(Sampling(temperature=value)).unique()) for value in (0.01, 5.0)]
    assert n_different == [1, 11]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=5.0, top_k=1)])
def test_the_likeliest_token_is_taken_without_a_draw(sampling):
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    logits_bo = torch.randn(7, 11)
    assert torch.equal(choose(logits_bo, sampling, generator), logits_bo.argmax(-1))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("top_k", [2, 5])
def test_top_k_draws_among_the_k_likeliest(top_k):
    assert draws(Sampling(temperature=5.0, top_k=top_k)).unique().tolist() == list(range(11 - top_k, 11))


def test_top_p_draws_among_the_likeliest_that_hold_the_share():
    """Shares .5 .3 .15 .05: up to .5 the first alone, up to .8 two, above that three, and all for 1."""
    logits_bo = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(400, -1)
    for top_p, n_kept in ((0.2, 1), (0.49, 1), (0.7, 2), (0.9, 3), (1.0, 4)):
        drawn_b = choose(logits_bo, Sampling(temperature=1.0, top_p=top_p), torch.Generator().manual_seed(3))
        assert drawn_b.unique().tolist() == list(range(n_kept))


def test_plain_draws_follow_the_shares():
    logits_bo = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    drawn_b = choose(logits_bo, Sampling(temperature=1.0), torch.Generator().manual_seed(3))
    shares_o = drawn_b.bincount(minlength=4) / len(drawn_b)
    torch.testing.assert_close(shares_o, torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.02)


@given(
    logits=st.lists(st.floats(-50, 50), min_size=3, max_size=9),
    temperature=st.floats(0.01, 10),
    top_k=st.integers(0, 12),
    top_p=st.floats(1e-6, 1),
)
def test_whatever_the_settings_some_id_is_drawn_and_rows_are_drawn_apart(logits, temperature, top_k, top_p):
    logits_bo = torch.tensor([logits, logits[::-1]])
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn_b = choose(logits_bo, sampling, torch.Generator().manual_seed(3))
    assert drawn_b.shape == (2,) and all(0 <= token_id < len(logits) for token_id in drawn_b.tolist())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number from 0 up"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number from 0 up"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.01}, "top_p is 1.01; it must be above 0 and at most 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(WrongValue, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("name", ZOO)
def test_greedy_text_is_the_argmax_of_rereading_it(name):
    """One token at a time with a state says what reading the whole text afresh says."""
    model, tokens_bt = grown(name), ids(1, 5)
    drawn = generate(model, tokens_bt, max_tokens=6, sampling=Sampling(temperature=0), generator=torch.Generator())
    written = [token.token_id for token in drawn]
    whole_bt = torch.cat([tokens_bt, torch.tensor([written])], dim=1)
    assert model(whole_bt)[0][0, 4:-1].argmax(-1).tolist() == written


def test_a_text_can_be_gone_on_from_any_token():
    model, sampling = grown("preset-titans-mag"), Sampling(temperature=0)
    whole = list(generate(model, ids(1, 5), max_tokens=9, sampling=sampling, generator=torch.Generator()))
    stop = whole[3]
    last_bt = torch.tensor([[stop.token_id]])
    rest = generate(model, last_bt, stop.state, max_tokens=5, sampling=sampling, generator=torch.Generator())
    assert [token.token_id for token in rest] == [token.token_id for token in whole[4:]]


def test_the_random_seed_decides_the_text():
    model = grown("preset-charrnn")

    def text(random_seed):
        generator = torch.Generator().manual_seed(random_seed)
        drawn = generate(model, ids(1, 5), max_tokens=16, sampling=Sampling(temperature=2.0), generator=generator)
        return [token.token_id for token in drawn]

    assert text(1) == text(1) != text(2)
    assert max(text(1)) < VOCABULARY


def test_one_text_is_written_at_a_time():
    drawn = generate(grown("preset-charrnn"), ids(2, 5), max_tokens=3, sampling=Sampling(), generator=torch.Generator())
    with pytest.raises(ShapeError, match=r"shape \(2, 5\); one text is written at a time"):
        next(drawn)
