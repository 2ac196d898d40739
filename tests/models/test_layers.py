"""Layers with settings of their own, side by side or on each other, and the patterns that they follow."""

import pytest
import torch

from meristem.errors import ConflictingKeys
from meristem.models.aggregate import JOINS
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.layers import PATTERNS
from meristem.nn.config import MemoryConfig
from meristem.optim.config import OptimConfig
from meristem.runs.config import Config

SIZES = {"dim": 12, "n_heads": 2, "n_layers": 2, "mlp": "gelu", "mixer": "mag"}
MEMORY = {"head_dim": 4, "chunk": 3}
FOLLOWING = {
    "basic": {"n_layers": 1},
    "nested": {"layers": [{"m3_every": 2}, {"m3_every": 8}]},
    "sequential": {"layers": [{"periods": [1]}, {"periods": [1, 4]}]},
    "independent": {"layers": [{"periods": [1, 2]}, {"periods": [1, 5]}], "aggregate": "attention"},
    "hybrid": {"layers": [{"periods": [1, 4]}, {"mixer": "attention"}]},
}
BREAKING = {
    "basic": ({}, "one layer. Here model.n_layers is 2"),
    "nested": ({"layers": [{"m3_every": 2}, {}]}, "Here optim.name is 'adamw'; m3_every is not given for the layers 1"),
    "sequential": ({"layers": [{"periods": [1, 4]}, {"periods": [1]}]}, "Here layer 1 has 1 levels above one with 2"),
    "independent": (
        {"layers": [{"periods": [1, 2]}]},
        "Here model.aggregate is 'stack'; all layers have the same periods",
    ),
    "hybrid": ({}, "Here no layer has more than one level; no layer is plain attention without levels"),
}


def config(settings, kind="adamw"):
    return Config(model=SIZES | settings, memory=MEMORY, optim={"name": kind})


def test_every_pattern_has_examples():
    assert PATTERNS.keys() == FOLLOWING.keys() == BREAKING.keys()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_that_is_followed_survives_being_written_out(pattern):
    """S3-M3: constructors and the JSON round trip."""
    followed = config(FOLLOWING[pattern] | {"pattern": pattern}, "m3" if pattern == "nested" else "adamw")
    assert Config.model_validate_json(followed.model_dump_json()) == followed


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_that_is_not_followed_is_refused_with_all_reasons(pattern):
    """S3-M3: five validators, each with a failing example."""
    settings, message = BREAKING[pattern]
    with pytest.raises(ConflictingKeys, match=f"model.pattern is '{pattern}': .*{message}. Change these"):
        config(settings | {"pattern": pattern})
    assert pattern == "nested" or config(settings)


def model_of(settings, kind="adamw"):
    made = config(settings, kind)
    return build(made.model, made.memory, 29, random_seed=3).double()


@pytest.mark.parametrize("mlp", ["gelu", "levels"])
def test_every_layer_has_its_own_clock(mlp):
    """S4-M9: after four tokens the slow level of period 2 has spoken, and that of period 5 beside it has not."""
    settings = {"layers": [{"periods": [1, 2]}, {"periods": [1, 5]}], "aggregate": "sum", "mlp": mlp}
    settings |= {"levels": {"tokens": "pooled"}} if mlp == "levels" else {}
    model, state = model_of(settings), None
    spoken = []
    for token in range(6):
        _, state = model(torch.tensor([[token]]), state)
        layers = [state["layer"][layer] for layer in "01"]
        slow = [layer["levels"]["level"]["1"] if mlp == "levels" else layer["recall"]["level"]["1"] for layer in layers]
        spoken.append([bool(level["last_bd"].any()) for level in slow])
    assert spoken == [[False, False], *[[True, False]] * 3, *[[True, True]] * 2]


@pytest.mark.parametrize("name", ["stack", *JOINS])
def test_all_layers_reach_the_head_and_are_taught(name):
    """S4-M9: shapes and gradients of concat, sum, attention mix and residual."""
    model = model_of({"layers": [{"mixer": "memory"}, {"mixer": "attention"}], "aggregate": name})
    logits_bto, _ = model(torch.randint(29, (2, 7)))
    assert logits_bto.shape == (2, 7, 29)
    logits_bto.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_layers_side_by_side_read_the_embedding():
    """What one of them gives does not reach the other."""
    model = model_of({"aggregate": "sum"})
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(torch.randint(29, (2, 7)))
    assert torch.equal(seen[0], seen[1])


def test_the_speed_of_every_layer_reaches_its_m3():
    """S3-M3, nested: each layer's parameters are gathered for as many steps as that layer says."""
    from meristem.optim.groups import build as build_optimizer

    model = model_of(FOLLOWING["nested"], "m3").float()
    optimizer = build_optimizer(model, OptimConfig(name="m3"))
    every = {
        id(parameter): group["every"]
        for group in optimizer.param_groups
        if "every" in group
        for parameter in group["params"]
    }
    for block, expected in zip(model.blocks, (2, 8), strict=True):
        assert every[id(block.mlp.up.weight)] == expected


def test_a_speed_that_no_optimizer_reads_is_refused():
    with pytest.raises(ConflictingKeys, match="m3_every of their own, and optim.name 'adamw' does not read it"):
        config(FOLLOWING["nested"])


def test_settings_of_layers_reach_them():
    part = ModelConfig(**SIZES, layers=[{"rule": "yaad", "retention": "decay"}, {"mixer": "attention"}])
    model = build(part, MemoryConfig(**MEMORY), 29, random_seed=3)
    assert model.blocks[0].mixer.recall.rule.bias.name == "huber_switch"
    assert model.blocks[0].mixer.recall.rule.retention.name == "decay"
    assert type(model.blocks[1].mixer).__name__ == "Attention"
