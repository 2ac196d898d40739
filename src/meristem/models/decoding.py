"""Reading on token by token: by the native core where it takes the model, else by the model itself, on a GPU by a step
that is recorded (``models.recorded``).

The core reads a token of a small model in a thirtieth of the time that the operations of torch take. It reads the same
weights, packed, and what it holds of a reader comes from a state of the model and becomes one without a bit lost: a
text may begin there, be read on here, and return.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from meristem.memory.state import State, alike_rows, clone, flatten, join_rows, select_rows, take_rows, unflatten
from meristem.memory.update import momentum_name
from meristem.models.packed import MATRIX, NotTaken, Packed, packed
from meristem.models.recorded import Reader, Steps
from meristem.models.weights import TailLearner, WeightLearner, mixed
from meristem.native import decoding as native


def refusal(reader: Reader) -> str:
    """Why the core does not read this reader, as a clause; empty where it does."""
    try:
        packed(_model_of(reader))
    except NotTaken as reason:
        return str(reason)
    return ""


class Decoding:
    """Rows that read on token by token, as ``reader(tokens_bt, state)`` reads them, but for rounding.

    What the core reads has the same bits whatever rows stand beside it.
    """

    def __init__(self, reader: Reader, state: State) -> None:
        """state: after one token or more, of any number of rows. It stays as it is."""
        self._reader = reader
        self._begin(state)

    def _begin(self, state: State) -> None:
        self._state: State | None = state
        self._steps = Steps(self._reader)
        self._rows: Rows | LearningRows | None = None
        self.refusal = ""
        """Why the core does not read, as a clause; empty where it does."""
        try:
            learner = self._reader if isinstance(self._reader, WeightLearner) else None
            self._rows = LearningRows.of(learner, state) if learner else Rows.of(self._reader, state)
        except NotTaken as reason:
            self.refusal = str(reason)

    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Read one token of each row; the predictions of the next, ``(n, vocabulary)``.

        Raises WrongValue, and nothing was read, for a token that is not one of the vocabulary, and whatever the reader
        raises.
        """
        if self._rows is not None and not self._rows.is_current():
            self._begin(self.state)  # with the weights as they are now
        if self._rows is not None:
            logits_bo = self._rows.step(token_ids)
            self._state = None
            return logits_bo
        logits_bo, self._state = self._steps(token_ids, self._state or {})
        return logits_bo

    @property
    def state(self) -> State:
        """What the rows carry now: a value, which later steps do not change."""
        if self._rows is not None and self._state is None:
            self._state = self._rows.state()
        state = self._state or {}
        return clone(state) if self._steps.is_recorded else state

    @property
    def is_in_place(self) -> bool:
        """Whether a step changes what the rows carried, so that ``state`` is a copy, which takes time."""
        return self._rows is not None or self._steps.is_recorded

    def row(self, at: int) -> State:
        """What one row carries now; a copy."""
        return clone(take_rows(self._state or {}, at, at + 1)) if self._rows is None else self._rows.state([at])

    def select(self, rows: Sequence[int]) -> None:
        """Read on with some of the rows, each once, in the order given."""
        if self._rows is None:
            self._state = select_rows(self._state or {}, rows)
            return
        self._rows, self._state = self._rows.selected(rows), None

    def extend(self, others: "Sequence[Decoding]") -> None:
        """Read on with the rows of others of the same reader as well, behind one's own. They read no more."""
        joined = _joined([each._rows for each in (self, *others)])
        if joined is not None:
            self._rows, self._state = joined, None
        else:
            self._begin(join_rows([each.state for each in (self, *others)]))


class Tail:
    """The last part of a model, which learns, for one reader: what ``TailLearner`` makes of the vectors before it.

    A row by itself, whose products have the same bits whatever other rows read.
    """

    def __init__(self, learner: TailLearner, learned: State) -> None:
        """learned: of one row."""
        self._learner, self.learned, self.which = learner, learned, learner.learning.which
        self._weights: Mapping[str, Tensor] | None = None

    def read(self, hidden_d: Float[Tensor, " d"], token_id: int) -> Float[Tensor, " o"]:
        """The prediction ``(vocabulary,)`` after a token, from the vector that the rest of the model gives for it."""
        token_11 = torch.tensor([[token_id]])
        logits_bto, self.learned, self._weights = self._learner.read_tail(
            hidden_d[None, None], token_11, self.learned, self._weights
        )
        return logits_bto[0, 0]


class Rows(NamedTuple):
    """Readers of the core, and the weights that they read; ``tails`` where the last part of the model learns."""

    packed: Packed
    readers: native.Readers
    tails: tuple[Tail, ...] | None = None

    @classmethod
    def of(cls, reader: Reader, state: State) -> "Rows":
        """Readers that stand where the rows of a state stand. Raises NotTaken for a model or a state that the core does
        not hold."""
        by, tails = packed(_model_of(reader)), None
        if isinstance(reader, TailLearner):
            tails = tuple(Tail(reader, learned) for learned in _one_by_one(state["learned"]))
            state = {name: leaf for name, leaf in state.items() if name != "learned"}
        blocks: dict[int, Tensor] = {}
        n_read: dict[int, int] = {}
        for places, alike in _alike(state):
            own_bn, count = _filled(by.decoder, flatten(alike), len(places))
            for place, block_n in zip(places, own_bn, strict=True):
                blocks[place], n_read[place] = block_n, count
        order = range(len(blocks))
        readers = native.Readers(by.decoder, [blocks[at] for at in order], [n_read[at] for at in order])
        return cls(by, readers, tails)

    @classmethod
    def joined(cls, parts: "Sequence[Rows]") -> "Rows":
        """The readers of several, which share their weights, in their order."""
        blocks = [block_n for each in parts for block_n in each.readers.blocks]
        n_read = [count for each in parts for count in each.readers.n_read]
        tails = None if parts[0].tails is None else tuple(tail for each in parts for tail in each.tails or ())
        return cls(parts[0].packed, native.Readers(parts[0].packed.decoder, blocks, n_read), tails)

    def selected(self, rows: Sequence[int]) -> "Rows":
        """Some of the readers, in the order given."""
        blocks, n_read = self.readers.blocks, self.readers.n_read
        found = native.Readers(self.packed.decoder, [blocks[at] for at in rows], [n_read[at] for at in rows])
        return self._replace(readers=found, tails=self.tails and tuple(self.tails[at] for at in rows))

    def is_current(self) -> bool:
        """Whether no weight has changed since."""
        return self.packed.is_current()

    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Read one token of each; the predictions of the next."""
        if self.tails is None:
            return self.readers.step(token_ids)
        is_mlp_left = self.tails[0].which == "last_mlp"
        hidden_bd = self.readers.hidden(token_ids, is_mlp_left=is_mlp_left)
        read = zip(self.tails, hidden_bd, token_ids, strict=True)
        return torch.stack([tail.read(hidden_d, token_id) for tail, hidden_d, token_id in read])

    def state(self, rows: Sequence[int] | None = None) -> State:
        """What some of them carry, or all, as a state of the model; a copy."""
        decoder, counts, blocks = self.packed.decoder, self.readers.n_read, self.readers.blocks
        states = []
        for at in range(len(blocks)) if rows is None else rows:
            own = unflatten(_taken_out(decoder, blocks[at], counts[at]))
            states.append(own if self.tails is None else own | {"learned": self.tails[at].learned})
        return join_rows(states)


class Moved:
    """One reader whose weights learn (``WeightLearner``), which the core reads with what it has learned.

    Within a chunk the core reads W + D, packed when the chunk begins; once it is full, the learner reads it again.
    """

    def __init__(self, learner: WeightLearner, state: State) -> None:
        """state: of one row. Raises NotTaken."""
        self._learner, self.learned = learner, state["learned"]
        self._begin({name: leaf for name, leaf in state.items() if name != "learned"})

    def _begin(self, carried: State) -> None:
        self._still = packed(_model_of(self._learner))
        is_still = not bool((self.learned["steps_b"] > 0).any())
        self._rows = Rows.of(self._learner.model if is_still else self._learner.moved(self.learned), carried)

    def is_current(self) -> bool:
        """Whether no weight of the model has changed since the chunk began."""
        return self._still.is_current() and self._rows.is_current()

    def require_known(self, token_ids: Sequence[int]) -> None:
        """Raises WrongValue for a token that is not one of the vocabulary."""
        self._rows.readers.require_known(token_ids)

    def step(self, token_id: int) -> Tensor:
        """Read a token; the prediction of the next, ``(1, vocabulary)``."""
        learned = self.learned
        if "tokens_bt" not in learned:
            learned = learned | {"begun": self._rows.state(), "tokens_bt": torch.zeros(1, 0, dtype=torch.int64)}
        logits_bto = mixed(self._rows.step([token_id])[:, None], learned["steps_b"])
        tokens_bt = torch.cat([learned["tokens_bt"], torch.tensor([[token_id]])], dim=1)
        if tokens_bt.shape[1] < self._learner.chunk:
            self.learned = learned | {"tokens_bt": tokens_bt}
        else:
            _, carried, self.learned = self._learner.learn_chunk(tokens_bt, learned.get("begun"), learned)
            self._begin(carried)
        return logits_bto[:, 0]

    @property
    def state(self) -> State:
        """What it carries now; a copy."""
        return self._rows.state() | {"learned": self.learned}


class LearningRows(NamedTuple):
    """Readers whose weights learn, each with its own."""

    each: tuple[Moved, ...]

    @classmethod
    def of(cls, learner: WeightLearner, state: State) -> "LearningRows":
        """Readers that stand where the rows of a state stand. Raises NotTaken for what the core does not hold."""
        return cls(tuple(Moved(learner, own) for own in _one_by_one(state)))

    def selected(self, rows: Sequence[int]) -> "LearningRows":
        """Some of the readers, in the order given."""
        return LearningRows(tuple(self.each[at] for at in rows))

    def is_current(self) -> bool:
        """Whether no weight has changed since."""
        return all(one.is_current() for one in self.each)

    @torch.no_grad()
    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Read one token of each; the predictions of the next."""
        self.each[0].require_known(token_ids)
        return torch.cat([one.step(token_id) for one, token_id in zip(self.each, token_ids, strict=True)])

    def state(self, rows: Sequence[int] | None = None) -> State:
        """What some of them carry, or all, as a state of the reader; a copy."""
        return join_rows([self.each[at].state for at in (range(len(self.each)) if rows is None else rows)])


def _joined(parts: Sequence[Rows | LearningRows | None]) -> Rows | LearningRows | None:
    """The readers of several in one, where the core can read them together."""
    learning = [each for each in parts if isinstance(each, LearningRows)]
    if len(learning) == len(parts):
        return LearningRows(tuple(one for part in learning for one in part.each))
    plain = [each for each in parts if isinstance(each, Rows)]
    return Rows.joined(plain) if len(plain) == len(parts) and len({id(each.packed) for each in plain}) == 1 else None


def _model_of(reader: object) -> object:
    """What the core reads of a reader: the model of one whose weights learn, or the reader itself. Raises NotTaken."""
    if not isinstance(reader, TailLearner | WeightLearner):
        return reader
    if reader.learning.which == "low_rank":
        raise NotTaken("a low-rank change of its weights learns, which the core does not add")
    return reader.model


def _alike(state: State) -> list[tuple[list[int], State]]:
    try:
        return alike_rows(state)
    except ValueError as cause:
        raise NotTaken("a leaf of its state names no rows") from cause


def _one_by_one(state: State) -> list[State]:
    """The state of each row; copies."""
    found = {
        place: clone(take_rows(alike, at, at + 1)) for places, alike in _alike(state) for at, place in enumerate(places)
    }
    return [found[place] for place in sorted(found)]


class _Leaves(NamedTuple):
    """The names of what a state holds of one layer; None of what the layer does not have."""

    keys: str | None = None
    values: str | None = None
    matrix: str | None = None
    momentum: str | None = None
    tail: str | None = None


def _leaves(index: int, shape: native.LayerShape) -> _Leaves:
    both = shape.mixer in (native.GATE, native.LAYER)
    attention, recall = (f"layer.{index}.{part}" if both else f"layer.{index}." for part in ("attention.", "recall."))
    found = _Leaves()
    if shape.mixer == native.SELF_REFERENCE:
        return found
    if shape.mixer != native.MEMORY:
        found = found._replace(keys=f"{attention}keys_bshk", values=f"{attention}values_bshv")
    if shape.mixer != native.ATTENTION:
        found = found._replace(matrix=f"{recall}memory.{MATRIX}", tail=f"{recall}conv.tail_bsd")
    if shape.has_momentum:
        found = found._replace(momentum=f"{recall}memory.{momentum_name(MATRIX)}")
    return found


def _filled(decoder: native.Decoder, flat: dict[str, Any], n_rows: int) -> tuple[Tensor, int]:
    """The blocks of rows that are alike, and how many tokens their rings count as read."""
    layers = [_leaves(index, shape) for index, shape in enumerate(decoder.layers)]
    names = {name for each in layers for name in each if name}
    blocks_bn = decoder.blocks(n_rows)
    names |= {name for index in range(len(layers)) for name, _ in _whole(decoder, blocks_bn, index)}
    if flat.keys() != names:
        odd = sorted(flat.keys() ^ names)
        raise NotTaken(f"its state has or lacks what the core does not hold: {', '.join(odd[:3])}")
    lengths = {flat[each.keys].shape[1] for each in layers if each.keys}
    if len(lengths) > 1:
        raise NotTaken("its layers have read different numbers of tokens")
    count = lengths.pop() if lengths else 0
    for index, own in enumerate(layers):
        held = decoder.held(blocks_bn, index)
        for name, part, slots in _rings(held, own, count, decoder.layers[index]):
            leaf, n_slots = flat[name], sum(each.stop - each.start for each in slots)
            if leaf.shape != (n_rows, n_slots, *part.shape[2:]) or leaf.dtype != decoder.dtype or not leaf.is_cpu:
                raise NotTaken(f"its state holds {tuple(leaf.shape)} {leaf.dtype} as {name}, which the core does not")
            _put(part, slots, leaf.detach())
        for name, part in _whole(decoder, blocks_bn, index):
            leaf = flat[name]
            if part.dtype == torch.int64:
                part[:] = leaf
                continue
            if leaf.shape != part.shape or leaf.dtype != decoder.dtype or not leaf.is_cpu:
                raise NotTaken(f"its state holds {tuple(leaf.shape)} {leaf.dtype} as {name}, which the core does not")
            part.copy_(leaf.detach())
    return blocks_bn, count


def _put(part: Tensor, slots: Sequence[slice], leaf: Tensor) -> None:
    sizes = [each.stop - each.start for each in slots]
    for each, piece in zip(slots, leaf.split(sizes, dim=1), strict=True):
        part[:, each] = piece


def _taken_out(decoder: native.Decoder, block_n: Tensor, count: int) -> dict[str, Tensor | int]:
    """What a reader holds, as the leaves of a state of one row."""
    flat: dict[str, Tensor | int] = {}
    for index, shape in enumerate(decoder.layers):
        held = decoder.held(block_n[None], index)
        for name, part, slots in _rings(held, _leaves(index, shape), count, shape):
            flat[name] = torch.cat([part[:, each] for each in slots], dim=1).contiguous()
        for name, part in _whole(decoder, block_n[None], index):
            flat[name] = int(part) if part.dtype == torch.int64 else part.clone(memory_format=torch.contiguous_format)
    return flat


def _rings(
    held: native.Held, names: _Leaves, count: int, shape: native.LayerShape
) -> Iterator[tuple[str, Tensor, list[slice]]]:
    """Each leaf of a layer, where the core holds it, and its places along the second axis in order: those of a ring in
    order of time.

    count: tokens that the rings count as read. Attention's ring has room for the present token beside those that a
    state holds.
    """
    n_keys = min(count, shape.span - 1)
    for name, part in zip(names, held, strict=True):
        if name is None or part is None:
            continue
        if name in (names.keys, names.values):
            yield name, part, _in_time(count - n_keys, n_keys, shape.span)
        elif name == names.tail:
            yield name, part, _in_time(count, shape.taps - 1, shape.taps - 1)
        else:
            yield name, part, [slice(0, part.shape[1])]


def _whole(decoder: native.Decoder, blocks_bn: Tensor, index: int) -> Iterator[tuple[str, Tensor]]:
    """Each leaf of a layer that the core holds as it stands in a state, and where; counts are integers."""
    shape, where = decoder.layers[index], f"layer.{index}"
    if shape.mixer == native.SELF_REFERENCE:
        own = decoder.held_self(blocks_bn, index)
        yield f"{where}.memory.n_tokens", own.count_b1
        yield f"{where}.conv.tail_bsd", own.tail_bsd
        yield f"{where}.memory.asked.start.{MATRIX}", own.memory_start_bhkv
        yield f"{where}.memory.asked.live.{MATRIX}", own.memory_live_bhkv
        if own.makers_start_bhkv is not None and own.makers_live_bhkv is not None:
            yield f"{where}.memory.makers.start.{MATRIX}", own.makers_start_bhkv
            yield f"{where}.memory.makers.live.{MATRIX}", own.makers_live_bhkv
    if shape.hope.is_pooled:
        levels = decoder.held_levels(blocks_bn, index)
        yield f"{where}.levels.count", levels.count_b1
        for level in range(1, shape.hope.n_levels):
            yield f"{where}.levels.level.{level}.sum_bd", levels.sum_bld[:, level - 1]
            yield f"{where}.levels.level.{level}.last_bd", levels.last_bld[:, level - 1]


def _in_time(first: int, n: int, n_slots: int) -> list[slice]:
    """The slots of ``n`` tokens from ``first`` on in a ring, of which there are no more than slots."""
    start = first % n_slots if n_slots else 0
    wrapped = max(start + n - n_slots, 0)
    return [slice(start, start + n - wrapped), slice(0, wrapped)]
