"""Normalisation belongs to one token."""

import pytest
import torch
import torch.nn.functional as F

from meristem.nn.norm import RMSNorm


def test_rms_norm_divides_by_the_root_mean_square_of_each_token():
    hidden_btd = torch.randn(3, 7, 5, dtype=torch.float64)
    norm = RMSNorm(5).double()
    torch.nn.init.normal_(norm.gain_d)
    size_bt = ((hidden_btd**2).mean(-1) + 1e-6).sqrt()
    torch.testing.assert_close(norm(hidden_btd), hidden_btd / size_bt[..., None] * norm.gain_d, rtol=0, atol=1e-12)


def test_a_token_is_normalised_whatever_stands_beside_it():
    hidden_btd = torch.randn(2, 11, 5)
    norm = RMSNorm(5)
    assert torch.equal(norm(hidden_btd)[:, :4], norm(hidden_btd[:, :4]))


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 3, 4, 5), (1, 5)])
def test_the_written_gradient_is_that_of_torch(shape):
    """Also where a token is all zeros, and nothing but eps is left to divide by."""
    hidden = torch.randn(shape, dtype=torch.float64)
    hidden[0] = 0
    hidden.requires_grad_()
    norm = RMSNorm(5).double()
    torch.nn.init.normal_(norm.gain_d)
    weight = torch.randn(shape, dtype=torch.float64)
    true = F.rms_norm(hidden, (5,), norm.gain_d, norm.eps)
    torch.testing.assert_close(norm(hidden), true, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((weight * norm(hidden)).sum(), [hidden, norm.gain_d])
    theirs = torch.autograd.grad((weight * true).sum(), [hidden, norm.gain_d])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_low_precision_is_normalised_in_full():
    hidden_btd = torch.randn(2, 11, 64).bfloat16().requires_grad_()
    norm = RMSNorm(64)
    normed_btd = norm(hidden_btd)
    true_btd = F.rms_norm(hidden_btd.detach().float(), (64,))
    assert normed_btd.dtype == torch.bfloat16
    torch.testing.assert_close(normed_btd.float(), true_btd, rtol=2**-8, atol=2**-8)
    normed_btd.float().sum().backward()
    assert hidden_btd.grad.dtype == torch.bfloat16 and norm.gain_d.grad.dtype == torch.float32
