"""Memory as context: a segment attends to what the memory of earlier ones recalls (Titans 2501.00663, eqs. 21-25)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from meristem.errors import WrongValue
from meristem.memory.value import State
from meristem.nn.attention import Attention, turned
from meristem.nn.combine import COMBINATIONS
from meristem.nn.part import MemoryPart
from meristem.nn.recall import recall_of
from meristem.shapes import Hidden, Keys, Queries, Values


class MemoryAsContext(nn.Module):
    """For every segment X of ``segment`` tokens, M the memory as the segment began:

    ``h = M(X W_Q)``, ``y = attention([p | h | X])``, ``o = (y x M*(y)) W``; M* has y written into it.

    h_t is made from x_t, so a causal mask over the joined sequence would show all h to the first token of a segment:
    a leak. h_t and x_t have the same time here, and x_t sees the persistent vectors p, the h up to t and the x up to t
    (memory.md 5.3, ``causal_pair``). Of y the rows of X are written, which are those that the output is made of.

    State: the memory now and as the segment began, and the keys, at their positions, and values of an unfinished
    segment.
    """

    def __init__(
        self, width: int, part: MemoryPart, *, attention: Attention, segment: int, combine: str = "normalised"
    ) -> None:
        super().__init__()
        if segment < 1:
            raise WrongValue(f"found a segment of {segment} tokens; expected 1 or more. Raise it.", value=segment)
        self.segment = segment
        self.attention = attention
        self.recall = recall_of(width, part, is_asked=True)
        self.ask = nn.Linear(width, width, bias=False)
        self.combine = COMBINATIONS[combine](width, part.head_width)

    @property
    def out(self) -> nn.Linear:
        """The last projection of this branch."""
        return self.attention.out

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        state = self._fresh(hidden_btd) if state is None else state
        n_read = state["keys_bshk"].shape[1]
        still_bthk, key_bthk, value_bthv = self.attention.project(hidden_btd)
        still_bthk = still_bthk / math.sqrt(still_bthk.shape[-1])
        window = [self.ask(hidden_btd), still_bthk, self._placed(still_bthk, n_read), self._placed(key_bthk, n_read)]
        attended, recalled, at = [], [], 0
        while at < hidden_btd.shape[1]:
            stop = min(hidden_btd.shape[1], at + self.segment - state["keys_bshk"].shape[1])
            parts = [x[:, at:stop] for x in (*window, value_bthv)]
            attended_btd, recalled_btd, state = self._read(parts, state)
            attended.append(attended_btd)
            recalled.append(recalled_btd)
            at = stop
        combined_btd = self.combine(torch.cat(attended, dim=1), torch.cat(recalled, dim=1), hidden_btd)
        return self.out(combined_btd), state

    def _placed(self, keys_bthk: Keys, n_read: int) -> Keys:
        """Keys at their positions in the segment, ``n_read`` tokens of which were read before."""
        if not self.attention.rope:
            return keys_bthk
        return turned(keys_bthk, n_read, period=self.segment)

    def _fresh(self, hidden_btd: Hidden) -> State:
        begun = self.recall.begin(hidden_btd)
        return {"recall": begun, "start": begun, **self._empty(hidden_btd)}

    def _empty(self, hidden_btd: Hidden) -> State:
        batch, _, width = hidden_btd.shape
        empty = hidden_btd.new_zeros(batch, 0, self.attention.heads, width // self.attention.heads)
        names = ("keys_bshk", "values_bshv", "context_keys_bshk", "context_values_bshv")
        return dict.fromkeys(names, empty)

    def _read(self, parts: list[Tensor], state: State) -> tuple[Hidden, Hidden, State]:
        """What tokens of one segment gather, what the memory recalls when that is written, and the state after them."""
        asked_btd, still_bthk, query_bthk, key_bthk, value_bthv = parts
        n_read, width = state["keys_bshk"].shape[1], asked_btd.shape[-1]
        context_btd = self.recall.look(asked_btd, state["start"])
        both_btd = functional.linear(context_btd, self.attention.qkv.weight[width:])
        context_key_bthk, context_value_bthv = both_btd.unflatten(-1, (2, self.attention.heads, -1)).unbind(2)
        new = (key_bthk, value_bthv, self._placed(context_key_bthk, n_read), context_value_bthv)
        names = ("keys_bshk", "values_bshv", "context_keys_bshk", "context_values_bshv")
        seen = {name: torch.cat([state[name], x], dim=1) if n_read else x for name, x in zip(names, new, strict=True)}
        attended_btd = self._attend(still_bthk, query_bthk, seen)
        recalled_btd, recall = self.recall(attended_btd, state["recall"])
        if n_read + asked_btd.shape[1] == self.segment:
            return attended_btd, recalled_btd, {"recall": recall, "start": recall, **self._empty(asked_btd)}
        return attended_btd, recalled_btd, {"recall": recall, "start": state["start"], **seen}

    def _attend(self, still_bthk: Queries, query_bthk: Queries, seen: State) -> Hidden:
        """Each query sees the persistent vectors, and in its segment what came before it and itself, twice."""
        n_read, n_time = seen["keys_bshk"].shape[1], query_bthk.shape[1]
        keys_bshk = torch.cat([seen["context_keys_bshk"], seen["keys_bshk"]], dim=1)
        score_bhts = torch.einsum("bthk,bshk->bhts", query_bthk, keys_bshk)
        is_later_ts = torch.ones(n_time, n_read, dtype=torch.bool, device=query_bthk.device).triu(n_read - n_time + 1)
        score_bhts = score_bhts.masked_fill(is_later_ts.repeat(1, 2), -math.inf)
        values_bshv = torch.cat([seen["context_values_bshv"], seen["values_bshv"]], dim=1)
        if self.attention.persistent_gd is not None:
            _, pinned_bghk, pinned_bghv = self.attention.project(self.attention.persistent_gd[None])
            pinned_bhtg = torch.einsum("bthk,ghk->bhtg", still_bthk, pinned_bghk[0])
            score_bhts = torch.cat([pinned_bhtg, score_bhts], dim=-1)
            values_bshv = torch.cat([pinned_bghv.expand(len(values_bshv), -1, -1, -1), values_bshv], dim=1)
        mixed_bthv: Values = torch.einsum("bhts,bshv->bthv", score_bhts.softmax(-1), values_bshv)
        return mixed_bthv.flatten(2)
