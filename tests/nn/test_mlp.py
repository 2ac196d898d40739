"""Feed-forward layers compute their formulas."""

import torch

from meristem.nn.mlp import Feedforward, SwiGLU


def test_swiglu_multiplies_a_gated_half_with_a_plain_one():
    layer = SwiGLU(5, 11).double()
    hidden_btd = torch.randn(2, 3, 5, dtype=torch.float64)
    gate_fd, up_fd = layer.gate_up.weight[:11], layer.gate_up.weight[11:]
    gate_btf, up_btf = hidden_btd @ gate_fd.T, hidden_btd @ up_fd.T
    wanted_btd = (gate_btf / (1 + torch.exp(-gate_btf)) * up_btf) @ layer.out.weight.T
    torch.testing.assert_close(layer(hidden_btd), wanted_btd, rtol=0, atol=1e-12)


def test_feedforward_is_two_linear_maps_with_an_activation_between():
    layer = Feedforward(5, 11, torch.relu).double()
    hidden_btd = torch.randn(2, 3, 5, dtype=torch.float64)
    up_btf = (hidden_btd @ layer.up.weight.T + layer.up.bias).clamp_min(0)
    torch.testing.assert_close(layer(hidden_btd), up_btf @ layer.out.weight.T + layer.out.bias, rtol=0, atol=1e-12)
