"""Weights may learn while a text is read, in a change that belongs to its reader; the model itself never changes."""

import functools

import pytest
import torch

from meristem.errors import CapabilityError, ShapeError
from meristem.memory.state import flatten, join_rows, select_rows
from meristem.models.config import LearnConfig
from meristem.models.online import online_reader
from meristem.models.weights import (
    MARGIN_NATS,
    MOST_DROPS,
    TAILS,
    UNIFORM,
    fresh,
    lost_nats,
    most_lost,
    put_rates,
    rate_of,
    step,
)
from meristem.train.loss import cross_entropy
from zoo import ZOO, grown, ids

CHUNK = 4
N_IDS = 29
KINDS = ("mlp", "last_mlp", "head", "low_rank", "all")
BATCHED = ("last_mlp", "head", "low_rank")
CHEAP = ("preset-charformer", "preset-chargru", "preset-titans-mag", "lm-levels-pooled", "lm-hybrid-attention")
"""One of each model, and of each way that a feed-forward layer is given its tokens."""

CHOICES = [(name, "head") for name in ZOO] + [(name, which) for name in CHEAP for which in ("mlp", "low_rank", "all")]
CHOICES = [(name, which) for name, which in CHOICES if name != "preset-chargru" or which in ("head", "all")]
CHOICES += [(name, "last_mlp") for name in ("preset-titans-mag", "lm-persistent", "preset-titans-mac")]
SIDE_BY_SIDE = [choice for choice in CHOICES if choice[0] in (*CHEAP, "lm-persistent") and choice[1] in BATCHED]


@functools.cache
def learning(name, which, **choice):
    told = LearnConfig(**{"which": which, "chunk": CHUNK, "lr": 0.1} | choice)
    return online_reader(grown(name), "weights", cross_entropy, told)


def changed(state):
    return {name: leaf for name, leaf in flatten(state["learned"]["delta"]).items() if leaf.any()}


@pytest.mark.parametrize("name, which", CHOICES)
def test_learning_is_causal_and_does_not_depend_on_the_cut(name, which):
    """Another seventh token changes nothing before it, cuts change nothing, and the first chunk is read as ever."""
    reader, tokens_bt = learning(name, which), ids(1)
    other_bt = tokens_bt.clone()
    other_bt[:, 6] = (tokens_bt[:, 6] + 1) % N_IDS
    logits_bto, last = reader(tokens_bt, None)
    assert torch.equal(logits_bto[:, :6], reader(other_bt, None)[0][:, :6])
    assert changed(last)
    torch.testing.assert_close(logits_bto[:, :CHUNK], reader.model(tokens_bt[:, :CHUNK])[0], rtol=0, atol=1e-12)
    parts, state = [], None
    for part_bt in tokens_bt.split([1, 5, 2, 4, 1], dim=1):
        part_bto, state = reader(part_bt, state)
        parts.append(part_bto)
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_bto, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        flatten(state["learned"]["delta"]), flatten(last["learned"]["delta"]), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    "name, which", [choice for choice in CHOICES if choice[0] in (*CHEAP, "lm-persistent") and choice[1] in BATCHED]
)
def test_rows_learn_as_each_does_alone(name, which):
    """Side by side, and joined at different places of their chunks."""
    reader, tokens_bt = learning(name, which), ids(3)
    states = [reader(tokens_bt[row : row + 1, :n], None)[1] for row, n in enumerate((5, 9, 5))]
    more_bt = ids(3, 6, 9)
    joined_bto, joined = reader(more_bt, join_rows(states))
    for row, state in enumerate(states):
        alone_bto, alone = reader(more_bt[row : row + 1], state)
        torch.testing.assert_close(joined_bto[row : row + 1], alone_bto, rtol=0, atol=1e-10)
        found, wanted = (flatten(x["learned"]["delta"]) for x in (select_rows(joined, [row]), alone))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("which", KINDS)
def test_no_gradient_comes_from_a_later_token(which):
    """Of what a token costs, no gradient reaches the embeddings of later ones."""
    reader, tokens_bt = learning("preset-titans-mag", which), torch.arange(11)[None]
    weight_od = grown("preset-titans-mag").embedding.weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        embedded = {"embedding.weight": weight_od}
        inside = reader.tail.body if hasattr(reader, "tail") else reader.reader
        hidden_bto, _ = torch.func.functional_call(inside, embedded, (tokens_bt, None))
        (found_od,) = torch.autograd.grad(hidden_bto[:, 6].square().sum(), weight_od)
    assert found_od[:7].any() and not found_od[7:].any()


def test_a_step_takes_no_gradient_from_a_token_to_a_later_one():
    """Of a chunk 0 1 2 3 the last token predicts none of it, so that its embedding does not move."""
    _, state = learning("preset-titans-mag", "all")(torch.arange(CHUNK)[None], None)
    moved_o = flatten(state["learned"]["delta"])["embedding.weight_b"][0].any(1)
    assert moved_o.tolist() == [row < CHUNK - 1 for row in range(N_IDS)]


def spent(reader, tokens_bt):
    """Nats by which a text costs more when weights learn, and the state after it."""
    logits_bto, state = reader(tokens_bt, None)
    plain_bto, _ = reader.model(tokens_bt)
    nats, plain = (float(cross_entropy(x[:, :-1].detach(), tokens_bt[:, 1:])) for x in (logits_bto, plain_bto))
    return nats, nats - plain, state


@pytest.mark.parametrize("rate", [100.0, 1e30])
@pytest.mark.parametrize("which", KINDS)
def test_a_rate_that_diverges_costs_no_more_than_is_proved(which, rate):
    """Every token costs at most log(V / e), and where the last part learns a text at most what was lost by drops."""
    tokens_bt = (torch.arange(97)[None] ** 2 * 7) % N_IDS
    reader = learning("preset-titans-mag", which, lr=rate)
    nats, more, state = spent(reader, tokens_bt)
    most = torch.log(torch.tensor(N_IDS / UNIFORM))
    assert nats <= 96 * most
    if which in TAILS:
        assert more <= most_lost(CHUNK, N_IDS) == pytest.approx((MOST_DROPS + 1) * CHUNK * (MARGIN_NATS + float(most)))
    assert float(state["learned"]["rate_b"]) < rate
    assert all(leaf.isfinite().all() for leaf in flatten(state).values() if isinstance(leaf, torch.Tensor))


@pytest.mark.parametrize("which", KINDS)
def test_learning_lowers_the_loss_of_a_text_that_repeats(which):
    nats, more, _ = spent(learning("preset-titans-mag", which, lr=1.0, chunk=8), (torch.arange(200)[None] * 7) % 5)
    assert more < -0.3 * (nats - more)


def test_the_rate_is_halved_unless_a_drop_was_paid_for():
    """Three rows that cost 2 nats more than at W: one had saved enough before, one had not, one has learned nothing."""
    lost, delta_bod = lost_nats(N_IDS), torch.ones(3, 5, 2, dtype=torch.float64)
    before = fresh(1.0, ids(3)) | {"delta": {"head_bod": delta_bod}, "saved_b": torch.tensor([lost, 0.9 * lost, 0.0])}
    before["steps_b"] = torch.tensor([9.0, 9.0, 0.0])
    costs = (torch.full((3,), 5.0), torch.full((3,), 3.0))
    how = {"first_rate": 1.0, "clip": 1.0, "lost_nats": lost}
    after, is_worse_b = step(before, {"head_bod": delta_bod}, costs, **how)
    assert after["rate_b"].tolist() == [1.0, 0.5, 1.0] and is_worse_b.tolist() == [True, True, False]
    assert after["delta"]["head_bod"].flatten(1).any(1).tolist() == [False, False, True]
    spoilt, _ = step(before, {"head_bod": delta_bod * torch.nan}, costs, **how)
    assert not spoilt["delta"]["head_bod"].any() and spoilt["rate_b"].tolist() == [1.0, 0.5, 0.5]


def test_the_rate_found_for_a_model_is_taken_unless_one_is_given():
    model = torch.nn.Linear(1, 1)
    assert rate_of(model, LearnConfig(which="head")) == 0.5
    put_rates(model, {"head": 0.25, "mlp": 0.75})
    assert rate_of(model, LearnConfig(which="last_mlp")) == 0.75
    assert [rate_of(model, LearnConfig(which="head", lr=rate)) for rate in (None, 2.0)] == [0.25, 2.0]


def test_two_texts_at_once_are_refused():
    with pytest.raises(ShapeError, match="2 texts were given at once; with learn.which=mlp weights learn from one"):
        learning("preset-titans-mag", "mlp")(ids(2), None)


@pytest.mark.parametrize("name", ["preset-chargru", "preset-charformer", "lm-hybrid-attention", "lm-levels-pooled"])
def test_a_model_without_the_weights_is_refused(name):
    """The last feed-forward layer is none where others stand beside or behind it."""
    with pytest.raises(CapabilityError, match="no weights 'last_mlp'"):
        learning(name, "last_mlp")
    with pytest.raises(CapabilityError, match="no weights 'low_rank'"):
        learning("preset-chargru", "low_rank")


def test_the_gradient_of_the_last_layer_is_that_of_the_whole_model():
    """One step of ``last_mlp`` is one of ``mlp`` in that layer, but for the one target more that it has."""
    model, tokens_bt = grown("preset-titans-mag"), ids(1, CHUNK + 1)
    _, state = learning("preset-titans-mag", "last_mlp", lr=0.125)(tokens_bt, None)
    names = [f"blocks.1.mlp.{name}.weight" for name in ("gate_up", "out")]
    own = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in names}
    with torch.enable_grad():
        logits_bto, _ = torch.func.functional_call(model, own, (tokens_bt[:, :CHUNK], None))
        nats = torch.nn.functional.cross_entropy(logits_bto[0], tokens_bt[0, 1:])
        found = torch.autograd.grad(nats, list(own.values()))
    length = torch.stack([gradient.norm() for gradient in found]).norm()
    for name, gradient in zip(("up_bfd", "out_bdf"), found, strict=True):
        moved = -0.125 / length.clamp_min(1) * gradient
        torch.testing.assert_close(state["learned"]["delta"][name][0], moved, rtol=0, atol=1e-12)
