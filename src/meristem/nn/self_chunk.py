"""What all memories of a self-reference share within a chunk: its keys, its gates, and how writes decay in it.

Axes: h rows of the batch and heads folded together, with chunks n in front where many are treated at once.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meristem.device.tf32 import exact_products
from meristem.linalg import solve_unit_lower
from meristem.memory.state import full_precision

GATES = ("rate", "retain")
"""Memories that say one number."""


@dataclass(frozen=True)
class Projections:
    """What the makers say of each token, ``h t ...``.

    key and query have length one. log_retain and rate have no last axis.
    """

    key: Tensor
    value: Tensor
    query: Tensor
    log_retain: Tensor
    rate: Tensor

    @staticmethod
    def joined(parts: "list[Projections]") -> "Projections":
        """Sequences concatenated."""
        if len(parts) == 1:
            return parts[0]
        return Projections(*(torch.cat(x, dim=1) for x in zip(*(vars(part).values() for part in parts), strict=True)))

    def window(self, begin: int, stop: int) -> "Projections":
        """The tokens from ``begin`` to ``stop``."""
        if begin == 0 and stop == self.key.shape[1]:
            return self
        return Projections(*(x[:, begin:stop] for x in vars(self).values()))

    def chunks(self, chunk: int) -> "Projections":
        """h (n c) ... -> n h c ..."""
        return Projections(*(x.unflatten(1, (-1, chunk)).transpose(0, 1).contiguous() for x in vars(self).values()))


class WriteSystem(Protocol):
    """The writes ``M <- M (retain - rate a a^T) + rate w a^T`` of the rows of a chunk, each made after the other."""

    @property
    def projections(self) -> Projections: ...

    def new(self, wanted: Tensor, recalled: Tensor) -> Tensor:
        """What each key is found to lack: ``wanted`` w less what it recalls just before its token is written.

        recalled: what it recalls from the memory that enters the chunk.
        """
        ...

    def recalled_before(self, recalled: Tensor, asked: Tensor, address: Tensor, new: Tensor) -> Tensor:
        """What each query recalls just before its token is written: ``recalled`` from the memory that enters."""
        ...

    def after(self, memory: Tensor, address: Tensor, new: Tensor) -> Tensor:
        """The memory that leaves the chunk."""
        ...

    def repeated(self, count: int) -> "WriteSystem":
        """The same for ``count`` memories behind each other in the place of each, as far as ``after`` goes."""
        ...


@dataclass(frozen=True)
class ChunkForm:
    """The writes of many rows at once (memory.md 4.3, with the probe cold and reads before writes).

    With rows per token, what is new N solves ``D N = W - diag(before) K M^T``, ``D = I + intra * K K^T``.

    before_c1: weight of the entering memory just before each token. intra_cs: weight there of what token s wrote, rate
    included. system_cs: D below its diagonal. write_c1: weight with which what is new leaves. carry_11: of the
    entering memory in the one that leaves.
    """

    projections: Projections
    before_c1: Tensor
    intra_cs: Tensor
    system_cs: Tensor
    write_c1: Tensor
    carry_11: Tensor
    inverse_cs: Tensor | None = None

    def solve(self, rows: Tensor) -> Tensor:
        """``D^-1`` times rows, by substitution unless ``inverted``."""
        if self.inverse_cs is not None:
            return self.inverse_cs @ rows
        solved: Tensor = Substituted.apply(self.system_cs, rows)
        return solved

    def new(self, wanted: Tensor, recalled: Tensor) -> Tensor:
        return self.solve(torch.addcmul(wanted, self.before_c1, recalled, value=-1))

    def recalled_before(self, recalled: Tensor, asked: Tensor, address: Tensor, new: Tensor) -> Tensor:
        return torch.addcmul((self.intra_cs * (asked @ address.mT)) @ new, self.before_c1, recalled)

    def after(self, memory: Tensor, address: Tensor, new: Tensor) -> Tensor:
        return torch.baddbmm(self.carry_11 * memory, (self.write_c1 * address).mT, new)

    def repeated(self, count: int) -> "ChunkForm":
        if count == 1:
            return self
        write_c1, carry_11 = (x.repeat_interleave(count, dim=0) for x in (self.write_c1, self.carry_11))
        return replace(self, write_c1=write_c1, carry_11=carry_11)

    def inverted(self) -> "ChunkForm":
        """The same with D^-1 at hand, for many small chunks that are solved one by one."""
        identity_cs = torch.eye(self.system_cs.shape[-1], dtype=self.system_cs.dtype, device=self.system_cs.device)
        return replace(self, inverse_cs=self.solve(identity_cs.expand_as(self.system_cs)))

    def unbound(self) -> "list[ChunkForm]":
        """The chunks that lie behind each other in front."""
        projections, *weights = (x for x in vars(self).values() if x is not None)
        each = (Projections(*x) for x in zip(*(x.unbind() for x in vars(projections).values()), strict=True))
        return [ChunkForm(*x) for x in zip(each, *(x.unbind() for x in weights), strict=True)]


class Substituted(torch.autograd.Function):
    """``apply(system_cs, rows) -> D^-1 rows``, with exact products both ways, whatever is allowed outside."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        system_cs, rows = inputs
        with exact_products():
            solved = solve_unit_lower(system_cs, rows)
        ctx.save_for_backward(system_cs, solved)
        return solved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_solved: Tensor) -> tuple[Tensor, Tensor]:
        system_cs, solved = ctx.saved_tensors
        # The engine may call this under the caller's autocast.
        with full_precision(d_solved.device), exact_products():
            d_rows = torch.linalg.solve_triangular(system_cs.mT, d_solved, upper=True, unitriangular=True)
            return (d_rows @ solved.mT).tril_(-1).neg_(), d_rows


@dataclass(frozen=True)
class TokenForm:
    """The write of a single row: nothing was written before it, and there is nothing to solve."""

    projections: Projections
    retain_h11: Tensor
    rate_h11: Tensor

    def new(self, wanted: Tensor, recalled: Tensor) -> Tensor:
        return wanted - recalled

    def recalled_before(self, recalled: Tensor, asked: Tensor, address: Tensor, new: Tensor) -> Tensor:
        return recalled

    def after(self, memory: Tensor, address: Tensor, new: Tensor) -> Tensor:
        return torch.addcmul(address.mT * (self.rate_h11 * new), self.retain_h11, memory)

    def repeated(self, count: int) -> "TokenForm":
        if count == 1:
            return self
        return TokenForm(
            self.projections, *(x.repeat_interleave(count, dim=0) for x in (self.retain_h11, self.rate_h11))
        )


def write_system(projections: Projections) -> ChunkForm | TokenForm:
    """The writes of a chunk or of a slice of one; of many, where chunks lie in front."""
    if projections.key.shape[-2] == 1:
        return TokenForm(projections, projections.log_retain.exp()[..., None], projections.rate[..., None])
    return chunk_form(projections)


def chunk_form(projections: Projections) -> ChunkForm:
    """The system of a chunk, or of many behind each other in front."""
    total = projections.log_retain.cumsum(dim=-1)
    entering, last = total - projections.log_retain, total[..., -1:]
    # Above the diagonal the difference is positive, would overflow, and is cut off afterwards.
    factor_cs = (entering[..., :, None] - total[..., None, :]).clamp(max=0.0).exp().tril(-1)
    intra_cs = factor_cs * projections.rate[..., None, :]
    return ChunkForm(
        projections=projections,
        before_c1=entering.exp()[..., None],
        intra_cs=intra_cs,
        system_cs=intra_cs * (projections.key @ projections.key.mT),
        write_c1=((last - total).exp() * projections.rate)[..., None],
        carry_11=last.exp()[..., None],
    )
