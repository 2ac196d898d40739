"""Groups of tokens that become one: what a slow level reads, and what it says until its next group has ended.

Only finished groups are read, and only the tokens after a group hear of it: a mean handed to the tokens that it was
made of would not be causal (memory.md 6.5).
"""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from meristem.shapes import Hidden

Groups = Float[Tensor, "b n d"]
Row = Float[Tensor, "b d"]


def spans(n_before: int, n_time: int, period: int) -> list[tuple[int, int]]:
    """Where a sequence that begins after ``n_before`` tokens is cut: where a multiple of ``period`` has been read."""
    cuts = [*range(period - n_before % period, n_time, period), n_time]
    return list(itertools.pairwise([0, *cuts]))


def group_means(hidden_btd: Hidden, sum_bd: Row, *, period: int, n_begun: int) -> tuple[Groups, Row]:
    """The mean of every group that ends in this sequence, in the precision of ``sum_bd``, and the sum of the rest.

    sum_bd: of the ``n_begun`` tokens of the group in which the sequence begins.
    """
    n_missing, n_time = (period - n_begun) % period, hidden_btd.shape[1]
    wide_btd = hidden_btd.to(sum_bd.dtype)
    if n_begun + n_time < period:
        return wide_btd[:, :0], sum_bd + wide_btd.sum(dim=1)
    n_left = (n_begun + n_time) % period
    first_btd, whole_btd, left_btd = _three(wide_btd, n_missing, n_left)
    # Not a mean over time, whose gradient is divided token by token.
    mean_bnd = whole_btd.unflatten(1, (-1, period)).sum(dim=2) / period if whole_btd.shape[1] else whole_btd
    if n_missing:
        first_bd = (sum_bd + first_btd.sum(dim=1)) / period
        mean_bnd = torch.cat([first_bd[:, None], mean_bnd], dim=1)
    return mean_bnd, left_btd.sum(dim=1)


def _three(wide_btd: Hidden, n_first: int, n_last: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence in three slices, uncut where two of them are empty: a gradient through a cut is a copy of the
    whole."""
    n_time = wide_btd.shape[1]
    if not n_first and not n_last:
        return wide_btd[:, :0], wide_btd, wide_btd[:, :0]
    first_btd, whole_btd, last_btd = wide_btd.split([n_first, n_time - n_first - n_last, n_last], dim=1)
    return first_btd, whole_btd, last_btd


def hold(read_bnd: Groups, last_bd: Row, *, period: int, n_begun: int, n_time: int) -> tuple[Hidden, Row]:
    """What every token of the sequence gets, ``out[floor(t / period) - 1]``, and what the next sequence gets first.

    read_bnd: one vector for each group that ended in the sequence; last_bd: that of the group that ended before it.
    """
    if read_bnd.shape[1] == 0:
        return last_bd[:, None].expand(-1, n_time, -1), last_bd
    n_left = (n_begun + n_time) % period
    parts = [last_bd[:, None].to(read_bnd.dtype).expand(-1, period - n_begun, -1)] if n_begun else []
    # Each output but the last is read for a whole period.
    whole_bnd = (
        read_bnd[:, :-1] if n_begun else torch.cat([last_bd[:, None].to(read_bnd.dtype), read_bnd[:, :-1]], dim=1)
    )
    parts += [whole_bnd.repeat_interleave(period, dim=1)] if whole_bnd.shape[1] else []
    parts += [read_bnd[:, -1:].expand(-1, n_left, -1)] if n_left else []
    # A copy, so that the state does not keep the whole sequence in memory.
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], read_bnd[:, -1].clone()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which many tokens are added up: at least float32."""
    return torch.promote_types(dtype, torch.float32)
