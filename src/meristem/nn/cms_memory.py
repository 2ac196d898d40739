"""Memories side by side that learn at different speeds: a continuum memory system (Nested Learning 2512.24695).

Level l has a period C_l in tokens, the fastest 1. It fires where the number of tokens read is a multiple of its period,
and only then can what it learned be read. The number is part of the state; whoever needs to know which levels
fire reads it before it moves on (memory.md 6.1, 6.3, 6.5, 6.8).
"""

import math
from collections.abc import Iterable, Iterator
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from meristem.errors import ConflictingKeys
from meristem.memory import Gates
from meristem.memory.forms import run_trusted
from meristem.memory.forms.by_chunk import finished
from meristem.memory.state import State, rows_apart
from meristem.nn.config import LevelsConfig, MemoryConfig
from meristem.nn.frequency import Frequency
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.norm import RMSNorm
from meristem.nn.token_pooling import Groups, group_means, hold, spans, wide
from meristem.shapes import Gate, Hidden


class CMSMemory(nn.Module):
    """``y_t = sum_l c_l a_lt y_lt`` over the levels, whose memories read the same tokens at different speeds.

    Every token reads all levels. c: 1 each, 1 / sqrt(their number), or a learned softmax, uniform at the start. a is 1
    unless the frequency of a level is learned (``nn.frequency``).

    is_queried: ``read`` mixes with a learned softmax of its own where outputs are mixed so (memory.md 5.3).
    State: the number of tokens read, how many of them by a frozen reader, what each level carries, and what the learned
    frequencies carry.
    """

    def __init__(self, width: int, config: MemoryConfig, *, is_queried: bool = False) -> None:
        super().__init__()
        self.width, self.config, self.is_queried = width, config, is_queried
        levels = config.levels
        self.level = nn.ModuleList(_level(width, config, level) for level in range(levels.count))
        is_learned = levels.joined_by == "softmax"
        self.mix_l = nn.Parameter(torch.zeros(levels.count)) if is_learned else None
        self.look_mix_l = nn.Parameter(torch.zeros(levels.count)) if is_learned and is_queried else None
        self.frequency = None if levels.frequency == "fixed" else Frequency(width, levels)

    @property
    def heads(self) -> int:
        """How many heads the output consists of."""
        return next(level.recall.heads for _, level in self.named_levels())

    def init_state(self, hidden_btd: Hidden) -> State:
        """The state of a reader that has read nothing; ``hidden_btd`` gives batch, dtype and device."""
        state: State = {
            "count": 0,
            "n_frozen": 0,
            "level": {str(index): level.init_state(hidden_btd) for index, level in self.named_levels()},
        }
        return state | ({} if self.frequency is None else {"frequency": self.frequency.init_state(hidden_btd)})

    @rows_apart
    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        state = self.init_state(hidden_btd) if state is None else state
        count = state["count"]
        on: list[Gate] = []
        after: State = {"count": count + hidden_btd.shape[1], "n_frozen": state.get("n_frozen", 0), "level": {}}
        if self.frequency is not None:
            on_btl, after["frequency"] = self.frequency(hidden_btd, state["frequency"], count)
            on = [torch.ones_like(on_btl[..., :1]), *on_btl.split(1, dim=-1)]
        is_writing = self.config.levels.frequency == "write"
        stride = self._stride(count, hidden_btd.shape[1])
        seen_btd = hidden_btd if stride == 1 else _means(hidden_btd, stride)
        outputs: list[Tensor] = []
        for index, level in self.named_levels():
            if stride > 1 and isinstance(level, PooledTokens):
                output_btd, after["level"][str(index)] = level.of_means(
                    seen_btd, state["level"][str(index)], count, stride
                )
                outputs.append(output_btd)
                continue
            write_bt1 = on[index] if is_writing else None
            written = _counted(level, state)
            output_btd, after["level"][str(index)] = level(hidden_btd, state["level"][str(index)], written, write_bt1)
            outputs.append(output_btd if is_writing or not on else (on[index] * output_btd).to(output_btd.dtype))
        return self._joined(outputs, self.mix_l, stride), after

    @rows_apart
    def forward_frozen(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        """The same of memories that are not written, whose periods are frozen; means of tokens are read as ever."""
        state = self.init_state(hidden_btd) if state is None else state
        n_time, on_btl = hidden_btd.shape[1], None
        after = state | {"count": state["count"] + n_time, "n_frozen": state.get("n_frozen", 0) + n_time, "level": {}}
        if self.frequency is not None:
            on_btl, after["frequency"] = self.frequency(hidden_btd, state["frequency"], state["count"])
        outputs: list[Tensor] = []
        for index, level in self.named_levels():
            carried, counted = state["level"][str(index)], _counted(level, state)
            output_btd, after["level"][str(index)] = level.forward_frozen(hidden_btd, carried, counted)
            if on_btl is not None and index > 0 and self.config.levels.frequency == "output":
                output_btd = (on_btl[..., index - 1 : index] * output_btd).to(output_btd.dtype)
            outputs.append(output_btd)
        return self._joined(outputs, self.mix_l), after

    def read(self, query_btd: Hidden, state: State) -> Hidden:
        """What the memories, as they stand, recall of the given vectors, mixed; nothing is written."""
        carried = state["level"]
        outputs = [
            level.read(query_btd, carried[str(index)], _counted(level, state)) for index, level in self.named_levels()
        ]
        return self._joined(outputs, self.mix_l if self.look_mix_l is None else self.look_mix_l)

    def shares(self) -> Tensor:
        """c_l: the weight of each level's output."""
        return self._shares_l(self.mix_l)

    def named_levels(self) -> Iterator[tuple[int, "Level"]]:
        """The levels with their numbers, the fastest first."""
        return enumerate(cast("Iterable[Level]", self.level))

    def _shares_l(self, mix_l: Tensor | None) -> Tensor:
        if mix_l is not None:
            return mix_l.softmax(dim=0)
        n_levels = len(self.level)
        share = 1 / math.sqrt(n_levels) if self.config.levels.joined_by == "inv_sqrt" else 1.0
        return torch.full((n_levels,), share)

    def _stride(self, count: int, n_time: int) -> int:
        """How many tokens slow levels may take together: those of the second level's period, where all others are
        multiples of it, the sequence is one, and none has a gate of its own. They then pass over the sequence once."""
        levels = self.config.levels
        if levels.count < 3 or levels.tokens != "pooled" or self.frequency is not None or n_time == 0:
            return 1
        stride = levels.all_periods[1]
        return 1 if any(length % stride for length in (count, n_time, *levels.all_periods[1:])) else stride

    def _joined(self, outputs: list[Tensor], mix_l: Tensor | None, stride: int = 1) -> Hidden:
        """The weighted sum. stride: tokens that read one row of the slow levels' outputs."""
        if len(outputs) == 1 and mix_l is None:
            return outputs[0]
        share_l = None if mix_l is None else self._shares_l(mix_l).to(outputs[0].dtype)
        heard = [x.to(outputs[0].dtype) for x in outputs]
        heard = heard if share_l is None else [share * x for share, x in zip(share_l, heard, strict=True)]
        slow_btd = heard[1] if len(heard) > 1 else heard[0]
        for slower_btd in heard[2:]:
            slow_btd = slow_btd + slower_btd
        if len(heard) == 1:
            return slow_btd
        joined_btd = heard[0] + (slow_btd if stride == 1 else slow_btd.repeat_interleave(stride, dim=1))
        # In place: a buffer of this size is slow to allocate.
        is_scaled = self.config.levels.joined_by == "inv_sqrt"
        return joined_btd.div_(math.sqrt(len(outputs))) if is_scaled else joined_btd


class EveryToken(nn.Module):
    """A level that is written and read at every token: the plain memory, begun afresh after ``reset_after`` tokens."""

    def __init__(self, recall: NeuralMemory, reset_after: int | None) -> None:
        super().__init__()
        self.recall, self.reset_after, self.n_apart = recall, reset_after, 1

    def init_state(self, hidden_btd: Hidden) -> State:
        return self.recall.init_state(hidden_btd)

    def forward(
        self, hidden_btd: Hidden, state: State, count: int, write_bt1: Tensor | None = None
    ) -> tuple[Hidden, State]:
        """count: tokens read before. The fastest level always writes."""
        return _recalled(self.recall, hidden_btd, state, count=count, reset_after=self.reset_after)

    def forward_frozen(self, hidden_btd: Hidden, state: State, count: int) -> tuple[Hidden, State]:
        return _recalled_frozen(self.recall, hidden_btd, state, count=count, reset_after=self.reset_after)

    def read(self, query_btd: Hidden, state: State, count: int) -> Hidden:
        return self.recall.read(query_btd, state)


class PooledTokens(nn.Module):
    """A level that is written once per period: the mean of the period's tokens, brought to unit size.

    The tokens of the next period get the memory's output for that mean, ``out[floor(t / period) - 1]``; those of
    the first get 0 (memory.md 6.5). The more numbers a mean is made of, the smaller it is; without the norm a slow
    level would add little.

    State: the memory and the convolution's tail, the sum over the unfinished period, the last output, and the number of
    means that a frozen reader read.
    """

    def __init__(self, recall: NeuralMemory, reset_after: int | None, *, width: int, period: int) -> None:
        super().__init__()
        self.recall, self.reset_after, self.n_apart = recall, reset_after, period
        self.norm = RMSNorm(width)

    def init_state(self, hidden_btd: Hidden) -> State:
        batch, _, width = hidden_btd.shape
        zeros_bd = hidden_btd.new_zeros(batch, width, dtype=wide(hidden_btd.dtype))
        return self.recall.init_state(hidden_btd) | {"sum_bd": zeros_bd, "last_bd": zeros_bd, "n_frozen": 0}

    def forward(
        self, hidden_btd: Hidden, state: State, count: int, write_bt1: Tensor | None = None
    ) -> tuple[Hidden, State]:
        """count: tokens read before. Pooling is the schedule of writes, so that no gate acts on them."""
        return self.of_means(hidden_btd, state, count, 1)

    def forward_frozen(self, hidden_btd: Hidden, state: State, count: int) -> tuple[Hidden, State]:
        return self.of_means(hidden_btd, state, count, 1, is_frozen=True)

    def of_means(
        self, hidden_btd: Hidden, state: State, count: int, stride: int, *, is_frozen: bool = False
    ) -> tuple[Hidden, State]:
        """The same where every vector is the mean of ``stride`` tokens, by which period and count can be divided."""
        period, n_begun, n_time = self.n_apart // stride, count % self.n_apart // stride, hidden_btd.shape[1]
        mean_bnd, sum_bd = group_means(hidden_btd, state["sum_bd"] / stride, period=period, n_begun=n_begun)
        carried = {"memory": state["memory"], "conv": state["conv"]}
        read_bnd, n_frozen = mean_bnd, state.get("n_frozen", 0)
        if mean_bnd.shape[1]:
            normed_bnd = self.norm(mean_bnd.to(hidden_btd.dtype))
            begun, read = count // self.n_apart - n_frozen, _recalled_frozen if is_frozen else _recalled
            read_bnd, carried = read(self.recall, normed_bnd, carried, count=begun, reset_after=self.reset_after)
            n_frozen += mean_bnd.shape[1] if is_frozen else 0
            read_bnd = read_bnd.to(sum_bd.dtype)
        held_btd, last_bd = hold(read_bnd, state["last_bd"], period=period, n_begun=n_begun, n_time=n_time)
        return held_btd, {**carried, "sum_bd": sum_bd * stride, "last_bd": last_bd, "n_frozen": n_frozen}

    def read(self, query_btd: Hidden, state: State, count: int) -> Hidden:
        return self.recall.read(query_btd, state)


class DelayedRead(nn.Module):
    """A level that is written at every token and read as it was when the last period ended (memory.md 6.1).

    The copy that is read is replaced at multiples of the period by the one that is written, which then begins afresh
    after ``reset_after`` periods.

    State: ``memory``, which is written, ``read``, which is read, and the convolution's tail.
    """

    def __init__(self, recall: NeuralMemory, reset_after: int | None, *, period: int) -> None:
        super().__init__()
        self.recall, self.reset_after, self.n_apart = recall, reset_after, period

    def init_state(self, hidden_btd: Hidden) -> State:
        begun = self.recall.init_state(hidden_btd)
        return begun | {"read": begun["memory"]}

    def forward(
        self, hidden_btd: Hidden, state: State, count: int, write_bt1: Tensor | None = None
    ) -> tuple[Hidden, State]:
        """count: tokens read before. write_bt1: 1 where the memory changes, 0 where it stays."""
        query_bthk, key_bthk, value_bthv, tail = self.recall.project(hidden_btd, state["conv"])
        gates = self.recall.gates(hidden_btd)
        gates = gates if write_bt1 is None else _only_where(gates, write_bt1)
        memory, read = state["memory"], state["read"]
        reads = []
        for begin, stop in spans(count, hidden_btd.shape[1], self.n_apart):
            if (count + begin) % self.n_apart == 0:
                memory, read = self._fired(memory, (count + begin) // self.n_apart, hidden_btd.shape[0])
            window = key_bthk[:, begin:stop], value_bthv[:, begin:stop], query_bthk[:, begin:stop]
            reads.append(self.recall.read_state(window[2], read))
            _, memory = run_trusted(
                self.recall.rule,
                memory,
                window,
                gates.slice_time(begin, stop),
                form=self.recall.form,
                chunk=self.recall.chunk,
            )
        output_btd = torch.cat(reads, dim=1).flatten(2).to(tail["tail_bsd"].dtype)
        return output_btd, {"memory": memory, "read": read, "conv": tail}

    def forward_frozen(self, hidden_btd: Hidden, state: State, count: int) -> tuple[Hidden, State]:
        read_btd, after = self.recall.forward_frozen(hidden_btd, state | {"memory": self._read(state, count)})
        return read_btd, state | {"conv": after["conv"]}

    def read(self, query_btd: Hidden, state: State, count: int) -> Hidden:
        return self.recall.read(query_btd, {"memory": self._read(state, count)})

    def _read(self, state: State, count: int) -> State:
        """The memory that the next token reads: where a period has just ended, what was written in it."""
        return finished(state["memory"]) if count % self.n_apart == 0 else state["read"]

    def _fired(self, memory: State, n_fires: int, batch: int) -> tuple[State, State]:
        """The memory that is written on, and the one that is read until the next period ends."""
        read = finished(memory)
        is_over = self.reset_after is not None and n_fires > 0 and n_fires % self.reset_after == 0
        return (self.recall.initial(batch) if is_over else memory), read


def _means(hidden_btd: Hidden, stride: int) -> Groups:
    """Of every ``stride`` tokens, the mean."""
    return hidden_btd.to(wide(hidden_btd.dtype)).unflatten(1, (-1, stride)).sum(dim=2) / stride


Level: TypeAlias = EveryToken | PooledTokens | DelayedRead
"""Each has a ``recall``, and ``n_apart``: tokens from one write that can be heard to the next."""


def _level(width: int, config: MemoryConfig, level: int) -> Level:
    """One level of the settings. A memory that is written less often fades less often, so that every level begins with
    a half-life of ``half_life`` times its period, in tokens."""
    levels = config.levels
    period = levels.all_periods[level]
    reset_after = None if levels.reset_after is None else levels.reset_after[level]
    is_each = levels.tokens == "each" and period > 1
    slower = period if is_each and levels.frequency != "write" else 1
    half_life = tuple(each * slower for each in config.half_lives(config.n_heads_in(width)))
    recall = NeuralMemory.from_config(
        width, config.model_copy(update={"levels": LevelsConfig(), "half_life": half_life})
    )
    if is_each:
        _require_each(recall, is_gated=levels.frequency == "write")
        return DelayedRead(recall, reset_after, period=period)
    return (
        EveryToken(recall, reset_after)
        if period == 1
        else PooledTokens(recall, reset_after, width=width, period=period)
    )


def _require_each(recall: NeuralMemory, *, is_gated: bool) -> None:
    """Raises ConflictingKeys with every reason why this memory cannot be read late, or written where a gate says."""
    rule = recall.rule
    reasons = ["the form 'tnt' reads local memories beside the one that a period ends with"] * (recall.form == "tnt")
    if is_gated:
        if rule.update.has_momentum or not rule.update.is_linear:
            reasons.append(f"the update '{rule.update.name}' changes the memory also where nothing is written")
        if not rule.retention.is_linear or rule.retention.is_mapped:
            reasons.append(f"the retention '{rule.retention.name}' is more than a factor that a gate can set to 1")
        if rule.span > 1 or rule.structure.n_codes:
            reasons.append("its surprises are more than the pair of one token")
    if reasons:
        raise ConflictingKeys(
            f"memory.levels with tokens 'each'{' and frequency write' if is_gated else ''} cannot run this memory: "
            f"{'; '.join(reasons)}. Take another rule or form, or memory.levels.tokens=pooled with frequency fixed or "
            f"output.",
            reasons=reasons,
        )


def _only_where(gates: Gates, on_bt1: Tensor) -> Gates:
    """Gates under which the memory becomes ``M + a (M' - M)``: write ``a w``, retain ``1 - a (1 - r)``."""
    log_retain_bth = gates.log_retain()
    on_bt1 = on_bt1.to(log_retain_bth.dtype)
    lost_bth = -on_bt1 * torch.expm1(log_retain_bth)
    kept_bth = 1 - on_bt1 + on_bt1 * log_retain_bth.exp()
    # log1p is exact where little is lost, and infinite where all is lost; the sum is exact where little is left.
    is_little = lost_bth < 0.5
    log_bth = torch.where(
        is_little, torch.log1p(-lost_bth.where(is_little, 0.0)), kept_bth.where(~is_little, 1.0).log()
    )
    others = {"threshold_bth": gates.threshold_bth}
    return Gates.from_logs(log_bth, on_bt1 * gates.write_bth, **others)


def _counted(level: Level, state: State) -> int:
    """The tokens that the periods of a level count: those that were written, or, of a pooled one, all."""
    return state["count"] - (0 if isinstance(level, PooledTokens) else state.get("n_frozen", 0))


def _recalled_frozen(
    recall: NeuralMemory, hidden_btd: Hidden, state: State, *, count: int, reset_after: int | None
) -> tuple[Hidden, State]:
    """The reads of all by the memory that the vector after ``count`` would read, which is unchanged."""
    is_over = reset_after is not None and count > 0 and count % reset_after == 0
    memory = recall.initial(len(hidden_btd)) if is_over else state["memory"]
    read_btd, after = recall.forward_frozen(hidden_btd, state | {"memory": memory})
    return read_btd, state | {"conv": after["conv"]}


def _recalled(
    recall: NeuralMemory, hidden_btd: Hidden, state: State, *, count: int, reset_after: int | None
) -> tuple[Hidden, State]:
    """What ``recall`` reads after ``count`` vectors, reset after every ``reset_after``."""
    if reset_after is None:
        read_btd, state = recall(hidden_btd, state)
        return read_btd, state
    reads = []
    for begin, stop in spans(count, hidden_btd.shape[1], reset_after):
        at = count + begin
        if at and at % reset_after == 0:
            state = {**state, "memory": recall.initial(hidden_btd.shape[0])}
        read_btd, state = recall(hidden_btd[:, begin:stop], state)
        reads.append(read_btd)
    return torch.cat(reads, dim=1), state
