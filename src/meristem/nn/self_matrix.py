"""Self-referential memories of one matrix each, side by side along the value axis of one wide matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meristem.memory.state import Memory, full_precision
from meristem.nn.self_chunk import GATES, ChunkForm, WriteSystem

NOISE = 0.02
"""Deviation of the first values from identity."""


@dataclass(frozen=True)
class Matrices:
    """``M(x) = M x`` for every name; those of gates say the mean of what they recall.

    They share keys and gates, so that one solve writes them all.

    is_generated: the target of a memory is what it makes of the token's value; else that value.
    is_squared: its loss is ``1/2 |M k - v|^2`` instead of ``-<M k, v>``.
    """

    names: tuple[str, ...]
    is_generated: bool
    is_squared: bool

    def first(self, heads: int, width: int) -> Memory:
        """Identity-like, for with all memories zero nothing ever moves; those of gates are zero and have a bias."""
        identity_hkv = torch.eye(width).expand(heads, width, width)
        values: Memory = {}
        for name in self.names:
            noise_hkv = NOISE * torch.randn(heads, width, width)
            values[f"{name}_hkv"] = torch.zeros_like(noise_hkv) if name in GATES else identity_hkv + noise_hkv
        return values

    def joined(self, values: Mapping[str, Tensor]) -> Memory:
        """The values of ``first`` beside each other."""
        return {"matrix_bhkv": torch.cat([values[f"{name}_hkv"] for name in self.names], dim=-1)[None]}

    def project(self, weights: Memory, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What the memories of vectors make of rows, and what those of gates do, ``h c l``."""
        recalled = rows @ weights["matrix_bhkv"]
        width, vectors = rows.shape[-1], [name for name in self.names if name not in GATES]
        projections = dict(zip(vectors, recalled.split(width, dim=-1), strict=False))
        return projections, recalled[..., len(vectors) * width :].unflatten(-1, (len(GATES), width)).mean(dim=-1)

    def write(self, start: Memory, live: Memory, rows: WriteSystem) -> Memory:
        """The memories after the rows of a chunk, or of a slice of it.

        start: as they were when the chunk began, which make the values. live: as the rows before have left them.
        """
        new, _ = self._new(start, live, rows)
        return {"matrix_bhkv": rows.after(live["matrix_bhkv"], rows.projections.key, new)}

    def read(self, start: Memory, live: Memory, rows: WriteSystem) -> tuple[Tensor, Memory]:
        """What each query recalls just before its token is written, and the memory after the rows."""
        new, asked = self._new(start, live, rows)[0], rows.projections.query
        read = rows.recalled_before(asked @ live["matrix_bhkv"], asked, rows.projections.key, new)
        return read, {"matrix_bhkv": rows.after(live["matrix_bhkv"], rows.projections.key, new)}

    def read_chunks(self, live: Memory, chunks: ChunkForm) -> tuple[Tensor, Memory]:
        """``read`` of whole chunks behind each other, ``n h c``: two products in order for each, the rest at once.

        What is new in a chunk is affine in the memory that enters it: ``N = P M^T + F``.
        """
        projections = chunks.projections
        probe_nhck = -chunks.before_c1 * projections.key
        if self.is_squared:
            probe_nhck = probe_nhck - projections.key
        if self.is_generated:
            probe_nhck = probe_nhck + projections.value
        probe_nhck = chunks.solve(probe_nhck)
        given_nhcv = None if self.is_generated else chunks.solve(projections.value)
        write_nhck = chunks.write_c1 * projections.key
        entering_nhkv, last_hkv = RunChunks.apply(
            probe_nhck, given_nhcv, write_nhck, chunks.carry_11, live["matrix_bhkv"]
        )
        mixing_nhcs = chunks.intra_cs * (projections.query @ projections.key.mT)
        read_nhcv = torch.addcmul(mixing_nhcs @ probe_nhck, chunks.before_c1, projections.query) @ entering_nhkv
        if given_nhcv is not None:
            read_nhcv = read_nhcv + mixing_nhcs @ given_nhcv
        return read_nhcv.transpose(0, 1).flatten(1, 2), {"matrix_bhkv": last_hkv}

    def _new(self, start: Memory, live: Memory, rows: WriteSystem) -> tuple[Tensor, Tensor]:
        """What is new in each value, and what is recalled for its key."""
        key, value = rows.projections.key, rows.projections.value
        recalled = key @ live["matrix_bhkv"]
        if self.is_generated:
            wanted = (value - key if self.is_squared else value) @ start["matrix_bhkv"]
        else:
            wanted = torch.cat([value] * len(self.names), dim=-1)
            if self.is_squared:
                wanted = wanted - (recalled if start is live else key @ start["matrix_bhkv"])
        return rows.new(wanted, recalled), recalled


class RunChunks(torch.autograd.Function):
    """``apply(probe, given, write, carry, first) -> (entering, last)``: the memory at the start of every chunk.

    ``M' = carry M + write^T (probe M + given)`` from chunk to chunk, n in front; given may be None.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        probe_nhck, given_nhcv, write_nhck, carry_nh11, first_hkv = inputs
        givens = [None] * len(probe_nhck) if given_nhcv is None else given_nhcv.unbind()
        passing_hkv, entering = first_hkv, []
        steps = zip(probe_nhck.unbind(), givens, write_nhck.mT.unbind(), carry_nh11.unbind(), strict=True)
        for probe_hck, given_hcv, write_hkc, carry_h11 in steps:
            entering.append(passing_hkv)
            if given_hcv is None:
                new_hcv = torch.bmm(probe_hck, passing_hkv)
            else:
                new_hcv = torch.baddbmm(given_hcv, probe_hck, passing_hkv)
            passing_hkv = torch.baddbmm(carry_h11 * passing_hkv, write_hkc, new_hcv)
        entering_nhkv = torch.stack(entering)
        ctx.save_for_backward(probe_nhck, given_nhcv, write_nhck, carry_nh11, entering_nhkv)
        return entering_nhkv, passing_hkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_entering_nhkv: Tensor, d_last_hkv: Tensor) -> tuple[Tensor | None, ...]:
        # The engine may call this under the caller's autocast; memories keep their precision backwards as well.
        with full_precision(d_last_hkv.device):
            return _run_chunks_backward(ctx.saved_tensors, d_entering_nhkv, d_last_hkv)


def _run_chunks_backward(
    saved: tuple[Any, ...], d_entering_nhkv: Tensor, d_last_hkv: Tensor
) -> tuple[Tensor | None, ...]:
    probe_nhck, given_nhcv, write_nhck, carry_nh11, entering_nhkv = saved
    d_passing_hkv, d_leaving, d_news = d_last_hkv, [], []
    steps = [x.unbind() for x in (d_entering_nhkv, probe_nhck.mT, write_nhck, carry_nh11)]
    for d_entering_hkv, probe_hkc, write_hck, carry_h11 in zip(*(reversed(step) for step in steps), strict=True):
        d_leaving.append(d_passing_hkv)
        d_news.append(torch.bmm(write_hck, d_passing_hkv))
        d_passing_hkv = torch.addcmul(d_entering_hkv, carry_h11, d_passing_hkv)
        d_passing_hkv = torch.baddbmm(d_passing_hkv, probe_hkc, d_news[-1])
    d_leaving_nhkv, d_new_nhcv = torch.stack(d_leaving[::-1]), torch.stack(d_news[::-1])
    new_nhcv = probe_nhck @ entering_nhkv
    if given_nhcv is not None:
        new_nhcv = new_nhcv + given_nhcv
    return (
        d_new_nhcv @ entering_nhkv.mT,
        None if given_nhcv is None else d_new_nhcv,
        new_nhcv @ d_leaving_nhkv.mT,
        (d_leaving_nhkv * entering_nhkv).sum(dim=(-2, -1), keepdim=True),
        d_passing_hkv,
    )
