"""Random numbers that can be had again: named streams from one random seed, and the states of the global generators."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from meristem.device.resolve import available
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


def random_state() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Where all global generators stand: python and numpy as JSON values, torch and each accelerator as tensors."""
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    values = {"python": {"version": version, "words": list(words), "gauss": gauss}, "numpy": numpy_state}
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    return values, tensors


def restore_random_state(values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], emit: Emit = silent) -> None:
    """Put all global generators back where ``random_state`` found them.

    A generator of which nothing was saved stays as it is. The state of an accelerator that is not here is left out, as
    the event ``degraded``: a run may go on elsewhere.
    """
    python, numpy_state = values.get("python"), values.get("numpy")
    if python:
        random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    if numpy_state:
        words = np.asarray(numpy_state["state"]["key"], dtype=np.uint32)
        np.random.set_state({**numpy_state, "state": {"key": words, "pos": numpy_state["state"]["pos"]}})
    here = available()
    left_out = sorted(name for name in tensors if name not in here)
    for name, saved in tensors.items():
        # Torch reads a state from where its storage begins, and a view into a larger buffer begins elsewhere.
        state = saved.clone()
        if name == "cpu":
            torch.set_rng_state(state)
        elif name in here and name == "mps":
            torch.mps.set_rng_state(state)
        elif name in here:
            torch.cuda.set_rng_state(state, name)
    if left_out:
        emit(Event("degraded", {"what": "random state", "left_out": left_out}, "warning"))
