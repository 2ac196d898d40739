"""Normalisation belongs to one token."""

import torch

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
