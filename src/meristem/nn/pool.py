"""Groups of tokens that become one: what a slow level reads, and what it says until its next group has ended.

Only finished groups are read, and only the tokens after a group hear of it: a mean handed to the tokens that it was
made of would tell them what comes later (memory.md 6.5).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from meristem.shapes import Hidden

Groups = Float[Tensor, "b n d"]
Row = Float[Tensor, "b d"]


def group_means(hidden_btd: Hidden, sum_bd: Row, *, period: int, n_begun: int) -> tuple[Groups, Row]:
    """The mean of every group that ends in this window, in the precision of ``sum_bd``, and the sum of the rest.

    sum_bd: of the ``n_begun`` tokens of the group in which the window begins.
    """
    wide_btd = hidden_btd.to(sum_bd.dtype)
    n_missing, n_time = period - n_begun, hidden_btd.shape[1]
    if n_time < n_missing:
        return wide_btd[:, :0], sum_bd + wide_btd.sum(dim=1)
    n_whole = (n_time - n_missing) // period
    stop = n_missing + n_whole * period
    first_bd = sum_bd + wide_btd[:, :n_missing].sum(dim=1)
    whole_bnd = wide_btd[:, n_missing:stop].unflatten(1, (n_whole, period)).sum(dim=2)
    return torch.cat([first_bd[:, None], whole_bnd], dim=1) / period, wide_btd[:, stop:].sum(dim=1)


def hold(read_bnd: Groups, last_bd: Row, *, period: int, n_begun: int, n_time: int) -> tuple[Hidden, Row]:
    """What every token of the window hears, ``out[floor(t / period) - 1]``, and what the next window hears first.

    read_bnd: one vector for each group that ended in the window; last_bd: that of the group that ended before it.
    """
    if read_bnd.shape[1] == 0:
        return last_bd[:, None].expand(-1, n_time, -1), last_bd
    heard_bnd = torch.cat([last_bd[:, None].to(read_bnd.dtype), read_bnd], dim=1)
    held_btd = heard_bnd.repeat_interleave(period, dim=1)[:, n_begun : n_begun + n_time]
    # A copy, so that the state does not keep the whole window alive.
    return held_btd, heard_bnd[:, -1].clone()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which many tokens are added up: at least float32."""
    return torch.promote_types(dtype, torch.float32)
