"""Causal attention, over everything read so far or over a sliding window, with its keys and values as the state."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from meristem.errors import WrongValue
from meristem.memory.kernels.select import fuses
from meristem.memory.state import LENGTHS, Memory, State, rows_apart
from meristem.native.window import ROTATION_BASE, windowed_attention
from meristem.nn.documents import Documents
from meristem.shapes import Hidden, Keys, Mixed, Queries, Values

BLOCK: Final = 64
"""Queries that share one set of keys. Fewer copy more keys, more mask more scores; 64 was fastest for spans 64, 128."""

FUSED: Final = frozenset({"cuda"})
"""Kinds of devices on which torch's fused kernel takes the blocks with their masks, so that no score is written out. On
a CPU it gains nothing from a mask: at t = 512 and span 64 it takes 1.8 times as long in fp32 and 3.7 times in bf16."""

PastKeys = Float[Tensor, "b s h k"]
PastValues = Float[Tensor, "b s h v"]
Firsts = Int[Tensor, "b t"]
Turns = tuple[Float[Tensor, "s 1 k"], Float[Tensor, "s 1 k"]]
"""Cosines and sines, the latter with the sign of the channel that they bring in."""


class Attention(nn.Module):
    """Multi-head attention of each token to itself and the ``span - 1`` tokens before it (a sliding window of
    ``span``), scaled by 1/sqrt(key width).

    span: None sees everything read so far, and the state then grows with it.
    rope: rotates queries and keys by their position (Su et al. 2104.09864): scores depend on distances.
    n_persistent: learned vectors in front of the text that every query sees, without a position (Titans 2501.00663,
    eq. 19).

    State: the last span - 1 keys and values in order of time, keys not yet rotated. Positions count from the first key
    of a call, for only their differences matter.
    """

    matrices: ClassVar = frozenset({"qkv.weight", "out.weight"})

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        span: int | None,
        rope: bool = True,
        n_persistent: int = 0,
        bias: bool = False,
        head_dim: int | None = None,
    ) -> None:
        """head_dim: the key width, where heads do not share the width."""
        super().__init__()
        outer, width = width, width if head_dim is None else heads * head_dim
        if width % heads or (rope and width // heads % 2):
            raise WrongValue(
                f"width {width} in {heads} heads makes a key width of {width / heads:g}; it must be a whole number, "
                f"and even with rotary positions. Change the width or the number of heads."
            )
        self.heads = heads
        self.span = span
        self.rope = rope
        self.qkv = nn.Linear(outer, 3 * width, bias=bias)
        self.out = nn.Linear(width, outer, bias=bias)
        self.persistent_gd = nn.Parameter(torch.randn(n_persistent, outer) * 0.02) if n_persistent else None

    def forward(self, hidden_btd: Hidden, state: Memory | None = None) -> tuple[Hidden, Memory]:
        mixed_btf, state = self.mix(hidden_btd, state)
        return self.out(mixed_btf), state

    def mix(self, hidden_btd: Hidden, state: Memory | None = None) -> tuple[Mixed, Memory]:
        """What the heads gathered, side by side, before it is projected back: where a gate can act."""
        return self._gather(self.qkv(hidden_btd), state)

    def forward_documents(self, hidden_btd: Hidden, state: State | None, documents: Documents) -> tuple[Hidden, State]:
        """The same of packed documents, of which each token sees its own."""
        mixed_btf, state = self.mix_documents(hidden_btd, state, documents)
        return self.out(mixed_btf), state

    def mix_documents(self, hidden_btd: Hidden, state: State | None, documents: Documents) -> tuple[Mixed, State]:
        """``mix`` of packed documents: a mask hides from each token the keys that are not of its document."""
        query_bthk, keys_bshk, values_bshv = self.project(hidden_btd)
        n_before, n_rows = 0, len(hidden_btd)
        here_b = torch.zeros(n_rows, dtype=torch.int64)
        if state is not None:
            n_before = state["keys_bshk"].shape[1]
            here_b = state.get(f"{LENGTHS}keys_bshk", here_b + n_before)
            keys_bshk = torch.cat([state["keys_bshk"], keys_bshk], dim=1)
            values_bshv = torch.cat([state["values_bshv"], values_bshv], dim=1)
        starts_bt = documents.starts_bt
        first_bt = n_before + torch.where(starts_bt < 0, -here_b[:, None], starts_bt)
        query_bthk = query_bthk / math.sqrt(query_bthk.shape[-1])
        mixed_bthv = self._mix(query_bthk, keys_bshk, values_bshv, first_bt.to(hidden_btd.device))
        n_read_b = keys_bshk.shape[1] - first_bt[:, -1]
        return mixed_bthv.flatten(2), self._rings(keys_bshk, values_bshv, n_read_b)

    def _rings(self, keys_bshk: PastKeys, values_bshv: PastValues, n_read_b: Tensor) -> State:
        """The state where row b has read ``n_read_b`` keys of its document; rows that differ as in ``memory.state``."""
        held_b = n_read_b if self.span is None else n_read_b.clamp(max=self.span - 1)
        longest, n_read = int(held_b.max()), keys_bshk.shape[1]
        last = {"keys_bshk": keys_bshk[:, n_read - longest :], "values_bshv": values_bshv[:, n_read - longest :]}
        if int(held_b.min()) == longest:
            return {name: leaf.clone() for name, leaf in last.items()}
        is_held_bs = (torch.arange(longest) >= longest - held_b[:, None]).to(keys_bshk.device)
        state: State = {name: torch.where(is_held_bs[:, :, None, None], leaf, 0) for name, leaf in last.items()}
        return state | {LENGTHS + name: held_b for name in last}

    @rows_apart
    def _gather(self, vectors_btf: Float[Tensor, "b t n"], state: Memory | None) -> tuple[Mixed, Memory]:
        query_bthk, keys_bshk, values_bshv = vectors_btf.unflatten(-1, (3, self.heads, -1)).unbind(2)
        past = None if state is None else (state["keys_bshk"], state["values_bshv"])
        if (span := self._fused_span(vectors_btf, *past or ())) is not None:
            mixed_btf = windowed_attention(vectors_btf, past, self.heads, span, is_rotated=self.rope)
            if past is not None and keys_bshk.shape[1] < span - 1:
                keys_bshk, values_bshv = (
                    torch.cat(each, dim=1) for each in zip(past, (keys_bshk, values_bshv), strict=True)
                )
            return mixed_btf, {"keys_bshk": self._ring(keys_bshk), "values_bshv": self._ring(values_bshv)}
        if state is not None:
            keys_bshk = torch.cat([state["keys_bshk"], keys_bshk], dim=1)
            values_bshv = torch.cat([state["values_bshv"], values_bshv], dim=1)
        mixed_bthv = self._mix(query_bthk / math.sqrt(query_bthk.shape[-1]), keys_bshk, values_bshv)
        state = {"keys_bshk": self._ring(keys_bshk), "values_bshv": self._ring(values_bshv)}
        return mixed_bthv.flatten(2), state

    def _fused_span(self, *tensors: Tensor) -> int | None:
        """The span, where the native core takes a call with these: what is projected, and past keys and values."""
        is_windowed = self.span is not None and self.persistent_gd is None
        width = tensors[0].shape[-1] // (3 * self.heads)
        return self.span if is_windowed and fuses(*tensors, width=width) else None

    def project(self, hidden_btd: Hidden) -> tuple[Queries, Keys, Values]:
        """Queries, keys and values of every head, neither scaled nor rotated."""
        query_bthk, key_bthk, value_bthv = self.qkv(hidden_btd).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return query_bthk, key_bthk, value_bthv

    def _ring(self, keys_bshk: PastKeys) -> Keys:
        """What later tokens may still see; a copy, so that it does not keep the rest in memory."""
        if self.span is None:
            return keys_bshk
        return keys_bshk[:, max(0, keys_bshk.shape[1] - self.span + 1) :].clone()

    def _mix(
        self, query_bthk: Queries, keys_bshk: PastKeys, values_bshv: PastValues, first_bt: Firsts | None = None
    ) -> Values:
        still_bthk, n_read = query_bthk, keys_bshk.shape[1]
        if self.rope:
            cos_shk, sin_shk = rope_angles(keys_bshk)
            first = n_read - query_bthk.shape[1]
            query_bthk = apply_rope(query_bthk, (cos_shk[first:], sin_shk[first:]))
            keys_bshk = apply_rope(keys_bshk, (cos_shk, sin_shk))
        if self.persistent_gd is None:
            return windowed(query_bthk, keys_bshk, values_bshv, self.span, first_bt=first_bt)
        _, pinned_bghk, pinned_bghv = self.project(self.persistent_gd[None])
        pinned_ghk, pinned_ghv = pinned_bghk[0], pinned_bghv[0]
        if self.rope:
            # A pinned key has no position and meets the query as it was: its score comes in as a channel of its own.
            query_bthk = torch.cat([query_bthk, torch.einsum("bthk,ghk->bthg", still_bthk, pinned_ghk)], dim=-1)
            keys_bshk = F.pad(keys_bshk, (0, len(pinned_ghk)))
            one_gg = torch.eye(len(pinned_ghk), dtype=keys_bshk.dtype, device=keys_bshk.device)
            pinned_ghk = F.pad(one_gg, (pinned_ghk.shape[-1], 0))[:, None].expand(-1, self.heads, -1)
        pinned = pinned_ghk, pinned_ghv
        return windowed(query_bthk, keys_bshk, values_bshv, self.span, pinned=pinned, first_bt=first_bt)


def windowed(
    query_bthk: Queries,
    keys_bshk: PastKeys,
    values_bshv: PastValues,
    span: int | None,
    *,
    pinned: tuple[Tensor, Tensor] | None = None,
    first_bt: Firsts | None = None,
) -> Values:
    """Each query sees ``span`` keys, the last of them its own; work and memory grow linearly with t.

    The keys end where the queries end and may begin before them; queries are scaled already. Queries are cut into
    blocks. Each block attends to its own keys and to those up to a window before it, gathered by copying; what lies
    outside is masked. On devices in ``FUSED`` torch's fused kernel does that, and everywhere what needs no mask of its
    own: fresh unbounded attention, and one token alone.

    pinned: keys_ghk and values_ghv that every query sees besides.
    first_bt: the first key that each query may see, by its place among the keys.
    """
    n_time, n_read = query_bthk.shape[1], keys_bshk.shape[1]
    is_fresh, is_last = span is None and n_time == n_read, n_time == 1 and n_read <= (span or n_read)
    if pinned is None and first_bt is None and (is_fresh or is_last):
        query_bhtk, keys_bhsk, values_bhsv = (x.transpose(1, 2) for x in (query_bthk, keys_bshk, values_bshv))
        is_causal = n_time > 1
        mixed_bhtv = F.scaled_dot_product_attention(query_bhtk, keys_bhsk, values_bhsv, is_causal=is_causal, scale=1.0)
        return mixed_bhtv.transpose(1, 2)
    span = n_read if span is None else span
    width = n_time if n_read <= span else min(n_time, span, BLOCK)
    blocks = _Blocks(n_time=n_time, n_before=n_read - n_time, span=span, width=width)
    pinned_ghk, pinned_ghv = pinned or (None, None)
    n_pinned = 0 if pinned_ghk is None else len(pinned_ghk)
    query_bhnck, keys_bhnsk = blocks.cut(query_bthk), blocks.gather(keys_bshk, pinned_ghk)
    if query_bthk.device.type in FUSED:
        values_bhnsv = blocks.gather(values_bshv, pinned_ghv)
        return blocks.join(blocks.fused(query_bhnck, keys_bhnsk, values_bhnsv, n_pinned, first_bt))
    score_bhncs = query_bhnck @ keys_bhnsk.transpose(-1, -2)
    if first_bt is not None:
        score_bhncs = score_bhncs.masked_fill_(blocks.is_hidden_bncs(first_bt, n_pinned)[:, None], -math.inf)
    elif n_time > 1:
        score_bhncs = score_bhncs.add_(blocks.mask_ncs(score_bhncs, n_pinned))
    return blocks.join(score_bhncs.softmax(-1) @ blocks.gather(values_bshv, pinned_ghv))


@dataclass(frozen=True)
class _Blocks:
    """How the queries of one call are cut, and which keys each block is given.

    n_before: keys that come before the first query.
    width: queries per block; the last block is filled up with zeros.
    """

    n_time: int
    n_before: int
    span: int
    width: int

    @property
    def n_blocks(self) -> int:
        return -(-self.n_time // self.width)

    @property
    def reach(self) -> int:
        """Keys that a block is given before its own: whole blocks of them, or what there is when it is the only one."""
        return self.n_before if self.n_blocks == 1 else -(-(self.span - 1) // self.width) * self.width

    def cut(self, query_bthk: Tensor) -> Tensor:
        """bthk -> bhnck"""
        return self._pad(query_bthk, front=0).transpose(1, 2).unflatten(2, (self.n_blocks, self.width))

    def join(self, mixed_bhncv: Tensor) -> Tensor:
        """bhncv -> bthv"""
        return mixed_bhncv.flatten(2, 3).transpose(1, 2)[:, : self.n_time]

    def gather(self, keys_bshk: Tensor, pinned_ghk: Tensor | None) -> Tensor:
        """bshk -> bhnsk, where s now counts the keys of one block: the pinned ones, those before it, its own."""
        keys_bhsk = self._pad(keys_bshk, front=self.reach - self.n_before).transpose(1, 2)
        if self.n_blocks == 1:
            pieces = [keys_bhsk.unsqueeze(2)]
        else:
            length = self.n_blocks * self.width
            shifted = (keys_bhsk[:, :, first : first + length] for first in range(0, self.reach + 1, self.width))
            pieces = [shifted_bhsk.unflatten(2, (self.n_blocks, self.width)) for shifted_bhsk in shifted]
        if pinned_ghk is not None:
            pinned_hgk = pinned_ghk.transpose(0, 1)
            pieces.insert(0, pinned_hgk[None, :, None].expand(*pieces[0].shape[:3], *pinned_hgk.shape[1:]))
        return torch.cat(pieces, dim=3)

    def fused(
        self, query_bhnck: Tensor, keys_bhnsk: Tensor, values_bhnsv: Tensor, n_pinned: int, first_bt: Tensor | None
    ) -> Tensor:
        """bhncv, by torch's fused kernel, which takes one axis of batches and one of heads: here rows and heads, and
        blocks, so that a mask of the blocks alone serves all rows."""
        is_seen = None
        if first_bt is not None:
            is_seen_bncs = ~self.is_hidden_bncs(first_bt, n_pinned)
            is_seen = is_seen_bncs[:, None].expand(-1, query_bhnck.shape[1], -1, -1, -1).flatten(0, 1)
        elif self.n_time > 1:
            is_seen = ~self.is_hidden_ncs(query_bhnck.device, n_pinned)
        query, keys, values = (x.flatten(0, 1) for x in (query_bhnck, keys_bhnsk, values_bhnsv))
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=is_seen, scale=1.0)
        return mixed.unflatten(0, query_bhnck.shape[:2])

    def is_hidden_ncs(self, device: torch.device, n_pinned: int) -> Tensor:
        """True where query c of block n may not see key s: for later keys, keys outside the window, and padding."""
        is_outside_cs, place_ns = self._places(device)
        return F.pad(is_outside_cs | (place_ns < 0)[:, None], (n_pinned, 0))

    def mask_ncs(self, score: Tensor, n_pinned: int) -> Tensor:
        """-inf where a key is hidden, else 0."""
        is_hidden_ncs = self.is_hidden_ncs(score.device, n_pinned)
        return torch.zeros_like(is_hidden_ncs, dtype=score.dtype).masked_fill_(is_hidden_ncs, -math.inf)

    def is_hidden_bncs(self, first_bt: Tensor, n_pinned: int) -> Tensor:
        """The same, and before the first key that a query may see."""
        is_outside_cs, place_ns = self._places(first_bt.device)
        # Queries that fill up the last block see what they like.
        first_bnc = F.pad(first_bt, (0, self.n_blocks * self.width - self.n_time)).unflatten(1, (-1, self.width))
        is_before_bncs = place_ns[:, None] < first_bnc[..., None]
        return F.pad(is_outside_cs | (place_ns < 0)[:, None] | is_before_bncs, (n_pinned, 0))

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Whether key s of a block is outside the window of its query c, and which of all keys it is in block n."""
        now_c = torch.arange(self.width, device=device)
        then_s = torch.arange(-self.reach, self.width, device=device)
        start_n = torch.arange(0, self.n_blocks * self.width, self.width, device=device)
        age_cs = now_c[:, None] - then_s
        return (age_cs < 0) | (age_cs >= self.span), start_n[:, None] + then_s + self.n_before

    def _pad(self, keys_bshk: Tensor, *, front: int) -> Tensor:
        back = self.n_blocks * self.width - self.n_time
        return F.pad(keys_bshk, (0, 0, 0, 0, front, back)) if front or back else keys_bshk


def rope_angles(keys_bshk: PastKeys, first: int = 0, *, period: int | None = None) -> Turns:
    """The angles by which ``apply_rope`` rotates keys at the positions ``first``, ``first + 1``, ...

    Positions are from 0 again at every multiple of ``period``. The pair made of channel k and channel k + half the key
    width is rotated by the angle position * base^(-2k / width).
    """
    # A graph may not keep what was made under inference mode, nor may real and fake tensors meet.
    is_real = type(keys_bshk) is torch.Tensor and not torch.compiler.is_compiling()
    is_shared = is_real and not torch.is_grad_enabled()
    make = _angles if is_shared else _angles.__wrapped__
    return make(first, keys_bshk.shape[1], keys_bshk.shape[-1], period, keys_bshk.dtype, keys_bshk.device)


@lru_cache(maxsize=8)
def _angles(first: int, n: int, width: int, period: int | None, dtype: torch.dtype, device: torch.device) -> Turns:
    """They depend on no weight, and are the same for every layer and every token once the window is full."""
    wide = torch.promote_types(dtype, torch.float32)
    position_s = torch.arange(first, first + n, dtype=wide, device=device)
    position_s = position_s if period is None else position_s % period
    exponent_k = torch.arange(0, width, 2, dtype=wide, device=device) / width
    angle_sk = position_s[:, None] * ROTATION_BASE**-exponent_k
    cos_shk, sin_shk = angle_sk.cos().to(dtype)[:, None], angle_sk.sin().to(dtype)[:, None]
    return torch.cat([cos_shk, cos_shk], dim=-1), torch.cat([-sin_shk, sin_shk], dim=-1)


def apply_rope(keys_bshk: PastKeys, by: Turns) -> PastKeys:
    """Keys rotated."""
    cos_shk, sin_shk = by
    left_bshk, right_bshk = keys_bshk.chunk(2, dim=-1)
    return keys_bshk * cos_shk + torch.cat([right_bshk, left_bshk], dim=-1) * sin_shk
