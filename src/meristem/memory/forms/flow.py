"""With which weight what was written has reached the memory, for all tokens of a chunk at once (memory.md 4.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from meristem.memory.kernels.chunk_solve import Between


@dataclass(frozen=True)
class Flow:
    """The weights of the past at every token of a chunk; l is memory, and momentum beside it.

    Leading axes are chunks and folded heads (n h), or rows and heads of one chunk.

    entering_nhcl: of the memory, and the momentum, that enter the chunk.
    reach_nhcs: of what token s wrote, at token c, write rate included; lower triangular.
    arriving_nhcl: of what each token wrote, in the memory and the momentum that leave the chunk, write rate included.
    carried_nhll: of the entering values in the leaving ones.
    """

    entering_nhcl: Tensor
    reach_nhcs: Tensor
    arriving_nhcl: Tensor
    carried_nhll: Tensor

    def before(self) -> tuple[Tensor, Tensor]:
        """``entering`` and ``reach`` one token earlier: as the memory is before a token is written."""
        first_nh1l = torch.zeros_like(self.entering_nhcl[..., :1, :])
        first_nh1l[..., 0] = 1.0
        entering_nhcl = torch.cat([first_nh1l, self.entering_nhcl[..., :-1, :]], dim=-2)
        return entering_nhcl, functional.pad(self.reach_nhcs[..., :-1, :], (0, 0, 1, 0))


def flow(log_retain: Tensor, log_momentum: Tensor | None, write: Tensor, is_token: Tensor | None = None) -> Flow:
    """The flow of chunks whose gates stand along the last axis.

    is_token: False where a chunk was padded, which broadcasts over [c, s]: such a token must not add the momentum once
    more, so it is emitted into the memory with weight 0.
    """
    kept_nhcs, kept_nhc = decay_between(log_retain)
    if log_momentum is None:
        reach_nhcs = kept_nhcs * write[..., None, :]
        return Flow(kept_nhc[..., None], reach_nhcs, reach_nhcs[..., -1, :, None], kept_nhc[..., -1:, None])
    moving_nhcs, moving_nhc = decay_between(log_momentum)
    emitted_nhcs = kept_nhcs if is_token is None else kept_nhcs * is_token
    joined_nhc = (emitted_nhcs * moving_nhc[..., None, :]).sum(dim=-1)
    written_nhcs = moving_nhcs * write[..., None, :]
    reach_nhcs = emitted_nhcs @ written_nhcs
    last = moving_nhc[..., -1]
    carried = torch.stack([kept_nhc[..., -1], joined_nhc[..., -1], torch.zeros_like(last), last], dim=-1)
    return Flow(
        entering_nhcl=torch.stack([kept_nhc, joined_nhc], dim=-1),
        reach_nhcs=reach_nhcs,
        arriving_nhcl=torch.stack([reach_nhcs[..., -1, :], written_nhcs[..., -1, :]], dim=-1),
        carried_nhll=carried.unflatten(-1, (2, 2)),
    )


def decay_between(log_factors: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the factors after s up to c, and from the chunk's start up to c."""
    total = log_factors.cumsum(dim=-1)
    return Between.apply(total), total.exp()


def cut(x: Tensor, chunk: int) -> Tensor:
    """b t h ... -> n (b h) c ..., zeros where the last chunk is not full."""
    padded = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunk)) if x.shape[1] % chunk else x
    return padded.unflatten(1, (-1, chunk)).movedim(3, 1).movedim(2, 0).flatten(1, 2).contiguous()
