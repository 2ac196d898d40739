"""Optional packages: imported where they are used, and where one is missing, an error says how to install it."""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from meristem.errors import MissingExtra

EXTRA_OF: Final = {
    "matplotlib": "plot",
    "transformers": "hf",
    "peft": "hf",
    "huggingface_hub": "hf",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "pyarrow": "arrow",
    "sentencepiece": "tok",
    "datasets": "data",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "wandb": "wandb",
    "lm_eval": "eval",
    "optuna": "sweep",
    "fastapi": "serve",
    "uvicorn": "serve",
    "httpx2": "serve",
    "prometheus_client": "serve",
    "fla": "kernels",
    "triton": "kernels",
}
"""The extra of this package that brings a library, by the name that the library is imported by."""


def is_there(library: str) -> bool:
    """Whether a library is installed; nothing is imported."""
    return find_spec(library) is not None


def require(library: str, purpose: str, advice: str = "") -> None:
    """Raise MissingExtra where a library is not installed; nothing is imported.

    purpose: what needs it, as the subject of a sentence. advice: what else can be done, a sentence of its own.
    """
    if not is_there(library):
        raise _missing(library, purpose, advice)


def imported(module: str, purpose: str, advice: str = "") -> Any:
    """A module of an optional library, or one of ours that imports such a library; see ``require``."""
    with needed(purpose, advice, library=module.partition(".")[0]):
        return import_module(module)


@contextlib.contextmanager
def needed(purpose: str, advice: str = "", *, library: str | None = None) -> Iterator[None]:
    """Turn the failure of an import inside the block into MissingExtra; see ``require``.

    library: the one that is imported, where a failure without a name, as of a broken installation, is of it.
    """
    try:
        yield
    except ImportError as cause:
        name = (cause.name or "").partition(".")[0]
        library = name if name in EXTRA_OF else library
        if library not in EXTRA_OF:
            raise
        if not is_there(library):
            raise _missing(library, purpose, advice) from cause
        raise _missing(library, purpose, advice, f"{library} is installed, and cannot be loaded: {cause}.") from cause


def _missing(library: str, purpose: str, advice: str, found: str | None = None) -> MissingExtra:
    extra = EXTRA_OF[library]
    found = found or f"{purpose} needs {library}, which is not installed."
    command = f"Run: pip install 'meristem[{extra}]'"
    return MissingExtra(f"{found} {command}{f'. {advice}' if advice else ''}", extra=extra, library=library)
