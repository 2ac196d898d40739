"""The session file: one safetensors file whose header says what it belongs to and whose hash covers every byte."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from meristem.checkpoint import migrate
from meristem.checkpoint.atomic import sha256, write_atomic
from meristem.config import canonical
from meristem.errors import CheckpointCorrupt, NoCheckpoint, RunError

HEADER = "session"
STATE = "memory.safetensors"
"""Sections of a session file, as ``checkpoint.migrate`` knows them: the state is saved as a checkpoint's memory is."""

INSIDE = "state."
"""What the names of the tensors of the state begin with in a session file."""

_DIGEST_FIELD = b'"sha256":"'
_NO_DIGEST = b"0" * 64


class SessionFile(NamedTuple):
    """What a session file holds: named tensors and a JSON header."""

    tensors: dict[str, torch.Tensor]
    header: dict[str, Any]


def pack(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> bytes:
    """Tensors and header as the bytes of a session file."""
    metadata = {
        "schema": f"meristem.session/{migrate.version(HEADER)}",
        "state": str(migrate.version(STATE)),
        "session": canonical(header).decode(),
    }
    return sealed(tensors, metadata)


def sealed(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with a hash of all of it.

    The hash stands inside the file, so it is taken with its own 64 digits set to zero.
    """
    whole = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    content = safetensors.torch.save(whole, {**metadata, "sha256": _NO_DIGEST.decode()})
    digest = sha256(content).encode()
    return content.replace(_DIGEST_FIELD + _NO_DIGEST, _DIGEST_FIELD + digest, 1)


def write(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Put tensors and header into one file, whole or not at all."""
    content = pack(tensors, header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except (OSError, ValueError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise RunError(
            f"the session could not be written to {path}: {reason}. Choose a path that can be written.",
            path=str(path),
        ) from cause


def read(path: Path) -> SessionFile:
    """The tensors and header of a session file; see ``unpack``."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise NoCheckpoint(
            f"no session could be read from {path}: {reason}. Give a file that `/save` or Session.save wrote.",
            path=str(path),
        ) from cause
    return unpack(content, path)


def unpack(content: bytes, path: Path | str) -> SessionFile:
    """The tensors and header that ``pack`` wrote, after the hash was checked; those of an earlier meristem as today's.

    path: where the bytes came from, for messages. CheckpointTooNew names the section that a later meristem saved.
    """
    metadata = _metadata(path, content)
    digest = str(metadata.get("sha256")).encode()
    if sha256(content.replace(_DIGEST_FIELD + digest, _DIGEST_FIELD + _NO_DIGEST, 1)).encode() != digest:
        raise _corrupt(path, "its bytes do not have the hash written in it")
    version = migrate.schema_version(metadata.get("schema"), "session")
    if version is None:
        raise _corrupt(path, f"its schema is {metadata.get('schema')!r}")
    migrate.require_readable(HEADER, version, path)
    try:
        mapped = safetensors.torch.load(content)
        # Copies: inside the file's bytes a tensor may lie on an odd address, and a sum over it end in other bits.
        tensors = {name: tensor.clone() for name, tensor in mapped.items()}
        header = json.loads(metadata["session"])
        of_state = int(metadata.get("state", 1))
        state = {name.removeprefix(INSIDE): tensors.pop(name) for name in list(tensors) if name.startswith(INSIDE)}
        beside = {"memory_integers.json": header.get("integers"), HEADER: header}.get
        state = migrate.migrated(STATE, state, of_state, path, beside)
        tensors |= {f"{INSIDE}{name}": tensor for name, tensor in state.items()}
        return SessionFile(tensors, migrate.migrated(HEADER, header, version, path))
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as cause:
        raise _corrupt(path, str(cause)) from cause


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the shapes, types and bytes of the weights of a model, whatever each is called."""
    each = (
        hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + _bytes(tensor)).digest()
        for tensor in model.state_dict().values()
    )
    return hashlib.sha256(b"".join(sorted(each))).hexdigest()


def named_model_fingerprint(model: nn.Module) -> str:
    """What session files of version 1 hold: SHA-256 over the class too, and the names that the weights had then."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted((migrate.first_name(name), tensor) for name, tensor in model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + _bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _metadata(path: Path | str, content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: eight bytes of length, then JSON."""
    end = 8 + int.from_bytes(content[:8], "little")
    if len(content) < 8 or end > len(content):
        raise _corrupt(path, f"it holds {len(content)} bytes and its header needs {end}")
    try:
        metadata = json.loads(content[8:end])["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise _corrupt(path, "its header is not that of a session") from cause
    return metadata if isinstance(metadata, dict) else {}


def _corrupt(path: Path | str, reason: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        f"{path} is not an intact session file: {reason}. Restore it from a copy, or begin a new session.",
        path=str(path),
    )
