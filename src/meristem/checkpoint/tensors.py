"""Trees of tensors as safetensors files, hashed while they are written.

The library's own writer wants a second copy of every tensor in RAM and a second pass for the hash. The format is a
length, a JSON header and the bytes of the tensors one after another, so it is written here and read by the library.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import orjson
import torch
from torch import Tensor

from meristem.checkpoint.atomic import write_all

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PORTION_BYTES = 1 << 20
_ALIGNMENT_BYTES = 8


def write_tensors(path: Path, tree: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write ``tree`` as a safetensors file, wait for the disk, and give its size in bytes and its SHA-256."""
    size_bytes, digest = 0, hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for portion in _portions(tree):
            write_all(descriptor, portion)
            digest.update(portion)
            size_bytes += len(portion)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size_bytes, digest.hexdigest()


def check_savable(name: str, tensor: Tensor) -> None:
    """Refuse, as a ValueError that names it, a tensor that has no bytes or a dtype unknown to the format."""
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"tensor {name!r} cannot be saved: {tensor.dtype}, {tensor.layout}, on {tensor.device}")


def _portions(tree: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file. Wide dtypes come first, so that every tensor lies aligned to its own width."""
    header, end = {}, 0
    names = sorted(tree, key=lambda name: (-tree[name].element_size(), name))
    for name in names:
        tensor = tree[name]
        check_savable(name, tensor)
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = orjson.dumps(header)
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tree[name].detach().cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().data
        for start in range(0, len(content), _PORTION_BYTES):
            yield content[start : start + _PORTION_BYTES]
