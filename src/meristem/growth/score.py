"""Where a seed would help most, and with which first weights (growth.md 14.3)."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from meristem.device.random import random_state, restore_random_state
from meristem.errors import WrongValue
from meristem.growth.attach import find_slot
from meristem.memory.state import State
from meristem.nn.documents import Documents
from meristem.nn.slot import Slot

Batch = TypeVar("Batch")

RIDGE: Final = 1e-3
"""What is added to every eigenvalue of C, by their mean: directions that are hardly there are not made large."""


@dataclass(frozen=True)
class SlotScore:
    """What a seed could do in a slot; None where a number was not finite or nothing was read.

    score: nats by which the loss falls at first, per size of what a seed of rank k adds. correlation: between 0 and k,
    how much of the gradient follows from what is read; unlike the score it can be compared between slots of which one
    matters more than another, but of fewer than some twenty tokens for each number in the width much of it is chance.
    projection: A, (k, d_read) in float64. n_tokens: over which all was measured.
    """

    score: float | None
    correlation: float | None
    projection: Tensor | None
    n_tokens: int

    @property
    def first_weights(self) -> Mapping[str, Tensor]:
        """For ``graft`` of a ``low_rank`` seed of rank k; none where there is no projection."""
        return {} if self.projection is None else {"down.weight": self.projection}


def slot_scores(
    model: nn.Module, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor], slots: Sequence[str], k: int
) -> dict[str, SlotScore]:
    """How much a low-rank addition in each of these slots would lower the loss, to first order.

    With x what the slot reads at a token and g the gradient of the loss with respect to what it gives there,
    ``C = mean(x x^T) + lambda 1`` over tokens, ``G = sum(g x^T)`` over the tokens of a batch, in the mean over batches,
    and ``G C^(-1/2) = U S V^T``:

    - score: the sum of the first k singular values, the most by which the loss falls per size of an addition
      ``B A x`` of rank k, whose size is the largest singular value of ``B A C^(1/2)``;
    - projection: ``A = V_k^T C^(-1/2)``, so that ``A C A^T = 1``; with it and B = 0 the gradient of B is the largest
      there is (GradMax, 2201.05125; TINY, 2405.19816);
    - correlation: the sum of the first k singular values of ``D^(-1/2) mean(g x^T) C^(-1/2)`` with
      ``D = mean(g g^T) + lambda 1``, the canonical correlations of g and x.

    lambda is 1e-3 of the mean eigenvalue. One forward and one backward pass to a batch, in evaluation mode, for all
    slots together; no gradient, mode or random number of the run changes. Sums are in float64.

    slots: empty ones. loss: the mean over the targets of a batch, with its graph. Raises WrongValue for a slot that
    is not there, holds a seed, or is narrower than k.
    """
    places = {name: _empty(model, name, k) for name in slots}
    sums = {name: _Sums(*place.widths) for name, place in places.items()}
    with _undisturbed(model):
        for batch in batches:
            with _probed(places) as probes, torch.enable_grad():
                found = loss(model, batch)
                zeros = [zero for probe in probes.values() for _, zero in probe.calls]
                grads = iter(torch.autograd.grad(found, zeros, allow_unused=True) if zeros else ())
            for name, probe in probes.items():
                sums[name].add([(read, next(grads)) for read, _ in probe.calls])
    return {name: each.score(k) for name, each in sums.items()}


class _Probe(nn.Module):
    """Stands in an empty slot for the time of a batch and adds zeros, whose gradient is that of what the slot gives.

    calls: what was read in each call, and the zeros.
    """

    is_live = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(
        self, host_btd: Tensor, read_btd: Tensor, state: State | None, documents: Documents | None
    ) -> tuple[Tensor, State]:
        zero_btd = torch.zeros_like(host_btd, requires_grad=True)
        self.calls.append((read_btd.detach(), zero_btd))
        return host_btd + zero_btd, {}


class _Sums:
    """``sum x x^T``, ``sum g g^T`` and ``sum g x^T`` over the tokens of one slot."""

    def __init__(self, read: int, added: int) -> None:
        self._read = torch.zeros(read, read, dtype=torch.float64)
        self._gradient = torch.zeros(added, added, dtype=torch.float64)
        self._cross = torch.zeros(added, read, dtype=torch.float64)
        self._n_tokens, self._n_batches = 0, 0

    def add(self, calls: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """One batch: what was read, and the gradient, or None where the loss does not depend on it."""
        self._n_batches += 1
        for read, gradient in calls:
            x = _in_float64(read)
            self._n_tokens += len(x)
            self._read = self._read.to(x.device) + x.T @ x
            if gradient is not None:
                g = _in_float64(gradient)
                self._gradient = self._gradient.to(x.device) + g.T @ g
                self._cross = self._cross.to(x.device) + g.T @ x

    def score(self, k: int) -> SlotScore:
        n = self._n_tokens
        read, gradient = self._read.diagonal().sum(), self._gradient.diagonal().sum()
        if not bool((read * gradient).isfinite()) or read == 0:
            return SlotScore(None, None, None, n)
        whitening = _whitening(self._read / n)
        cross = self._cross.to(whitening.device) @ whitening
        _, values, directions = torch.linalg.svd(cross / self._n_batches, full_matrices=False)
        shares = torch.linalg.svdvals(_whitening(self._gradient / n) @ cross / n) if gradient > 0 else torch.zeros(k)
        return SlotScore(float(values[:k].sum()), float(shares[:k].sum()), directions[:k] @ whitening, n)


def _whitening(square: Tensor) -> Tensor:
    """``(square + lambda 1)^(-1/2)`` of a matrix of second moments that is not zero."""
    size, axes = torch.linalg.eigh(square)
    return axes * (size.clamp(min=0) + RIDGE * square.diagonal().mean()).rsqrt() @ axes.T


def _in_float64(tensor: Tensor) -> Tensor:
    """Tokens in rows, where float64 exists."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device).double().flatten(0, -2)


def _empty(model: nn.Module, name: str, k: int) -> Slot:
    place = find_slot(model, name)
    if place.seed is not None:
        raise WrongValue(f"slot '{name}' holds a seed; expected an empty one. Score the others.", value=name)
    if not 1 <= k <= min(place.widths):
        raise WrongValue(
            f"k = {k} was found for slot '{name}' of widths {place.widths}; expected a rank from 1 to "
            f"{min(place.widths)}.",
            value=k,
        )
    return place


@contextmanager
def _probed(places: Mapping[str, Slot]) -> Iterator[dict[str, _Probe]]:
    """Probes in all of these slots while the block lasts."""
    probes = {name: _Probe() for name in places}
    try:
        for name, place in places.items():
            place.seed = probes[name]
        yield probes
    finally:
        for place in places.values():
            place.seed = None


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and not compiled; modes and random numbers are afterwards what they were."""
    modes = {module: module.training for module in model.modules()}
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    drawn = random_state(device)
    is_compiling = "torch._dynamo" in sys.modules
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager") if is_compiling else nullcontext():
            yield
    finally:
        restore_random_state(*drawn, device=device)
        for module, mode in modes.items():
            module.training = mode
