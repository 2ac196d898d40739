"""What a prepared corpus holds and came from, with a hash for every file (schema ``meristem.dataset/1``)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from meristem import config
from meristem.checkpoint.atomic import sha256_file, write_atomic
from meristem.data.files import read, refused
from meristem.errors import DataError, ManifestMismatch

SCHEMA: Final = "meristem.dataset/1"
FILE: Final = "manifest.json"
_FIELDS: Final = frozenset(
    "schema name version created tool sources loader transform tokenizer split counts files quality max_token_id "
    "random_seed fingerprint".split()
)
# When and by which release a corpus was written does not change what it is.
_CIRCUMSTANCE: Final = frozenset({"fingerprint", "created", "tool"})


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """The name of exactly this data: the same text prepared again elsewhere has the same.

    How many of its documents are copies follows from the text, and older manifests say 0 of any.
    """
    named = {name: value for name, value in manifest.items() if name not in _CIRCUMSTANCE}
    return config.fingerprint({**named, "quality": {**manifest["quality"], "duplicates": 0}})


def describe_file(path: Path, dtype: str, n_records: int) -> dict[str, Any]:
    """The entry of one file of the corpus."""
    return {
        "path": path.name,
        "size_bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "dtype": dtype,
        "records": n_records,
    }


def write(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Complete a manifest with its fingerprint and put it into its directory."""
    whole = {**manifest, "fingerprint": fingerprint(manifest)}
    write_atomic(directory / FILE, orjson.dumps(whole, option=orjson.OPT_INDENT_2))


def load(directory: Path) -> dict[str, Any]:
    """The manifest of a corpus directory, refused when it is torn, altered or of another schema."""
    path = directory / FILE
    if not os.path.lexists(path):
        raise DataError(
            f"{directory} is no prepared corpus: it holds no {FILE}. `meristem data ls` lists those that there are.",
            path=str(path),
        )
    try:
        manifest = orjson.loads(read(path))
    except orjson.JSONDecodeError as cause:
        raise _mismatch(path, f"is not JSON ({cause})") from cause
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise _mismatch(path, f"has schema {found!r}, expected {SCHEMA!r}")
    if manifest.keys() != _FIELDS:
        raise _mismatch(path, f"lacks or adds fields: {sorted(manifest.keys() ^ _FIELDS)}")
    if manifest["fingerprint"] != fingerprint(manifest):
        raise _mismatch(path, "was altered: its fingerprint is not that of its content")
    return manifest


def verify(directory: Path, manifest: Mapping[str, Any], *, hashes: bool = True) -> None:
    """Refuse a corpus with a file that is missing, of another size or, where ``hashes`` are read, of other bytes."""
    for entry in manifest["files"]:
        path = directory / entry["path"]
        try:
            size_bytes = os.stat(path).st_size
        except OSError as cause:
            raise refused("open", path, cause) from cause
        if size_bytes != entry["size_bytes"]:
            raise _mismatch(path, f"holds {size_bytes} bytes, its manifest says {entry['size_bytes']}")
        if hashes and sha256_file(path) != entry["sha256"]:
            raise _mismatch(path, "does not have the SHA-256 of its manifest: its bytes changed")


def _mismatch(path: Path, found: str) -> ManifestMismatch:
    return ManifestMismatch(
        f"{path} {found}. Remove the directory {path.parent} and prepare the text again.", path=str(path), found=found
    )
