"""The memory layer over the whole catalogue."""

import pytest
import torch

from meristem.errors import ConflictingKeys
from meristem.memory import named
from meristem.memory.forms import accepting
from meristem.memory.named import rules
from meristem.memory.value import clone, flatten
from meristem.nn.decode import can_decode
from meristem.nn.memory import MemoryLayer
from meristem.nn.part import MemoryPart
from meristem.nn.rule import rule_of
from zoo import preset

WIDTH = 32
PAIRS = [(name, form) for name in rules.names() for form in accepting(named(name)) if form != "associative"]


def layer(name: str, form: str, **settings: object) -> MemoryLayer:
    """The layer of a preset, small."""
    part = preset(f"lmm-{name}")["memory"] | {"rule": name, "form": form, "head_width": 8, "chunk": 8} | settings
    torch.manual_seed(0)
    return MemoryLayer(WIDTH, MemoryPart.model_validate(part))


@pytest.mark.parametrize("name, form", PAIRS)
def test_inputs_ten_times_as_large_stay_finite(name: str, form: str) -> None:
    """With the gates that a layer begins with, forwards and backwards, over many chunks."""
    module = layer(name, form)
    hidden_btd = 10 * torch.randn(2, 96, WIDTH, generator=torch.Generator().manual_seed(1))
    mixed_btd, _ = module(hidden_btd)
    mixed_btd.square().sum().backward()
    assert mixed_btd.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("name, form", PAIRS)
def test_no_parameter_of_a_layer_is_dead(name: str, form: str) -> None:
    """Whatever a rule does not use is not made; whatever is made gets a gradient."""
    module = layer(name, form)
    mixed_btd, _ = module(torch.randn(2, 33, WIDTH, generator=torch.Generator().manual_seed(1)))
    mixed_btd.square().sum().backward()
    dead = [path for path, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


CHOICES = [
    {"rule": "titans", "update": "implicit"},
    {"rule": "titans", "update": "deep_momentum(hidden=4)"},
    {"rule": "titans", "update": "delta_momentum"},
    {"rule": "delta", "bias": "power(p=3)"},
    {"rule": "delta", "bias": "huber_switch"},
    {"rule": "delta", "bias": "kl", "retention": "local(strength=0.1, period=4)"},
    {"rule": "delta", "retention": "elastic(alpha=5)", "probe": "warm"},
    {"rule": "delta", "retention": "f_divergence(kind='pearson')"},
    {"rule": "delta", "retention": "bounded", "features": "elu1"},
    {"rule": "delta", "retention": "entropy", "reads": "before"},
    {"rule": "hebbian", "features": "fourier(n_features=12)"},
    {"rule": "delta", "features": "exponential(n_features=12)"},
    {"rule": "delta", "structure": "vector"},
    {"rule": "moneta", "retention": "power_norm(q=3, mapped='mirror')"},
    {"rule": "delta", "structure": "mlp(n_layers=3, is_normed=True)"},
    {"rule": "titans", "structure": "mlp(is_gated=True, is_normed=True)"},
]


@pytest.mark.parametrize("settings", CHOICES, ids=str)
def test_every_part_may_be_chosen_by_name(settings: dict[str, object]) -> None:
    """S3b-M1, S3b-M2: a layer of any valid choice learns; no part of it is dead."""
    torch.manual_seed(0)
    module = MemoryLayer(WIDTH, MemoryPart.model_validate({"head_width": 8, "chunk": 8} | settings))
    mixed_btd, _ = module(torch.randn(2, 9, WIDTH))
    mixed_btd.square().sum().backward()
    assert mixed_btd.isfinite().all()
    assert [path for path, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_parts_that_do_not_go_together_are_refused_with_every_reason() -> None:
    part = MemoryPart(rule="hebbian", structure="mlp", retention="sphere", update="implicit")
    with pytest.raises(ConflictingKeys) as caught:
        rule_of(part)
    text = str(caught.value)
    assert all(word in text for word in ("'sphere'", "'dot'", "'implicit' solves", "the bias 'squared'", "take"))


DECODED = [name for name in rules.names() if layer(name, "auto").recall.is_plain]


@pytest.mark.parametrize("name", DECODED)
def test_one_token_outside_training_is_the_same_token(name: str) -> None:
    """The short way of a session gives what the window gives: reads, memory and the convolution's tail."""
    module = layer(name, "auto").double()
    hidden_btd = torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole_btd, whole = module(hidden_btd)
    state, reads = module(hidden_btd[:, :4])[1], []
    with torch.no_grad():
        for t in range(4, 9):
            assert can_decode(module.recall, hidden_btd[:, t : t + 1], state)
            read_btd, state = module(hidden_btd[:, t : t + 1], state)
            reads.append(read_btd)
    torch.testing.assert_close(torch.cat(reads, dim=1), whole_btd[:, 4:], rtol=0, atol=1e-10)
    torch.testing.assert_close(flatten(state), flatten(whole), rtol=0, atol=1e-10)


def test_the_short_way_leaves_the_state_that_came_in() -> None:
    module = layer("titans", "auto")
    hidden_btd = torch.randn(1, 5, WIDTH)
    with torch.no_grad():
        _, state = module(hidden_btd)
        before = clone(state)
        module(hidden_btd[:, :1], state)
    torch.testing.assert_close(flatten(state), flatten(before), rtol=0, atol=0)


def test_what_has_no_short_way_goes_as_windows_do() -> None:
    hidden_btd = torch.randn(1, 1, WIDTH)
    with torch.no_grad():
        for module in (layer("titans_mlp", "auto"), layer("titans", "frozen_chunk"), layer("omega", "auto")):
            _, state = module(hidden_btd)
            assert not can_decode(module.recall, hidden_btd, state)
    module = layer("titans", "auto")
    _, state = module(hidden_btd)
    assert not can_decode(module.recall, hidden_btd, state), "training goes through autograd"


@pytest.mark.parametrize("settings", [{"gates": "channel"}, {"gates": "channel", "gate_rank": 3}, {"gate_rank": 2}])
@pytest.mark.parametrize("name", ["titans", "gated_delta", "hebbian"])
def test_gates_may_be_of_channels_and_of_low_rank(name: str, settings: dict[str, object]) -> None:
    """Every parameter learns; with equal gates in all channels of a head the layer is the one with gates of heads."""
    module = layer(name, "auto", **settings)
    hidden_btd = torch.randn(2, 19, WIDTH, generator=torch.Generator().manual_seed(1))
    mixed_btd, _ = module(hidden_btd)
    mixed_btd.square().sum().backward()
    assert [path for path, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []
    plain = layer(name, "auto")
    values = {path: p for path, p in module.state_dict().items() if "gates" not in path and "initial" not in path}
    plain.load_state_dict(values, strict=False)
    module.recall.gates.weight_hd.data.zero_()
    torch.testing.assert_close(module(hidden_btd)[0], plain(hidden_btd)[0], rtol=0, atol=1e-5)


def test_channels_that_a_rule_joins_have_no_gates_of_their_own() -> None:
    with pytest.raises(ConflictingKeys, match="'channel', and this rule joins.*'mlp'.*memory.gates=head"):
        layer("titans_mlp", "frozen_chunk", gates="channel")
