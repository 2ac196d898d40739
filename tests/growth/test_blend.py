"""Blends: what enters the host, by how much, and what is refused (growth.md 7.1; K3, KA1)."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import meristem.growth as grow
import zoo
from growth.catalogue import PLACES, Says, bits, grown, host, logits
from meristem.errors import BlendRefused
from meristem.growth.blend import Confidence, LogitMix
from meristem.growth.graft import cost_in
from meristem.growth.measure import blend_report
from meristem.growth.seed import Origin

PLACE = PLACES["preset-default"]
ONE = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.7, 3.0])
def test_k3_the_factor_is_the_margin_of_the_two_largest_logits(margin: float) -> None:
    """``sigmoid(4 (m - 0.2))`` of every token, and no gradient reaches the logits."""
    model, blend = Says(margin), Confidence()
    blend.bind(model, 5)
    host_btd, delta_btd = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double().requires_grad_()
    added_btd = blend(host_btd, delta_btd, ONE)
    torch.testing.assert_close(added_btd, delta_btd / (1 + math.exp(-4 * (margin - 0.2))))
    added_btd.sum().backward()
    assert model.weight.grad is None and delta_btd.grad is not None


def test_k3_the_logits_are_those_of_the_model_that_the_seed_is_in() -> None:
    """Also of a copy, of a model built from the log, and of a seed that was taken out and put back; per token."""
    model, made = grown("preset-default", "low_rank", blend="confidence")
    seen: list[Tensor] = []
    made.blend.register_forward_hook(lambda _, given, __: seen.append(given[0].detach()))
    said_bto = logits(model, zoo.ids(2))
    two = model.readout(seen[0]).topk(2, dim=-1).values
    torch.testing.assert_close(made.blend.factor(seen[0]), (4 * (two[..., :1] - two[..., 1:] - 0.2)).sigmoid())
    twin = copy.deepcopy(model)
    assert grow.seeds_in(twin)[PLACE].blend.model == (twin,)
    rebuilt = grow.replay(host("preset-default"), grow.to_json(model))
    rebuilt.load_state_dict(model.state_dict())
    for each in (twin, rebuilt):
        assert torch.equal(logits(each, zoo.ids(2)), said_bto)
    grow.graft(rebuilt, PLACE, grow.remove(rebuilt, PLACE))
    assert torch.equal(logits(rebuilt, zoo.ids(2)), said_bto)
    with torch.no_grad():
        rebuilt.norm.gain_d.mul_(3)
    assert not torch.equal(rebuilt.readout(seen[0]), model.readout(seen[0]))
    assert not torch.equal(grow.seeds_in(rebuilt)[PLACE].blend.factor(seen[0]), made.blend.factor(seen[0]))


@pytest.mark.parametrize("name, place", [("a model", "0"), ("a width", "head")])
def test_k3_without_logits_it_is_refused_and_said(name: str, place: str) -> None:
    """Vectors that a model cannot read out are none, and there is no other blend to fall back to."""
    model = nn.Sequential(nn.Linear(5, 12)) if name == "a model" else host("foreign")
    before, heard = bits(grow.attach(model, place)), []
    with pytest.raises(BlendRefused, match="needs the logits of its host.*(no method 'readout'|of the width 29)"):
        grow.graft(model, place, "low_rank", blend="confidence", emit=heard.append)
    assert bits(model) == before and not grow.seeds_in(model)
    assert [(event.name, event.payload["slot"]) for event in heard] == [("blend.refused", place)]
    with pytest.raises(BlendRefused, match="without a host was called"):
        Confidence()(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5), torch.ones(()))


def test_the_cost_of_confidence_is_that_of_reading_out() -> None:
    model = grow.attach(host("preset-default"), PLACE)
    place, width = grow.slots_in(model)[PLACE], 12
    plain, sure = (
        cost_in(model, place, Origin.of("norm", {}, blend=blend, random_seed=0)) for blend in ("residual", "confidence")
    )
    assert sure.n_parameters == plain.n_parameters
    assert sure.flops_per_token - plain.flops_per_token == 2 * width * zoo.VOCABULARY


@pytest.mark.parametrize("weight", [1e-3, 0.3, 1.0])
@pytest.mark.parametrize("size", [0.0, 1.0, 300.0])
def test_mixed_logits_are_those_of_mixed_probabilities(weight: float, size: float) -> None:
    host_bto = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    delta_bto = (size * torch.randn(2, 3, 7, dtype=torch.float64)).requires_grad_()
    after_bto = host_bto + LogitMix()(host_bto, delta_bto, torch.tensor(weight, dtype=torch.float64))
    wanted = (1 - weight) * host_bto.softmax(-1) + weight * (host_bto + delta_bto).softmax(-1)
    torch.testing.assert_close(after_bto.softmax(-1), wanted, rtol=0, atol=1e-12)
    assert size or torch.equal(after_bto, host_bto)
    after_bto.softmax(-1)[..., 0].sum().backward()
    assert host_bto.grad is not None and host_bto.grad.isfinite().all() and delta_bto.grad.isfinite().all()


def test_logits_are_mixed_at_the_head_of_a_model_of_ours() -> None:
    """The seed reads what the head reads; at 0.5 the probabilities are the mean of both ends."""
    model = grow.attach(host("preset-default"), "head", reads="input")
    plain_bto = logits(host("preset-default"), zoo.ids(2))
    made = grow.graft(model, "head", "low_rank", rank=3, blend="logit_mix")
    assert torch.equal(logits(model, zoo.ids(2)), plain_bto)
    nn.init.normal_(made.layer.out.weight)
    found = {}
    for weight in (0.0, 0.5, 1.0):
        grow.set_blend(model, "head", weight)
        found[weight] = logits(model, zoo.ids(2)).softmax(-1)
    assert torch.equal(found[0.0], plain_bto.softmax(-1))
    torch.testing.assert_close(found[0.5], (found[0.0] + found[1.0]) / 2, rtol=0, atol=1e-12)


FACTORS = {"channel": 1 / (1 + math.exp(-4)), "gated": 1 / (1 + math.exp(2))}


@pytest.mark.parametrize("blend", grow.blends.names())
def test_ka1_every_blend_says_what_it_does(blend: str) -> None:
    """Of a fresh seed the numbers are known; one that is switched off says nothing."""
    model, _ = grown("preset-default", "low_rank", is_moved=False, blend=blend)
    for weight in (0.25, 0.5, 1.0):
        grow.set_blend(model, PLACE, weight)
        found = blend_report(model, PLACE, lambda model: logits(model, zoo.ids(2)))
        assert found is not None and found.blend == blend and found.seconds > 0 and found.sparsity == 0
        if blend == "confidence":
            assert 0 < found.factor_mean < 1 and found.weight_mean <= found.weight_p95 < weight
            continue
        factor = FACTORS.get(blend, 1.0)
        assert found.factor_mean == pytest.approx(factor)
        assert found.weight_mean == pytest.approx(weight * factor) and found.weight_p95 == pytest.approx(
            weight * factor
        )
    grow.set_blend(model, PLACE, 0.0)
    assert blend_report(model, PLACE, lambda model: logits(model, zoo.ids(2))) is None
