"""How much of each write is in the memory and in each read, for all tokens of a chunk at once (memory.md 4.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(frozen=True)
class Decay:
    """The weights of the past at every token of a chunk; l is memory, and momentum beside it.

    Leading axes are chunks and folded heads (n h), or rows and heads of one chunk.

    entering_nhcl: of the memory, and the momentum, that enter the chunk.
    intra_nhcs: of what token s wrote, at token c, write rate included; lower triangular.
    write_nhcl: of what each token wrote, in the memory and the momentum that leave the chunk, write rate included.
    carry_nhll: of the entering values in the leaving ones.
    """

    entering_nhcl: Tensor
    intra_nhcs: Tensor
    write_nhcl: Tensor
    carry_nhll: Tensor

    def before(self) -> tuple[Tensor, Tensor]:
        """``entering`` and ``intra`` one token earlier: as the memory is before a token is written."""
        return self.entering_before(), functional.pad(self.intra_nhcs[..., :-1, :], (0, 0, 1, 0))

    def entering_before(self) -> Tensor:
        first_nh1l = torch.zeros_like(self.entering_nhcl[..., :1, :])
        first_nh1l[..., 0] = 1.0
        return torch.cat([first_nh1l, self.entering_nhcl[..., :-1, :]], dim=-2)


class Logs(NamedTuple):
    """What a ``Decay`` is computed from: the gates of every chunk along the last axis.

    log_momentum: None where the rule has no momentum.
    is_token: False where a chunk was padded, which broadcasts over [c, s]: such a token must not add the momentum once
    more, so it is emitted into the memory with weight 0.
    """

    log_retain: Tensor
    log_momentum: Tensor | None
    write: Tensor
    is_token: Tensor | None = None


def compute_decay(
    log_retain: Tensor, log_momentum: Tensor | None, write: Tensor, is_token: Tensor | None = None
) -> Decay:
    """The decay of chunks whose gates are along the last axis, under autograd."""
    return compute_decay_from(Logs(log_retain, log_momentum, write, is_token), DecayBetween.apply)


def compute_decay_from(logs: Logs, apart: Callable[[Tensor], Tensor]) -> Decay:
    """The decay; apart: ``between``, or ``Between.apply`` under autograd."""
    kept_nhcs, kept_nhc = _kept(logs, apart)
    if logs.log_momentum is None:
        intra_nhcs = kept_nhcs * logs.write[..., None, :]
        return Decay(kept_nhc[..., None], intra_nhcs, intra_nhcs[..., -1, :, None], kept_nhc[..., -1:, None])
    total_nhc = logs.log_momentum.cumsum(dim=-1)
    moving_nhc = total_nhc.exp()
    written_nhcs = apart(total_nhc) * logs.write[..., None, :]
    joined_nhc = (kept_nhcs @ moving_nhc[..., None])[..., 0]
    intra_nhcs = kept_nhcs @ written_nhcs
    last = moving_nhc[..., -1]
    carried = torch.stack([kept_nhc[..., -1], joined_nhc[..., -1], torch.zeros_like(last), last], dim=-1)
    return Decay(
        entering_nhcl=torch.stack([kept_nhc, joined_nhc], dim=-1),
        intra_nhcs=intra_nhcs,
        write_nhcl=torch.stack([intra_nhcs[..., -1, :], written_nhcs[..., -1, :]], dim=-1),
        carry_nhll=carried.unflatten(-1, (2, 2)),
    )


def decay_backward(logs: Logs, d_decay: Decay) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of ``log_retain``, ``log_momentum`` and ``write``; ``d_decay.intra_nhcs`` is overwritten.

    With R, P, A, H as in memory.md 4.2: ``W = R P diag(write)``, and the gradient of a total log is what its row gets
    less what its column gets of ``R * dR``, and of ``P * dP``.
    """
    d_intra_nhcs, d_kept_nhc = d_decay.intra_nhcs, d_decay.entering_nhcl[..., 0]
    d_intra_nhcs[..., -1, :] += d_decay.write_nhcl[..., 0]
    kept_nhcs, kept_nhc = _kept(logs, between)
    d_kept_nhc = _at_the_end(d_kept_nhc, d_decay.carry_nhll[..., 0, 0]) * kept_nhc
    if logs.log_momentum is None:
        d_write, d_total_nhc = _written_back(d_intra_nhcs.mul_(kept_nhcs), logs.write)
        return _summed_back(d_total_nhc + d_kept_nhc), None, d_write
    total_nhc = logs.log_momentum.cumsum(dim=-1)
    moving_nhcs, moving_nhc = between(total_nhc), total_nhc.exp()
    d_joined_nhc = _at_the_end(d_decay.entering_nhcl[..., 1], d_decay.carry_nhll[..., 0, 1])
    d_moving_nhc = (kept_nhcs.mT @ d_joined_nhc[..., None])[..., 0]
    d_moving_nhc = _at_the_end(d_moving_nhc, d_decay.carry_nhll[..., 1, 1]) * moving_nhc
    d_written_nhcs = kept_nhcs.mT @ d_intra_nhcs
    d_written_nhcs[..., -1, :] += d_decay.write_nhcl[..., 1]
    d_write, d_moved_nhc = _written_back(d_written_nhcs.mul_(moving_nhcs), logs.write)
    d_kept_nhcs = d_intra_nhcs @ moving_nhcs.mul_(logs.write[..., None, :]).mT
    d_kept_nhcs.addcmul_(d_joined_nhc[..., None], moving_nhc[..., None, :]).mul_(kept_nhcs)
    d_total_nhc = d_kept_nhcs.sum(dim=-1) - d_kept_nhcs.sum(dim=-2) + d_kept_nhc
    return _summed_back(d_total_nhc), _summed_back(d_moved_nhc + d_moving_nhc), d_write


def _kept(logs: Logs, apart: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """How much of what is written at s is left at c, and of what entered the chunk."""
    total_nhc = logs.log_retain.cumsum(dim=-1)
    kept_nhcs = apart(total_nhc)
    if logs.is_token is not None and logs.log_momentum is not None:
        kept_nhcs = kept_nhcs * logs.is_token
    return kept_nhcs, total_nhc.exp()


def _written_back(d_rate_nhcs: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of write rate and summed logs, where ``exp(total_c - total_s) * write_s`` is what was made of them.

    d_rate_nhcs: the gradient of what was made, times the exponential.
    """
    d_write = d_rate_nhcs.sum(dim=-2)
    return d_write, (d_rate_nhcs @ write[..., None])[..., 0] - d_write * write


def _at_the_end(x_nhc: Tensor, added_nh: Tensor) -> Tensor:
    return torch.cat([x_nhc[..., :-1], x_nhc[..., -1:] + added_nh[..., None]], dim=-1)


def _summed_back(d_total_nhc: Tensor) -> Tensor:
    """The gradient of what ``cumsum`` summed."""
    return d_total_nhc.flip(-1).cumsum(dim=-1).flip(-1)


def decay_between(log_factors: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the factors after s up to c, and from the chunk's start up to c."""
    total = log_factors.cumsum(dim=-1)
    return DecayBetween.apply(total), total.exp()


def between(total: Tensor) -> Tensor:
    """exp(total_c - total_s) for s <= c, else 0, along the last axis, whatever leads."""
    # Clamped before exp: above the diagonal the difference is positive, would overflow, and is cut off afterwards.
    # Filling it with -inf instead costs seven times as much, for exp is slow on what it cannot represent.
    return (total[..., :, None] - total[..., None, :]).clamp_(max=0.0).exp_().tril_()


class DecayBetween(torch.autograd.Function):
    """``apply(total)``: ``between`` with its gradient, one product and two sums; autograd would make six passes."""

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        factor = between(total)
        ctx.save_for_backward(factor)
        return factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_factor: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        d_difference = d_factor * factor
        return d_difference.sum(dim=-1) - d_difference.sum(dim=-2)


def cut(x: Tensor, chunk: int) -> Tensor:
    """b t h ... -> n (b h) c ..., zeros where the last chunk is not full."""
    padded = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunk)) if x.shape[1] % chunk else x
    return padded.unflatten(1, (-1, chunk)).movedim(3, 1).movedim(2, 0).flatten(1, 2).contiguous()
