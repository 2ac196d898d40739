"""The short convolution: its sum, its past, and its start."""

import pytest
import torch

from meristem.memory.kernels.select import force_reference
from meristem.nn.conv import CausalConv


def plain(weight_dc, hidden_btd):
    """The sum of the docstring, token by token and tap by tap."""
    kernel = weight_dc.shape[1]
    mixed_btd = torch.zeros_like(hidden_btd)
    for now in range(hidden_btd.shape[1]):
        for tap in range(kernel):
            then = now - kernel + 1 + tap
            if then >= 0:
                mixed_btd[:, now] += weight_dc[:, tap] * hidden_btd[:, then]
    return mixed_btd


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("n_time", [1, 3, 11])
def test_conv_is_a_weighted_sum_of_the_last_inputs(kernel, n_time):
    """S3b-S19."""
    conv = CausalConv(5, kernel).double()
    hidden_btd = torch.randn(3, n_time, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(hidden_btd)[0], plain(conv.weight_dc, hidden_btd), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 4])
@pytest.mark.parametrize("cuts", [[1] * 11, [2, 9], [1, 3, 7]])
def test_cutting_the_window_changes_nothing(kernel, cuts):
    """S3b-S19."""
    conv = CausalConv(5, kernel).double()
    hidden_btd = torch.randn(3, 11, 5, dtype=torch.float64)
    whole_btd, last = conv(hidden_btd)
    parts, state = [], None
    for part_btd in hidden_btd.split(cuts, dim=1):
        mixed_btd, state = conv(part_btd, state)
        parts.append(mixed_btd)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_btd, rtol=0, atol=1e-12)
    assert torch.equal(state["tail_bsd"], last["tail_bsd"])


def test_conv_starts_near_the_identity():
    hidden_btd = torch.randn(3, 101, 7)
    mixed_btd, _ = CausalConv(7, 4)(hidden_btd)
    assert (mixed_btd - hidden_btd).std() < 0.1


def test_a_kernel_of_one_tap_keeps_no_past():
    """S3b-S19."""
    _, state = CausalConv(5, 1)(torch.randn(3, 7, 5))
    assert state["tail_bsd"].shape == (3, 0, 5)


def test_the_state_does_not_keep_the_window_alive():
    _, state = CausalConv(5, 4)(torch.randn(3, 101, 5))
    assert state["tail_bsd"].untyped_storage().nbytes() == 3 * 3 * 5 * 4


@pytest.mark.parametrize("n_units", [0, 1, 3])
def test_vectors_and_their_gradients_are_those_of_plain_maths(n_units):
    """``silu`` of the sum, cut into vectors of every head, the first of them of length one."""
    conv = CausalConv(2 * 3 * 4, 3).double()
    hidden_btd = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    mixed_btd = torch.nn.functional.silu(plain(conv.weight_dc, hidden_btd))
    expected = list(mixed_btd.unflatten(-1, (3, 2, 4)).unbind(2))
    expected[:n_units] = [each / each.norm(dim=-1, keepdim=True) for each in expected[:n_units]]
    found, _ = conv.project(hidden_btd, None, n_vectors=3, heads=2, n_units=n_units)
    torch.testing.assert_close(found, tuple(expected), rtol=1e-9, atol=1e-9)
    sent, leaves = [torch.randn_like(each) for each in expected], (hidden_btd, conv.weight_dc)
    gradients, true_gradients = (torch.autograd.grad(each, leaves, sent) for each in (found, expected))
    torch.testing.assert_close(gradients, true_gradients, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kernel", [1, 4])
def test_float32_inputs_under_autocast_get_a_gradient(kernel):
    """As in a stack whose norm gives float32; what is filtered there, and its gradient, are of half precision."""
    conv, hidden_btd = CausalConv(5, kernel), torch.randn(3, 11, 5, requires_grad=True)
    sent_btd = torch.randn(3, 11, 5)
    (expected_btd,) = torch.autograd.grad(conv(hidden_btd)[0], hidden_btd, sent_btd)
    with torch.autocast("cpu", torch.bfloat16):
        mixed_btd, _ = conv(hidden_btd)
    mixed_btd.backward(sent_btd.to(mixed_btd.dtype))
    assert hidden_btd.grad is not None and conv.weight_dc.grad is not None
    torch.testing.assert_close(hidden_btd.grad, expected_btd, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("n_time", [1, 2, 3, 7])
def test_what_the_core_carries_on_is_what_tensor_code_does(n_time):
    """Fewer tokens than taps and more, after others; heads are as wide as whole vectors of the core."""
    conv = CausalConv(3 * 2 * 32, 4)
    before_btd, hidden_btd = torch.randn(5, 2, 192), torch.randn(5, n_time, 192)
    settings = {"n_vectors": 3, "heads": 2, "n_units": 2}
    _, state = conv.project(before_btd, None, **settings)
    found, after = conv.project(hidden_btd, state, **settings)
    with force_reference():
        _, plain_state = conv.project(before_btd, None, **settings)
        expected, plain_after = conv.project(hidden_btd, plain_state, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)
    assert torch.equal(after["tail_bsd"], plain_after["tail_bsd"])
