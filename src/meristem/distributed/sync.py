"""Sums over all processes, and how many bytes they took.

An exchange is handed the same tensors, in the same order, by every process.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from meristem.distributed.mesh import Ranks
from meristem.errors import AgreementFailed

CONTROL: Final = "control"
"""What agreement costs, and no gradient is part of: losses, flags, norms, times."""

PORTION_BYTES: Final = 32 << 20
"""Small tensors are sent together, up to so many bytes at once: each sending has its own delay."""

_CARRIER = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


class Traffic:
    """Bytes of the tensors that were exchanged, by what they were for.

    Each tensor is counted once, in full, however often the algorithm sends it; with two processes and a sum it is what
    each of them sends.
    """

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()

    def add(self, kind: str, n_bytes: int) -> None:
        """Count an exchange."""
        self._bytes[kind] += n_bytes

    def take(self) -> dict[str, int]:
        """What was counted since the last call, by kind."""
        taken = dict(self._bytes)
        self._bytes.clear()
        return taken


class Sync:
    """Exchanges between the processes of a run; alone, nothing is sent."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.traffic = ranks, Traffic()

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Put into each tensor its sum over all processes; the bits of the result are the same in all of them."""
        if self.ranks.size == 1:
            return
        with lost_process(f"the sum of {kind}", self.ranks):
            for portion in _portions(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in portion])
                self.traffic.add(kind, size_bytes(flat))
                dist.all_reduce(flat)
                parts = flat.split([tensor.numel() for tensor in portion])
                for tensor, summed in zip(portion, parts, strict=True):
                    tensor.copy_(summed.view_as(tensor))

    @torch.no_grad()
    def collect(self, tensor: Tensor, kind: str) -> list[Tensor]:
        """The tensors of every process, by rank; of one shape and dtype."""
        if self.ranks.size == 1:
            return [tensor]
        every = tensor.new_empty(self.ranks.size * tensor.numel())
        self.traffic.add(kind, size_bytes(every))
        with lost_process(f"the gathering of {kind}", self.ranks):
            dist.all_gather_single(every, tensor.reshape(-1).contiguous())
        return [each.view(tensor.shape) for each in every.split(tensor.numel())]

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, by rank: a few of the host's, as seconds and wishes. A tensor is not read."""
        if self.ranks.size == 1:
            return [[float(value) for value in values]]
        own = torch.tensor(values, dtype=torch.float64)
        every = own.new_empty(self.ranks.size * len(own))
        self.traffic.add(CONTROL, size_bytes(every))
        with lost_process("the gathering of numbers", self.ranks):
            dist.all_gather_single(every, own)
        return [numbers.tolist() for numbers in every.split(len(own))]


@contextlib.contextmanager
def lost_process(what: str, ranks: Ranks) -> Iterator[None]:
    """Raise AgreementFailed where an exchange inside the block breaks, as it does when another process ends."""
    try:
        yield
    except RuntimeError as cause:
        # The carriers raise no type of their own, also where torch has one; anything else is not theirs.
        if not isinstance(cause, dist.DistError) and not _CARRIER.search(str(cause)):
            raise
        raise AgreementFailed(
            f"{what} over {ranks.size} processes broke in process {ranks.rank}: {cause}. Another process ended or "
            f"hangs; its own output says why. Start all of them again: they go on from the last checkpoint.",
            rank=ranks.rank,
        ) from cause


def size_bytes(tensor: Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.element_size()


def _portions(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, as many as fit into a portion; what is larger goes alone."""
    portion: list[Tensor] = []
    held_bytes = 0
    for tensor in tensors:
        is_alike = not portion or (tensor.dtype, tensor.device) == (portion[0].dtype, portion[0].device)
        if portion and (not is_alike or held_bytes + size_bytes(tensor) > PORTION_BYTES):
            yield portion
            portion, held_bytes = [], 0
        portion.append(tensor)
        held_bytes += size_bytes(tensor)
    if portion:
        yield portion
