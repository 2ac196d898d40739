"""Whole segments of memory as context, read together, are those that are read one after the other."""

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from meristem.memory.kernels.select import force_reference, plain_layers
from meristem.memory.state import State, flatten
from meristem.models.online import frozen
from meristem.native.library import core, library
from meristem.nn import mac
from meristem.nn.attention import Attention
from meristem.nn.config import MemoryConfig
from meristem.nn.mac import MemoryAsContext
from native.compared import apart

pytestmark = pytest.mark.skipif(library() is None, reason=f"there is no native core: {core().said}")

MOST = {torch.float64: 1e-13, torch.float32: 3e-6}
"""How far from tensor code in float64 a result may be, over its length; in float32 twice what that is off more."""


def layer(rule: str = "titans", *, pinned: int = 3, rope: bool = True, **settings: object) -> MemoryAsContext:
    """Of segments of 8 tokens, whose gates differ from token to token and whose first memory is not empty."""
    attention = Attention(32, 2, span=None, rope=rope, n_persistent=pinned)
    config = MemoryConfig(rule=rule, head_dim=16, **settings)
    module = MemoryAsContext(32, config, attention=attention, segment=8, combine="additive")
    for name, parameter in module.recall.named_parameters():
        if name.startswith("initial") or name.endswith("gates.weight_hd"):
            nn.init.normal_(parameter, std=0.2)
    return module


def results(module: MemoryAsContext, hidden: Tensor, cuts: list[int], *, is_native: bool) -> dict[str, Tensor]:
    """What is read and left, and every gradient of a loss that weighs each number differently."""
    hidden_btd = hidden.detach().to(module.ask.weight.dtype).requires_grad_()
    with nullcontext() if is_native else force_reference():
        state: State | None = None
        parts = []
        for part in hidden_btd.split(cuts, dim=1):
            read, state = module(part, state)
            parts.append(read)
        assert state is not None
        left = {"read": torch.cat(parts, dim=1)}
        left |= {f"after {name}": x for name, x in flatten(state).items() if isinstance(x, Tensor)}
        generator = torch.Generator().manual_seed(9)
        loss = torch.zeros((), dtype=torch.float64)
        for x in left.values():
            loss = loss + (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        leaves = {"hidden": hidden_btd} | dict(module.named_parameters())
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = {f"d {name}": x for name, x in zip(leaves, found, strict=True) if x is not None}
    # The map of the gates as one: what is summed for a bias may cancel.
    both = [gradients.pop(f"d recall.gates.{name}") for name in ("weight_hd", "bias_h")]
    gradients["d gates"] = torch.cat([each.flatten() for each in both])
    return {name: x.detach() for name, x in left.items()} | gradients


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many segments are read together, call by call."""
    seen: list[int] = []
    read_segments = mac.read_segments

    def counting(inputs: mac.Inputs, *rest: object) -> object:
        seen.append(len(inputs.asked_nbhck))
        return read_segments(inputs, *rest)

    monkeypatch.setattr(mac, "read_segments", counting)
    yield seen


@pytest.mark.parametrize("rule", ["titans", "delta", "gated_delta", "hebbian"])
@pytest.mark.parametrize("cuts, counts", [([16], [2]), ([37], [4]), ([5, 30, 2, 3], [3])], ids=str)
def test_segments_read_together_are_segments(
    rule: str, cuts: list[int], counts: list[int], together: list[int]
) -> None:
    """Wherever calls begin and end: reads, what is left, and every gradient."""
    module, hidden = layer(rule), torch.randn(2, sum(cuts), 32).bfloat16().double()
    truth = results(copy.deepcopy(module).double(), hidden, cuts, is_native=False)
    plain = apart(results(module, hidden, cuts, is_native=False), truth)
    assert not together
    for dtype, most in MOST.items():
        found = results(copy.deepcopy(module).to(dtype), hidden, cuts, is_native=True)
        assert together == counts
        together.clear()
        for name, error in apart(found, truth).items():
            assert error < most + (2 * plain[name] if dtype == torch.float32 else 0), (dtype, name, error)


@pytest.mark.parametrize(
    "settings", [{"pinned": 0}, {"rope": False}, {"conv": 1}, {"retain_lr": 4.0}, {"chunk": 4}], ids=str
)
def test_other_settings(settings: dict[str, object], together: list[int]) -> None:
    """Without persistent vectors, rotation or convolution, with a scaled map of gates, and with several chunks."""
    module, hidden = layer("titans", **settings).double(), torch.randn(2, 27, 32).double()
    errors = apart(*(results(module, hidden, [27], is_native=is_it) for is_it in (True, False)))
    assert together == [3]
    assert max(errors.values()) < 1e-13, errors


def test_without_gradients_the_values_are_the_same(together: list[int]) -> None:
    module, hidden = layer(), torch.randn(2, 24, 32)
    read, after = module(hidden)
    with torch.no_grad():
        plain, left = module(hidden)
    assert together == [3, 3] and torch.equal(read, plain)
    assert all(torch.equal(x, left["recall"]["memory"][name]) for name, x in after["recall"]["memory"].items())


@pytest.mark.parametrize("of", ["read", "matrix_bhkv", "matrix_momentum_bhkv", "tail_bsd"])
def test_a_loss_of_one_result_alone(of: str) -> None:
    module, hidden = layer().double(), torch.randn(2, 24, 32).double().requires_grad_()
    gradients = []
    for is_native in (True, False):
        with nullcontext() if is_native else force_reference():
            read, after = module(hidden)
            named = {"read": read} | after["recall"]["memory"] | after["recall"]["conv"]
            gradients.append(torch.autograd.grad(named[of].square().sum(), hidden)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-11)


def test_a_graph_that_is_retained_gives_the_same_twice() -> None:
    module, hidden = layer(), torch.randn(2, 24, 32, requires_grad=True)
    loss = module(hidden)[0].square().sum()
    first = torch.autograd.grad(loss, [hidden, *module.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, *module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_a_weight_that_was_changed_before_the_backward_pass_is_an_error() -> None:
    module, hidden = layer(), torch.randn(2, 24, 32)
    read, _ = module(hidden)
    with torch.no_grad():
        module.recall.qkv.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.sum().backward()


def test_what_is_dropped_is_freed_at_once() -> None:
    """A result is not held by its own node, which a collection of garbage alone would find."""
    module = layer()
    gc.collect()
    gc.disable()
    try:
        read, after = module(torch.randn(2, 24, 32))
        watched = [weakref.ref(read), weakref.ref(after["recall"]["memory"]["matrix_bhkv"])]
        node = read.grad_fn
        while node is not None and "Segments" not in node.name():
            node = next((each for each, _ in node.next_functions if each is not None), None)
        assert node is not None, "the node is not where this test looks for it"
        watched.append(weakref.ref(node.run))
        del read, after, node
        assert all(each() is None for each in watched)
    finally:
        gc.enable()


def test_who_decides(together: list[int]) -> None:
    """One after the other wherever something is not as the core takes it, or listens."""
    hidden = torch.randn(2, 24, 32)
    module = layer()
    alone = {
        "another rate": layer("delta_descent"),
        "another form": layer("titans", form="frozen_chunk"),
        "a cache": layer("titans", cache={"read": "sum", "length": 8}),
        "levels": layer("titans", levels={"count": 2}),
        "frozen": frozen(copy.deepcopy(module)),
    }
    for why, other in alone.items():
        other(hidden)
        assert not together, why
    for part in (module.recall, module.recall.qkv, module.recall.gates):
        handle = part.register_forward_hook(lambda *_: None)
        module(hidden)
        handle.remove()
        assert not together, part
    for context in (plain_layers(), force_reference(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            module(hidden)
        assert not together, context
    module(hidden[:, :15])
    assert not together, "one whole segment alone"
    module(hidden)
    assert together == [3]
