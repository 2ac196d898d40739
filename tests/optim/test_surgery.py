"""What an optimizer has gathered outlives a growth of its model: levels of a memory, levels of a chain."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from meristem.errors import WrongValue
from meristem.models.build import build as build_model
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.nn.memory import MemoryLayer
from meristem.nn.promotion import push_up, push_up_chain, stack_up, stack_up_chain
from meristem.optim import state
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.kinds import KINDS
from meristem.optim.surgery import carried
from optim.levels import Levelled, copied, equal, train, weights

SMALL = {"dim": 12, "n_layers": 1, "mlp_dim": 17}
MODELS = {
    "memory": ModelConfig.model_validate(SMALL | {"mixer": "memory", "mlp": "gelu"}),
    "chain": ModelConfig.model_validate(
        SMALL | {"mixer": "attention", "n_heads": 2, "mlp": "levels", "levels": {"count": 2, "periods": [1, 3]}}
    ),
}
MEMORY = MemoryConfig.model_validate(
    {"head_dim": 4, "chunk": 3, "levels": {"count": 2, "periods": [1, 2], "mix": "softmax"}}
)
N_BEFORE = 5
"""Between two updates of the level of period 3, which has something waiting then."""


def part_of(kind):
    return OptimConfig(name=kind, lr=0.01)


def learn(model, optimizer, steps):
    """Steps on texts that are others at every step, long enough for the slowest memory to be heard."""
    n_time = 20 if isinstance(model.blocks[0].mixer, MemoryLayer) else 9
    for step in steps:
        tokens_bt = torch.randint(29, (2, n_time), generator=torch.Generator().manual_seed(step))
        logits_bto, _ = model(tokens_bt[:, :-1])
        loss = functional.cross_entropy(logits_bto.flatten(0, 1), tokens_bt[:, 1:].flatten())
        loss.backward()
        optimizer.step(loss.detach())
        optimizer.zero_grad()
        assert loss.isfinite()


def trained(kind, where):
    model = build_model(MODELS[where], MEMORY, 29, random_seed=3)
    optimizer = build(model, part_of(kind))
    learn(model, optimizer, range(N_BEFORE))
    return model, optimizer


def grown(model, where, grow):
    """The model with one level more in its memory or its chain, and its names with those in the old one."""
    model, path = copy.deepcopy(model), f"blocks.0.{'mixer.recall' if where == 'memory' else 'mlp'}."
    block = model.blocks[0]
    torch.manual_seed(7)
    if where == "memory":
        made = {"push_up": push_up, "stack_up": stack_up}[grow](block.mixer.recall, MEMORY)
        block.mixer.recall = made.module
    else:
        made = {"push_up": push_up_chain, "stack_up": stack_up_chain}[grow](block.mlp)
        block.mlp = made.module
    kept = {name: name for name, _ in model.named_parameters() if not name.startswith(path)}
    return model, kept | {path + new: path + old for old, new in made.names.items()}, f"{path}level.{made.fresh}."


every_kind = pytest.mark.parametrize("kind", KINDS)
every_growth = pytest.mark.parametrize(
    "where, grow", [(where, grow) for where in ("memory", "chain") for grow in ("push_up", "stack_up")]
)


def gathered(model, optimizer):
    """By parameter, what there is of it."""
    found = {name: {} for name, _ in model.named_parameters()}
    for path, value in state.tensors(model, optimizer).items():
        name, key = path.rsplit("/", 1)
        if name in found and key != state.NOTHING:
            found[name][key] = value
    return found


@every_kind
@every_growth
def test_moments_move_with_their_levels(kind, where, grow):
    """Issue 4, 6: moments, counters and what waits are bitwise those of the level as it was; a fresh level has none."""
    old, before = trained(kind, where)
    model, names, fresh = grown(old, where, grow)
    after = carried(before, old=old, model=model, names=names, config=part_of(kind))
    had, has = gathered(old, before), gathered(model, after)
    assert all(had[name] for name in had), "every parameter had something"
    for new, name in names.items():
        assert equal(has[new], had[name]), new
        assert {value.data_ptr() for value in has[new].values()}.isdisjoint(v.data_ptr() for v in had[name].values())
    begun = {name for name, _ in model.named_parameters()} - names.keys()
    assert not any(has[name] for name in begun) and any(name.startswith(fresh) for name in begun)
    slow = [name for name in names if state.PENDING in has[name]]
    assert bool(slow) == (where == "chain") and all(has[name][state.PENDING].any() for name in slow)
    assert (after.clock.count, after.clock.periods) == (N_BEFORE, (1, 3, 24) if where == "chain" else (1,))


@pytest.mark.parametrize("kind", ["adamw", "m3"])
@every_growth
def test_training_goes_on_and_the_old_run_knows_nothing_of_it(kind, where, grow):
    """Finite, every parameter of the grown model moves once its period has passed; undone, all is as it was.

    Of a level that adds nothing yet only the last projection has a gradient at first; decay moves all matrices.
    """
    old, before = trained(kind, where)
    was, held = weights(old), copied(state.tensors(old, before))
    model, names, fresh = grown(old, where, grow)
    after = carried(before, old=old, model=model, names=names, config=part_of(kind))
    start = weights(model)
    learn(model, after, range(N_BEFORE, 25))
    now = weights(model)
    still = {name for name in now if torch.equal(now[name], start[name])}
    waits = {name for name in now if where == "chain" and grow == "stack_up" and name.startswith(fresh)}
    assert all(tensor.isfinite().all() for tensor in now.values())
    assert still == {name for name in waits if ".out." not in name and now[name].dim() == 1}
    assert equal(weights(old), was) and equal(state.tensors(old, before), held)


@every_kind
@pytest.mark.parametrize("cut", [0, 4])
def test_a_grown_run_is_resumed_to_the_bit(kind, cut):
    """Issue 4, 6: checkpoint, promotion and resume; the level on top is not due before step 24, and has nothing yet."""
    old, before = trained(kind, "chain")
    model, names, fresh = grown(old, "chain", "stack_up")
    after = carried(before, old=old, model=model, names=names, config=part_of(kind))
    learn(model, after, range(N_BEFORE, N_BEFORE + cut))
    saved, saved_weights = copied(state.tensors(model, after)), weights(model)
    assert f"{fresh}norm.gain_d/{state.NOTHING}" in saved
    second, _, _ = grown(old, "chain", "stack_up")
    second.load_state_dict(saved_weights)
    restored = build(second, part_of(kind))
    state.restore(second, restored, saved)
    for each, optimizer in ((model, after), (second, restored)):
        learn(each, optimizer, range(N_BEFORE + cut, 25))
    assert equal(weights(model), weights(second))
    assert equal(state.tensors(model, after), state.tensors(second, restored))


@every_kind
def test_nothing_grown_is_nothing_changed(kind):
    """A model that was only copied goes on to the bit, and sums over processes as it did."""
    first, second = Levelled(2, 3), Levelled(2, 3)
    before = build(first, part_of(kind))
    before.reduce = lambda tensors, what: None
    train(first, before, range(4))
    second.load_state_dict(weights(first))
    names = {name: name for name, _ in first.named_parameters()}
    after = carried(before, old=first, model=second, names=names, config=part_of(kind))
    train(first, before, range(4, 11))
    train(second, after, range(4, 11))
    assert after.reduce is before.reduce
    assert equal(weights(first), weights(second))
    assert equal(state.tensors(first, before), state.tensors(second, after))


def test_what_is_named_no_more_begins_afresh():
    """Moments can be left behind, of a promoted level as of any other."""
    old, before = trained("adamw", "chain")
    model, names, _ = grown(old, "chain", "push_up")
    left = {name: source for name, source in names.items() if not name.startswith("blocks.0.mlp.")}
    found = gathered(model, carried(before, old=old, model=model, names=left, config=part_of("adamw")))
    assert all(bool(found[name]) == (name in left) for name in found)


def test_another_shape_or_another_kind_of_optimizer_begins_afresh():
    """Moments of half a matrix mean nothing, and Muon can make nothing of AdamW's."""
    old = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))
    old.matrices = {"0.weight", "1.weight"}
    before = build(old, OptimConfig())
    old(torch.ones(1, 3)).sum().backward()
    before.step()
    names = {name: name for name, _ in old.named_parameters()}
    wide = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 5))
    found = gathered(wide, carried(before, old=old, model=wide, names=names, config=OptimConfig()))
    assert [name for name in found if found[name]] == ["1.bias"]
    found = gathered(old, carried(before, old=old, model=old, names=names, config=OptimConfig(name="muon")))
    assert [name for name in found if found[name]] == ["0.bias", "1.bias"]


def test_names_that_are_nowhere_are_refused():
    old = Levelled(2)
    with pytest.raises(WrongValue, match=r"no parameter is called layers.1.bias, layers.7.bias \(2 names in all\)"):
        names = {"layers.1.bias": "layers.0.bias", "scale": "layers.7.bias"}
        carried(build(old, OptimConfig()), old=old, model=Levelled(2), names=names, config=OptimConfig())


def test_a_sum_that_would_wait_for_ever_is_refused():
    """A level that now moves at every step has no turn at which to use it; after a flush there is none."""
    old, model = Levelled(3), Levelled(1)
    before = build(old, OptimConfig())
    train(old, before, range(2))
    names = {name: name for name, _ in old.named_parameters()}
    with pytest.raises(WrongValue, match=r"gradients wait for layers.0.weight, layers.0.bias .* Call flush\(\)"):
        carried(before, old=old, model=model, names=names, config=OptimConfig())
    before.flush()
    assert not carried(before, old=old, model=model, names=names, config=OptimConfig()).pending
