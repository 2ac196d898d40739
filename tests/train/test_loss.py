"""Values and gradient of the one loss."""

import inspect
import math

import pytest
import torch

from meristem.data.stream import IGNORED
from meristem.errors import ShapeError
from meristem.train.loss import cross_entropy


def random_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits_bto = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    targets_bt = torch.randint(0, 7, (3, 5), generator=generator)
    targets_bt[1, 2:] = IGNORED
    return logits_bto, targets_bt


def truth(logits_bto: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
    """The definition, in float64: minus the log of the share that each target has of the exponentials."""
    shares_bto = logits_bto.double().exp() / logits_bto.double().exp().sum(-1, keepdim=True)
    kept = targets_bt != IGNORED
    return -shares_bto[kept].gather(-1, targets_bt[kept][:, None]).log().sum()


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    assert float(cross_entropy(torch.zeros(2, 3, 11), torch.ones(2, 3).long())) == pytest.approx(6 * math.log(11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_over_kept_targets_equals_the_definition(dtype):
    """Whatever the dtype of the logits, the sum is made in float32."""
    logits_bto, targets_bt = random_case(dtype)
    found = cross_entropy(logits_bto, targets_bt)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth(logits_bto, targets_bt), rtol=1e-6, atol=0)


def test_gradient_agrees_with_float64():
    logits_bto, targets_bt = random_case(torch.float32)
    exact_bto = logits_bto.double().requires_grad_()
    (wanted_bto,) = torch.autograd.grad(truth(exact_bto, targets_bt), exact_bto)
    (found_bto,) = torch.autograd.grad(cross_entropy(logits_bto.requires_grad_(), targets_bt), logits_bto)
    torch.testing.assert_close(found_bto.double(), wanted_bto, rtol=0, atol=1e-6)


def test_nothing_to_predict_costs_nothing():
    assert float(cross_entropy(torch.randn(2, 3, 5), torch.full((2, 3), IGNORED))) == 0.0


DOOR = inspect.unwrap(cross_entropy)
"""Without the shape checks of the test run, which would come first."""


def test_l22_targets_are_moved_to_the_logits():
    """Wherever the targets are; the meta device stands for an accelerator, and torch itself refuses two devices."""
    logits_bto, targets_bt = torch.zeros(2, 3, 5, device="meta"), torch.zeros(2, 3, dtype=torch.int64)
    assert DOOR(logits_bto, targets_bt).device.type == "meta"
    with pytest.raises(RuntimeError, match="not on the expected device"):
        torch.nn.functional.cross_entropy(logits_bto.flatten(0, 1), targets_bt.flatten())


@pytest.mark.parametrize(
    ("logits_bto", "targets_bt", "found", "expected", "message"),
    [
        (torch.zeros(2, 3, 5), torch.zeros(2, 4).long(), (2, 4), (2, 3), r"targets have the shape \(2, 4\).*\(2, 3\)"),
        (torch.zeros(2, 3, 5), torch.zeros(6).long(), (6,), (2, 3), r"targets have the shape \(6,\)"),
        (torch.zeros(2, 3, 5), torch.zeros(3, 2).long(), (3, 2), (2, 3), r"targets have the shape \(3, 2\)"),
        (
            torch.zeros(2, 3, 5),
            torch.zeros(2, 3),
            "torch.float32",
            "torch.int64",
            r"targets are torch.float32.*long\(\)",
        ),
        (torch.zeros(2, 3, 5), torch.zeros(2, 3).int(), "torch.int32", "torch.int64", "targets are torch.int32"),
        (
            torch.zeros(3, 5),
            torch.zeros(3).long(),
            ((3, 5), "torch.float32"),
            ("batch", "time", "vocabulary"),
            r"shape \(3, 5\); expected .*\(batch, time, vocabulary\).*logits\[None\]",
        ),
        (
            torch.zeros(2, 3, 5).long(),
            torch.zeros(2, 3).long(),
            ((2, 3, 5), "torch.int64"),
            ("batch", "time", "vocabulary"),
            "logits are torch.int64",
        ),
    ],
)
def test_l22_what_does_not_fit_is_refused(logits_bto, targets_bt, found, expected, message):
    """Six targets in another arrangement would fit once both are flattened, and be the wrong ones."""
    with pytest.raises(ShapeError, match=message) as caught:
        DOOR(logits_bto, targets_bt)
    assert caught.value.fields == {"found": found, "expected": expected}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l22_checks_change_no_bit(dtype):
    logits_bto, targets_bt = random_case(dtype)
    wanted = torch.nn.functional.cross_entropy(
        logits_bto.flatten(0, 1).float(), targets_bt.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert torch.equal(cross_entropy(logits_bto, targets_bt), wanted)
