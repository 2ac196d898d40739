"""A self-reference that reads one token: what its window does, in a third of the time, for memories of one matrix.

A session that speaks reads one token after another, and there the cost is the number of operations, not their size.
Nothing here is learned or decided: the same numbers, fewer calls.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from meristem.memory.state import State
from meristem.nn.self_chunk import unit
from meristem.shapes import Hidden

if TYPE_CHECKING:
    from meristem.nn.self_reference import Memories, SelfReference


def can_decode(layer: "SelfReference", hidden_btd: Hidden, state: State | None) -> bool:
    """One token, in full precision, outside training, and memories of one matrix that are all written."""
    if hidden_btd.shape[1] != 1 or state is None or torch.is_grad_enabled():
        return False
    is_usual = layer.is_matrix and layer.query is not None and not layer.is_static
    return (
        is_usual and hidden_btd.dtype is layer.bias_hl.dtype and not torch.is_autocast_enabled(hidden_btd.device.type)
    )


def decode(layer: "SelfReference", hidden_btd: Hidden, state: State) -> tuple[Hidden, State]:
    """What the layer answers to one token, and the state after it; the state that came in stays as it was."""
    batch, heads = len(hidden_btd), layer.heads
    query_dd: Tensor = layer.query.weight  # type: ignore[union-attr]
    memory, n_after = state["memory"], state["memory"]["n_tokens"] + 1
    padded_bsd = torch.cat([state["conv"]["tail_bsd"], hidden_btd], dim=1)
    mixed_bd = (padded_bsd.mT * layer.conv.weight_dc).sum(dim=-1)
    # From here on h is rows of the batch and heads together.
    row_h1k = mixed_bd.view(batch * heads, 1, -1)
    width = row_h1k.shape[-1]
    names = ("makers", "asked")
    starts, lives = ([memory[name][at]["matrix_bhkv"].flatten(0, 1) for name in names] for at in ("start", "live"))
    made_h1v = torch.bmm(row_h1k, starts[0])
    value_h1k = made_h1v[..., width : 2 * width]
    vectors = [functional.linear(mixed_bd, query_dd).view_as(row_h1k), made_h1v[..., :width]]
    found_hlk = unit(torch.cat([*vectors, value_h1k] if layer.unit_value else vectors, dim=1))
    query_h1k, key_h1k, value_h1k = (*found_hlk.split(1, dim=1), value_h1k)[:3]
    gate_bhl = made_h1v[..., 2 * width :].view(batch, heads, 2, width).mean(dim=-1) + layer.bias_hl
    gate_hl1 = gate_bhl.view(-1, 2, 1)
    rate_h1k = layer.eta_scale * functional.softplus(gate_hl1[:, :1]) * key_h1k
    retain_h11 = gate_hl1[:, 1:].sigmoid()
    read_h1k = torch.bmm(query_h1k, lives[1])
    normed_bd = functional.rms_norm(read_h1k, (width,), layer.norm.gain_d, layer.norm.eps).view(batch, -1)
    gate_bd = functional.linear(hidden_btd[:, 0], layer.gate.weight, layer.gate.bias).sigmoid()
    out_bd = functional.linear(normed_bd * gate_bd, layer.out.weight)
    after: State = {"n_tokens": n_after}
    for name, start_hkv, live_hkv in zip(names, starts, lives, strict=True):
        teach, chunk = (layer.makers, layer.chunk_other) if name == "makers" else (layer.memory, layer.chunk_memory)
        new_h1v = torch.baddbmm(_wanted(teach, start_hkv, key_h1k, value_h1k), key_h1k, live_hkv, alpha=-1)
        live_hkv = torch.addcmul(rate_h1k.mT * new_h1v, retain_h11, live_hkv)
        live_bhkv = live_hkv.unflatten(0, (batch, heads))
        start_bhkv = _began(live_bhkv, memory[name]["start"]["matrix_bhkv"], n_after % chunk == 0)
        after[name] = {"start": {"matrix_bhkv": start_bhkv}, "live": {"matrix_bhkv": live_bhkv}}
    return out_bd[:, None], {"memory": after, "conv": {"tail_bsd": padded_bsd[:, 1:]}}


def _began(live_bhkv: Tensor, start_bhkv: Tensor, is_over: bool | Tensor) -> Tensor:
    """What the chunk of the next token began with; of every row by itself where rows have read differently."""
    if isinstance(is_over, Tensor):
        return torch.where(is_over.to(live_bhkv.device)[:, None, None, None], live_bhkv, start_bhkv)
    return live_bhkv if is_over else start_bhkv


def _wanted(teach: "Memories", start_hkv: Tensor, key_h1k: Tensor, value_h1k: Tensor) -> Tensor:
    """What the memories are to recall for the key."""
    if teach.is_generated:
        return torch.bmm(value_h1k - key_h1k if teach.is_squared else value_h1k, start_hkv)
    wanted_h1v = value_h1k.repeat(1, 1, len(teach.names))
    return torch.baddbmm(wanted_h1v, key_h1k, start_hkv, alpha=-1) if teach.is_squared else wanted_h1v
