"""The manifest of one checkpoint: what it is, of which run, and the size and hash of every file (schema 17.4)."""

import datetime
import importlib.metadata
import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from meristem.checkpoint.atomic import read_in, sha256
from meristem.checkpoint.migrate import migrated, require_readable, schema_version
from meristem.checkpoint.migrate import version as version_of
from meristem.config import canonical
from meristem.errors import CheckpointCorrupt

FILE = "manifest.json"

_HEADER: dict[str, object] = {
    "run": None,
    "tokens": None,
    "epoch": None,
    "seq": None,
    "reason": "interval",
    "parent": None,
    "config_sha256": None,
    "code": None,
    "tokenizer_fingerprint": None,
    "dataset_fingerprint": None,
    "arch": {"graph": None, "growth_seq": 0},
    "world": {"size": 1, "mesh": None},
    "metrics": {},
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def build(step: int, header: Mapping[str, object], files: list[dict[str, object]]) -> dict[str, Any]:
    """The manifest of a checkpoint about to be sealed.

    header: any of the fields of schema 17.4 that the store cannot know by itself; absent ones get their default.
    """
    unknown = sorted(set(header) - set(_HEADER))
    if unknown:
        raise ValueError(f"unknown header fields {unknown}; known are {sorted(_HEADER)}")
    version = version_of(FILE)
    manifest: dict[str, Any] = {"schema": f"meristem.checkpoint/{version}", "step": step}
    manifest |= {"created": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")}
    manifest |= _HEADER | dict(header) | {"files": files}
    manifest |= _finite(manifest["metrics"])
    manifest |= {"torch": importlib.metadata.version("torch"), "python": platform.python_version()}
    manifest |= {"compat": {"min_reader": version}}
    return manifest | {"manifest_sha256": sha256(canonical(manifest))}


def _finite(metrics: Mapping[str, float | None]) -> dict[str, object]:
    """JSON has no NaN: such a value becomes null and is named beside."""
    odd = {name: str(value) for name, value in metrics.items() if value is not None and not math.isfinite(value)}
    finite: dict[str, object] = {"metrics": {name: None if name in odd else value for name, value in metrics.items()}}
    return finite | ({"nonfinite": odd} if odd else {})


def read(directory: Path, descriptor: int) -> dict[str, Any]:
    """The verified manifest of ``directory``, brought to today's version. Its files are not read.

    descriptor: of the open directory.
    CheckpointTooNew names what a later meristem saved: the manifest itself, or one of the files by its version.
    """
    try:
        manifest: dict[str, Any] = orjson.loads(read_in(descriptor, FILE))
    except FileNotFoundError:
        raise corrupt(directory, f"there is no {FILE}, so it was never finished") from None
    except (OSError, orjson.JSONDecodeError) as cause:
        raise corrupt(directory, f"{FILE} cannot be read: {cause}") from cause
    version = _version(directory, manifest)
    require_readable(FILE, version, f"checkpoint {directory}")
    said = manifest.get("manifest_sha256")
    if said != sha256(canonical({key: value for key, value in manifest.items() if key != "manifest_sha256"})):
        raise corrupt(directory, f"{FILE} does not match the hash it carries")
    today = {"schema": f"meristem.checkpoint/{version_of(FILE)}"}
    manifest = migrated(FILE, manifest, version, f"checkpoint {directory}") | today
    for file in manifest["files"]:
        require_readable(file["path"], file["version"], f"checkpoint {directory}")
        if not _NAME.fullmatch(file["path"]):
            raise corrupt(directory, f"{FILE} names the file {file['path']!r}, which is not a plain name")
    return manifest | {name: default for name, default in _HEADER.items() if name not in manifest}


def _version(directory: Path, manifest: object) -> int:
    """The version a reader must know: that of the schema, or a higher one that the manifest requires."""
    if isinstance(manifest, dict):
        said = schema_version(manifest.get("schema"), "checkpoint")
        compat = manifest.get("compat")
        wanted = compat.get("min_reader") if isinstance(compat, dict) else None
        if said and isinstance(wanted, int) and wanted >= 1:
            return max(said, wanted)
    raise corrupt(directory, f"{FILE} is not a manifest of schema meristem.checkpoint")


def check_names(names: list[str]) -> None:
    """Refuse file names that could leave the directory, meet each other or meet the store's own files."""
    for name in names:
        if not _NAME.fullmatch(name) or name in (FILE, "pinned") or names.count(name) > 1:
            raise ValueError(f"file name {name!r} is not plain, is taken, or appears twice among {sorted(names)}")


def corrupt(directory: Path, reason: str) -> CheckpointCorrupt:
    """The error for a checkpoint with something wrong in its files."""
    return CheckpointCorrupt(
        f"checkpoint {directory} is damaged: {reason}. Use another one (`meristem checkpoint ls` shows them).",
        path=str(directory),
        reason=reason,
    )
