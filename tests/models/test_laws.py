"""The laws that every model keeps (memory.md 1.3), over the whole zoo."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meristem.config import preset_names
from meristem.memory.state import flatten, map_tensors, unflatten
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from zoo import N_TIME, VOCABULARY, ZOO, grown, ids, preset

every_model = pytest.mark.parametrize("name", ZOO)


def embedded(model, tokens_bt, state=None):
    """The logits, and the embeddings they came from as leaves to differentiate by."""
    caught = []
    hook = model.embedding.register_forward_hook(
        lambda module, inputs, hidden_btd: caught.append(hidden_btd.detach().requires_grad_()) or caught[-1]
    )
    try:
        logits_bto, _ = model(tokens_bt, state)
    finally:
        hook.remove()
    return logits_bto, caught[-1]


def tensors(state):
    """The tensors of a state; its other leaves are whole numbers."""
    return {path: leaf for path, leaf in flatten(state).items() if isinstance(leaf, torch.Tensor)}


@every_model
@pytest.mark.parametrize("changed", [1, 8])
def test_no_logit_knows_a_later_token(name, changed):
    """B7.9."""
    model, tokens_bt = grown(name), ids(3)
    other_bt = tokens_bt.clone()
    other_bt[:, changed] = (tokens_bt[:, changed] + 1) % VOCABULARY
    logits_bto, others_bto = model(tokens_bt)[0], model(other_bt)[0]
    assert torch.equal(logits_bto[:, :changed], others_bto[:, :changed])
    assert not torch.isclose(logits_bto[:, changed], others_bto[:, changed]).all(-1).any(), "but that token's own do"


@every_model
def test_no_gradient_flows_from_a_logit_to_a_later_token(name):
    """B7.9."""
    model, now = grown(name), 8
    logits_bto, hidden_btd = embedded(model, ids(2))
    (upstream_btd,) = torch.autograd.grad(logits_bto[:, now].square().sum(), hidden_btd)
    assert not upstream_btd[:, now + 1 :].any()
    assert upstream_btd[:, now].any()


@every_model
def test_rows_of_a_batch_know_nothing_of_each_other(name):
    """Neither in one call nor through the state that it leaves, neither by value nor by gradient."""
    model, tokens_bt, next_bt = grown(name), ids(3), ids(3, 4, random_seed=11)
    other_bt = tokens_bt.clone()
    other_bt[1] = ids(1, random_seed=13)
    logits_bto, state = model(tokens_bt)
    others_bto, other_state = model(other_bt)
    assert torch.equal(logits_bto[::2], others_bto[::2])
    later_bto, hidden_btd = embedded(model, next_bt, state)
    assert torch.equal(later_bto[::2], model(next_bt, other_state)[0][::2])
    (upstream_btd,) = torch.autograd.grad(later_bto[0].square().sum(), hidden_btd)
    assert upstream_btd[0].any() and not upstream_btd[1:].any()


@every_model
def test_permuted_rows_give_permuted_logits(name):
    model, tokens_bt, order = grown(name), ids(3), [2, 0, 1]
    torch.testing.assert_close(model(tokens_bt[order])[0], model(tokens_bt)[0][order], rtol=0, atol=1e-10)


@every_model
@pytest.mark.parametrize("cuts", [[1] * N_TIME, [5, 1, N_TIME - 6], "random"])
def test_cutting_a_text_anywhere_changes_nothing(name, cuts):
    """One call, a prefill with tokens one by one, and any other cut give the same logits and leave the same state."""
    if isinstance(cuts, str):
        places = sorted(random.Random(name + cuts).sample(range(1, N_TIME), 3))
        cuts = [stop - start for start, stop in zip([0, *places], [*places, N_TIME], strict=True)]
    model, tokens_bt = grown(name), ids(2)
    whole_bto, last = model(tokens_bt)
    parts, state = [], None
    for part_bt in tokens_bt.split(cuts, dim=1):
        logits_bto, state = model(part_bt, state)
        parts.append(logits_bto)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_bto, rtol=0, atol=1e-10)
    torch.testing.assert_close(flatten(state), flatten(last), rtol=0, atol=1e-10)


@every_model
def test_gradients_do_not_depend_on_the_cut(name):
    """A memory carried through two calls teaches as one call does."""
    model, tokens_bt = grown(name), ids(2)
    whole_bto, _ = model(tokens_bt)
    first_bto, state = model(tokens_bt[:, :7])
    second_bto, _ = model(tokens_bt[:, 7:], state)
    parameters = list(model.parameters())
    whole = torch.autograd.grad(whole_bto.square().sum(), parameters)
    cut = torch.autograd.grad(first_bto.square().sum() + second_bto.square().sum(), parameters)
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-9)


@every_model
def test_every_parameter_learns_from_the_start(name):
    """TR-5: At the first weights, not only at those of a grown model."""
    model = build(*ZOO[name], VOCABULARY, random_seed=3).double()
    logits_bto, _ = model(ids(3))
    F.cross_entropy(logits_bto.flatten(0, 1), ids(3, random_seed=17).flatten()).backward()
    idle = [path for path, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert idle == []


@every_model
def test_every_parameter_is_registered(name):
    """TR-5: What the attributes of all modules hold, lists and dicts included, is what the model says it has."""
    model = build(*ZOO[name], VOCABULARY, random_seed=3)
    held = {id(leaf) for module in model.modules() for leaf in leaves(vars(module))}
    assert held == {id(parameter) for parameter in model.parameters()}


def leaves(value):
    """The parameters inside nested containers; modules among them included, since a list hides them as well."""
    if isinstance(value, nn.Parameter):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, dict | list | tuple | set):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)


@every_model
def test_forward_is_pure(name):
    """Reading changes neither the weights, nor the state that was handed in, nor what the next call gives."""
    model, tokens_bt = grown(name), ids(2)
    _, state = model(tokens_bt[:, :9])
    before = {path: leaf.clone() for path, leaf in (model.state_dict() | tensors(state)).items()}
    counts = flatten(state).keys() - tensors(state).keys()
    counted = {path: flatten(state)[path] for path in counts}
    first_bto, _ = model(tokens_bt[:, 9:], state)
    second_bto, _ = model(tokens_bt[:, 9:], state)
    after = model.state_dict() | tensors(state)
    assert counted == {path: flatten(state)[path] for path in counts}
    assert torch.equal(first_bto, second_bto)
    assert before.keys() == after.keys() and all(torch.equal(before[path], after[path]) for path in before)


@every_model
def test_a_state_survives_being_flat(name):
    model, tokens_bt = grown(name), ids(2)
    _, state = model(tokens_bt[:, :9])
    again = unflatten(flatten(map_tensors(lambda leaf: leaf.clone().contiguous(), state)))
    assert torch.equal(model(tokens_bt[:, 9:], again)[0], model(tokens_bt[:, 9:], state)[0])


@every_model
def test_weights_depend_on_the_random_seed_alone(name):
    torch.manual_seed(1)
    first = build(*ZOO[name], VOCABULARY, random_seed=3).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build(*ZOO[name], VOCABULARY, random_seed=3).state_dict()
    other = build(*ZOO[name], VOCABULARY, random_seed=4).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[path], second[path]) for path in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@every_model
def test_a_model_is_shaped_on_meta_without_being_computed(name):
    """CX-2.6."""
    real = build(*ZOO[name], VOCABULARY, random_seed=3)
    with torch.device("meta"):
        model = build(*ZOO[name], VOCABULARY, random_seed=3)
        _, state = model(torch.zeros(3, 7, dtype=torch.int64))
        logits_bto, state = model(torch.zeros(3, 1, dtype=torch.int64), state)
    _, real_state = real(ids(3, 8))
    assert logits_bto.is_meta and logits_bto.shape == (3, 1, VOCABULARY)
    assert {path: leaf.shape for path, leaf in model.state_dict().items()} == {
        path: leaf.shape for path, leaf in real.state_dict().items()
    }
    assert {path: leaf.shape for path, leaf in tensors(state).items()} == {
        path: leaf.shape for path, leaf in tensors(real_state).items()
    }
    assert flatten(state).keys() == flatten(real_state).keys()


@every_model
def test_low_precision_stays_near_full_precision(name):
    """Under autocast and across a cut, logits stay within the noise of the precision, and a memory stays float32.

    Rules with a switch or a sign in them throw small differences far; they are allowed twice the error of the same
    model computed in bfloat16 throughout.
    """
    model, tokens_bt = grown(name, torch.float32), ids(2)
    true_bto, _ = model(tokens_bt)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first_bto, state = model(tokens_bt[:, :9])
        second_bto, state = model(tokens_bt[:, 9:], state)
    logits_bto = torch.cat([first_bto, second_bto], dim=1).float()
    errors_bto = (logits_bto - true_bto).abs()
    if errors_bto.max() >= 0.1 * true_bto.abs().max():
        with torch.no_grad():
            plain_bto, _ = copy.deepcopy(model).to(torch.bfloat16)(tokens_bt)
        assert errors_bto.mean() < 2 * (plain_bto.float() - true_bto).abs().mean()
    memories = [leaf for path, leaf in tensors(state).items() if ".memory." in path]
    assert all(leaf.dtype == torch.float32 for leaf in memories)


@pytest.mark.parametrize("name", preset_names())
def test_the_first_loss_is_that_of_a_uniform_guess(name):
    """TR-1: At the sizes of the preset, within 5 %."""
    settings = preset(name)
    model = build(ModelConfig(**settings["model"]), MemoryConfig(**settings["memory"]), 256, random_seed=3)
    tokens_bt = torch.randint(256, (4, 101), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits_bto, _ = model(tokens_bt[:, :-1])
    loss = F.cross_entropy(logits_bto.flatten(0, 1), tokens_bt[:, 1:].flatten())
    assert abs(loss - math.log(256)) < 0.05 * math.log(256)


def test_layers_begin_with_different_weights():
    model = build(*ZOO["preset-titans-mag"], VOCABULARY, random_seed=3)
    first, second = (dict(block.named_parameters()) for block in model.blocks)
    assert all(not torch.equal(first[path], second[path]) for path in first if path.endswith("qkv.weight"))


def test_a_state_can_be_detached_and_carried_on():
    """As training over consecutive windows does it: same values, no gradient into the window before."""
    model, tokens_bt = grown("preset-titans-mag"), ids(2)
    _, state = model(tokens_bt[:, :9])
    logits_bto, _ = model(tokens_bt[:, 9:], map_tensors(torch.Tensor.detach, state))
    assert torch.equal(logits_bto, model(tokens_bt[:, 9:], state)[0])


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["preset-titans-mag", "preset-charformer"])
def test_a_block_is_one_graph(name):
    """Fresh and with a state; ``device.compile`` takes the blocks of a model one by one."""
    block, hidden_btd = grown(name).blocks[0], torch.randn(2, 4, 12, dtype=torch.float64)
    _, state = block(hidden_btd)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    for before in (None, state):
        torch.testing.assert_close(compiled(hidden_btd, before)[0], block(hidden_btd, before)[0], rtol=0, atol=1e-12)
