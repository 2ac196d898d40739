"""Values and gradient of the one loss."""

import inspect
import math

import pytest
import torch

from meristem.data.stream import IGNORED
from meristem.errors import ShapeError, WrongValue
from meristem.memory.kernels.select import force_reference
from meristem.train.loss import Teacher, cross_entropy, distillation


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
    """TR-1."""
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
    with force_reference():
        assert torch.equal(cross_entropy(logits_bto, targets_bt), wanted)


def spoken(n_rows=2, n_time=5, n_vocabulary=7):
    """Logits of a student and of a teacher, and targets of which one is ignored."""
    generator = torch.Generator().manual_seed(3)
    student_bto, teacher_bto = (torch.randn(n_rows, n_time, n_vocabulary, generator=generator) for _ in range(2))
    targets_bt = torch.randint(n_vocabulary, (n_rows, n_time), generator=generator)
    targets_bt[0, 2] = IGNORED
    return student_bto.requires_grad_(), targets_bt, teacher_bto


def test_ka5_at_weight_zero_it_is_cross_entropy_to_the_bit():
    student_bto, targets_bt, teacher_bto = spoken()
    mine = distillation(student_bto, targets_bt, teacher_bto, weight=0.0)
    wanted = cross_entropy(student_bto, targets_bt)
    assert torch.equal(mine, wanted)
    assert torch.equal(*(torch.autograd.grad(each, student_bto)[0] for each in (mine, wanted)))


@pytest.mark.parametrize("weight, temperature", [(0.3, 4.0), (1.0, 1.0), (0.5, 0.7)])
def test_ka5_it_is_the_sum_that_it_is_defined_by(weight, temperature):
    """(1 - w) CE + w T^2 KL(teacher | student), of the targets that count alone, and no gradient to the teacher."""
    student_bto, targets_bt, teacher_bto = spoken()
    teacher_bto.requires_grad_()
    found = distillation(student_bto, targets_bt, teacher_bto, weight=weight, temperature=temperature)
    p_bto, q_bto = ((each.detach().double() / temperature).softmax(-1) for each in (teacher_bto, student_bto))
    divergence_bt = (p_bto * (p_bto / q_bto).log()).sum(-1)
    kept = divergence_bt[targets_bt != IGNORED].sum()
    wanted = (1 - weight) * cross_entropy(student_bto, targets_bt).double() + weight * temperature**2 * kept
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    found.backward()
    assert teacher_bto.grad is None and student_bto.grad[1].any(-1).all()
    assert weight < 1 or not student_bto.grad[0, 2].any()


def test_ka5_gradients_scale_as_the_square_of_the_temperature():
    """A teacher and a student that are T times as sharp have the gradient of T = 1 times T^2 / T."""
    student_bto, targets_bt, teacher_bto = spoken()
    (plain,) = torch.autograd.grad(
        distillation(student_bto, targets_bt, teacher_bto, weight=1.0, temperature=1.0), student_bto
    )
    for temperature in (2.0, 4.0):
        sharp_bto = (temperature * student_bto.detach()).requires_grad_()
        loss = distillation(sharp_bto, targets_bt, temperature * teacher_bto, weight=1.0, temperature=temperature)
        (found,) = torch.autograd.grad(loss, sharp_bto)
        torch.testing.assert_close(found / temperature**2, plain / temperature, rtol=1e-5, atol=1e-6)


def test_ka5_a_student_comes_to_say_what_its_teacher_says():
    """The divergence falls, and the teacher, which is read without gradients, is the same bits."""
    torch.manual_seed(0)
    student, teacher = (torch.nn.Sequential(torch.nn.Embedding(7, 6), torch.nn.Linear(6, 7)) for _ in range(2))
    source, before = Teacher(teacher, weight=1.0), {name: x.clone() for name, x in teacher.state_dict().items()}
    tokens_bt, optimizer = torch.arange(7)[None], torch.optim.Adam(student.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        logits_bto = source.logits(tokens_bt)
        loss = distillation(student(tokens_bt), tokens_bt, logits_bto, weight=source.weight)
        assert not logits_bto.requires_grad
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0] and all(each.grad is None for each in teacher.parameters())
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


def test_ka5_what_cannot_teach_is_refused():
    student_bto, targets_bt, teacher_bto = spoken()
    with pytest.raises(ShapeError, match=r"of the teacher have the shape \(2, 5, 6\), those of the model \(2, 5, 7\)"):
        distillation(student_bto, targets_bt, teacher_bto[..., :6])
    small = torch.nn.Linear(3, 4)
    for wrong, message in (
        ({"weight": 1.5}, "weight is 1.5; expected 0 to 1"),
        ({"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
        ({"most_bytes": 10}, "it takes 64 bytes; expected 10"),
    ):
        with pytest.raises(WrongValue, match=message):
            Teacher(small, **wrong)
