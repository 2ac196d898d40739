"""Random numbers that can be had again: named streams from one random seed, and the global states as plain data."""

import base64
import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from meristem.events import Emit, Event, silent


def key(random_seed: int, name: str, *indices: int) -> int:
    """The 63-bit number that a stream is keyed with: SHA-256 of ``random_seed|name|index|...``.

    Streams of different names have nothing to do with each other, so a new one never shifts the draws of the others.
    """
    text = "|".join(str(part) for part in (random_seed, name, *indices))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(random_seed: int, name: str, *indices: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one named purpose: init, data, dropout, evaluate, sample, growth."""
    return torch.Generator(device).manual_seed(key(random_seed, name, *indices))


def random_state() -> dict[str, Any]:
    """Where all global generators stand (python, numpy, torch, each accelerator), as plain JSON values."""
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": numpy_state,
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "mps": _text(torch.mps.get_rng_state()) if torch.backends.mps.is_available() else None,
    }


def restore_random_state(state: Mapping[str, Any], emit: Emit = silent) -> None:
    """Put all global generators back where ``random_state`` found them.

    The state of an accelerator that is not here is left out, as the event ``degraded``: a run may go on elsewhere.
    """
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    words = np.asarray(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {"key": words, "pos": numpy_state["state"]["pos"]}})
    torch.set_rng_state(_bytes(state["torch"]))
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, text in enumerate(state["cuda"][:n_cuda]):
        torch.cuda.set_rng_state(_bytes(text), index)
    left_out = [f"cuda:{index}" for index in range(n_cuda, len(state["cuda"]))]
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_bytes(state["mps"]))
    elif state["mps"] is not None:
        left_out.append("mps")
    if left_out:
        emit(Event("degraded", {"what": "random state", "left_out": left_out}, "warning"))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
