"""What a worker and its process say to each other: JSON, with named tensors beside it where there are any. No pickle.

A message is the lengths of its two parts, the JSON and the safetensors bytes; the second may be empty.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    import torch

LENGTHS = struct.Struct("<QQ")

_PLAIN = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS


@dataclass(frozen=True)
class Result:
    """What a call gives: a JSON value, and tensors by name. An endpoint returns one when it has tensors to give."""

    value: Any
    tensors: Mapping[str, "torch.Tensor"] = field(default_factory=dict)


def message(head: Mapping[str, Any], tensors: Mapping[str, "torch.Tensor"]) -> list[bytes]:
    """The pieces of one message, to be sent one after the other.

    Raises TypeError for what JSON cannot hold: other types, keys that are no text, numbers that are not finite.
    """
    body, packed = orjson.dumps(head, option=_PLAIN), b""
    # orjson writes null for a number that is not finite; the other side would take it for an answer of None.
    if b"null" in body and not _is_finite(head):
        raise TypeError("a number is infinite or not a number; send it as a tensor")
    if tensors:
        from safetensors.torch import save

        packed = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    return [LENGTHS.pack(len(body), len(packed)) + body, packed]


def tensors_of(packed: bytes) -> dict[str, "torch.Tensor"]:
    """The tensors of a message; needs torch only where there are any."""
    if not packed:
        return {}
    from safetensors.torch import load

    return load(packed)


def _is_finite(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_finite(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_finite(inner) for inner in value)
    return not isinstance(value, float) or math.isfinite(value)
