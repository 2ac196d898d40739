"""Where a gate says that nothing or all is kept, logarithms of factors stay finite and right."""

import pytest
import torch

from meristem.memory import Gates
from meristem.nn.cms_memory import _only_where


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_gates_at_their_ends(dtype: torch.dtype) -> None:
    """The factor is ``1 - a (1 - r)``, and so are its gradients, for a and r at 0, at 1 and between."""
    retain = torch.tensor([0.0, 0.3, 0.999, 1.0], dtype=dtype).view(1, 4, 1)
    for on in (0.0, 0.5, 1.0):
        log = retain.log().clamp_min(-30.0).requires_grad_()
        gate = torch.full((1, 4, 1), on, dtype=dtype, requires_grad=True)
        gates = _only_where(Gates.from_logs(log, torch.ones_like(retain)), gate)
        factor = gates.log_retain().exp()
        torch.testing.assert_close(factor, 1 - gate + gate * log.exp(), rtol=1e-6, atol=1e-12)
        d_log, d_gate = torch.autograd.grad(factor.sum(), (log, gate))
        torch.testing.assert_close(d_log, gate * log.exp(), rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(d_gate, log.exp() - 1, rtol=1e-5, atol=1e-12)
