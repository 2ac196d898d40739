"""Compiling the blocks of a model, in place and one by one."""

import os
import shutil

import torch
from torch import nn

from meristem.device.config import DeviceConfig
from meristem.errors import CapabilityError
from meristem.events import Emit, Event


def compile_blocks(model: nn.Module, config: DeviceConfig, device: torch.device, emit: Emit) -> None:
    """Compile each block that ``model.blocks`` lists, if ``config`` says so. Parameters and their names stay.

    Equal blocks share one compilation; a whole model would be compiled anew for every change.
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
    for block in blocks:
        block.compile()
    is_repeatable = torch.are_deterministic_algorithms_enabled()
    emit(Event("capability.chosen", {"compiled_blocks": len(blocks), "is_repeatable": is_repeatable}))
