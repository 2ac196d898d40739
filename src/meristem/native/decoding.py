"""One token of a whole model by the native core, for several readers at once (``native/decode.hpp``).

What is known here are numbers and tensors; ``models.decoding`` makes them of a model, and knows which models can be
decoded like this.
"""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from meristem.errors import ShapeError, WrongValue
from meristem.native.interface import torchs_threads

ATTENTION, GATE, LAYER, MEMORY, SELF_REFERENCE = range(5)
"""What mixes tokens: attention, memory as gate, memory as layer, memory alone, memories that make their own keys."""

COMBINATIONS: Final = ("gated", "normalised", "projected", "sigmoid", "additive")
SWIGLU, GELU, LEVELS = range(3)

_WEIGHTS: Final = (
    *("mixer_norm", "attention", "attention_out", "pinned_keys", "pinned_values"),
    *("memory", "conv", "gates", "gate_bias", "most_momentum"),
    *("memory_norm", "attention_norm", "open", "open_bias", "memory_out"),
    *("mlp_norm", "up", "up_bias", "down", "down_bias"),
    *("query", "first_makers", "periods", "shares"),
)
_COUNTS: Final = (
    *("mixer", "combine", "is_residual", "mlp", "hidden", "attention_heads", "span", "is_rotated", "n_pinned"),
    *("memory_heads", "taps", "is_writing"),
)
_MEASURES: Final = ("slope", "write_limit", "curvature")
_CHOICES: Final = (
    *("is_warm", "is_proximal", "reads_before", "has_momentum", "is_coasting", "is_scaled"),
    *("has_retain", "has_retain_gate"),
)
PLAIN: Final = (*_COUNTS, *_MEASURES, *_CHOICES)
"""The numbers of a layer that has neither a self-reference nor levels."""


_SELF: Final = (
    *("n_makers", "chunk_makers", "chunk_memory", "is_static", "is_generated", "is_squared", "is_asking"),
    "has_unit_value",
)
_LEVELS: Final = ("n_levels", "is_mixed", "is_pooled", "is_slowest_first")


class ModelShape(ctypes.Structure):
    """Sizes of a model; eps is that of every norm."""

    _fields_ = (*((name, ctypes.c_int64) for name in ("width", "vocabulary", "n_layers")), ("eps", ctypes.c_double))


class HopeShape(ctypes.Structure):
    """A self-reference and feed-forward levels, as ``native/hope.hpp`` has them."""

    _fields_ = (*((name, ctypes.c_int64) for name in (*_SELF, *_LEVELS)), ("eta_scale", ctypes.c_double))


class LayerShape(ctypes.Structure):
    """What a layer is made of, as ``native/decode.hpp`` has it; what it does not have is 0."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_double) for name in _MEASURES),
        *((name, ctypes.c_int64) for name in _CHOICES),
        ("hope", HopeShape),
    )


class _LayerWeights(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in _WEIGHTS)


class _ModelWeights(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("embedding", "norm", "head"))


_OFFSETS: Final = ("keys", "values", "matrix", "momentum", "tail")
_STRIDES: Final = ("key_stride", "value_stride", "matrix_stride", "tail_stride")


_HOPE_OFFSETS: Final = ("count", "tail", "makers_start", "makers_live", "memory_start", "memory_live")
_HOPE_STRIDES: Final = ("tail_stride", "makers_stride", "memory_stride")


class _HopePlace(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in (*_HOPE_OFFSETS, *_HOPE_STRIDES, "rows", "row_stride"))


class _Place(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_OFFSETS, *_STRIDES)),
        ("mixer", _HopePlace),
        ("mlp", _HopePlace),
    )


Weights: TypeAlias = Mapping[str, Tensor]


class Held(NamedTuple):
    """What readers hold of one layer, as views of their blocks; None of what the layer does not have.

    Keys and values, and the tail of the convolution, are rings: token t stands in slot ``t % slots``, counted from
    where the ring was filled. The axes are those of the leaves of a state.
    """

    keys_bshk: Tensor | None
    values_bshv: Tensor | None
    matrix_bhkv: Tensor | None
    momentum_bhkv: Tensor | None
    tail_bsd: Tensor | None


class HeldSelf(NamedTuple):
    """What readers hold of a self-reference; None of makers that are not written.

    count_b1: tokens read while its memories were written. Of memories, the values that began the unfinished chunk, and
    those that its tokens have left; makers lie side by side along the last axis.
    """

    count_b1: Tensor
    tail_bsd: Tensor
    makers_start_bhkv: Tensor | None
    makers_live_bhkv: Tensor | None
    memory_start_bhkv: Tensor
    memory_live_bhkv: Tensor


class HeldLevels(NamedTuple):
    """What readers hold of levels that read means, l without the fastest: tokens read, and of each level the sum over
    its unfinished period and its last output."""

    count_b1: Tensor
    sum_bld: Tensor
    last_bld: Tensor


class Decoder:
    """The weights of a model, packed: what a step of any readers reads. It never changes and may serve many threads.

    dtype: float32 or float64, of all weights.
    """

    def __init__(
        self,
        core: ctypes.CDLL,
        shape: ModelShape,
        layers: Sequence[tuple[LayerShape, Weights]],
        ends: Weights,
    ) -> None:
        """layers: each with its weights by name, ``[out, in]``; ends: ``embedding``, ``norm`` and ``head``.

        Raises ShapeError where a weight is missing or has another size or dtype than the shapes say, MemoryError where
        there is no room for them.
        """
        self.shape, self.layers = shape, [own for own, _ in layers]
        self.dtype = ends["embedding"].dtype
        if self.dtype not in (torch.float32, torch.float64):
            raise ShapeError(f"weights of {self.dtype} were given; the core takes float32 or float64. Convert them.")
        d, o = shape.width, shape.vocabulary
        kept = [_checked(ends, {"embedding": (o, d), "norm": (d,), "head": (o, d)}, self.dtype)]
        kept += [_checked(weights, _sizes(d, own), self.dtype) for own, weights in layers]
        pointers = [{name: tensor.data_ptr() for name, tensor in each.items()} for each in kept]
        word = "f32" if self.dtype == torch.float32 else "f64"
        self._call = {
            name: _function(core, f"meristem_decoder_{name}_{word}", *types) for name, types in _FUNCTIONS.items()
        }
        shapes = (LayerShape * len(layers))(*self.layers)
        of_layers = (_LayerWeights * len(layers))(*(_LayerWeights(**each) for each in pointers[1:]))
        of_ends = _ModelWeights(**pointers[0])
        refer = ctypes.byref
        self._handle = self._call["open"](refer(shape), refer(shapes), refer(of_ends), refer(of_layers))
        if not self._handle:
            raise MemoryError("there is no memory for the packed weights of this model. Free some, or use less of it.")
        weakref.finalize(self, self._call["close"], self._handle)
        self.block_size = int(self._call["block"](self._handle))
        self._logits_stride = int(self._call["logits"](self._handle))
        self._places = [self._place(index) for index in range(len(layers))]

    def _place(self, layer: int) -> _Place:
        found = _Place()
        self._call["place"](self._handle, layer, ctypes.byref(found))
        return found

    def blocks(self, n: int) -> Tensor:
        """Blocks of so many readers, all zeros: ``(n, block_size)``."""
        return torch.zeros(n, self.block_size, dtype=self.dtype)

    def held(self, blocks: Tensor, layer: int) -> Held:
        """Where the blocks of some readers hold what is of a layer."""
        own, place, d = self.layers[layer], self._places[layer], self.shape.width

        def view(at: int, sizes: Sequence[int], strides: Sequence[int]) -> Tensor | None:
            return None if at < 0 else _view(blocks, at, sizes, strides)

        a, s = own.attention_heads, own.span
        k = d // a if a else 0
        m, w = own.memory_heads, d // own.memory_heads if own.memory_heads else 0
        to_key, to_value, to_row, to_tail = (getattr(place, name) for name in _STRIDES)
        matrix = (m, w, w), (w * to_row, to_row, 1)
        return Held(
            view(place.keys, (s, a, k), (1, k * to_key, to_key)),
            view(place.values, (s, a, k), (to_value, s * to_value, 1)),
            view(place.matrix, *matrix),
            view(place.momentum, *matrix),
            view(place.tail, (own.taps - 1, 3 * d), (to_tail, 1)),
        )

    def held_self(self, blocks: Tensor, layer: int) -> HeldSelf:
        """Where the blocks of some readers hold what is of the self-reference of a layer."""
        own, place, d = self.layers[layer], self._places[layer].mixer, self.shape.width
        h, to_row, to_maker = own.memory_heads, place.memory_stride, place.makers_stride
        k = d // h
        memory = (h, k, k), (k * to_row, to_row, 1)
        makers = (h, k, own.hope.n_makers * k), (k * to_maker, to_maker, 1)
        has_makers = not own.hope.is_static
        return HeldSelf(
            _count(blocks, place.count),
            _view(blocks, place.tail, (own.taps - 1, d), (place.tail_stride, 1)),
            _view(blocks, place.makers_start, *makers) if has_makers else None,
            _view(blocks, place.makers_live, *makers) if has_makers else None,
            _view(blocks, place.memory_start, *memory),
            _view(blocks, place.memory_live, *memory),
        )

    def held_levels(self, blocks: Tensor, layer: int) -> HeldLevels:
        """Where the blocks of some readers hold what is of the levels of a layer, which read means."""
        own, place, d = self.layers[layer], self._places[layer].mlp, self.shape.width
        rows = (own.hope.n_levels - 1, d), (2 * place.row_stride, 1)
        sums_bld, lasts_bld = (_view(blocks, place.rows + at, *rows) for at in (0, place.row_stride))
        return HeldLevels(_count(blocks, place.count), sums_bld, lasts_bld)

    def room(self, n: int, n_threads: int) -> Tensor:
        """What a step of so many readers on so many threads writes beside their blocks."""
        return torch.empty(int(self._call["room"](self._handle, n, n_threads)), dtype=self.dtype)

    def logits(self, n: int) -> Tensor:
        """Room for the logits of so many readers, ``(n, stride)``; the vocabulary is what each row begins with."""
        return torch.empty(n, self._logits_stride, dtype=self.dtype)

    def step(self, n: int, *arguments: Any) -> bool:
        """``native/decode.hpp``, ``step``; False where a token is none of the vocabulary."""
        return not self._call["step"](self._handle, n, *arguments)

    def hidden(self, n: int, *arguments: Any) -> bool:
        """The same without the last part of the model."""
        return not self._call["hidden"](self._handle, n, *arguments)


@dataclass
class _Sharing:
    n_threads: int | None = None


_sharing: Final = _Sharing()


def share_readers(n_threads: int | None) -> None:
    """Readers that are put together from now on are shared among so many threads; None stands for torch's number."""
    _sharing.n_threads = n_threads


class Readers:
    """Some readers of one decoder, in the order of their rows.

    blocks: what each holds, one axis each. n_read: tokens that each has read since its rings were filled from slot 0.
    Both are changed in place by ``step``; rows of the same block may not stand here twice. Many are shared among
    threads (``share_readers``); the bits do not depend on how many these are.
    """

    def __init__(self, decoder: Decoder, blocks: Sequence[Tensor], n_read: Sequence[int]) -> None:
        n = len(blocks)
        for block in blocks:
            if block.shape != (decoder.block_size,) or block.dtype != decoder.dtype or not block.is_contiguous():
                raise ShapeError(
                    f"a reader holds {tuple(block.shape)} numbers of {block.dtype}; this decoder takes "
                    f"{decoder.block_size} of {decoder.dtype} side by side. Make them by Decoder.blocks.",
                    found=tuple(block.shape),
                    expected=(decoder.block_size,),
                )
        self.decoder, self.blocks = decoder, list(blocks)
        self._n_read = (ctypes.c_int64 * n)(*n_read)
        self._tokens = (ctypes.c_int64 * n)()
        self._pointers = (ctypes.c_void_p * n)(*(block.data_ptr() for block in blocks))
        n_threads = _sharing.n_threads or torch.get_num_threads()
        self._room = decoder.room(n, n_threads)
        self._where = self._room.data_ptr(), n_threads, torchs_threads()

    @property
    def n_read(self) -> list[int]:
        """Tokens that each reader has read since its rings were filled from slot 0."""
        return list(self._n_read)

    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Read one token for each reader; the predictions of the next, ``(n, vocabulary)``.

        Raises WrongValue, and nothing was read, for a token that is not one of the vocabulary.
        """
        arguments = self._taken(token_ids)
        logits_bo = self.decoder.logits(len(self.blocks))
        if not self.decoder.step(len(self.blocks), *arguments, logits_bo.data_ptr(), *self._where):
            self.require_known(token_ids)
        return logits_bo[:, : self.decoder.shape.vocabulary]

    def hidden(self, token_ids: Sequence[int], *, is_mlp_left: bool) -> Tensor:
        """The same without the last part of the model: the vectors ``(n, width)`` that the head is given, or, with
        is_mlp_left, the residual stream before the last feed-forward layer."""
        arguments = self._taken(token_ids)
        hidden_bd = torch.empty(len(self.blocks), self.decoder.shape.width, dtype=self.decoder.dtype)
        if not self.decoder.hidden(len(self.blocks), *arguments, hidden_bd.data_ptr(), *self._where, is_mlp_left):
            self.require_known(token_ids)
        return hidden_bd

    def _taken(self, token_ids: Sequence[int]) -> tuple[Any, ...]:
        if len(token_ids) != len(self.blocks):
            raise ShapeError(
                f"{len(token_ids)} tokens were given for {len(self.blocks)} readers. Give each one.",
                expected=len(self.blocks),
            )
        self._tokens[:] = list(token_ids)
        return self._tokens, self._pointers, self._n_read

    def require_known(self, token_ids: Sequence[int]) -> None:
        """Raises WrongValue for a token that is not one of the vocabulary."""
        n_ids = self.decoder.shape.vocabulary
        if not all(0 <= token_id < n_ids for token_id in token_ids):
            raise WrongValue(
                f"the tokens {list(token_ids)} were given, and the vocabulary of this model holds 0 to {n_ids - 1}. "
                f"Encode the text with the model's own tokenizer.",
                value=list(token_ids),
            )


_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
# The decoder; tokens, blocks, counts, results and room of so many rows; threads, and what runs in them.
_STEP: Final = (_POINTER, _INT64, *[_POINTER] * 5, _INT64, _POINTER)
_FUNCTIONS: Final = {
    "open": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    "close": (None, _POINTER),
    "block": (_INT64, _POINTER),
    "logits": (_INT64, _POINTER),
    "room": (_INT64, _POINTER, _INT64, _INT64),
    "place": (None, _POINTER, _INT64, _POINTER),
    "step": (ctypes.c_int, *_STEP),
    "hidden": (ctypes.c_int, *_STEP, ctypes.c_int32),
}
"""Of each function of the interface: what it gives, and what it takes."""


def _view(blocks: Tensor, at: int, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    n, size = blocks.shape
    return blocks.as_strided((n, *sizes), (size, *strides), blocks.storage_offset() + at)


def _count(blocks: Tensor, at: int) -> Tensor:
    """An integer of each reader that stands among its numbers, ``(b, 1)``."""
    return _view(blocks, at, (8 // blocks.element_size(),), (1,)).view(torch.int64)


def _function(core: ctypes.CDLL, name: str, gives: Any, *takes: Any) -> Any:
    # A function object of its own: one that is shared has one signature for all who use it.
    prototype = ctypes.CFUNCTYPE(gives, *takes)
    return prototype((name, core))


def _sizes(d: int, own: LayerShape) -> dict[str, tuple[int, ...]]:
    """The weights that a layer must have, with their sizes."""
    sizes = {"mixer_norm": (d,)} | _feedforward_sizes(d, own)
    if own.mixer == SELF_REFERENCE:
        return sizes | _self_sizes(d, own)
    if own.mixer != MEMORY:
        sizes |= {"attention": (3 * d, d), "attention_out": (d, d)}
        if own.n_pinned:
            sizes |= {"pinned_keys": (own.n_pinned, d), "pinned_values": (own.n_pinned, d)}
    if own.mixer == ATTENTION:
        return sizes
    n_gates = (1 + own.has_retain_gate + own.has_momentum) * own.memory_heads
    sizes |= {"memory": (3 * d, d), "conv": (3 * d, own.taps), "gates": (n_gates, d), "gate_bias": (n_gates,)}
    if own.has_momentum:
        sizes |= {"most_momentum": (own.memory_heads,)}
    head = (d // own.memory_heads,)
    if own.mixer != GATE:
        return sizes | {"memory_norm": head, "open": (d, d), "open_bias": (d,), "memory_out": (d, d)}
    of_combination: dict[str, dict[str, tuple[int, ...]]] = {
        "gated": {"memory_norm": (d,), "open_bias": (d,)},
        "normalised": {"memory_norm": (d,), "attention_norm": (d,), "open_bias": (d,)},
        "projected": {"memory_norm": (d,), "attention_norm": (d,), "open": (d, d), "open_bias": (d,)},
        "sigmoid": {},
        "additive": {"memory_norm": head, "open": (d, d), "open_bias": (d,)},
    }
    return sizes | of_combination[COMBINATIONS[own.combine]]


def _feedforward_sizes(d: int, own: LayerShape) -> dict[str, tuple[int, ...]]:
    f, hope = own.hidden, own.hope
    if own.mlp == SWIGLU:
        return {"mlp_norm": (d,), "up": (2 * f, d), "down": (d, f)}
    if own.mlp == GELU:
        return {"mlp_norm": (d,), "up": (f, d), "up_bias": (f,), "down": (d, f), "down_bias": (d,)}
    n = hope.n_levels
    sizes: dict[str, tuple[int, ...]] = {"mlp_norm": (n, d), "up": (n, f, d), "up_bias": (n, f)}
    sizes |= {"down": (n, d, f), "down_bias": (n, d)}
    return sizes | ({"periods": (n,)} if hope.is_pooled else {}) | ({"shares": (n,)} if hope.is_mixed else {})


def _self_sizes(d: int, own: LayerShape) -> dict[str, tuple[int, ...]]:
    h, hope = own.memory_heads, own.hope
    sizes: dict[str, tuple[int, ...]] = {"conv": (d, own.taps), "gate_bias": (h, 2), "memory_norm": (d // h,)}
    sizes |= {"open": (d, d), "open_bias": (d,), "memory_out": (d, d)}
    sizes |= {} if hope.is_asking else {"query": (d, d)}
    return sizes | ({"first_makers": (h, d // h, hope.n_makers * (d // h))} if hope.is_static else {})


def _checked(weights: Weights, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights, side by side in memory. Raises ShapeError where they are not those of ``sizes``."""
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in sizes.keys() | found.keys() if sizes.get(name) != found.get(name))
    wrong += sorted(name for name, tensor in weights.items() if tensor.dtype != dtype or not tensor.is_cpu)
    if wrong:
        said = "; ".join(f"{name}: {found.get(name)}, expected {sizes.get(name)}" for name in wrong)
        raise ShapeError(f"weights do not fit the model that they are of ({dtype} on the CPU): {said}.", found=wrong)
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}
