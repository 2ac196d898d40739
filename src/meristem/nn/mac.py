"""Memory as context: a segment attends to what the memory of earlier ones recalls (Titans 2501.00663, eqs. 21-25)."""

import math
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from meristem.errors import WrongValue
from meristem.memory.state import State, rows_apart
from meristem.nn.attention import Attention, Turns, apply_rope, rope_angles
from meristem.nn.combine import COMBINATIONS
from meristem.nn.config import MemoryConfig
from meristem.nn.memory import build_memory
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.segments import Inputs, by_segment, by_token, read_segments
from meristem.nn.token_pooling import spans
from meristem.nn.write import can_write, is_bare, memories_of, rule_of, state_of
from meristem.shapes import Hidden, Keys, Queries, Values

SEEN: Final = ("keys_bshk", "values_bshv", "context_keys_bshk", "context_values_bshv")
"""What the state holds of an unfinished segment."""


class MemoryAsContext(nn.Module):
    """For every segment X of ``segment`` tokens, M the memory as the segment began:

    ``h = M(X W_Q)``, ``y = attention([p | h | X])``, ``o = (y x M*(y)) W``; M* has y written into it.

    h_t is made from x_t, so a causal mask over the joined sequence would show all h to the first token of a segment:
    a leak. h_t and x_t have the same time here, and x_t sees the persistent vectors p, the h up to t and the x up to t
    (memory.md 5.3, ``causal_pair``). Of y the rows of X are written, which are those that the output is made of.

    State: the memory now and as the segment began, and the keys, at their positions, and values of an unfinished
    segment.
    """

    matrices: ClassVar = frozenset({"ask.weight"})
    is_writing = True
    """False in a frozen reader (``models.online.frozen``)."""

    def __init__(
        self, width: int, config: MemoryConfig, *, attention: Attention, segment: int, combine: str = "gated"
    ) -> None:
        super().__init__()
        if segment < 1:
            raise WrongValue(f"found a segment of {segment} tokens; expected 1 or more. Raise it.", value=segment)
        self.segment = segment
        self.attention = attention
        self.recall = build_memory(width, config, is_queried=True)
        self.ask = nn.Linear(width, width, bias=False)
        self.combine = COMBINATIONS[combine](width, config.head_dim)

    @property
    def out(self) -> nn.Linear:
        """The last projection of this branch."""
        return self.attention.out

    @rows_apart
    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        state = self._fresh(hidden_btd) if state is None else state
        segments, whole = self._cut(hidden_btd, state)
        attended, recalled = [], []
        for segment in segments:
            read = self._read if segment.query_btd.shape[1] <= self.segment else self._read_together
            attended_btd, recalled_btd, state = read(segment, whole, state)
            attended.append(attended_btd)
            recalled.append(recalled_btd)
        combined_btd = self.combine(torch.cat(attended, dim=1), torch.cat(recalled, dim=1), hidden_btd)
        return self.out(combined_btd), state

    def _fresh(self, hidden_btd: Hidden) -> State:
        begun = self.recall.init_state(hidden_btd)
        return {"recall": begun, "start": begun, **self._empty(hidden_btd)}

    def _empty(self, hidden_btd: Hidden) -> State:
        batch, _, width = hidden_btd.shape
        empty = hidden_btd.new_zeros(batch, 0, self.attention.heads, width // self.attention.heads)
        return dict.fromkeys(SEEN, empty)

    def _sizes(self, hidden_btd: Hidden, state: State) -> list[int]:
        """How many tokens are read together: those of a segment, or of all whole ones where the core reads these."""
        n_read = state["keys_bshk"].shape[1]
        sizes = [stop - begin for begin, stop in spans(n_read, hidden_btd.shape[1], self.segment)]
        whole = sizes.count(self.segment)
        if whole < 2 or not self._can_read_together(hidden_btd, state):
            return sizes
        first = sizes.index(self.segment)
        return [*sizes[:first], whole * self.segment, *sizes[first + whole :]]

    def _can_read_together(self, hidden_btd: Hidden, state: State) -> bool:
        recall: Any = self.recall
        if not self.is_writing or torch.is_autocast_enabled(hidden_btd.device.type):
            return False
        if not (is_bare(recall, NeuralMemory) and is_bare(recall.qkv, nn.Linear)):
            return False
        n_kept, whole_btd = recall.conv.weight_dc.shape[1] - 1, hidden_btd[:, : self.segment]
        weights = recall.gates.weight_hd, recall.qkv.weight, self.attention.qkv.weight
        is_one_kind = all(x.dtype == hidden_btd.dtype for x in (*weights, *state["start"]["memory"].values()))
        return is_one_kind and self.segment >= n_kept and can_write(recall, whole_btd, state["recall"])

    def _cut(self, hidden_btd: Hidden, state: State) -> tuple[list["Segment"], "Whole"]:
        """The sequence in segments, or several that are read together; what does not wait for a memory is done here for
        all of them at once."""
        n_read, sizes = state["keys_bshk"].shape[1], self._sizes(hidden_btd, state)
        still_bthk, key_bthk, value_bthv = self.attention.project(hidden_btd)
        query_bthk = still_bthk = still_bthk / math.sqrt(still_bthk.shape[-1])
        rotated: list[Turns | None] = [None] * len(sizes)
        if self.attention.rope:
            by = rope_angles(still_bthk, n_read, period=self.segment)
            query_bthk, key_bthk = apply_rope(still_bthk, by), apply_rope(key_bthk, by)
            rotated = list(zip(*(x.split(sizes) for x in by), strict=True))
        pinned: list[Tensor | None] = [None] * len(sizes)
        pinned_ghv = None
        if self.attention.persistent_gd is not None:
            _, pinned_bghk, pinned_bghv = self.attention.project(self.attention.persistent_gd[None])
            pinned_ghv = pinned_bghv[0]
            pinned_bhtg = torch.einsum("bthk,ghk->bhtg", still_bthk, pinned_bghk[0])
            pinned = list(pinned_bhtg.split(sizes, dim=2))
        longest = min(self.segment, n_read + hidden_btd.shape[1])
        is_later_ts = torch.ones(longest, longest, dtype=torch.bool, device=hidden_btd.device).triu(1)
        cut = [x.split(sizes, dim=1) for x in (self.ask(hidden_btd), query_bthk, key_bthk, value_bthv)]
        segments = [Segment(*x) for x in zip(*cut, pinned, rotated, strict=True)]
        return segments, Whole(self.attention.qkv.weight[hidden_btd.shape[-1] :], pinned_ghv, is_later_ts)

    def _read(self, segment: "Segment", whole: "Whole", state: State) -> tuple[Hidden, Hidden, State]:
        """What tokens of one segment gather, what the memory recalls when that is written, and the state after them."""
        n_read, heads = state["keys_bshk"].shape[1], self.attention.heads
        both_btd = functional.linear(self.recall.read(segment.query_btd, state["start"]), whole.weight_fd)
        context_key_bthk, context_value_bthv = both_btd.unflatten(-1, (2, heads, -1)).unbind(2)
        if segment.by is not None:
            context_key_bthk = apply_rope(context_key_bthk, segment.by)
        new = (segment.key_bthk, segment.value_bthv, context_key_bthk, context_value_bthv)
        seen = {name: torch.cat([state[name], x], dim=1) if n_read else x for name, x in zip(SEEN, new, strict=True)}
        attended_btd = self._attend(segment, whole, seen)
        read = self.recall if self.is_writing else self.recall.forward_frozen
        recalled_btd, recall = read(attended_btd, state["recall"])
        if n_read + attended_btd.shape[1] == self.segment:
            return attended_btd, recalled_btd, {"recall": recall, "start": recall, **self._empty(attended_btd)}
        return attended_btd, recalled_btd, {"recall": recall, "start": state["start"], **seen}

    def _read_together(self, segment: "Segment", whole: "Whole", state: State) -> tuple[Hidden, Hidden, State]:
        """The same of several whole segments, none of them begun."""
        recall: Any = self.recall
        length = self.segment
        vectors = recall.to_queries(segment.query_btd), segment.query_bthk, segment.key_bthk, segment.value_bthv
        asked_nbhck, query_nbhck, keys_nbhck, values_nbhcv = (by_segment(x, length) for x in vectors)
        pinned_nbhcg = None
        if segment.pinned_bhtg is not None:
            pinned_nbhcg = segment.pinned_bhtg.unflatten(2, (-1, length)).permute(2, 0, 1, 3, 4)
        gates_fd, bias_f = recall.gates.map()
        inputs = Inputs(
            asked_nbhck,
            query_nbhck,
            keys_nbhck,
            values_nbhcv,
            pinned_nbhcg,
            whole.pinned_ghv,
            whole.weight_fd,
            recall.qkv.weight,
            gates_fd,
            bias_f,
            recall.conv.weight_dc,
            recall.gates.most_momentum(),
            *memories_of(recall, state["recall"], segment.query_btd.dtype),
        )
        turns = None if segment.by is None else (segment.by[0][:length, 0], segment.by[1][:length, 0])
        found = read_segments(inputs, rule_of(recall), turns)
        recalled = state_of(recall, found.memory_bhkv, found.moving_bhkv, found.tail_bsd)
        left = {"recall": recalled, "start": recalled, **self._empty(segment.query_btd)}
        return by_token(found.attended_nbcd), by_token(found.recalled_nbcd), left

    def _attend(self, segment: "Segment", whole: "Whole", seen: State) -> Hidden:
        """Each query sees the persistent vectors, and in its segment what came before it and itself, twice."""
        n_read, n_time = seen["keys_bshk"].shape[1], segment.query_bthk.shape[1]
        keys_bshk = torch.cat([seen["context_keys_bshk"], seen["keys_bshk"]], dim=1)
        values = [seen["context_values_bshv"], seen["values_bshv"]]
        score_bhts = torch.einsum("bthk,bshk->bhts", segment.query_bthk, keys_bshk)
        if n_time > 1:
            is_later_ts = whole.is_later_ts[n_read - n_time : n_read, :n_read]
            score_bhts = score_bhts.masked_fill(is_later_ts.repeat(1, 2), -math.inf)
        if segment.pinned_bhtg is not None and whole.pinned_ghv is not None:
            score_bhts = torch.cat([segment.pinned_bhtg, score_bhts], dim=-1)
            values = [whole.pinned_ghv.expand(len(score_bhts), -1, -1, -1), *values]
        mixed_bthv: Values = torch.einsum("bhts,bshv->bthv", score_bhts.softmax(-1), torch.cat(values, dim=1))
        return mixed_bthv.flatten(2)


class Segment(NamedTuple):
    """A segment or what a sequence holds of one. ``by``: its rotations; pinned_bhtg: scores of the persistent
    vectors."""

    query_btd: Hidden
    query_bthk: Queries
    key_bthk: Keys
    value_bthv: Values
    pinned_bhtg: Tensor | None
    by: Turns | None


class Whole(NamedTuple):
    """What all segments of a sequence share: the projection of what is recalled, persistent values, and which of two
    tokens of a segment is later."""

    weight_fd: Tensor
    pinned_ghv: Tensor | None
    is_later_ts: Tensor
