"""Weights that rows write outer products into: the gradients that are written out are those of the maths."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meristem.memory.kernels.frozen_kernel import FrozenRead, FrozenWrite
from meristem.memory.structure import Gelu

BATCH, HEADS, CHUNK = 2, 2, 3


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(BATCH, HEADS, *shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("widths", [(2, 5), (5, 2)])
@pytest.mark.parametrize("n_stored", [1, 2])
def test_what_rows_meet_has_the_gradients_of_finite_differences(widths: tuple[int, int], n_stored: int) -> None:
    """Whichever side is narrower, with a momentum and without."""
    inward, outward = widths
    sides = drawn(CHUNK, inward), drawn(4, inward), drawn(4, outward)
    stored = [drawn(inward, outward) + index for index in range(n_stored)]
    intra_bhcs, entering_bhcl = drawn(CHUNK, 4), drawn(CHUNK, n_stored)
    met_bhcj = FrozenRead.apply(*sides, intra_bhcs, entering_bhcl, *stored)
    rows_bhci, inward_bhsi, outward_bhsj = sides
    entered = sum(entering_bhcl[..., n : n + 1] * (rows_bhci @ stored[n]) for n in range(n_stored))
    true_bhcj = entered - (rows_bhci @ inward_bhsi.mT * intra_bhcs) @ outward_bhsj
    torch.testing.assert_close(met_bhcj, true_bhcj, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(
        FrozenRead.apply, (*sides, intra_bhcs, entering_bhcl, *stored), atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("widths", [(2, 5), (5, 2)])
@pytest.mark.parametrize("n_stored", [1, 2])
def test_what_leaves_a_chunk_has_the_gradients_of_finite_differences(widths: tuple[int, int], n_stored: int) -> None:
    """Whichever side is narrower, with a momentum, into which no memory is carried, and without."""
    inward, outward = widths
    address_bhsi, gradient_bhsj = drawn(CHUNK, inward), drawn(CHUNK, outward)
    stored = [drawn(inward, outward) + index for index in range(n_stored)]
    write_bhsl, carry_bhll = drawn(CHUNK, n_stored), drawn(n_stored, n_stored)
    inputs = address_bhsi, gradient_bhsj, write_bhsl, carry_bhll, *stored
    for row, left_bhij in enumerate(FrozenWrite.apply(*inputs)):
        kept_bhij = sum(carry_bhll[..., row, n, None, None] * stored[n] for n in range(row, n_stored))
        true_bhij = kept_bhij - (write_bhsl[..., row : row + 1] * address_bhsi).mT @ gradient_bhsj
        torch.testing.assert_close(left_bhij, true_bhij, rtol=0, atol=1e-12)

    assert torch.autograd.gradcheck(FrozenWrite.apply, inputs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("take", [lambda both: both, lambda both: both[0], lambda both: both[1]])
def test_gelu_and_its_slope_can_be_differentiated_twice(take: Callable[[tuple[Tensor, Tensor]], Tensor]) -> None:
    """Both, or either alone; the slope is the derivative of the value, and the value that of torch."""
    reached_bhcf = drawn(CHUNK, 4)
    curved_bhcf, slope_bhcf = Gelu.apply(reached_bhcf)
    torch.testing.assert_close(curved_bhcf, torch.nn.functional.gelu(reached_bhcf), rtol=0, atol=1e-14)
    (true_bhcf,) = torch.autograd.grad(curved_bhcf.sum(), reached_bhcf)
    torch.testing.assert_close(slope_bhcf, true_bhcf, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: take(Gelu.apply(x)), (reached_bhcf,), atol=1e-7, rtol=1e-5)
    assert torch.autograd.gradgradcheck(lambda x: take(Gelu.apply(x)), (reached_bhcf,), atol=1e-7, rtol=1e-5)
