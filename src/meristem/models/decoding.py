"""Reading on token by token: by the native core where it takes the model, else by the model itself.

The core reads a token of a small model in a thirtieth of the time that the operations of torch take. It reads the same
weights, packed, and what it holds of a reader comes from a state of the model and becomes one without a bit lost: a
text may begin there, be read on here, and return.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from meristem.memory.state import State, alike_rows, clone, flatten, join_rows, select_rows, take_rows, unflatten
from meristem.memory.update import momentum_name
from meristem.models.packed import MATRIX, NotTaken, Packed, packed
from meristem.native import decoding as native
from meristem.shapes import Logits, Tokens

Reader: TypeAlias = Callable[[Tokens, State | None], tuple[Logits, State]]
"""A model, or a way to read one (``models.online.online_reader``)."""


def refusal(reader: Reader) -> str:
    """Why the core does not read this reader, as a clause; empty where it does."""
    try:
        packed(reader)
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
        self._rows: Rows | None = None
        self.refusal = ""
        """Why the core does not read, as a clause; empty where it does."""
        try:
            self._rows = Rows.of(packed(self._reader), state)
        except NotTaken as reason:
            self.refusal = str(reason)

    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Read one token of each row; the predictions of the next, ``(n, vocabulary)``.

        Raises WrongValue, and nothing was read, for a token that is not one of the vocabulary, and whatever the reader
        raises.
        """
        if self._rows is not None and not self._rows.packed.is_current():
            self._begin(self.state)  # with the weights as they are now
        if self._rows is not None:
            logits_bo = self._rows.readers.step(token_ids)
            self._state = None
            return logits_bo
        tokens_bt = torch.tensor(token_ids, device=_device(self.state))[:, None]
        with torch.no_grad():
            logits_bto, self._state = self._reader(tokens_bt, self._state)
        return logits_bto[:, -1]

    @property
    def state(self) -> State:
        """What the rows carry now: a value, which later steps do not change."""
        if self._rows is not None and self._state is None:
            self._state = self._rows.state()
        return self._state or {}

    def row(self, at: int) -> State:
        """What one row carries now; a copy."""
        return clone(take_rows(self.state, at, at + 1)) if self._rows is None else self._rows.state([at])

    def select(self, rows: Sequence[int]) -> None:
        """Read on with some of the rows, each once, in the order given."""
        if self._rows is None:
            self._state = select_rows(self.state, rows)
            return
        self._rows, self._state = self._rows.selected(rows), None

    def extend(self, others: "Sequence[Decoding]") -> None:
        """Read on with the rows of others of the same reader as well, behind one's own. They read no more."""
        found = [each._rows for each in (self, *others) if each._rows is not None]
        if len(found) == len(others) + 1 and len({id(each.packed) for each in found}) == 1:
            self._rows, self._state = Rows.joined(found), None
        else:
            self._begin(join_rows([each.state for each in (self, *others)]))


class Rows(NamedTuple):
    """Readers of the core, and the weights that they read."""

    packed: Packed
    readers: native.Readers

    @classmethod
    def of(cls, by: Packed, state: State) -> "Rows":
        """Readers that stand where the rows of a state stand. Raises NotTaken for a state that the core does not
        hold."""
        blocks: dict[int, Tensor] = {}
        n_read: dict[int, int] = {}
        try:
            groups = alike_rows(state)
        except ValueError as cause:
            raise NotTaken("a leaf of its state names no rows") from cause
        for places, alike in groups:
            own_bn, count = _filled(by.decoder, flatten(alike), len(places))
            for place, block_n in zip(places, own_bn, strict=True):
                blocks[place], n_read[place] = block_n, count
        order = range(len(blocks))
        return cls(by, native.Readers(by.decoder, [blocks[at] for at in order], [n_read[at] for at in order]))

    @classmethod
    def joined(cls, parts: "Sequence[Rows]") -> "Rows":
        """The readers of several, which share their weights, in their order."""
        blocks = [block_n for each in parts for block_n in each.readers.blocks]
        n_read = [count for each in parts for count in each.readers.n_read]
        return cls(parts[0].packed, native.Readers(parts[0].packed.decoder, blocks, n_read))

    def selected(self, rows: Sequence[int]) -> "Rows":
        """Some of the readers, in the order given."""
        blocks, n_read = self.readers.blocks, self.readers.n_read
        found = native.Readers(self.packed.decoder, [blocks[at] for at in rows], [n_read[at] for at in rows])
        return self._replace(readers=found)

    def state(self, rows: Sequence[int] | None = None) -> State:
        """What some of them carry, or all, as a state of the model; a copy."""
        decoder, counts, blocks = self.packed.decoder, self.readers.n_read, self.readers.blocks
        chosen = range(len(blocks)) if rows is None else rows
        return join_rows([unflatten(_taken_out(decoder, blocks[at], counts[at])) for at in chosen])


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


def _device(state: State) -> torch.device:
    # What counts for each row stays on the host.
    return next(leaf.device for leaf in flatten(state).values() if isinstance(leaf, Tensor) and leaf.dim() > 1)
