"""Checkpoints: directories of named trees of tensors, values and files that are either whole or do not exist.

A checkpoint is written under ``.step-00012000.partial``, every file synced, its manifest last, and then renamed. Names
that begin with a dot do not exist for readers, with one exception: ``.step-00012000.replaced`` is what a newer save of
the same step has moved aside, and it counts as long as that newer one is not in place.

The room knows neither trainer nor growth. One process writes at a time (``checkpoint.run.RunLock``).
"""

import contextlib
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from meristem.checkpoint import manifest as manifests
from meristem.checkpoint import migrate
from meristem.checkpoint.atomic import (
    PARTIAL,
    disk_full,
    sha256,
    sha256_file,
    sync_directory,
    write_atomic,
    write_synced,
)
from meristem.checkpoint.manifest import corrupt
from meristem.checkpoint.tensors import write_tensors
from meristem.checkpoint.values import to_json
from meristem.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch, CheckpointTooNew, NoCheckpoint
from meristem.events import Emit, Event

INDEX = "index.json"
PINNED = "pinned"
_REPLACED = ".replaced"
_DELETED = ".deleted"
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Entry:
    """One finished checkpoint, as its manifest tells it. ``seq`` is where the records of the run stood."""

    path: Path
    step: int
    metrics: Mapping[str, float | None]
    created: str
    pinned: bool = False
    seq: int = 0


def age_order(entry: Entry) -> tuple[int, str, int]:
    """Sorts entries from the oldest to the newest. The clock comes second: it may jump, the records only go on."""
    return entry.seq, entry.created, entry.step


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Tensors are mapped from the file on the CPU when asked for.

    What an earlier meristem saved is given as today's saves it (``migrate``).
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return int(self.manifest["step"])

    def has(self, name: str) -> bool:
        """Whether a tree, a value or a file of this name is inside."""
        return any(name in (file["path"], _stem(file)) for file in self.manifest["files"])

    def tree(self, name: str) -> dict[str, Tensor]:
        """The tensors saved as tree ``name``, on the CPU."""
        return dict(self._today(self._path(name, "tree")))

    def value(self, name: str) -> Any:
        """The plain value saved as ``name``."""
        return self._today(self._path(name, "value"))

    def settings(self) -> dict[str, Any]:
        """The nested settings of the run, by today's keys."""
        return migrate.settings(self.file("config.yaml").decode(), self.path / "config.yaml")

    def file(self, name: str) -> bytes:
        """The bytes saved as file ``name``."""
        return self._path(name, "file").read_bytes()

    def _today(self, path: Path) -> Any:
        version = next(file["version"] for file in self.manifest["files"] if file["path"] == path.name)
        return migrate.migrated(path.name, self._as_saved(path.name), version, self.path, self._as_saved)

    def _as_saved(self, name: str) -> Any:
        """Tensors or plain value of a file, as they were written; None where there is no such file."""
        path = self.path / name
        if all(file["path"] != name for file in self.manifest["files"]):
            return None
        is_tree = path.suffix == ".safetensors"
        try:
            return load_file(path) if is_tree else orjson.loads(path.read_bytes())
        except (SafetensorError, orjson.JSONDecodeError) as cause:
            kind = "a safetensors file" if is_tree else "JSON"
            raise corrupt(self.path, f"{name} is not {kind}: {cause}") from cause

    def _path(self, name: str, role: str) -> Path:
        held = {_stem(file): file["path"] for file in self.manifest["files"] if file["role"] == role}
        if name not in held:
            raise CheckpointMismatch(
                f"checkpoint {self.path} has no {role} '{name}'; it holds {', '.join(sorted(held)) or 'none'}. "
                f"It was saved by a run of another kind.",
                path=str(self.path),
                step=self.step,
            )
        return self.path / str(held[name])


def _stem(file: Mapping[str, Any]) -> str:
    """The name under which a file was handed in: trees and values get their ending from the store."""
    path = str(file["path"])
    return path if file["role"] == "file" else path.rsplit(".", 1)[0]


def save(
    root: Path,
    *,
    step: int,
    trees: Mapping[str, Mapping[str, Tensor]],
    values: Mapping[str, object],
    files: Mapping[str, bytes],
    header: Mapping[str, object],
) -> Path:
    """Write one checkpoint under ``root`` and give its directory. A second one of the same step replaces the first.

    Whatever fails, what was there before can still be loaded; a full disk is ``DiskFull``.
    header: fields of the manifest that the caller knows (``manifest.build``).
    """
    texts = {f"{name}.json": to_json(name, value) for name, value in values.items()}
    manifests.check_names([f"{name}.safetensors" for name in trees] + list(texts) + list(files))
    final = root / f"step-{step:08d}"
    partial = _aside(final, PARTIAL)
    with disk_full(final):
        root.mkdir(parents=True, exist_ok=True)
        _clear(root)
        try:
            os.mkdir(partial)
            written = [_written(f"{name}.safetensors", "tree", *write_tensors(partial / f"{name}.safetensors", tree))
                       for name, tree in trees.items()]  # fmt: skip
            for name, content in (texts | dict(files)).items():
                write_synced(partial / name, content)
                role = "value" if name in texts else "file"
                written.append(_written(name, role, len(content), sha256(content)))
            manifest = manifests.build(step, header, written)
            if (final / PINNED).exists():
                write_synced(partial / PINNED, b"")
            write_synced(partial / manifests.FILE, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
            sync_directory(partial)
            _publish(partial, final)
        except BaseException:
            _remove(partial)
            raise
        write_index(root)
        _remove(_aside(final, _REPLACED))
    return final


def _written(path: str, role: str, size_bytes: int, digest: str) -> dict[str, object]:
    version = migrate.version(path)
    return {"path": path, "size_bytes": size_bytes, "sha256": digest, "role": role, "version": version}


def _aside(final: Path, ending: str) -> Path:
    """The hidden name beside a checkpoint under which it comes or goes."""
    return final.with_name(f".{final.name}{ending}")


def _publish(partial: Path, final: Path) -> None:
    """Give a finished directory its name. An older one of that name steps aside, where readers still find it."""
    if final.exists():
        os.rename(final, _aside(final, _REPLACED))
    os.rename(partial, final)
    sync_directory(final.parent)


def _clear(root: Path) -> None:
    """Remove what interrupted saves and deletions left behind, and put back what no newer one has replaced."""
    for replaced in root.glob(f".step-*{_REPLACED}"):
        final = root / replaced.name[1 : -len(_REPLACED)]
        if not final.exists():
            os.rename(replaced, final)
    for ending in (PARTIAL, _REPLACED, _DELETED):
        for left in root.glob(f".step-*{ending}"):
            _remove(left)


def _remove(directory: Path) -> None:
    """Delete a hidden directory. What cannot be deleted now is invisible and goes at the next save."""
    shutil.rmtree(directory, ignore_errors=True)


def delete(path: Path) -> None:
    """Delete one checkpoint. It disappears as a whole before its files go."""
    deleted = _aside(path, _DELETED)
    _remove(deleted)
    os.rename(path, deleted)
    _remove(deleted)


def write_index(root: Path) -> None:
    """Replace ``index.json``, the list of what is here, oldest first, for readers who do not want to open manifests."""
    listed = [
        {"path": e.path.name, "step": e.step, "created": e.created, "metrics": dict(e.metrics), "pinned": e.pinned}
        for e in entries(root)
    ]
    write_atomic(root / INDEX, orjson.dumps({"checkpoints": listed}, option=orjson.OPT_INDENT_2))


def _directories(root: Path) -> list[Path]:
    """Every directory under ``root`` that should be a checkpoint, by step."""
    if not root.is_dir():
        return []
    found = {path.name: path for path in root.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()}
    for replaced in root.glob(f".step-*{_REPLACED}"):
        found.setdefault(replaced.name[1 : -len(_REPLACED)], replaced)
    return [found[name] for name in sorted(found, key=lambda name: int(name.removeprefix("step-")))]


def _entry(path: Path) -> Entry:
    """The entry of one directory, or ``CheckpointError`` when its manifest or the size of a file is wrong."""
    manifest = manifests.read(path)
    for file in manifest["files"]:
        _check_size(path, file)
    return Entry(
        path=path,
        step=manifest["step"],
        metrics=manifest["metrics"],
        created=manifest["created"],
        pinned=(path / PINNED).exists(),
        seq=manifest["seq"] or 0,
    )


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise NoCheckpoint(
            f"there is no checkpoint directory {path}. Give one that `meristem checkpoint ls` shows.", path=str(path)
        )


def _check_size(directory: Path, file: Mapping[str, Any]) -> None:
    try:
        size_bytes = (directory / file["path"]).stat().st_size
    except OSError as cause:
        raise corrupt(directory, f"{file['path']} cannot be read: {cause.strerror}") from cause
    if size_bytes != file["size_bytes"]:
        raise corrupt(directory, f"{file['path']} has {size_bytes} bytes instead of {file['size_bytes']}")


def _check_hash(directory: Path, file: Mapping[str, Any]) -> None:
    try:
        found = sha256_file(directory / file["path"])
    except OSError as cause:
        raise corrupt(directory, f"{file['path']} cannot be read: {cause.strerror}") from cause
    if found != file["sha256"]:
        raise corrupt(directory, f"{file['path']} has other bytes than were saved (its SHA-256 differs)")


def entries(root: Path) -> list[Entry]:
    """The finished checkpoints under ``root``, oldest first: manifest whole, every file there and of its size."""
    found = []
    for path in _directories(root):
        with contextlib.suppress(CheckpointError):
            found.append(_entry(path))
    return sorted(found, key=age_order)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path``, every byte of it verified."""
    _check_directory(path)
    manifest = manifests.read(path)
    for file in manifest["files"]:
        _check_size(path, file)
        _check_hash(path, file)
    return Checkpoint(path, manifest)


def verify(path: Path) -> list[str]:
    """Everything that is wrong with the checkpoint in ``path``, one line for each file; empty when it is whole."""
    _check_directory(path)
    try:
        manifest = manifests.read(path)
    except CheckpointError as error:
        return [str(error)]
    wrong = []
    for file in manifest["files"]:
        try:
            _check_size(path, file)
            _check_hash(path, file)
        except CheckpointCorrupt as error:
            wrong.append(str(error.fields["reason"]))
    return wrong


def newest(root: Path, emit: Emit, refusal: Callable[[Checkpoint], str | None] = lambda _: None) -> Checkpoint | None:
    """The newest checkpoint under ``root`` that is whole, and for which ``refusal`` knows no reason against it.

    Each one that is passed over is ``checkpoint.skipped``. One that a later meristem saved is an error instead: to go
    on from an older one, or to begin afresh, would abandon what it holds.
    """
    readable = []
    for path in _directories(root):
        try:
            readable.append(_entry(path))
        except CheckpointTooNew:
            raise
        except CheckpointError as error:
            _skipped(path, str(error), emit)
    for entry in sorted(readable, key=age_order, reverse=True):
        try:
            checkpoint = open_checkpoint(entry.path)
            reason = refusal(checkpoint)
        except CheckpointError as error:
            reason = str(error)
        if reason is None:
            return checkpoint
        _skipped(entry.path, reason, emit)
    return None


def _skipped(path: Path, reason: str, emit: Emit) -> None:
    emit(Event("checkpoint.skipped", {"checkpoint": path.name, "reason": reason}, "warning"))


def find(path: Path, emit: Emit) -> Checkpoint:
    """The checkpoint that ``path`` means: one itself, or the newest of a ``checkpoints`` or a run directory."""
    if (path / manifests.FILE).exists() or _STEP.fullmatch(path.name):
        return open_checkpoint(path)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = newest(root, emit)
    if found is None:
        n_damaged = len(_directories(root))
        raise NoCheckpoint(
            f"no whole checkpoint in {path}: found {n_damaged} damaged. "
            f"Expected a checkpoint (step-...), a checkpoints directory or a run directory with one inside.",
            path=str(path),
        )
    return found


def pin(path: Path) -> None:
    """Keep this checkpoint whatever retention says."""
    open_checkpoint(path)
    write_atomic(path / PINNED, b"")
    write_index(path.parent)


def unpin(path: Path) -> None:
    """Leave this checkpoint to retention again."""
    _check_directory(path)
    (path / PINNED).unlink(missing_ok=True)
    write_index(path.parent)


def diff(a: Path, b: Path) -> dict[str, Any]:
    """What differs between two checkpoints: fields of the manifest, files, and within trees the tensors.

    ``tensors`` maps ``tree/name`` to the largest absolute difference, or to both dtypes and shapes where these differ,
    the absent side being null.
    """
    left, right = open_checkpoint(a), open_checkpoint(b)
    own = {"files", "manifest_sha256", "created"}
    fields = {
        key: [left.manifest.get(key), right.manifest.get(key)]
        for key in sorted({*left.manifest, *right.manifest} - own)
        if left.manifest.get(key) != right.manifest.get(key)
    }
    held = [{(f["path"], f["role"]): f["sha256"] for f in side.manifest["files"]} for side in (left, right)]
    changed = sorted(file for file in {*held[0], *held[1]} if held[0].get(file) != held[1].get(file))
    tensors: dict[str, object] = {}
    for path, role in changed:
        if role == "tree":
            name = path.removesuffix(".safetensors")
            trees = [side.tree(name) if side.has(name) else {} for side in (left, right)]
            tensors |= {f"{name}/{key}": change for key, change in _tensor_differences(*trees).items()}
    return {"manifest": fields, "files": [path for path, _ in changed], "tensors": tensors}


def _tensor_differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in sorted({*a, *b}):
        described = [f"{side[name].dtype} {list(side[name].shape)}" if name in side else None for side in (a, b)]
        if described[0] != described[1]:
            found[name] = described
        elif not torch.equal(a[name], b[name]):
            largest = float((a[name].double() - b[name].double()).abs().max())
            found[name] = largest if math.isfinite(largest) else str(largest)
    return found
