"""Weights may learn while a text is read, in a change that belongs to its reader; the model itself never changes."""

import pytest
import torch

from meristem.errors import CapabilityError, ShapeError
from meristem.memory.state import flatten
from meristem.models.weights import WORSE_NATS, WeightLearner, learnable
from meristem.train.loss import cross_entropy
from zoo import ZOO, ids, moved

CHUNK = 4


def learning(name, **choice):
    return WeightLearner(moved(*ZOO[name]), cross_entropy, **{"which": "all", "chunk": CHUNK, "rate": 0.1} | choice)


@pytest.mark.parametrize("name", ZOO)
def test_no_token_is_predicted_by_weights_that_have_seen_it(name):
    """Another seventh token changes no prediction before it, and the model's own weights stand still."""
    reader, tokens_bt = learning(name), ids(1)
    own = {path: tensor.clone() for path, tensor in reader.model.state_dict().items()}
    other_bt = tokens_bt.clone()
    other_bt[:, 6] = (tokens_bt[:, 6] + 1) % 29
    logits_bto, _ = reader(tokens_bt)
    assert torch.equal(logits_bto[:, :6], reader(other_bt)[0][:, :6])
    assert all(torch.equal(tensor, own[path]) for path, tensor in reader.model.state_dict().items())
    torch.testing.assert_close(logits_bto[:, :CHUNK], reader.model(tokens_bt[:, :CHUNK])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_learning_does_not_depend_on_the_cut(name):
    """What was learned is the same to the bit."""
    reader, tokens_bt = learning(name), ids(1)
    whole_bto, last = reader(tokens_bt)
    parts, state = [], None
    for part_bt in tokens_bt.split([1, 5, 2, 4, 1], dim=1):
        logits_bto, state = reader(part_bt, state)
        parts.append(logits_bto)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_bto, rtol=0, atol=1e-10)
    found, wanted = flatten(state["learned"]), flatten(last["learned"])
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("rate", [100.0, 1e30])
@pytest.mark.parametrize("which", ["mlp", "head", "all"])
def test_a_rate_that_diverges_costs_no_more_than_the_limit(which, rate):
    reader = learning("preset-titans-mag", which=which, rate=rate)
    tokens_bt = (torch.arange(200)[None] * 7) % 29
    logits_bto, state = reader(tokens_bt)
    plain_bto, _ = reader.model(tokens_bt)
    nats, plain = (
        float(cross_entropy(x[:, :-1].detach(), tokens_bt[:, 1:])) / 199 for x in (logits_bto, plain_bto.detach())
    )
    assert nats <= plain + WORSE_NATS
    assert float(state["learned"]["rate"]) < rate
    assert all(leaf.isfinite().all() for leaf in flatten(state["learned"].get("delta", {})).values())


def test_learning_lowers_the_loss_of_a_text_that_repeats():
    reader = learning("preset-titans-mag", which="mlp", rate=1.0, chunk=8)
    tokens_bt = (torch.arange(400)[None] * 7) % 5

    def second_half(read):
        logits_bto, _ = read(tokens_bt)
        return float(cross_entropy(logits_bto[:, 199:-1].detach(), tokens_bt[:, 200:])) / 200

    assert second_half(reader) < 0.8 * second_half(reader.model)


def test_two_texts_at_once_are_refused():
    with pytest.raises(ShapeError, match="2 texts were given at once; weights learn from one"):
        learning("preset-titans-mag")(ids(2))


def test_a_model_without_the_weights_is_refused():
    with pytest.raises(CapabilityError, match="no weights 'levels'"):
        learnable(moved(*ZOO["preset-titans-mag"]), "levels")
