"""Levels added to trained modules."""

import pytest
import torch

from meristem.memory.state import flatten
from meristem.nn.cms_memory import CMSMemory
from meristem.nn.cms_mlp import CMSMLP, build_cms_mlp
from meristem.nn.config import CMSConfig, MemoryConfig
from meristem.nn.memory import build_memory
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.promotion import carry_state, push_up, push_up_chain, stack_up, stack_up_chain

WIDTH = 12
LEVELS = [
    {},
    {"count": 2},
    {"count": 2, "periods": (1, 3), "mix": "softmax"},
    {"count": 2, "periods": (1, 3), "tokens": "each", "reset_after": (7, 2), "mix": "inv_sqrt"},
    {"count": 2, "periods": (1, 3), "frequency": "output", "mix": "softmax"},
]


def trained(levels: dict[str, object]) -> tuple[NeuralMemory | CMSMemory, MemoryConfig]:
    part = MemoryConfig.model_validate(
        {"head_dim": 4, "chunk": 3, "levels": levels | ({"mix": "inv_sqrt"} if levels == {"count": 2} else {})}
    )
    torch.manual_seed(0)
    module = build_memory(WIDTH, part).double()
    shaken(module)
    return module, part


def shaken(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def text(n_time: int, random_seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(random_seed)
    return torch.randn(2, n_time, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("grow, is_below", [(push_up, True), (stack_up, False)])
def test_levels_keep_what_they_learned(levels, grow, is_below):
    """6.7: parameters are found under new names, bitwise; the fresh level is the only one that is not named; nothing
    of the module before has changed."""
    module, part = trained(levels)
    before = {name: p.clone() for name, p in module.named_parameters()}
    grown = grow(module, part)
    now = dict(grown.module.named_parameters())
    assert grown.fresh == (0 if is_below else part.levels.count) and len(grown.module.level) == part.levels.count + 1
    assert all(torch.equal(now[new], before[old]) for old, new in grown.names.items())
    per_level = {name for name in before if name.endswith("_l") or name.endswith("_ld")}
    assert set(before) - set(grown.names) == per_level - {name for name in per_level if name in grown.names}
    unnamed = set(now) - set(grown.names.values())
    assert {name for name in unnamed if name.startswith("level.")} >= {
        name for name in now if name.startswith(f"level.{grown.fresh}.")
    }
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    now["level.0.recall.qkv.weight"].data.zero_()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters()), "nothing is shared"


@pytest.mark.parametrize("levels", LEVELS[2:], ids=str)
def test_a_promoted_level_answers_at_its_new_pace(levels):
    """A level that is given the period it had answers as before; push-up gives it the next one."""
    module, part = trained(levels)
    grown, hidden_btd = stack_up(module, part).module, text(17)
    for old, new in zip(module.level, grown.level, strict=False):
        assert torch.equal(
            old(hidden_btd, old.init_state(hidden_btd), 0)[0], new(hidden_btd, new.init_state(hidden_btd), 0)[0]
        )
    pushed = push_up(module, part).module
    assert [level.n_apart for level in pushed.level] == [1, 3, 24]
    assert torch.equal(pushed.level[2].recall(hidden_btd)[0], module.level[1].recall(hidden_btd)[0])


def test_a_fresh_level_draws_from_the_generator_alone():
    module, part = trained({"count": 2, "mix": "softmax"})
    weights = []
    for random_seed in (1, 1, 2):
        torch.manual_seed(random_seed)
        weights.append(push_up(module, part).module.level[0].recall.qkv.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.7 < float(weights[0].detach().std()) * WIDTH**0.5 < 1.3


def test_mix_logits_move_with_their_levels():
    module, part = trained({"count": 2, "mix": "softmax"})
    first, second = module.mix_l.tolist()
    assert push_up(module, part).module.mix_l.tolist() == [0, first, second]
    assert stack_up(module, part).module.mix_l.tolist() == [first, second, 0]


def test_gates_may_begin_with_the_defaults_of_their_place():
    module, part = trained({"count": 2, "mix": "softmax"})
    kept, fresh = (push_up(module, part, gates=gates) for gates in ("carry", "default"))
    assert torch.equal(kept.module.level[1].recall.gates.bias_h, module.level[0].recall.gates.bias_h)
    assert not fresh.module.level[1].recall.gates.weight_hd.any()
    assert "level.0.recall.gates.bias_h" in kept.names and "level.0.recall.gates.bias_h" not in fresh.names


def test_a_promoted_frequency_keeps_its_distance_from_its_budget():
    module, part = trained({"count": 2, "periods": (1, 3), "frequency": "output", "mix": "softmax"})
    grown = push_up(module, part).module
    torch.testing.assert_close(grown.frequency.weight_ld[1], module.frequency.weight_ld[0])
    off = module.frequency.bias_l[0] - torch.tensor(1 / 2).logit().double() + torch.tensor(2.0).log()
    torch.testing.assert_close(grown.frequency.bias_l[1] + torch.tensor(23.0).double().log(), off, atol=1e-6, rtol=0)
    assert not grown.frequency.weight_ld[0].any()


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("grow", [push_up, stack_up])
def test_memories_move_with_their_levels(levels, grow):
    """6.7: a reader goes on: its old memories stand in their new places, its count is the same, and it reads on."""
    module, part = trained(levels)
    _, state = module(text(11))
    grown = grow(module, part)
    carried = carry_state(grown, state, text(1))
    old = state["level"] if "level" in state else {"0": state}
    for a, b in grown.moved.items():
        moved = flatten(carried["level"][str(b)]["memory"])
        assert all(torch.equal(moved[name], leaf) for name, leaf in flatten(old[str(a)]["memory"]).items())
    fresh = flatten(grown.module.init_state(text(1))["level"][str(grown.fresh)])
    torch.testing.assert_close(flatten(carried["level"][str(grown.fresh)]), fresh, rtol=0, atol=0)
    assert carried["count"] == state.get("count", 0)
    read_btd, after = grown.module(text(9, 2), carried)
    assert read_btd.isfinite().all() and after["count"] == carried["count"] + 9
    assert {name: leaf.shape for name, leaf in flatten(after).items() if isinstance(leaf, torch.Tensor)} == {
        name: leaf.shape for name, leaf in flatten(carried).items() if isinstance(leaf, torch.Tensor)
    }


@pytest.mark.parametrize(
    "values", [{}, {"order": "slowest"}, {"variant": "independent"}, {"tokens": "pooled"}], ids=str
)
@pytest.mark.parametrize("grow, new_of", [(push_up_chain, 1), (stack_up_chain, 0)])
def test_a_grown_chain_adds_what_it_added(values, grow, new_of):
    """The fresh level adds nothing until it has learned, and it learns; names and periods are those of the places."""
    part = CMSConfig.model_validate({"count": 2, "periods": (1, 3)} | values)
    torch.manual_seed(0)
    chain = build_cms_mlp(WIDTH, 17, part).double()
    shaken(chain)
    hidden_btd, grown = text(19), grow(chain)
    now = dict(grown.module.named_parameters())
    assert all(torch.equal(now[grown.names[name]], p) for name, p in chain.named_parameters() if name in grown.names)
    assert [level.period for level in grown.module.level] == [1, 3, 24] and list(grown.moved.values())[0] == new_of
    added_btd, _ = grown.module(hidden_btd)
    if part.tokens == "each":
        torch.testing.assert_close(added_btd, chain(hidden_btd)[0], rtol=0, atol=1e-14)
    added_btd.square().sum().backward()
    outs = [name for name, p in now.items() if name.startswith(f"level.{grown.fresh}.") and ".out." in name]
    assert outs and not any(now[name].any() for name in outs)
    if grown.fresh == 0 or part.tokens == "each":
        assert all(now[name].grad.any() for name in outs)


def test_a_grown_chain_goes_on_reading():
    torch.manual_seed(0)
    chain: CMSMLP = build_cms_mlp(WIDTH, 17, CMSConfig(count=2, periods=(1, 3), tokens="pooled")).double()
    _, state = chain(text(11))
    grown = push_up_chain(chain)
    carried = carry_state(grown, state, text(1))
    assert torch.equal(carried["level"]["2"]["last_bd"], state["level"]["1"]["last_bd"])
    assert not carried["level"]["1"]["last_bd"].any() and carried["count"] == 11
    assert grown.module(text(5), carried)[1]["count"] == 16
