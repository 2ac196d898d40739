"""Deterministic means: set before the accelerator starts, and an operation that cannot comply says its name."""

import os

import pytest
import torch

from meristem.device.determinism import be_deterministic
from meristem.errors import CapabilityError


@pytest.fixture
def restored(monkeypatch):
    """Every switch as it was, after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[:2]
    torch.set_float32_matmul_precision(before[2])


def test_raises_with_name(restored):
    """A5.4: An operation without a deterministic form raises and names itself."""
    be_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        torch.zeros(5).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_order(restored, monkeypatch):
    """A5.4: Once CUDA has started without the setting it is too late, and nothing is switched."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(CapabilityError, match="CUDA has started without CUBLAS_WORKSPACE_CONFIG"):
        be_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    be_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
