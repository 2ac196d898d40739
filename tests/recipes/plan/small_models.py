"""Small models with a part of each kind, and the truth about a step: what torch's profiler saw the allocator do."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Stage = Callable[[str], None]


class Block(nn.Module):
    """Causal attention and a feed-forward part, both residual."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(width)
        self.joined = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, hidden_btd: Tensor) -> Tensor:
        b, t, d = hidden_btd.shape
        joined = self.joined(self.norm(hidden_btd)).view(b, t, 3, self.n_heads, d // self.n_heads)
        query_bhtk, key_bhtk, value_bhtv = joined.permute(2, 0, 3, 1, 4)
        read_bhtv = F.scaled_dot_product_attention(query_bhtk, key_bhtk, value_bhtv, is_causal=True)
        hidden_btd = hidden_btd + read_bhtv.transpose(1, 2).reshape(b, t, d)
        return hidden_btd + self.mlp(hidden_btd)


class Stack(nn.Module):
    """Embedding, the given layers in turn, a head."""

    def __init__(self, width: int, vocabulary: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        hidden_btd = self.embed(tokens_bt)
        for layer in self.layers:
            hidden_btd = layer(hidden_btd)
            hidden_btd = hidden_btd[0] if isinstance(hidden_btd, tuple) else hidden_btd
        return self.head(hidden_btd)


class ShortConv(nn.Module):
    """A depthwise causal convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 4, groups=width, padding=3)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return F.silu(self.conv(hidden_btd.transpose(1, 2))[..., :-3]).transpose(1, 2)


def blocks() -> nn.Module:
    return Stack(60, 251, [Block(60, 5), Block(60, 5)])


def shared() -> nn.Module:
    """One block that runs three times."""
    block = Block(60, 5)
    return Stack(60, 251, [block, block, block])


def recurrent() -> nn.Module:
    return Stack(36, 251, [nn.GRU(36, 36, 2, batch_first=True)])


def convolved() -> nn.Module:
    return Stack(44, 251, [ShortConv(44)])


MODELS = [blocks, shared, recurrent, convolved]


def train(model: nn.Module, batch: int, window: int, stage: Stage = lambda name: None) -> None:
    """Two steps as any trainer takes them."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        tokens_bt = torch.randint(0, 251, (batch, window + 1))
        stage("forward")
        logits_bto = model(tokens_bt[:, :-1])
        loss = F.cross_entropy(logits_bto.flatten(0, 1), tokens_bt[:, 1:].flatten())
        del logits_bto
        stage("backward")
        loss.backward()
        stage("clip")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stage("optimizer")
        optimizer.step()
        optimizer.zero_grad()


def profiled_peak(model: nn.Module, call: Callable[[], object]) -> int:
    """The most bytes that parameters, buffers and everything allocated during a call occupied at once.

    What an operation takes and gives back before it ends is scratch space of its kernel, of which no plan is made: some
    lay out their inputs anew, and oneDNN packs the matrices of products in bfloat16 on processors with units for it.
    """
    standing = [*model.parameters(), *model.buffers()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    moves = [move for event in profiler.profiler.kineto_results.experimental_event_tree() for move in _moves(event)]
    live_bytes = peak_bytes = sum(tensor.untyped_storage().nbytes() for tensor in standing)
    for _, size_bytes, _ in sorted(moves):
        live_bytes += size_bytes
        peak_bytes = max(peak_bytes, live_bytes)
    return peak_bytes


def _moves(event: Any) -> list[tuple[int, int, int]]:
    """When memory was taken or given back inside an event, how many bytes, and where they lie."""
    if event.name == "[memory]":
        return [(event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr)]
    moves = [move for child in event.children for move in _moves(child)]
    if not _is_kernel(event.name):
        return moves
    taken: dict[int, tuple[int, int, int]] = {}
    lasting = []
    for move in sorted(moves):
        if move[1] > 0:
            taken[move[2]] = move
        elif taken.pop(move[2], None) is None:
            lasting.append(move)
    return [*lasting, *taken.values()]


@cache
def _is_kernel(name: str) -> bool:
    """Whether this is one operation where a plan follows operations, and not made of others there."""
    namespace, _, operation = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), operation, None) if operation.isidentifier() else None
    if packet is None:
        return False
    names = [name if overload == "default" else f"{name}.{overload}" for overload in packet.overloads()]
    known = [each for each in names if torch._C._dispatch_has_kernel(each)]
    return not any(torch._C._dispatch_has_kernel_for_dispatch_key(each, "CompositeImplicitAutograd") for each in known)
