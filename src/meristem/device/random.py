"""Random numbers that can be had again: named streams from one random seed, and the states of the global generators."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from meristem.events import Emit, Event, silent

CPU: Final = torch.device("cpu")

GlobalGenerators: TypeAlias = Mapping[str, torch.Tensor]
"""Where the global generators of torch stand, by the type of their device."""


def key(random_seed: int, name: str, *indices: int) -> int:
    """The 63-bit number that a stream is keyed with: SHA-256 of ``random_seed|name|index|...``.

    Streams of different names have nothing to do with each other, so a new one never shifts the draws of the others.
    """
    text = "|".join(str(part) for part in (random_seed, name, *indices))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(random_seed: int, name: str, *indices: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one named purpose: init, data, dropout, evaluate, sample, growth."""
    return torch.Generator(device).manual_seed(key(random_seed, name, *indices))


def random_state(device: torch.device = CPU) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Where all global generators of this process stand: python and numpy as JSON values, and as tensors those of torch
    by type, on the CPU and on ``device``. That of an accelerator which another process uses is none of them.
    """
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    values = {"python": {"version": version, "words": list(words), "gauss": gauss}, "numpy": numpy_state}
    return values, global_generators(device)


def global_generators(device: torch.device = CPU) -> dict[str, torch.Tensor]:
    """Where those of torch stand, on the CPU and on ``device``; ``restore_random_state({}, ...)`` puts them back."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        tensors[device.type] = torch.get_device_module(device).get_rng_state(*_named(device))
    return tensors


def restore_random_state(
    values: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    emit: Emit = silent,
    *,
    device: torch.device = CPU,
) -> None:
    """Put all global generators back where ``random_state`` found them; that of an accelerator into ``device``.

    A generator of which nothing was saved stays as it is. The state of an accelerator of another type is left out, as
    the event ``degraded``: a run may go on elsewhere. Up to e97c871 the states of all GPUs were saved, by number; the
    own one is taken, or the first where there were fewer.
    """
    python, numpy_state = values.get("python"), values.get("numpy")
    if python:
        random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    if numpy_state:
        words = np.asarray(numpy_state["state"]["key"], dtype=np.uint32)
        np.random.set_state({**numpy_state, "state": {"key": words, "pos": numpy_state["state"]["pos"]}})
    if "cpu" in tensors:
        # Torch reads a state from where its storage begins, and a view into a larger buffer begins elsewhere.
        torch.set_rng_state(tensors["cpu"].clone())
    names = (device.type, str(device), f"{device.type}:0")
    found = next((tensors[name] for name in names if name in tensors), None)
    if device.type != "cpu" and found is not None:
        torch.get_device_module(device).set_rng_state(found.clone(), *_named(device))
    left_out = sorted(name for name in tensors if name.partition(":")[0] not in ("cpu", device.type))
    if left_out:
        emit(Event("degraded", {"what": "random state", "left_out": left_out}, "warning"))


def _named(device: torch.device) -> tuple[torch.device, ...]:
    """How a call names this device: there is one mps, and its calls take no name."""
    return () if device.type == "mps" else (device,)
