"""Where a base comes from, and whether code that comes with it may run."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.data.files import read
from meristem.data.given import PINNED
from meristem.errors import CheckpointMismatch, WrongValue
from meristem.extras import imported

ALLOWED: Final = "MERISTEM_ALLOW_REMOTE_CODE"
"""An environment variable: models whose own code may run, joined by commas."""

CONFIG: Final = "config.json"
_permitted: ContextVar[frozenset[str]] = ContextVar("permitted", default=frozenset())
FILES: Final = ("*.safetensors", "*.json", "*.py")
"""What of a model of the hub is fetched."""


def is_folder(path: str | Path) -> bool:
    """Whether this is a folder of ``transformers``, rather than a checkpoint or a run."""
    return os.path.isfile(os.path.join(path, CONFIG))


def located(base: str) -> Path:
    """The directory of a base; a model of the hub, as name@commit, is fetched into its cache.

    Raises WrongValue for a name without a commit: a branch may hold other weights tomorrow.
    """
    if os.path.exists(base):
        return Path(base).resolve()
    found = PINNED.fullmatch(base)
    if found is None:
        raise WrongValue(
            f"'{base}' is no checkpoint, run or folder here, and no model of the hub as name@commit, whose commit has "
            f"40 digits of 0-9 and a-f. Name one of these; a branch or a tag may change.",
            value=base,
        )
    hub = imported("huggingface_hub", "a model of the hub")
    return Path(hub.snapshot_download(found["name"], revision=found["commit"], allow_patterns=list(FILES)))


def described(folder: Path) -> dict[str, Any]:
    """What ``config.json`` of a folder says; it names its ``model_type``."""
    try:
        config = orjson.loads(read(folder / CONFIG))
    except orjson.JSONDecodeError as cause:
        raise CheckpointMismatch(f"{folder / CONFIG} is not JSON: {cause}.", path=str(folder)) from cause
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointMismatch(
            f"{folder / CONFIG} names no model_type, so it is none of transformers. Name a folder with a model.",
            path=str(folder),
        )
    return config


@contextmanager
def permitting(models: Iterable[str]) -> Iterator[None]:
    """Let the code of these models, each as name@commit, run while the block lasts."""
    token = _permitted.set(frozenset(models))
    try:
        yield
    finally:
        _permitted.reset(token)


def runs_code(base: str, config: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether code that comes with a base has to run, and may. WrongValue where it may not; nothing is imported.

    It may where ``permitting`` or the environment variable ``ALLOWED`` names the base. What a checkpoint says of itself
    does not count.
    """
    if "auto_map" not in config:
        return False
    permitted = {*_permitted.get(), *filter(None, environment.get(ALLOWED, "").split(","))}
    loose = sorted(each for each in permitted if not PINNED.fullmatch(each))
    if loose:
        raise WrongValue(
            f"code may run of {', '.join(loose)}, which is no name@commit with 40 digits of 0-9 and a-f: what it runs "
            f"could change. Pin it to a commit.",
            value=loose,
        )
    if base not in permitted:
        pinned = base if PINNED.fullmatch(base) else "NAME@COMMIT, as the hub has it"
        raise WrongValue(
            f"{base} brings code of its own, which is not run. Read it; if it may run, set finetune.remote_code="
            f"[{pinned}], or {ALLOWED} to the same.",
            value=base,
        )
    return True
