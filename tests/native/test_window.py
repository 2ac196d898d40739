"""Attention over a sliding window by the native core is what tensor code gathers, and so are all gradients."""

import ctypes
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from meristem.memory.kernels.select import force_reference
from meristem.native import window as native
from meristem.native.library import core, library
from meristem.nn import attention as of_attention
from meristem.nn.attention import Attention
from native.compared import apart

pytestmark = pytest.mark.skipif(library() is None, reason=f"there is no native core: {core().said}")

MOST = {torch.float64: 1e-13, torch.float32: 3e-6}
"""How far from tensor code of the same precision, in units of a result's length."""


def draw(*shape: int) -> Tensor:
    """Numbers that every precision can hold."""
    return torch.randn(*shape).bfloat16().double()


def results(
    inputs: list[Tensor], heads: int, span: int, dtype: torch.dtype, *, is_native: bool, is_rotated: bool = True
) -> dict[str, Tensor]:
    """What is gathered, the state that is left, and gradients of a loss that weighs each number differently."""
    layer = Attention(inputs[0].shape[-1] // 3, heads, span=span, rope=is_rotated)
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    state = None if len(leaves) == 1 else dict(zip(("keys_bshk", "values_bshv"), leaves[1:], strict=True))
    with nullcontext() if is_native else force_reference():
        mixed, after = layer._gather(leaves[0], state)
        generator, outputs = torch.Generator().manual_seed(9), [mixed, *after.values()]
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
        loss = sum((x.double() * weight).sum() for x, weight in zip(outputs, weights, strict=True))
        found = torch.autograd.grad(loss, leaves)
    named = {"mixed": mixed} | after | {f"d {at}": x for at, x in enumerate(found)}
    return {name: x.detach() for name, x in named.items()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called of the core."""
    seen: list[str] = []
    run = native._Call.run

    def counting(self: native._Call, what: str) -> None:
        seen.append(what)
        run(self, what)

    monkeypatch.setattr(native._Call, "run", counting)
    return seen


@pytest.mark.parametrize("is_rotated", [True, False])
@pytest.mark.parametrize(
    "n_time, n_past, span",
    [(1, 0, 4), (5, 0, 64), (65, 0, 16), (130, 0, 64), (70, 0, 1), (1, 7, 8), (33, 15, 16), (67, 3, 80), (130, 63, 64)],
)
def test_attention_is_that_of_tensor_code(
    n_time: int, n_past: int, span: int, is_rotated: bool, calls: list[str]
) -> None:
    """Odd lengths, blocks that end early, more and less past than a window; bfloat16 no further from the truth."""
    heads, width = 2, 32
    inputs = [draw(2, n_time, 3 * heads * width)]
    if n_past:
        inputs += [draw(2, n_past, heads, width) for _ in range(2)]
    settings = {"is_rotated": is_rotated}
    for dtype, most in MOST.items():
        found = results(inputs, heads, span, dtype, is_native=True, **settings)
        assert calls == ["forward", "backward"]
        calls.clear()
        plain = results(inputs, heads, span, dtype, is_native=False, **settings)
        assert not calls
        errors = apart(found, plain)
        assert max(errors.values()) < most, (dtype, errors)
    truth = results(inputs, heads, span, torch.float64, is_native=False, **settings)
    half = [results(inputs, heads, span, torch.bfloat16, is_native=is_it, **settings) for is_it in (True, False)]
    assert {name: x.dtype for name, x in half[0].items()} == {name: x.dtype for name, x in half[1].items()}
    ours, theirs = (apart(found, truth) for found in half)
    assert all(ours[name] <= 2 * theirs[name] + 2**-9 for name in ours), (ours, theirs)


def test_later_tokens_are_not_seen() -> None:
    """Not even where they are no number; nor what lies before the window."""
    layer = Attention(32, 1, span=4)
    vectors = torch.randn(1, 80, 96)
    spoilt = vectors.clone()
    spoilt[0, 70, 32:64] = float("nan")
    found, other = (layer._gather(x, None)[0] for x in (vectors, spoilt))
    assert torch.equal(found[:, :70], other[:, :70]) and torch.equal(found[:, 74:], other[:, 74:])
    assert other[:, 70:74].isnan().all()


@pytest.mark.parametrize("n_threads", [2, 3])
def test_the_bits_do_not_depend_on_the_threads(n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WORTH_A_THREAD", 1.0)
    inputs, found, before = [draw(2, 70, 96)], [], torch.get_num_threads()
    try:
        for threads in (1, n_threads):
            torch.set_num_threads(threads)
            found.append(results(inputs, 2, 16, torch.float32, is_native=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_without_gradients_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, vectors = Attention(32, 2, span=8), torch.randn(2, 33, 96)
    sizes: list[int] = []
    forward = native._forward

    def watched(*given: object) -> tuple[Tensor, Tensor]:
        mixed, kept = forward(*given)
        sizes.append(kept.numel())
        return mixed, kept

    monkeypatch.setattr(native, "_forward", watched)
    with torch.no_grad():
        read = layer._gather(vectors, None)[0]
    again = layer._gather(vectors.requires_grad_(), None)[0]
    assert sizes[0] == 0 < sizes[1] and torch.equal(read, again)


def test_the_core_takes_no_other_attention() -> None:
    """Unbounded, with pinned vectors, or of heads that are no whole vectors."""
    vectors = torch.randn(2, 33, 96)
    assert Attention(32, 2, span=8)._fused_span(vectors) == 8
    for other in (Attention(32, 2, span=None), Attention(32, 2, span=8, n_persistent=2), Attention(32, 8, span=8)):
        assert other._fused_span(vectors) is None
    with force_reference():
        assert Attention(32, 2, span=8)._fused_span(vectors) is None


def test_the_operation_is_what_torch_expects_of_one() -> None:
    past = [torch.randn(3, 5, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    vectors = torch.randn(3, 9, 96, dtype=torch.float64, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for given in ((None, None), past):
        arguments = vectors, *given, 2, 4, True, True
        torch.library.opcheck(torch.ops.meristem.windowed_attention.default, arguments, test_utils=checks)


def test_the_angles_are_those_of_tensor_code() -> None:
    cosine, sine = of_attention.rope_angles(torch.zeros(1, 9, 1, 32, dtype=torch.float64))
    ours = native._angles(9, 32, torch.float64)
    assert torch.equal(ours[0], cosine[:, 0, :16]) and torch.equal(ours[1], sine[:, 0, 16:])


def test_the_core_refuses_what_does_not_fit() -> None:
    """A code, and nothing is touched."""
    found = library()
    assert found is not None
    number = torch.zeros(4096)
    at = number.data_ptr()
    sizes = {"rows": 1, "time": 4, "past": 0, "heads": 1, "width": 16, "span": 2, "threads": 1}
    sizes |= dict.fromkeys(("vectors", "kept", "mixed", "sent", "d_vectors"), at)
    room = torch.empty(1 << 16, dtype=torch.uint8)
    sizes |= {"scratch": room.data_ptr(), "n_scratch_bytes": len(room)}
    for name in ("forward", "backward"):
        call = getattr(found, f"meristem_window_{name}")
        assert call(ctypes.byref(native.Window(**sizes))) == 0
        wrongs = {"time": 0}, {"width": 8}, {"span": 0}, {"past": -1}, {"heads": 2**40}, {"n_scratch_bytes": 64}
        for wrong in wrongs:
            assert call(ctypes.byref(native.Window(**(sizes | wrong)))) == 1, (name, wrong)
        for missing in ({"vectors": None}, {"past": 1}, {"cosine": at}, {"mixed": None, "kept": None}):
            assert call(ctypes.byref(native.Window(**(sizes | missing)))) == 2, (name, missing)
