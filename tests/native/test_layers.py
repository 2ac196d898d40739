"""What the native core computes around the products of a training step is what tensor code computes there."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meristem.memory.kernels import select
from meristem.memory.kernels.select import force_reference, fuses, plain_layers
from meristem.native import layers
from meristem.native.interface import lanes
from meristem.native.library import core, library
from meristem.nn.combine import Additive
from meristem.nn.config import MemoryConfig
from meristem.nn.conv import CausalConv
from meristem.nn.memory import MemoryLayer
from meristem.nn.mlp import SwiGLU
from meristem.nn.norm import RMSNorm
from meristem.train.loss import cross_entropy

pytestmark = pytest.mark.skipif(library() is None, reason=f"there is no native core: {core().said}")

MOST = {torch.float64: 1e-13, torch.float32: 3e-6}
"""How far from tensor code of the same precision, and, of bfloat16, from that of float64, in units of its own error."""

Run = Callable[..., Sequence[Tensor]]


def draw(*shape: int) -> Tensor:
    """Numbers that every precision can hold."""
    return torch.randn(*shape).bfloat16().double()


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of parameters where inputs are of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def results(
    run: Run, inputs: Sequence[Tensor], module: nn.Module, dtype: torch.dtype, *, is_native: bool
) -> list[Tensor]:
    """Outputs, and every gradient of a loss that weighs each number differently."""
    module = module.to(wide(dtype))
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with nullcontext() if is_native else force_reference():
        outputs = list(run(module, *leaves))
        generator = torch.Generator().manual_seed(9)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
        loss = sum((x.double() * weight).sum() for x, weight in zip(outputs, weights, strict=True))
        found = torch.autograd.grad(loss, [*leaves, *module.parameters()])
    return [x.detach() for x in (*outputs, *found)]


def apart(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    pairs = zip(found, truth, strict=True)
    return [float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30)) for x, y in pairs]


def require_same(run: Run, inputs: Sequence[Tensor], module: nn.Module, called: str, calls: list[str]) -> None:
    """In every precision. bfloat16 may be twice as far from the truth as tensor code is, and a rounding more."""
    for dtype, most in MOST.items():
        found = results(run, inputs, module, dtype, is_native=True)
        assert calls == [called, f"{called}_backward"], "the core was not called"
        calls.clear()
        plain = results(run, inputs, module, dtype, is_native=False)
        assert not calls, "the core was called in spite of force_reference"
        errors = apart(found, plain)
        assert max(errors) < most, (dtype, errors)
    truth = results(run, inputs, module, torch.float64, is_native=False)
    found, plain = (results(run, inputs, module, torch.bfloat16, is_native=is_it) for is_it in (True, False))
    assert all(x.dtype in (y.dtype, torch.float32) for x, y in zip(found, plain, strict=True))
    for ours, theirs in zip(apart(found, truth), apart(plain, truth), strict=True):
        assert ours <= 2 * theirs + 2**-9


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is called of the core."""
    seen: list[str] = []
    call = layers._call

    def counting(name: str, *rest: object) -> None:
        seen.append(name.replace("_forward", ""))
        call(name, *rest)

    monkeypatch.setattr(layers, "_call", counting)
    yield seen


@pytest.mark.parametrize("n_time", [1, 2, 3, 33])
@pytest.mark.parametrize("kernel, width, n_units", [(4, 32, 2), (1, 16, 2), (3, 16, 0), (8, 48, 3)])
def test_vectors_of_a_memory(n_time: int, kernel: int, width: int, n_units: int, calls: list[str]) -> None:
    """Whatever the length, the taps and what came before; also where the tail is longer than the sequence."""
    conv = CausalConv(3 * 2 * width, kernel)
    inputs = draw(2, n_time, 6 * width), draw(2, kernel - 1, 6 * width)
    if kernel == 1:
        inputs = inputs[:1]

    def run(module: CausalConv, mixed_btd: Tensor, tail_bsd: Tensor | None = None) -> list[Tensor]:
        state = None if tail_bsd is None else {"tail_bsd": tail_bsd}
        found, after = module.project(mixed_btd, state, n_vectors=3, heads=2, n_units=n_units)
        return [*found, after["tail_bsd"]]

    require_same(run, inputs, conv, "vectors", calls)


@pytest.mark.parametrize("cuts", [[33], [1, 3, 2, 20, 7], [16, 17]])
def test_vectors_do_not_depend_on_where_a_sequence_is_cut(cuts: list[int]) -> None:
    """To the bit: what is carried from one part to the next is all that the next one needs."""
    conv, mixed_btd = CausalConv(96), torch.randn(2, 33, 96)
    whole, last = conv.project(mixed_btd, None, n_vectors=3, heads=2, n_units=2)
    parts, state = [], None
    for part_btd in mixed_btd.split(cuts, dim=1):
        found, state = conv.project(part_btd, state, n_vectors=3, heads=2, n_units=2)
        parts.append(found)
    for index, vector_bthk in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts], dim=1), vector_bthk)
    assert state is not None and torch.equal(state["tail_bsd"], last["tail_bsd"])


@pytest.mark.parametrize("shape", [(2, 70, 32), (1, 1, 16), (3, 5, 2, 48)])
def test_a_norm(shape: tuple[int, ...], calls: list[str]) -> None:
    """Also of a token that is all zeros."""
    norm, hidden = RMSNorm(shape[-1]), draw(*shape)
    hidden[0, 0] = 0
    nn.init.normal_(norm.gain_d)
    require_same(lambda module, x: [module(x)], [hidden], norm, "norm", calls)


def test_what_is_recalled_beside_attention(calls: list[str]) -> None:
    """Its norm by head, its gate, and the sum with what attention gathered."""
    module = Additive(64, 16)
    nn.init.normal_(module.memory_norm.gain_d)

    def run(module: Additive, attended: Tensor, recalled: Tensor, hidden: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
            return [module(attended, recalled, hidden)]

    require_same(run, [draw(2, 70, 64) for _ in range(3)], module, "norm", calls)


def test_a_memory_alone_normed_and_gated() -> None:
    """The layer of ``MemoryLayer``: every gradient, through projections, form and norm."""
    for rule in ("titans", "gated_delta"):
        module = MemoryLayer(32, MemoryConfig(rule=rule, head_dim=16))
        nn.init.normal_(module.recall.gates.weight_hd, std=0.1)

        def run(module: MemoryLayer, hidden: Tensor) -> list[Tensor]:
            mixed, state = module(hidden)
            return [mixed, *state["memory"].values()]

        hidden = draw(2, 33, 32)
        found, plain = (results(run, [hidden], module, torch.float64, is_native=is_it) for is_it in (True, False))
        assert max(apart(found, plain)) < 1e-13


def test_swiglu(calls: list[str]) -> None:
    module = SwiGLU(32, 48)

    def run(module: SwiGLU, hidden: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
            return [module(hidden)]

    require_same(run, [draw(2, 70, 32)], module, "swiglu", calls)


@pytest.mark.parametrize("n_logits", [1, 37, 64])
def test_cross_entropy(n_logits: int, calls: list[str]) -> None:
    """A vocabulary of no whole vector, targets that cost nothing, logits far apart; float64 is computed in float32."""
    targets_bt = torch.randint(n_logits, (2, 65))
    targets_bt[0, :3] = -100
    logits = 20 * draw(2, 65, n_logits)

    def run(_: nn.Module, logits_bto: Tensor) -> list[Tensor]:
        return [cross_entropy(logits_bto, targets_bt)]

    truth = results(run, [logits], nn.Identity(), torch.float64, is_native=True)
    assert not calls
    for dtype in (torch.float32, torch.bfloat16):
        found = results(run, [logits], nn.Identity(), dtype, is_native=True)
        assert calls == ["cross_entropy", "cross_entropy_backward"]
        calls.clear()
        plain = results(run, [logits], nn.Identity(), dtype, is_native=False)
        assert not calls and [x.dtype for x in found] == [x.dtype for x in plain]
        for ours, theirs in zip(apart(found, truth), apart(plain, truth), strict=True):
            assert ours <= 2 * theirs + 1e-6
    exact, _ = layers.cross_entropy(logits.flatten(0, 1), targets_bt.flatten(), -100)
    true = nn.functional.cross_entropy(logits.flatten(0, 1), targets_bt.flatten(), reduction="sum")
    torch.testing.assert_close(exact, true, rtol=1e-13, atol=1e-13)


def test_cross_entropy_of_nothing_and_of_what_is_no_number() -> None:
    logits, targets = torch.zeros(1, 4, 16), torch.full((1, 4), -100)
    assert cross_entropy(logits, targets) == 0
    for value in (float("nan"), float("inf")):
        logits[0, 1, 3], targets[0, 1] = value, 2
        assert cross_entropy(logits, targets).isnan()
    masked = torch.full((1, 1, 16), torch.finfo(torch.float32).min).requires_grad_()
    with torch.no_grad():
        masked[..., :2] = torch.tensor([1.0, 2.0])
    nats = cross_entropy(masked, torch.zeros(1, 1, dtype=torch.int64))
    nats.backward()
    torch.testing.assert_close(nats, torch.tensor([1.0, 2.0]).exp().sum().log() - 1)
    assert masked.grad is not None and not masked.grad[..., 2:].any()


@pytest.mark.parametrize("target", [-1, 16, 2**40])
def test_a_target_that_is_no_logits_is_an_error(target: int) -> None:
    with pytest.raises(IndexError, match="expected ids below 16, the number of logits"):
        cross_entropy(torch.zeros(1, 2, 16), torch.tensor([[3, target]]))


def test_the_bits_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "WORTH_A_THREAD", 1.0)
    conv, norm, mixed = CausalConv(96), RMSNorm(32), draw(2, 97, 96)

    def run(_: nn.Module, mixed_btd: Tensor) -> list[Tensor]:
        vectors, _ = conv.project(mixed_btd, None, n_vectors=3, heads=2, n_units=2)
        normed = norm(mixed_btd.unflatten(-1, (3, 32)))
        return [
            *vectors,
            normed,
            layers.swiglu(mixed_btd),
            cross_entropy(mixed_btd, torch.zeros(2, 97, dtype=torch.int64)),
        ]

    found, before = [], torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found.append(results(run, [mixed], nn.ModuleList([conv, norm]), torch.float32, is_native=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_who_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor code wherever the core does not take the tensors, or one token alone is read outside training."""
    hidden = torch.zeros(2, 3, 32)
    assert fuses(hidden, hidden, width=32)
    with force_reference():
        assert not fuses(hidden, width=32)
    with plain_layers():
        assert not fuses(hidden, width=32) and select.choose_form(hidden[:, :, None], hidden[:, :, None]) == "native"
    assert not fuses(hidden, width=lanes(torch.float32) + 1)
    assert not fuses(hidden, hidden.bfloat16(), width=32) and not fuses(hidden.half(), width=32)
    assert not fuses(hidden[:, :0], width=32)
    with torch.no_grad():
        assert fuses(hidden, width=32) and not fuses(hidden[:, :1], width=32)
    with FakeTensorMode():
        assert not fuses(torch.empty(2, 3, 32, device="cuda"), width=32)
    torch.func.vmap(lambda x: x.add(0) if not fuses(x, width=32) else None)(hidden)
    monkeypatch.setattr(select, "_why_no_core", lambda: ["no compiler"])
    assert not fuses(hidden, width=32)


def test_the_operations_are_what_torch_expects_of_one() -> None:
    """Shapes without values are those with them, and nothing that is given is changed."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    ops = torch.ops.meristem
    given: dict[torch._ops.OpOverload, tuple[object, ...]] = {
        ops.memory_vectors.default: (leaf(2, 5, 96), leaf(2, 3, 96), leaf(96, 4), 3, 2, 2),
        ops.norm.default: (leaf(2, 5, 32), leaf(16), leaf(2, 5, 32), leaf(2, 5, 32), 1e-6),
        ops.swiglu.default: (leaf(2, 5, 32),),
        ops.cross_entropy.default: (leaf(5, 17), torch.tensor([0, 3, 16, -100, 2]), -100),
    }
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operation, arguments in given.items():
        torch.library.opcheck(operation, arguments, test_utils=checks)


def test_strides_are_followed() -> None:
    """A part of something wider, and gradients that lie otherwise than what they are of."""
    wide_btd = torch.randn(2, 9, 64, dtype=torch.float64)
    norm, part_btd = RMSNorm(32).double(), wide_btd[..., :32].requires_grad_()
    found = norm(part_btd)
    assert torch.equal(found, norm(part_btd.contiguous()))
    weight = torch.randn(2, 32, 9, dtype=torch.float64).mT
    (ours,) = torch.autograd.grad(found, part_btd, weight)
    (theirs,) = torch.autograd.grad(norm(part_btd), part_btd, weight.contiguous())
    assert torch.equal(ours, theirs)


def test_the_core_refuses_what_does_not_fit() -> None:
    """A code, and nothing is touched."""
    found = library()
    assert found is not None
    number = torch.zeros(4096)
    at = number.data_ptr()
    rows = {"rows": 2, "width": 16, "threads": 1, "x": at, "gain": at, "sent": at, "out": at, "d_x": at, "d_gain": at}
    for name in ("norm_forward", "norm_backward", "swiglu_forward", "swiglu_backward"):
        call = getattr(found, f"meristem_{name}")
        assert call(ctypes.byref(layers.Rows(**rows))) == 0
        for wrong in ({"rows": 0}, {"width": 15}, {"width": -16}, {"threads": 0}, {"numbers": 3}):
            assert call(ctypes.byref(layers.Rows(**(rows | wrong)))) == 1, (name, wrong)
        assert call(ctypes.byref(layers.Rows(**(rows | {"x": None})))) == 2
    assert found.meristem_norm_backward(ctypes.byref(layers.Rows(**(rows | {"gate": at})))) == 2
    sizes = {"rows": 1, "time": 2, "vectors": 1, "heads": 1, "width": 16, "taps": 2, "units": 1, "threads": 1}
    sizes |= {"x": at, "before": at, "weight": at, "d_x": at, "d_weight": at}
    view = (layers.View * 3)(layers.View(at, 32, 16, 16))
    for name in ("vectors_forward", "vectors_backward"):
        call = getattr(found, f"meristem_{name}")
        assert call(ctypes.byref(layers.Vectors(**sizes, vector=view))) == 0
        for wrong in (
            {"time": 0},
            {"width": 8},
            {"width": 2048},
            {"taps": 9},
            {"vectors": 4},
            {"units": 2},
            {"heads": -1},
        ):
            assert call(ctypes.byref(layers.Vectors(**(sizes | wrong), vector=view))) == 1, (name, wrong)
        assert call(ctypes.byref(layers.Vectors(**sizes))) == 2, "there is no place for a vector"
    entropy = {
        "rows": 1,
        "width": 5,
        "ignored": -100,
        "threads": 1,
        "logits": at,
        "log_sum": at,
        "nats": at,
        "d_logits": at,
    }
    for name in ("cross_entropy_forward", "cross_entropy_backward"):
        call = getattr(found, f"meristem_{name}")
        for target, code in ((4, 0), (-100, 0), (5, 1), (-1, 1)):
            targets = torch.tensor([target])
            assert call(ctypes.byref(layers.CrossEntropy(**entropy, targets=targets.data_ptr()))) == code
        assert call(ctypes.byref(layers.CrossEntropy(**entropy))) == 2
