"""Attention, against a dense reference that shares no line with it."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from meristem.errors import WrongValue
from meristem.memory.state import LENGTHS
from meristem.nn import attention as attention_module
from meristem.nn.attention import BLOCK, Attention, apply_rope, rope_angles
from meristem.nn.documents import Documents


@pytest.fixture(autouse=True, params=["written out", "fused"])
def _by(request, monkeypatch):
    """Both ways of a block: that of a CPU, and that of the devices on which torch's fused kernel takes masks."""
    if request.param == "fused":
        monkeypatch.setattr(attention_module, "FUSED", frozenset({"cpu", "meta"}))


def rotated(keys_bshk):
    """Rotary positions, written with complex numbers."""
    keys_bshk = keys_bshk.to(torch.promote_types(keys_bshk.dtype, torch.float32))
    n_time, key_width = keys_bshk.shape[1], keys_bshk.shape[-1]
    speed_k = 10_000.0 ** (-torch.arange(0, key_width, 2, dtype=keys_bshk.dtype) / key_width)
    angle_sk = torch.arange(n_time, dtype=keys_bshk.dtype)[:, None] * speed_k
    left_bshk, right_bshk = keys_bshk.chunk(2, -1)
    pairs_bshk = torch.complex(left_bshk, right_bshk) * torch.polar(torch.ones_like(angle_sk), angle_sk)[:, None]
    return torch.cat([pairs_bshk.real, pairs_bshk.imag], dim=-1)


def dense(attention, hidden_btd):
    """One matrix of scores over everything, prefix first, with a mask; fresh start."""
    width = hidden_btd.shape[-1]
    key_width = width // attention.heads

    def parts(x_btd):
        projected = x_btd @ attention.qkv.weight.T
        if attention.qkv.bias is not None:
            projected = projected + attention.qkv.bias
        return [part.unflatten(-1, (attention.heads, key_width)) for part in projected.split(width, dim=-1)]

    query_bthk, key_bshk, value_bshv = parts(hidden_btd)
    now_t = torch.arange(hidden_btd.shape[1])
    age_ts = now_t[:, None] - now_t
    is_seen_ts = (age_ts >= 0) & (age_ts < (attention.span or math.inf))
    turn = rotated if attention.rope else lambda x: x
    score_bhts = torch.einsum("bthk,bshk->bhts", turn(query_bthk), turn(key_bshk)).masked_fill(~is_seen_ts, -math.inf)
    if attention.persistent_gd is not None:
        _, first_ghk, first_ghv = parts(attention.persistent_gd)
        score_bhts = torch.cat([torch.einsum("bthk,ghk->bhtg", query_bthk, first_ghk), score_bhts], dim=-1)
        value_bshv = torch.cat([first_ghv.expand(len(hidden_btd), *first_ghv.shape), value_bshv], dim=1)
    weight_bhts = (score_bhts / math.sqrt(key_width)).softmax(-1)
    return attention.out(torch.einsum("bhts,bshv->bthv", weight_bhts, value_bshv).flatten(2))


def made(key_width=6, heads=3, **options):
    """Attention with a prefix as large as its text, so that a wrong prefix shows."""
    attention = Attention(key_width * heads, heads, **({"span": 7} | options)).double()
    if attention.persistent_gd is not None:
        torch.nn.init.normal_(attention.persistent_gd)
    return attention


def compared(attention, n_time, width):
    """Outputs and all gradients, ours and the reference's."""
    hidden_btd = torch.randn(2, n_time, width, dtype=torch.float64, requires_grad=True)
    upstream_btd = torch.randn_like(hidden_btd)
    leaves = [hidden_btd, *attention.parameters()]
    for mixed_btd in (attention(hidden_btd)[0], dense(attention, hidden_btd)):
        yield mixed_btd, torch.autograd.grad(mixed_btd, leaves, upstream_btd)


@pytest.mark.parametrize("key_width", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("span", [None, 5])
def test_every_head_width_agrees_with_the_dense_reference(key_width, span):
    """S2-M1a."""
    (ours, our_grads), (true, true_grads) = compared(made(key_width, 2, span=span), 23, 2 * key_width)
    torch.testing.assert_close(ours, true, rtol=0, atol=1e-10)
    torch.testing.assert_close(our_grads, true_grads, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("n_persistent", [0, 4])
@pytest.mark.parametrize(
    "span, n_time",
    [
        (None, 1),
        (None, 13),
        (1, 5),
        (2, 7),
        (7, 1),
        (7, 7),
        (7, 8),
        (7, 31),
        (BLOCK + 9, 2 * BLOCK + 11),
        (2 * BLOCK, 3 * BLOCK),
    ],
)
def test_every_span_and_length_agrees_with_the_dense_reference(span, n_time, n_persistent, rope):
    attention = made(span=span, n_persistent=n_persistent, rope=rope, bias=True)
    (ours, our_grads), (true, true_grads) = compared(attention, n_time, 18)
    torch.testing.assert_close(ours, true, rtol=0, atol=1e-10)
    torch.testing.assert_close(our_grads, true_grads, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("n_persistent", [0, 4])
@pytest.mark.parametrize("span", [None, 1, 5, BLOCK + 9])
@pytest.mark.parametrize("cuts", [[1] * 19, [3, 1, 15], [2, BLOCK + 30, 1, BLOCK + 40]])
def test_the_ring_carries_attention_across_any_cut(cuts, span, n_persistent, rope):
    attention = made(span=span, n_persistent=n_persistent, rope=rope)
    hidden_btd = torch.randn(2, sum(cuts), 18, dtype=torch.float64)
    whole_btd, last = attention(hidden_btd)
    parts, state = [], None
    for part_btd in hidden_btd.split(cuts, dim=1):
        mixed_btd, state = attention(part_btd, state)
        parts.append(mixed_btd)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_btd, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("span", [None, 5])
@pytest.mark.parametrize("n_persistent, rope", [(0, True), (3, False)])
@pytest.mark.parametrize("cuts", [[13], [4, 9], [1, 6, 6]])
def test_packed_documents_read_as_if_each_were_alone(span, n_persistent, rope, cuts):
    """Whatever the calls: rows begin documents at other places, and one goes on from call to call."""
    attention = made(span=span, n_persistent=n_persistent, rope=rope)
    hidden_btd = torch.randn(3, 13, 18, dtype=torch.float64)
    edges = [[0, 2, 9], [0], [0, 6, 7]]
    begins_bt = torch.zeros(3, 13, dtype=torch.bool)
    expected_btd = torch.empty_like(hidden_btd)
    for row, starts in enumerate(edges):
        for start, stop in itertools.pairwise([*starts, 13]):
            begins_bt[row, start] = start > 0
            expected_btd[row, start:stop] = dense(attention, hidden_btd[row : row + 1, start:stop])[0]
    mixed, state = [], None
    for part_btd, mask_bt in zip(hidden_btd.split(cuts, dim=1), begins_bt.split(cuts, dim=1), strict=True):
        documents = Documents.packed(part_btd, reset_mask_bt=mask_bt)
        mixed_btd, state = attention.forward_documents(part_btd, state, documents)
        mixed.append(mixed_btd)
    torch.testing.assert_close(torch.cat(mixed, dim=1), expected_btd, rtol=0, atol=1e-12)
    held = [min(13 - starts[-1], (span or 14) - 1) for starts in edges]
    assert state[f"{LENGTHS}keys_bshk"].tolist() == held if len(set(held)) > 1 else f"{LENGTHS}keys_bshk" not in state


def test_the_ring_holds_one_key_less_than_the_span_and_nothing_else():
    _, state = made(span=7)(torch.randn(2, 41, 18, dtype=torch.float64))
    assert state["keys_bshk"].shape == (2, 6, 3, 6)
    assert state["keys_bshk"].untyped_storage().nbytes() == 2 * 6 * 18 * 8


def test_no_tensor_of_a_windowed_pass_grows_with_the_square_of_time():
    """Doubling the time at most doubles what the backward pass keeps, within a few blocks."""

    def kept_bytes(n_time):
        kept = {}

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        attention = made(span=BLOCK, n_persistent=4)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            mixed_btd, _ = attention(torch.randn(1, n_time, 18, dtype=torch.float64))
        assert mixed_btd.requires_grad
        return sum(kept.values())

    assert kept_bytes(32 * BLOCK) < 2.1 * kept_bytes(16 * BLOCK)


@pytest.mark.parametrize("span", [None, 7])
def test_low_precision_errs_no_more_than_twice_the_plain_maths_in_it(span):
    attention = Attention(18, 3, span=span)
    hidden_btd = torch.randn(2, 31, 18)
    true_btd = dense(attention, hidden_btd)
    with torch.autocast("cpu", torch.bfloat16):
        ours_btd, plain_btd = attention(hidden_btd)[0], dense(attention, hidden_btd)
    assert ours_btd.dtype == torch.bfloat16
    assert (ours_btd - true_btd).abs().max() <= 2 * (plain_btd - true_btd).abs().max()


@pytest.mark.parametrize("span", [None, 7])
def test_attention_is_shaped_on_meta_without_being_computed(span):
    with torch.device("meta"):
        attention = Attention(18, 3, span=span, n_persistent=4)
        mixed_btd, state = attention(torch.empty(2, 31, 18))
        mixed_btd, state = attention(torch.empty(2, 1, 18), state)
    assert mixed_btd.is_meta and state["keys_bshk"].shape == (2, 6 if span else 32, 3, 6)


@pytest.mark.compiled
@pytest.mark.parametrize("n_persistent", [0, 4])
def test_attention_compiles_into_one_graph(n_persistent):
    attention = made(n_persistent=n_persistent)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    hidden_btd = torch.randn(2, 31, 18, dtype=torch.float64)
    mixed_btd, state = compiled(hidden_btd)
    torch.testing.assert_close(mixed_btd, attention(hidden_btd)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(compiled(hidden_btd, state), attention(hidden_btd, state), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width, heads, rope", [(18, 4, False), (18, 6, True)])
def test_heads_that_do_not_fit_the_width_are_refused(width, heads, rope):
    with pytest.raises(WrongValue, match=f"width {width} in {heads} heads.*Change the width"):
        Attention(width, heads, span=7, rope=rope)


def test_angles_that_calls_without_gradients_share_stay_out_of_graphs_and_fake_tensors() -> None:
    keys_bshk = torch.randn(1, 5, 2, 4)
    with torch.inference_mode():
        shared = rope_angles(keys_bshk)
        assert rope_angles(keys_bshk)[0] is shared[0]
    moving_bshk = keys_bshk.clone().requires_grad_()
    apply_rope(moving_bshk, rope_angles(moving_bshk)).sum().backward()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = rope_angles(mode.from_tensor(keys_bshk))
    assert isinstance(fake[0], FakeTensor)
    assert torch.equal(rope_angles(keys_bshk)[1], shared[1])
