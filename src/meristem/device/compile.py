"""Compiling the blocks of a model, in place and one by one."""

import os
import shutil
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch
from torch import nn

from meristem.device.config import DeviceConfig
from meristem.errors import CapabilityError
from meristem.events import Emit, Event

Graph: TypeAlias = Callable[..., Any]

MOST_FAILURES: Final = 3
"""After so many nothing more is compiled."""


def compile_blocks(model: nn.Module, config: DeviceConfig, device: torch.device, emit: Emit) -> None:
    """Compile each block that ``model.blocks`` lists, if ``config`` says so. Parameters and their names stay.

    Equal blocks share one compilation; a whole model would be compiled anew for every change. What the compiler fails
    at runs as it is, with the event ``compile.fallback``; after three failures nothing more is compiled.
    """
    if not config.compile:
        return
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise CapabilityError(
            f"{type(model).__name__} lists no blocks to compile. Set device.compile to false for this model.",
            operation="compile",
            reason="no blocks",
        )
    compiler = os.environ.get("CXX")
    on_cpu = device.type == "cpu"
    if on_cpu and not any(shutil.which(name) for name in ([compiler] if compiler else ["g++", "clang++", "c++"])):
        raise CapabilityError(
            "compiling for the CPU needs a C++ compiler, and none was found (g++, clang++, c++). "
            "Install one, or set device.compile to false.",
            operation="compile",
            reason="no C++ compiler",
        )
    from torch._dynamo.backends.registry import lookup_backend  # it takes a second, and few runs compile

    backend = _with_fallback(lookup_backend("inductor"), emit)
    for block in blocks:
        block.compile(backend=backend)
    is_repeatable = torch.are_deterministic_algorithms_enabled()
    emit(Event("capability.chosen", {"compiled_blocks": len(blocks), "is_repeatable": is_repeatable}))


def _with_fallback(compiler: Callable[[Any, Any], Graph], emit: Emit) -> Callable[..., Graph]:
    """A compiler that gives a graph as it is where the given one raises, counts that, and soon tries no more."""
    n_failures = 0

    def compiled(graph: Any, inputs: Any) -> Graph:
        nonlocal n_failures
        if n_failures < MOST_FAILURES:
            try:
                return compiler(graph, inputs)
            except Exception as cause:  # noqa: BLE001 - a compiler may raise what it likes, and the run goes on
                n_failures += 1
                reason = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0][:200]}"
                is_last = n_failures == MOST_FAILURES
                payload = {"n_failures": n_failures, "reason": reason, "is_last": is_last}
                emit(Event("compile.fallback", payload, "warning"))
        own: Graph = graph.forward
        return own

    return compiled
