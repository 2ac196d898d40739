"""Feed-forward layers on each other, and what they take over from a trained transformer."""

import pytest
import torch
from torch.nn import functional

from meristem.errors import ConflictingKeys
from meristem.memory.state import flatten
from meristem.nn.cms_mlp import CMSMLP, build_cms_mlp
from meristem.nn.config import CMSConfig
from meristem.nn.mlp import Feedforward, SwiGLU
from meristem.nn.norm import RMSNorm
from meristem.nn.promotion import cms_mlp_from
from meristem.optim.groups import levels
from meristem.optim.period_clock import Clock
from zoo import ZOO, ids, moved

WIDTH, HIDDEN = 12, 17
PERIODS = (1, 3, 5)


def chain(noise: float = 0.1, **values: object) -> CMSMLP:
    torch.manual_seed(0)
    module = build_cms_mlp(WIDTH, HIDDEN, CMSConfig.model_validate({"count": 3, "periods": PERIODS} | values)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return module


def text(n_time: int = 17, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, n_time, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("order", ["fastest", "slowest"])
def test_levels_stand_on_each_other(order):
    """Eq. 70: each reads what the one before gives, with its own norm and residual."""
    module, hidden_btd = chain(order=order), text()
    now_btd = hidden_btd
    for level in module.level if order == "fastest" else reversed(module.level):
        now_btd = now_btd + level.feedforward(level.norm(now_btd))
    torch.testing.assert_close(module(hidden_btd)[0], now_btd - hidden_btd, rtol=0, atol=1e-12)


def test_levels_may_stand_side_by_side():
    """Eq. 74: all read the same, and a learned weighted sum, of the size of one at the start, joins them."""
    module, hidden_btd = chain(variant="independent"), text()
    summed_btd = sum(
        share * level.feedforward(level.norm(hidden_btd))
        for share, level in zip(module.mix_l, module.level, strict=True)
    )
    torch.testing.assert_close(module(hidden_btd)[0], summed_btd, rtol=0, atol=1e-12)
    torch.testing.assert_close(chain(0.0, variant="independent").mix_l.detach().square().sum().item(), 1.0)


@pytest.mark.parametrize("variant", ["chained", "independent"])
def test_every_parameter_learns(variant):
    module = chain(0.0, variant=variant)
    module(text())[0].square().sum().backward()
    assert [path for path, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("variant", ["chained", "independent"])
def test_every_level_says_how_often_it_is_stepped(variant):
    """S1-M1: the optimizer finds each level's parameters at its period, the mix at 1; S1-M3's schedule by the clock."""
    module = chain(variant=variant)
    found = levels(module)
    own = {period: set(map(id, level.parameters())) for period, level in zip(PERIODS, module.level, strict=True)}
    if module.mix_l is not None:
        own[1].add(id(module.mix_l))
    assert {period: set(map(id, parameters)) for period, parameters in found.items()} == own
    clock = Clock(0, tuple(found), "steps")
    pulses = [clock.advanced(count).pulse() for count in range(15)]
    assert [sum(fired) for fired in zip(*pulses, strict=True)] == [15, 5, 3]


def test_nothing_is_carried_where_nothing_is_pooled():
    module, hidden_btd = chain(), text()
    whole_btd, state = module(hidden_btd)
    assert state == {}
    torch.testing.assert_close(module(hidden_btd[:, 5:], state)[0], whole_btd[:, 5:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["chained", "independent"])
def test_a_pooled_level_answers_the_mean_of_the_group_before(variant):
    """Written plainly: group by group, in the order of the levels."""
    module, hidden_btd = chain(variant=variant, tokens="pooled"), text()
    now_btd, added_btd = hidden_btd, torch.zeros_like(hidden_btd)
    for index, (period, level) in enumerate(zip(PERIODS, module.level, strict=True)):
        seen_btd = now_btd if variant == "chained" else hidden_btd
        output_btd = torch.zeros_like(hidden_btd)
        for t in range(hidden_btd.shape[1]):
            begin = t // period * period - period
            if index == 0:
                output_btd[:, t] = level(seen_btd[:, t : t + 1])[:, 0]
            elif begin >= 0:
                output_btd[:, t] = level(seen_btd[:, begin : begin + period].mean(1, keepdim=True))[:, 0]
        now_btd = now_btd + output_btd
        added_btd = added_btd + (1 if variant == "chained" else module.mix_l[index]) * output_btd
    torch.testing.assert_close(module(hidden_btd)[0], added_btd, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant, order", [("chained", "fastest"), ("chained", "slowest"), ("independent", "fastest")])
def test_a_text_may_be_cut_anywhere_in_pooled_levels(variant, order):
    module, hidden_btd = chain(variant=variant, order=order, tokens="pooled"), text(23)
    whole_btd, last = module(hidden_btd)
    parameters = list(module.parameters())
    whole = torch.autograd.grad(whole_btd.square().sum(), parameters)
    for cuts in ([1] * 23, [5, 1, 17], [4, 19], [9, 3, 11]):
        state, parts = None, []
        for part_btd in hidden_btd.split(cuts, dim=1):
            added_btd, state = module(part_btd, state)
            parts.append(added_btd)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole_btd, rtol=0, atol=1e-10)
        torch.testing.assert_close(flatten(state), flatten(last), rtol=0, atol=1e-10)
        cut = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), parameters)
        torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("now", [4, 9, 14])
def test_pooled_levels_know_no_later_token(now):
    module, hidden_btd = chain(tokens="pooled"), text().requires_grad_()
    added_btd, _ = module(hidden_btd)
    (upstream_btd,) = torch.autograd.grad(added_btd[:, now].square().sum(), hidden_btd)
    assert not upstream_btd[:, now + 1 :].any() and upstream_btd[:, now].any()


# Taking over a transformer's layers


def layers(maker) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    torch.manual_seed(3)
    made = [(RMSNorm(WIDTH).double(), maker().double()) for _ in PERIODS]
    with torch.no_grad():
        for norm, _ in made:
            norm.gain_d.add_(0.3 * torch.randn_like(norm.gain_d))
    return made


@pytest.mark.parametrize("order", ["fastest", "slowest"])
@pytest.mark.parametrize(
    "maker",
    [lambda: SwiGLU(WIDTH, HIDDEN), lambda: Feedforward(WIDTH, HIDDEN, functional.gelu)],
    ids=["swiglu", "gelu"],
)
def test_a_chain_of_trained_layers_is_those_layers(maker, order):
    """S3b-S20: norms taken over, ``x + MLP(norm x)`` layer by layer; the copies are its own."""
    trained, hidden_btd = layers(maker), text()
    module = cms_mlp_from(trained, CMSConfig(count=3, periods=PERIODS, order=order))
    now_btd = hidden_btd
    for norm, feedforward in trained:
        now_btd = now_btd + feedforward(norm(now_btd))
    torch.testing.assert_close(hidden_btd + module(hidden_btd)[0], now_btd, rtol=0, atol=1e-12)
    assert {id(p) for p in module.parameters()}.isdisjoint(
        id(p) for pair in trained for m in pair for p in m.parameters()
    )


@pytest.mark.parametrize("name", ["preset-attention", "lm-persistent"])
def test_a_level_from_a_model_is_its_feed_forward_bitwise(name):
    """S3b-S20, second half: a block of attention and a chain at rate zero returns what the transformer's block did."""
    model = moved(*ZOO[name])
    block, hidden_btd = model.blocks[0], model.embedding(ids(2)).detach()
    module = cms_mlp_from([(block.mlp_norm, block.mlp)], CMSConfig(count=1))
    mixed_btd = hidden_btd + block.mixer(block.mixer_norm(hidden_btd))[0]
    assert torch.equal(mixed_btd + module(mixed_btd)[0], block(hidden_btd)[0])


def test_settings_under_which_the_function_would_differ_are_refused():
    part = CMSConfig(count=2, variant="independent", tokens="pooled")
    with pytest.raises(ConflictingKeys) as caught:
        cms_mlp_from(layers(lambda: SwiGLU(WIDTH, HIDDEN)), part)
    assert all(
        word in str(caught.value) for word in ("3 layers for a count of 2", "'independent'", "pooled", "count=3")
    )


@pytest.mark.parametrize(
    "values, reasons",
    [
        ({"count": 2, "periods": (1, 8, 64)}, ["there are 3 periods for a count of 2"]),
        ({"count": 2, "periods": (4, 2)}, ["the first period is 4", "not greater than the one before"]),
        ({"count": 2, "variant": "independent", "order": "slowest"}, ["order 'slowest' means nothing"]),
        ({"count": 1, "tokens": "pooled"}, ["mean nothing to a single level"]),
    ],
)
def test_levels_that_make_no_sense_are_refused_with_every_reason(values, reasons):
    with pytest.raises(ConflictingKeys, match="model.levels cannot be used") as caught:
        CMSConfig.model_validate(values)
    assert all(reason in str(caught.value) for reason in reasons)
