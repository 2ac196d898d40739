"""A reader's memory may stand still, learn, or be joined by levels that learn; the model itself never changes."""

import pytest
import torch

from meristem.errors import CapabilityError, ShapeError
from meristem.memory.state import flatten
from meristem.models.online import OnlineLearner, frozen, online_reader
from meristem.train.loss import cross_entropy
from zoo import ZOO, ids, moved

LEVELS = [name for name, (model, _) in ZOO.items() if model.name == "lm" and model.mlp == "levels"]
CHUNK = 4


def learning(name, **choice):
    return OnlineLearner(moved(*ZOO[name]), cross_entropy, chunk=CHUNK, **choice)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ZOO)
def test_a_memory_that_stands_still_is_never_written(name):
    """S3b-M3: what a frozen session would change stays as it was, whatever the rule."""
    reader, tokens_bt = frozen(moved(*ZOO[name])), ids(2)
    _, before = reader(tokens_bt[:, :5])
    _, after = reader(tokens_bt[:, 5:], before)
    held = {path: leaf for path, leaf in flatten(before).items() if ".memory." in path and "unfinished" not in path}
    later = flatten(after)
    assert all(torch.equal(leaf, later[path]) for path, leaf in held.items() if isinstance(leaf, torch.Tensor))


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith(("lm-m", "preset-titans"))])
def test_a_memory_that_learns_says_something_else_than_one_that_stands_still(name):
    model, tokens_bt = moved(*ZOO[name]), ids(2)
    assert not torch.allclose(model(tokens_bt)[0], frozen(model)(tokens_bt)[0])


def test_a_still_reader_shares_the_weights():
    model = moved(*ZOO["preset-titans-mag"])
    assert {id(p) for p in model.parameters()} == {id(p) for p in frozen(model).parameters()}
    assert model.blocks[0].mixer.is_writing


@pytest.mark.parametrize("name", LEVELS)
def test_learning_levels_change_the_reader_and_no_weight(name):
    """S4-M14: with learn = levels the copy that travels with the state changes, the model does not."""
    reader, tokens_bt = learning(name), ids(1)
    before = weights_of(reader.model)
    logits_bto, state = reader(tokens_bt)
    assert all(torch.equal(tensor, before[path]) for path, tensor in reader.model.state_dict().items())
    moved = flatten(state["learned"]["moved"])
    assert moved and all(not torch.equal(tensor, before[path]) for path, tensor in moved.items())
    plain_bto, _ = reader.model(tokens_bt)
    torch.testing.assert_close(logits_bto[:, :CHUNK], plain_bto[:, :CHUNK], rtol=0, atol=1e-12)
    assert not torch.allclose(logits_bto[:, CHUNK:], plain_bto[:, CHUNK:])


@pytest.mark.parametrize("name", LEVELS)
def test_learning_does_not_depend_on_the_cut(name):
    reader, tokens_bt = learning(name), ids(1)
    whole_bto, last = reader(tokens_bt)
    parts, state = [], None
    for part_bt in tokens_bt.split([1, 5, 2, 4, 1], dim=1):
        logits_bto, state = reader(part_bt, state)
        parts.append(logits_bto)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_bto, rtol=0, atol=1e-10)
    torch.testing.assert_close(flatten(state), flatten(last), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LEVELS)
def test_no_token_is_judged_by_weights_that_have_seen_it(name):
    reader, tokens_bt = learning(name), ids(1)
    other_bt = tokens_bt.clone()
    other_bt[:, 6] = (tokens_bt[:, 6] + 1) % 29
    assert torch.equal(reader(tokens_bt)[0][:, :6], reader(other_bt)[0][:, :6])


def test_a_level_moves_at_its_period_and_gathers_between():
    """Periods 1, 2 and 5 with chunks of 4: after 4 tokens the first two move, after 20 the third as well."""
    reader, state = learning("lm-levels-each"), None
    tokens_bt = torch.arange(20)[None] % 29
    moved = []
    for first in range(0, 20, CHUNK):
        _, state = reader(tokens_bt[:, first : first + CHUNK], state)
        moved.append({path.split(".level.")[1][0] for path in flatten(state["learned"]["moved"])})
    assert moved == [{"0", "1"}] * 4 + [{"0", "1", "2"}]
    assert not state["learned"]["waiting"]


def test_a_step_is_clipped_to_the_rate():
    reader = learning("lm-levels-each", rate=0.5, clip=1e-3)
    _, state = reader(ids(1)[:, :CHUNK])
    own = dict(reader.model.named_parameters())
    for level in "01":
        changes = [moved - own[path] for path, moved in state["learned"]["moved"].items() if f".level.{level}." in path]
        torch.testing.assert_close(torch.stack([c.norm() for c in changes]).norm().item(), 0.5 * 1e-3)


def test_learning_lowers_the_loss_of_a_text_that_repeats():
    model = moved(*ZOO["lm-levels-each"]).float()
    tokens_bt = (torch.arange(400)[None] * 7) % 5
    reader = OnlineLearner(model, cross_entropy, rate=0.1, chunk=8)

    def second_half(read):
        with torch.no_grad():
            logits_bto, _ = read(tokens_bt)
        return float(cross_entropy(logits_bto[:, 199:-1], tokens_bt[:, 200:])) / 200

    assert second_half(reader) < 0.8 * second_half(model)


def test_two_texts_at_once_are_refused():
    with pytest.raises(ShapeError, match="2 texts were given at once; levels learn from one"):
        learning("lm-levels-each")(ids(2))


def test_a_model_without_levels_is_refused():
    with pytest.raises(CapabilityError, match="no feed-forward levels.*model.mlp=levels"):
        online_reader(moved(*ZOO["preset-titans-mag"]), "levels", cross_entropy)
