"""Which parameters decay, when they move and by what."""

import pytest
import torch
from torch import nn

from meristem.config import preset_names
from meristem.errors import ConflictingKeys, WrongValue
from meristem.models.build import build as build_model
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build, levels, split
from meristem.optim.kinds import KINDS
from meristem.runs.config import load_config
from optim.levels import Levelled
from zoo import VOCABULARY, ZOO


class Gated(nn.Module):
    """A module with one of every kind of parameter."""

    matrices = frozenset({"mix.weight", "tokens.weight"})

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 3)
        self.gate = nn.Linear(5, 2)
        self.conv = nn.Conv1d(5, 5, 3, groups=5)
        self.norm = nn.RMSNorm(5)
        self.first_bhkv = nn.Parameter(torch.zeros(2, 3))
        self.frozen = nn.Parameter(torch.zeros(4, 3), requires_grad=False)


def names(model, parameters):
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {of[id(parameter)] for parameter in parameters}


def test_only_plain_matrices_decay():
    """Of embeddings, gates, biases, norms, convolutions, initial memories and matrices, only the matrices decay."""
    model = Gated()
    decayed, _ = split(model)
    assert names(model, decayed) == {"mix.weight"}


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = Gated()
    decayed, plain = split(model)
    every = [id(parameter) for parameter in decayed + plain]
    assert sorted(every) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_tied_embedding_does_not_decay():
    """A head that shares its matrix with the embedding is an embedding."""
    model = nn.ModuleDict({"head": nn.Linear(5, 7, bias=False), "tokens": nn.Embedding(7, 5)})
    model["head"].weight = model["tokens"].weight
    decayed, plain = split(model)
    assert (len(decayed), len(plain)) == (0, 1)


def test_decay_shrinks_only_the_first_group():
    """With zero gradients one step multiplies the decayed matrices by 1 - rate * decay and leaves the rest alone."""
    model = Gated()
    optimizer = build(model, OptimConfig(lr=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.frozen.grad = None
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name == "mix.weight" else 1.0
        torch.testing.assert_close(parameter, before[name] * factor)


@pytest.mark.parametrize("preset", preset_names())
def test_groups_of_every_preset(preset):
    """Every parameter in exactly one group; no embedding, norm, gate, bias or first memory decays."""
    config = load_config(preset, (), {}).tree
    with torch.device("meta"):
        model = build_model(config.model, config.memory, 256, random_seed=0)
    decayed, plain = split(model)
    assert len({id(p) for p in decayed + plain}) == len(decayed + plain) == len(list(model.parameters()))
    spared = {name for name in names(model, decayed) if any(word in name for word in SPARED)}
    assert spared == set()
    rest = [p for name, p in model.named_parameters() if ".learned." not in name]
    n_decayed, n_all = (sum(p.numel() for p in group) for group in (decayed, rest))
    assert n_decayed > 0.8 * n_all, "what remains is small: a matrix that is not decayed was forgotten"


SPARED = ("embedding", "norm", "gates.", "bias", "initial", "persistent", "position")


@pytest.mark.parametrize("name", ZOO)
def test_groups_of_every_model(name):
    """For every kind each trainable parameter is in exactly one group, that of its period and decay.

    What makes steps of matrices gets plain matrices, and neither embedding nor head among them.
    """
    with torch.device("meta"):
        model = build_model(*ZOO[name], VOCABULARY, random_seed=3)
    decayed = {id(parameter) for parameter in split(model)[0]}
    period_of = {id(p): period for period, parameters in levels(model).items() for p in parameters}
    trainable = sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    for kind in KINDS:
        part = OptimConfig(name=kind)
        optimizer = build(model, part)
        assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == trainable
        for group in optimizer.param_groups:
            assert {period_of[id(p)] for p in group["params"]} == {group["period"]}
            assert {id(p) in decayed for p in group["params"]} == {group["weight_decay"] > 0}
            assert group["lr"] == part.lr * part.level_rate(group["period"])
        for matrices in optimizer.parts[1:]:
            rotated = names(model, [p for group in matrices.param_groups for p in group["params"]])
            assert rotated and not [it for it in rotated if any(word in it for word in (*SPARED, "head"))]


def test_the_nearest_module_with_a_period_wins():
    model = Levelled(8, 2)
    model.layers[0].period = 4
    model.layers.period = 16
    model.layers.append(nn.Linear(5, 3))
    found = {period: names(model, parameters) for period, parameters in levels(model).items()}
    assert found == {
        1: {"scale", "norm.weight", "norm.bias"},
        2: {"layers.1.weight", "layers.1.bias"},
        4: {"layers.0.weight", "layers.0.bias"},
        16: {"layers.2.weight", "layers.2.bias"},
    }


def test_what_two_levels_share_moves_with_the_faster():
    model = Levelled(8, 2)
    model.layers[0].weight = model.layers[1].weight
    assert names(model, levels(model)[2]) == {"layers.0.weight", "layers.1.bias"}
    assert names(model, levels(model)[8]) == {"layers.0.bias"}


@pytest.mark.parametrize("period", [0, 2.5])
def test_a_period_that_is_none_is_refused(period):
    with pytest.raises(WrongValue, match=rf"Linear.period is {period}; expected the whole number of steps, 1 or more"):
        levels(Levelled(period))


def test_a_setting_for_a_level_that_is_not_there_is_refused():
    part = OptimConfig(level_rates={7: 2.0, 8: 1.0}, level_betas={64: (0.1, 0.2)})
    with pytest.raises(ConflictingKeys, match=r"level_rates.7, optim.level_betas.64: no level .* there are 1, 8"):
        build(Levelled(8), part)
