"""Layers: modules whose forward takes a state and gives it back."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meristem.memory.state import detach as detach
    from meristem.nn.documents import reset_mask as reset_mask
    from meristem.nn.neural_memory import NeuralMemory as NeuralMemory

__all__ = ["NeuralMemory", "detach", "reset_mask"]

_LATER = {
    "NeuralMemory": "meristem.nn.neural_memory",
    "detach": "meristem.memory.state",
    "reset_mask": "meristem.nn.documents",
}


def __getattr__(name: str) -> object:
    """Import what is public on first access: it needs torch, and the configuration in this room does not."""
    if name not in _LATER:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'; it has {', '.join(__all__)}")
    value = getattr(import_module(_LATER[name]), name)
    globals()[name] = value
    return value
