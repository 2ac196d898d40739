"""What the native core takes of a model: the numbers of its layers and its weights, or the reason why it does not."""

import ctypes
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from meristem.memory.kernels.select import is_forced
from meristem.memory.region import curvature, is_coasting
from meristem.memory.rule import Rule
from meristem.memory.state import as_tensors
from meristem.memory.update import implicit, plain
from meristem.models.config import LearnConfig
from meristem.models.lm import LM, Block
from meristem.models.weights import TAILS, rate_of
from meristem.native import decoding as native
from meristem.native.library import core
from meristem.nn.attention import Attention
from meristem.nn.cms_mlp import CMSMLP, CMSMLPLevel
from meristem.nn.combine import Additive, Gated, Normalised, Projected, Sigmoid
from meristem.nn.conv import CausalConv
from meristem.nn.gates import GateMap
from meristem.nn.mag import MemoryAsGate
from meristem.nn.mal import MemoryAsLayer
from meristem.nn.memory import MemoryLayer, initial_state
from meristem.nn.mlp import Feedforward, SwiGLU
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.norm import RMSNorm
from meristem.nn.self_matrix import Matrices
from meristem.nn.self_reference import SelfReference

MIXERS: Final = {
    Attention: native.ATTENTION,
    MemoryAsGate: native.GATE,
    MemoryAsLayer: native.LAYER,
    MemoryLayer: native.MEMORY,
    SelfReference: native.SELF_REFERENCE,
}
COMBINES: Final = {Gated: 0, Normalised: 1, Projected: 2, Sigmoid: 3, Additive: 4}
"""By class, its place in ``native.COMBINATIONS``."""


LARGE_BYTES: Final = 1 << 28
MANY_THREADS: Final = 4
"""Weights of this size, read by so many threads of torch, arrive sooner than by the one thread of the core: it reads 24
GB/s of them here, and saves about 0.5 ms of calls for each layer. An estimate: no machine with so many was at hand."""


LONGEST_PERIOD: Final = 1 << 24
"""The longest that float32 counts without a gap."""

MATRIX: Final = "matrix_bhkv"
"""What a memory of one matrix is in a state."""


class NotTaken(Exception):
    """The core does not take a model, or a state of it; the message is the reason, as a clause."""


@dataclass(frozen=True, eq=False)
class Packed:
    """The weights of a model as the core reads them, and the moment of the model that they are of.

    versions, places: of each tensor of the model its version, which every change in place raises, and where its numbers
    are.
    """

    decoder: native.Decoder
    tensors: list[Tensor]
    versions: list[int]
    places: list[int]

    def is_current(self) -> bool:
        """Whether no weight has changed since."""
        return [x._version for x in self.tensors] == self.versions and _places(self.tensors) == self.places


_LOCK: Final = threading.Lock()
_LAST: Final[weakref.WeakKeyDictionary[nn.Module, Packed]] = weakref.WeakKeyDictionary()
_ALIVE: Final[weakref.WeakValueDictionary[object, Packed]] = weakref.WeakValueDictionary()
"""By what it was made of: readers that share their weights share what is packed."""


def packed(reader: object) -> Packed:
    """The weights of a reader, packed now or since they last changed. Raises NotTaken."""
    model, tensors = _taken(reader)
    library = _library()
    shape, layers = shapes(model)
    _require_worth(tensors)
    with _LOCK:
        versions, places = [x._version for x in tensors], _places(tensors)
        of_shapes = (bytes(shape), *(bytes(each) for each in layers))
        key = of_shapes, tuple(map(id, tensors)), tuple(versions), tuple(places)
        found = _ALIVE.get(key)
        if found is None:
            weights = [(own, _layer_weights(block, own)) for own, block in zip(layers, model.blocks, strict=True)]
            found = Packed(native.Decoder(library, shape, weights, _ends(model)), tensors, versions, places)
            _ALIVE[key] = found
        _LAST[model] = found
    return found


def refusal_as_built(model: nn.Module) -> str:
    """Why the core would not read a model that is built like this one, as a clause; empty where it would. Shapes are
    enough: the model may be on ``meta``."""
    try:
        shapes(model)
        _library()
        _require_worth(model.parameters())
    except NotTaken as reason:
        return str(reason)
    return ""


def shapes(model: nn.Module) -> tuple[native.ModelShape, list[native.LayerShape]]:
    """The numbers of a model and of its layers. Raises NotTaken."""
    if type(model) is not LM:
        raise NotTaken(f"it is a {type(model).__name__}, not a language model of ours alone")
    if model.join is not None or model.n_masked:
        raise NotTaken("its layers stand side by side" if model.join is not None else "part of its vocabulary is idle")
    vocabulary, width = model.embedding.weight.shape
    if type(model.embedding) is not nn.Embedding:
        raise NotTaken(f"its embedding is a {type(model.embedding).__name__}")
    if model.head is not None:
        _plain_linear(model.head, "the head")
    shape = native.ModelShape(width, vocabulary, len(model.blocks), model.norm.eps)
    return shape, [_layer_shape(index, block) for index, block in enumerate(model.blocks)]


def _require_worth(tensors: Iterable[Tensor]) -> None:
    size_bytes, n_threads = sum(x.nbytes for x in tensors), torch.get_num_threads()
    if size_bytes >= LARGE_BYTES and n_threads >= MANY_THREADS:
        raise NotTaken(f"its weights are {size_bytes >> 20} MiB, and torch reads them with {n_threads} threads")


def _library() -> ctypes.CDLL:
    if is_forced():
        raise NotTaken("force_reference() is in effect")
    if (library := core().library) is None:
        raise NotTaken(f"there is no native core: {core().said}")
    return library


class Parts(NamedTuple):
    """What a model is made of, as the core has it.

    layers: each with its weights by name. begin: what a memory holds before the first token, where that is not zero, by
    layer and then by the name of a leaf of its state. learn_rates: of the last parts of the model, where they learn.
    """

    shape: native.ModelShape
    layers: list[tuple[native.LayerShape, native.Weights]]
    ends: native.Weights
    begin: list[dict[str, Tensor]]
    learn_rates: dict[str, float]


def parts_of(reader: object) -> Parts:
    """A model in parts, for a core that is not of this process. Raises NotTaken."""
    model, _ = _taken(reader)
    shape, of_layers = shapes(model)
    for index, own in enumerate(of_layers):
        if own.mixer == native.SELF_REFERENCE or own.mlp == native.LEVELS:
            raise NotTaken(f"layer {index} has a self-reference or levels, which only the core of this process has")
    blocks: list[Any] = list(model.blocks)
    layers: list[tuple[native.LayerShape, native.Weights]] = [
        (own, _layer_weights(block, own)) for own, block in zip(of_layers, blocks, strict=True)
    ]
    rates = {which: rate_of(model, LearnConfig.model_validate({"which": which})) for which in TAILS}
    return Parts(shape, layers, _ends(model), [_begin(block.mixer) for block in blocks], rates)


@torch.no_grad()
def _begin(mixer: Any) -> dict[str, Tensor]:
    recall = _recall(mixer)
    if recall is None:
        return {}
    persistent_gd = getattr(_attention(mixer), "persistent_gd", None)
    state = initial_state(recall, persistent_gd, recall.qkv.weight[None, :1])
    leaves = as_tensors(recall.init_state(recall.qkv.weight[None, :1]) if state is None else state)
    inside = "" if type(mixer) is MemoryLayer else "recall."
    return {f"{inside}{name}": leaf for name, leaf in leaves.items() if leaf.any()}


def _ends(model: LM) -> dict[str, Tensor]:
    head_od = model.embedding.weight if model.head is None else model.head.weight
    return {"embedding": model.embedding.weight, "norm": model.norm.gain_d, "head": head_od}


def _places(tensors: list[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _taken(reader: object) -> tuple[LM, list[Tensor]]:
    """The model itself and all its tensors, where nothing about it is other than it was built."""
    if type(reader) is not LM:
        raise NotTaken(f"it is a {type(reader).__name__}, not a language model of ours alone")
    if torch.is_autocast_enabled("cpu"):
        raise NotTaken("it is read under autocast")
    tensors: list[Tensor] = []
    modules: list[nn.Module | None] = [reader]
    while modules:
        if (module := modules.pop()) is None:
            continue
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise NotTaken(f"something listens to a {type(module).__name__} of it")
        if isinstance(module, RMSNorm) and (type(module) is not RMSNorm or module.eps != reader.norm.eps):
            raise NotTaken("a norm of it is not as it was built")
        tensors += [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]
        modules += module._modules.values()
    dtype = reader.embedding.weight.dtype
    for x in tensors:
        is_usual = type(x) in (Tensor, nn.Parameter) and not x.is_inference() and x.is_cpu and x.dtype == dtype
        if not is_usual or dtype not in (torch.float32, torch.float64):
            raise NotTaken(f"its weights are not all float32 or float64 on the CPU: one is {x.dtype} on {x.device}")
    return reader, tensors


def _layer_shape(index: int, block: Any) -> native.LayerShape:
    where = f"layer {index}"
    if type(block) is not Block or type(block.mixer) not in MIXERS:
        part = block if type(block) is not Block else block.mixer
        raise NotTaken(f"{where} has a {type(part).__name__} that the core does not have")
    mixer: Any = block.mixer
    shape = native.LayerShape(mixer=MIXERS[type(mixer)])
    _put_feedforward(shape, block, where)
    if type(mixer) is SelfReference:
        _put_self_reference(shape, mixer, where)
        return shape
    if (attention := _attention(mixer)) is not None:
        _put_attention(shape, attention, where)
    if (recall := _recall(mixer)) is not None:
        _put_memory(shape, recall, where)
    if type(mixer) is MemoryAsGate:
        if type(mixer.combine) not in COMBINES:
            raise NotTaken(f"{where} has a {type(mixer.combine).__name__} that the core does not have")
        shape.combine = COMBINES[type(mixer.combine)]
        shape.is_writing = mixer.is_writing
    layer = _memory_layer(mixer)
    if layer is not None:
        shape.is_writing = layer.is_writing
        shape.is_residual = type(mixer) is not MemoryAsLayer or mixer.is_residual
    return shape


def _put_feedforward(shape: native.LayerShape, block: Any, where: str) -> None:
    mlp: Any = block.mlp
    if type(mlp) is CMSMLP:
        _put_levels(shape, mlp, where)
        return
    if type(mlp) not in (SwiGLU, Feedforward) or block.mlp_norm is None:
        raise NotTaken(f"{where} has a {type(mlp).__name__} that the core does not have")
    shape.hidden = mlp.out.in_features
    _plain_linear(mlp.out, where, has_bias=type(mlp) is Feedforward)
    if type(mlp) is SwiGLU:
        _plain_linear(mlp.gate_up, where)
    else:
        _plain_gelu(mlp, where)
        shape.mlp = native.GELU


def _plain_gelu(mlp: Any, where: str) -> None:
    _plain_linear(mlp.up, where, has_bias=True)
    _plain_linear(mlp.out, where, has_bias=True)
    if mlp.activation is not torch.nn.functional.gelu:
        raise NotTaken(f"{where} has an activation that the core does not have")


def _put_levels(shape: native.LayerShape, chain: Any, where: str) -> None:
    for level in chain.level:
        if type(level) is not CMSMLPLevel or type(level.feedforward) is not Feedforward:
            raise NotTaken(f"{where} has a level that the core does not have")
        _plain_gelu(level.feedforward, where)
    hidden = {level.feedforward.out.in_features for level in chain.level}
    if len(hidden) > 1 or max(level.period for level in chain.level) > LONGEST_PERIOD:
        raise NotTaken(f"{where} has levels of several widths, or one of more tokens than the core counts")
    config, own = chain.config, shape.hope
    shape.mlp, shape.hidden, own.n_levels = native.LEVELS, hidden.pop(), len(chain.level)
    own.is_mixed, own.is_pooled = chain.mix_l is not None, chain.is_carrying
    own.is_slowest_first = config.order == "slowest"


def _put_self_reference(shape: native.LayerShape, layer: SelfReference, where: str) -> None:
    if not isinstance(layer.makers, Matrices) or type(layer.conv) is not CausalConv:
        raise NotTaken(f"{where} has memories of several layers, of which the core knows no step")
    if layer.query is not None:
        _plain_linear(layer.query, where)
    _plain_linear(layer.gate, where, has_bias=True)
    _plain_linear(layer.out, where)
    shape.memory_heads, shape.taps, shape.is_writing = layer.heads, layer.conv.weight_dc.shape[1], layer.is_writing
    own = shape.hope
    own.n_makers, own.is_asking = len(layer.makers.names), layer.query is None
    own.chunk_makers, own.chunk_memory, own.is_static = layer.chunk_other, layer.chunk_memory, layer.is_static
    own.is_generated, own.is_squared = layer.makers.is_generated, layer.makers.is_squared
    own.has_unit_value, own.eta_scale = layer.unit_value, layer.eta_scale


def _attention(mixer: Any) -> Any:
    return mixer if type(mixer) is Attention else getattr(mixer, "attention", None)


def _memory_layer(mixer: Any) -> Any:
    return mixer if type(mixer) is MemoryLayer else getattr(mixer, "memory", None)


def _recall(mixer: Any) -> Any:
    return getattr(_memory_layer(mixer), "recall", None) or getattr(mixer, "recall", None)


def _put_attention(shape: native.LayerShape, attention: Any, where: str) -> None:
    if type(attention) is not Attention or attention.span is None:
        raise NotTaken(f"{where} attends to everything before")
    _plain_linear(attention.qkv, where)
    _plain_linear(attention.out, where)
    if attention.qkv.in_features != attention.out.in_features:
        raise NotTaken(f"{where} has attention heads of another width than the model's")
    shape.attention_heads, shape.span, shape.is_rotated = attention.heads, attention.span, attention.rope
    shape.n_pinned = 0 if attention.persistent_gd is None else len(attention.persistent_gd)


def _put_memory(shape: native.LayerShape, recall: Any, where: str) -> None:
    if type(recall) is not NeuralMemory or type(recall.conv) is not CausalConv or type(recall.gates) is not GateMap:
        raise NotTaken(f"{where} has a {type(recall).__name__} that the core does not have")
    rule, gates = recall.rule, recall.gates
    rates = {plain().rate: False, implicit().rate: True}
    if not recall.is_plain or rule.update.rate not in rates or gates.down_rd is not None or gates.code is not None:
        raise NotTaken(f"{where} has a memory of which the core knows no step")
    _plain_linear(recall.qkv, where)
    shape.memory_heads, shape.taps = recall.heads, recall.conv.weight_dc.shape[1]
    shape.slope, shape.write_limit, shape.curvature = rule.slope, gates.write_limit, curvature(rule) or 0.0
    for name, choice in _choices(rule, gates, is_proximal=rates[rule.update.rate]).items():
        setattr(shape, name, choice)


def _choices(rule: Rule, gates: GateMap, *, is_proximal: bool) -> Mapping[str, bool]:
    return {
        "is_warm": rule.probe == "warm",
        "is_proximal": is_proximal,
        "reads_before": rule.reads == "before",
        "has_momentum": rule.update.has_momentum,
        "is_coasting": rule.update.has_momentum and is_coasting(rule),
        "is_scaled": rule.update.has_momentum and gates.is_scaled,
        "has_retain": rule.has_retain,
        "has_retain_gate": rule.has_retain_gate,
    }


def _plain_linear(linear: Any, where: str, *, has_bias: bool = False) -> None:
    if type(linear) is not nn.Linear or (linear.bias is not None) != has_bias:
        raise NotTaken(f"{where} has a {type(linear).__name__} that was put in the place of its own")


@torch.no_grad()
def _layer_weights(block: Any, shape: native.LayerShape) -> dict[str, Tensor]:
    """The weights of a layer by the names of ``native/decode.hpp``."""
    found = {"mixer_norm": block.mixer_norm.gain_d} | _feedforward_weights(block, shape)
    if shape.mixer == native.SELF_REFERENCE:
        return found | _self_weights(block.mixer)
    if (attention := _attention(block.mixer)) is not None:
        found |= _attention_weights(attention)
    if (recall := _recall(block.mixer)) is not None:
        found |= _memory_weights(recall)
    if (layer := _memory_layer(block.mixer)) is not None:
        found |= {"memory_norm": layer.norm.gain_d, "memory_out": layer.out.weight}
        found |= {"open": layer.gate.weight, "open_bias": layer.gate.bias}
    elif shape.mixer == native.GATE:
        found |= _combine_weights(block.mixer.combine)
    return found


def _feedforward_weights(block: Any, shape: native.LayerShape) -> dict[str, Tensor]:
    if shape.mlp == native.LEVELS:
        return _levels_weights(block.mlp)
    found = {"mlp_norm": block.mlp_norm.gain_d, "down": block.mlp.out.weight}
    if shape.mlp == native.SWIGLU:
        return found | {"up": block.mlp.gate_up.weight}
    return found | {"up": block.mlp.up.weight, "up_bias": block.mlp.up.bias, "down_bias": block.mlp.out.bias}


def _levels_weights(chain: Any) -> dict[str, Tensor]:
    levels = list(chain.level)
    each = [level.feedforward for level in levels]
    found = {"mlp_norm": torch.stack([level.norm.gain_d for level in levels])}
    found |= {"up": torch.stack([x.up.weight for x in each]), "up_bias": torch.stack([x.up.bias for x in each])}
    found |= {"down": torch.stack([x.out.weight for x in each]), "down_bias": torch.stack([x.out.bias for x in each])}
    if chain.is_carrying:
        found["periods"] = found["up"].new_tensor([level.period for level in levels])
    return found if chain.mix_l is None else found | {"shares": chain.mix_l}


def _self_weights(layer: SelfReference) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"conv": layer.conv.weight_dc, "gate_bias": layer.bias_hl}
    found["memory_norm"] = layer.norm.gain_d
    found |= {"open": layer.gate.weight, "open_bias": layer.gate.bias, "memory_out": layer.out.weight}
    if layer.query is not None:
        found["query"] = layer.query.weight
    if layer.is_static:
        found["first_makers"] = layer.makers.joined(layer.values)[MATRIX][0]
    return found


def _attention_weights(attention: Attention) -> dict[str, Tensor]:
    found = {"attention": attention.qkv.weight, "attention_out": attention.out.weight}
    if attention.persistent_gd is not None:
        _, pinned_bghk, pinned_bghv = attention.project(attention.persistent_gd[None])
        found |= {"pinned_keys": pinned_bghk[0].flatten(1), "pinned_values": pinned_bghv[0].flatten(1)}
    return found


def _memory_weights(recall: NeuralMemory) -> dict[str, Tensor]:
    gates = recall.gates
    found = {"memory": recall.qkv.weight, "conv": recall.conv.weight_dc}
    found |= {"gates": gates.weight_hd, "gate_bias": gates.bias_h}
    if gates.scale_h is not None:
        found |= {"gates": gates.weight_hd * gates.scale_h[:, None], "gate_bias": gates.bias_h * gates.scale_h}
    most_h = gates.most_momentum()
    return found if most_h is None else found | {"most_momentum": most_h}


def _combine_weights(combine: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in ("memory_norm", "attention_norm"):
        if (norm := getattr(combine, name, None)) is not None:
            found[name] = norm.gain_d
    if (gate := getattr(combine, "gate", None)) is not None:
        found |= {"open": gate.weight, "open_bias": gate.bias}
    if (bias_d := getattr(combine, "bias_d", None)) is not None:
        found["open_bias"] = bias_d
    return found
