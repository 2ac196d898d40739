"""meristem: train, grow and serve language models that keep learning."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meristem.runs.open import load as load
    from meristem.serve.session import Session as Session

__version__ = "0.1.0"
__all__ = ["Session", "__version__", "load"]

_LATER = {"load": "meristem.runs.open", "Session": "meristem.serve.session"}


def __getattr__(name: str) -> object:
    """Import ``load`` and ``Session`` on first access: they need torch, and much does not."""
    if name not in _LATER:
        raise AttributeError(f"module 'meristem' has no attribute '{name}'")
    value = getattr(import_module(_LATER[name]), name)
    globals()[name] = value
    return value
