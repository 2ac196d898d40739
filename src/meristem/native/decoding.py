"""One token of a whole model by the native core, for several readers at once (``native/decode.hpp``).

What is known here are numbers and tensors; ``models.decoding`` makes them of a model, and knows which models can be
decoded like this.
"""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from meristem.errors import ShapeError, WrongValue

ATTENTION, GATE, LAYER, MEMORY = range(4)
"""What mixes tokens: attention, memory as gate, memory as layer, memory alone."""

COMBINATIONS: Final = ("gated", "normalised", "projected", "sigmoid", "additive")
SWIGLU, GELU = range(2)

_WEIGHTS: Final = (
    *("mixer_norm", "attention", "attention_out", "pinned_keys", "pinned_values"),
    *("memory", "conv", "gates", "gate_bias", "most_momentum"),
    *("memory_norm", "attention_norm", "open", "open_bias", "memory_out"),
    *("mlp_norm", "up", "up_bias", "down", "down_bias"),
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


class ModelShape(ctypes.Structure):
    """Sizes of a model; eps is that of every norm."""

    _fields_ = (*((name, ctypes.c_int64) for name in ("width", "vocabulary", "n_layers")), ("eps", ctypes.c_double))


class LayerShape(ctypes.Structure):
    """What a layer is made of, as ``native/decode.hpp`` has it; what it does not have is 0."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_double) for name in _MEASURES),
        *((name, ctypes.c_int64) for name in _CHOICES),
    )


class _LayerWeights(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in _WEIGHTS)


class _ModelWeights(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("embedding", "norm", "head"))


_OFFSETS: Final = ("keys", "values", "matrix", "momentum", "tail")
_STRIDES: Final = ("key_stride", "value_stride", "matrix_stride", "tail_stride")


class _Place(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in (*_OFFSETS, *_STRIDES))


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
        n, size = blocks.shape

        def view(at: int, sizes: Sequence[int], strides: Sequence[int]) -> Tensor | None:
            if at < 0:
                return None
            return blocks.as_strided((n, *sizes), (size, *strides), blocks.storage_offset() + at)

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

    def room(self, n: int) -> Tensor:
        """What a step of so many readers writes beside their blocks."""
        return torch.empty(int(self._call["room"](self._handle, n)), dtype=self.dtype)

    def logits(self, n: int) -> Tensor:
        """Room for the logits of so many readers, ``(n, stride)``; the vocabulary is what each row begins with."""
        return torch.empty(n, self._logits_stride, dtype=self.dtype)

    def step(self, n: int, *arguments: Any) -> bool:
        """``native/decode.hpp``, ``step``; False where a token is none of the vocabulary."""
        return not self._call["step"](self._handle, n, *arguments)


class Readers:
    """Some readers of one decoder, in the order of their rows.

    blocks: what each holds, one axis each. n_read: tokens that each has read since its rings were filled from slot 0.
    Both are changed in place by ``step``; rows of the same block may not stand here twice.
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
        self._room = decoder.room(n)

    @property
    def n_read(self) -> list[int]:
        """Tokens that each reader has read since its rings were filled from slot 0."""
        return list(self._n_read)

    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Read one token for each reader; the predictions of the next, ``(n, vocabulary)``.

        Raises WrongValue, and nothing was read, for a token that is not one of the vocabulary.
        """
        n, n_ids = len(self.blocks), self.decoder.shape.vocabulary
        if len(token_ids) != n:
            raise ShapeError(f"{len(token_ids)} tokens were given for {n} readers. Give each one.", expected=n)
        self._tokens[:] = list(token_ids)
        logits_bo = self.decoder.logits(n)
        arguments = self._tokens, self._pointers, self._n_read, logits_bo.data_ptr(), self._room.data_ptr()
        if not self.decoder.step(n, *arguments):
            raise WrongValue(
                f"the tokens {list(token_ids)} were given, and the vocabulary of this model holds 0 to {n_ids - 1}. "
                f"Encode the text with the model's own tokenizer.",
                value=list(token_ids),
            )
        return logits_bo[:, :n_ids]


_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: Final = {
    "open": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    "close": (None, _POINTER),
    "block": (_INT64, _POINTER),
    "logits": (_INT64, _POINTER),
    "room": (_INT64, _POINTER, _INT64),
    "place": (None, _POINTER, _INT64, _POINTER),
    "step": (ctypes.c_int, _POINTER, _INT64, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
}
"""Of each function of the interface: what it gives, and what it takes."""


def _function(core: ctypes.CDLL, name: str, gives: Any, *takes: Any) -> Any:
    # A function object of its own: one that is shared has one signature for all who use it.
    prototype = ctypes.CFUNCTYPE(gives, *takes)
    return prototype((name, core))


def _sizes(d: int, own: LayerShape) -> dict[str, tuple[int, ...]]:
    """The weights that a layer must have, with their sizes."""
    f = own.hidden
    sizes: dict[str, tuple[int, ...]] = {"mixer_norm": (d,), "mlp_norm": (d,), "down": (d, f)}
    sizes |= {"up": (2 * f, d)} if own.mlp == SWIGLU else {"up": (f, d), "up_bias": (f,), "down_bias": (d,)}
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


def _checked(weights: Weights, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights, side by side in memory. Raises ShapeError where they are not those of ``sizes``."""
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in sizes.keys() | found.keys() if sizes.get(name) != found.get(name))
    wrong += sorted(name for name, tensor in weights.items() if tensor.dtype != dtype or not tensor.is_cpu)
    if wrong:
        said = "; ".join(f"{name}: {found.get(name)}, expected {sizes.get(name)}" for name in wrong)
        raise ShapeError(f"weights do not fit the model that they are of ({dtype} on the CPU): {said}.", found=wrong)
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}
