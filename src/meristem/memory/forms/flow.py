"""With which weight what was written has reached the memory, for all tokens of a chunk at once (memory.md 4.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from meristem.memory.kernels.chunk_solve import Between


@dataclass(frozen=True)
class Flow:
    """The weights of the past at every token of a chunk, for any leading axes; l is memory, and momentum beside it.

    entering_cl: of the memory, and the momentum, that enter the chunk.
    reach_cs: of what token s wrote, at token c, write rate included; lower triangular.
    arriving_cl: of what each token wrote, in the memory and the momentum that leave the chunk, write rate included.
    carried_ll: of the entering values in the leaving ones.
    """

    entering_cl: Tensor
    reach_cs: Tensor
    arriving_cl: Tensor
    carried_ll: Tensor

    def before(self) -> tuple[Tensor, Tensor]:
        """``entering`` and ``reach`` one token earlier: as the memory is before a token is written."""
        first_1l = torch.zeros_like(self.entering_cl[..., :1, :])
        first_1l[..., 0] = 1.0
        entering_cl = torch.cat([first_1l, self.entering_cl[..., :-1, :]], dim=-2)
        return entering_cl, functional.pad(self.reach_cs[..., :-1, :], (0, 0, 1, 0))


def flow(log_retain: Tensor, log_momentum: Tensor | None, write: Tensor, is_token: Tensor | None = None) -> Flow:
    """The flow of chunks whose gates stand along the last axis.

    is_token: False where a chunk was padded, which broadcasts over [c, s]: such a token must not add the momentum once
    more, so it is emitted into the memory with weight 0.
    """
    kept_cs, kept_c = decay_between(log_retain)
    if log_momentum is None:
        reach_cs = kept_cs * write[..., None, :]
        return Flow(kept_c[..., None], reach_cs, reach_cs[..., -1, :, None], kept_c[..., -1:, None])
    moving_cs, moving_c = decay_between(log_momentum)
    emitted_cs = kept_cs if is_token is None else kept_cs * is_token
    joined_c = (emitted_cs * moving_c[..., None, :]).sum(dim=-1)
    written_cs = moving_cs * write[..., None, :]
    reach_cs = emitted_cs @ written_cs
    last = moving_c[..., -1]
    carried_ll = torch.stack([kept_c[..., -1], joined_c[..., -1], torch.zeros_like(last), last], dim=-1)
    return Flow(
        entering_cl=torch.stack([kept_c, joined_c], dim=-1),
        reach_cs=reach_cs,
        arriving_cl=torch.stack([reach_cs[..., -1, :], written_cs[..., -1, :]], dim=-1),
        carried_ll=carried_ll.unflatten(-1, (2, 2)),
    )


def decay_between(log_factors: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the factors after s up to c, and from the chunk's start up to c."""
    total_c = log_factors.cumsum(dim=-1)
    return Between.apply(total_c), total_c.exp()


def cut(x: Tensor, chunk: int) -> Tensor:
    """b t h ... -> n (b h) c ..., zeros where the last chunk is not full."""
    padded = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunk)) if x.shape[1] % chunk else x
    return padded.unflatten(1, (-1, chunk)).movedim(3, 1).movedim(2, 0).flatten(1, 2).contiguous()
