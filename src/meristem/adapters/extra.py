"""The libraries of the extra ``hf``, imported where they are used."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from meristem.errors import MissingExtra


def require(library: str, purpose: str) -> None:
    """Raise MissingExtra where a library is not installed; nothing is imported."""
    if find_spec(library) is None:
        raise _missing(library, purpose)


def imported(library: str, purpose: str) -> Any:
    """The library. MissingExtra says what it is needed for, and how it is installed."""
    try:
        return import_module(library)
    except ImportError as cause:
        raise _missing(library, purpose) from cause


def _missing(library: str, purpose: str) -> MissingExtra:
    return MissingExtra(
        f"{library.partition('.')[0]} is not installed, which {purpose} needs. Run: pip install 'meristem[hf]'",
        extra="hf",
    )
