"""Checkpoints: directories of named trees of tensors, values and files that are either whole or do not exist.

A checkpoint is written under ``.step-00012000.partial``, every file synced, its manifest last, and then renamed. Names
that begin with a dot do not exist for readers, with one exception: ``.step-00012000.replaced`` is what a newer save of
the same step has moved aside, and it counts as long as that newer one is not in place.

The room knows neither trainer nor growth. One process writes at a time (``checkpoint.run.RunLock``). Others may read
meanwhile: what is deleted or replaced while they choose makes them choose again, and what they opened stays readable.
"""

import contextlib
import difflib
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

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
    open_in,
    read_all,
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
_MOST_CHOICES: Final = 1000
"""How often a reader chooses again. Each time, the writer has deleted something meanwhile."""
T = TypeVar("T")


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
    """A verified checkpoint. Tensors are mapped from the file on the CPU on access.

    What an earlier meristem saved is given as today's saves it (``migrate``).

    descriptors: of its files, by name; they are closed with the last reference to this. What was verified can be read
        as long, also where it is deleted meanwhile.
    """

    path: Path
    manifest: Mapping[str, Any]
    descriptors: Mapping[str, int] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, _close, self.descriptors.values())

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return int(self.manifest["step"])

    def has(self, name: str) -> bool:
        """Whether a tree, a value or a file of this name is inside."""
        return any(name in (file["path"], _stem(file)) for file in self.manifest["files"])

    def tree(self, name: str) -> dict[str, Tensor]:
        """The tensors saved as tree ``name``, on the CPU."""
        return dict(self._today(self._file(name, "tree")))

    def value(self, name: str) -> Any:
        """The plain value saved as ``name``."""
        return self._today(self._file(name, "value"))

    def settings(self) -> dict[str, Any]:
        """The nested settings of the run, by today's keys."""
        return migrate.settings(self.file("config.yaml").decode(), self.path / "config.yaml")

    def file(self, name: str) -> bytes:
        """The bytes saved as file ``name``."""
        return read_all(self.descriptors[self._file(name, "file")])

    def _today(self, file: str) -> Any:
        version = next(entry["version"] for entry in self.manifest["files"] if entry["path"] == file)
        return migrate.migrated(file, self._as_saved(file), version, self.path, self._as_saved)

    def _as_saved(self, file: str) -> Any:
        """Tensors or plain value of a file, as they were written; None where there is no such file."""
        if file not in self.descriptors:
            return None
        descriptor, is_tree = self.descriptors[file], file.endswith(".safetensors")
        try:
            return load_file(f"/dev/fd/{descriptor}") if is_tree else orjson.loads(read_all(descriptor))
        except (SafetensorError, orjson.JSONDecodeError) as cause:
            kind = "a safetensors file" if is_tree else "JSON"
            raise corrupt(self.path, f"{file} is not {kind}: {cause}") from cause

    def _file(self, name: str, role: str) -> str:
        held = {_stem(file): file["path"] for file in self.manifest["files"] if file["role"] == role}
        if name not in held:
            raise CheckpointMismatch(
                f"checkpoint {self.path} has no {role} '{name}'; it holds {', '.join(sorted(held)) or 'none'}. "
                f"It was saved by a run of another kind.",
                path=str(self.path),
                step=self.step,
            )
        return str(held[name])


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


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
    try:
        listed = os.listdir(root)  # in one go: between two looks a replaced one might be in neither
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = {name: root / name for name in listed if _STEP.fullmatch(name) and (root / name).is_dir()}
    for name in listed:
        if name.startswith(".step-") and name.endswith(_REPLACED):
            found.setdefault(name[1 : -len(_REPLACED)], root / name)
    return [found[name] for name in sorted(found, key=lambda name: int(name.removeprefix("step-")))]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a checkpoint's directory: what is read by it is of this one, wherever it is moved meanwhile.

    Raises NoCheckpoint where there is none, and in place of what the block raises when it was deleted or replaced.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(path) from None
    except OSError as cause:
        raise corrupt(path, f"it cannot be opened: {cause.strerror}") from cause
    try:
        yield descriptor
    except CheckpointError as error:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise
        raise _absent(path) from error
    finally:
        os.close(descriptor)


def _absent(path: Path) -> NoCheckpoint:
    return NoCheckpoint(
        f"there is no checkpoint directory {path}. Give one that `meristem checkpoint ls` shows.", path=str(path)
    )


def _entry(path: Path) -> Entry:
    """The entry of one directory, or ``CheckpointError`` when its manifest or the size of a file is wrong."""
    with _opened(path) as directory:
        manifest = manifests.read(path, directory)
        for file in manifest["files"]:
            os.close(_open_file(path, directory, file))
        return Entry(
            path=path,
            step=manifest["step"],
            metrics=manifest["metrics"],
            created=manifest["created"],
            pinned=PINNED in os.listdir(directory),
            seq=manifest["seq"] or 0,
        )


def _open_file(path: Path, directory: int, file: Mapping[str, Any]) -> int:
    """A descriptor of a file of the size that the manifest says."""
    try:
        descriptor = open_in(directory, file["path"])
        size_bytes = os.fstat(descriptor).st_size
    except OSError as cause:
        raise corrupt(path, f"{file['path']} cannot be read: {cause.strerror}") from cause
    if size_bytes != file["size_bytes"]:
        os.close(descriptor)
        raise corrupt(path, f"{file['path']} has {size_bytes} bytes instead of {file['size_bytes']}")
    return descriptor


def _check_hash(path: Path, file: Mapping[str, Any], descriptor: int) -> None:
    try:
        found = sha256_file(descriptor)
    except OSError as cause:
        raise corrupt(path, f"{file['path']} cannot be read: {cause.strerror}") from cause
    if found != file["sha256"]:
        raise corrupt(path, f"{file['path']} has other bytes than were saved (its SHA-256 differs)")


def _again(choose: Callable[[], T]) -> T:
    """What ``choose`` gives, once nothing that it had listed was deleted or replaced before it was read."""
    for _ in range(_MOST_CHOICES):
        with contextlib.suppress(NoCheckpoint):
            return choose()
    return choose()


def entries(root: Path) -> list[Entry]:
    """The finished checkpoints under ``root``, oldest first: manifest whole, every file there and of its size."""
    return _again(lambda: _readable(root, {}))


def _readable(root: Path, passed_over: dict[Path, str]) -> list[Entry]:
    """``entries``; why others are none of them is added to ``passed_over``. NoCheckpoint: one was gone in between."""
    found = []
    for path in _directories(root):
        try:
            found.append(_entry(path))
        except (NoCheckpoint, CheckpointTooNew):
            raise
        except CheckpointError as error:
            passed_over[path] = str(error)
    return sorted(found, key=age_order)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path``, every byte of it verified."""
    with _opened(path) as directory, contextlib.ExitStack() as opened:
        manifest = manifests.read(path, directory)
        descriptors: dict[str, int] = {}
        opened.callback(lambda: _close(descriptors.values()))
        for file in manifest["files"]:
            descriptors[file["path"]] = _open_file(path, directory, file)
            _check_hash(path, file, descriptors[file["path"]])
        opened.pop_all()
        return Checkpoint(path, manifest, descriptors)


def verify(path: Path) -> list[str]:
    """Everything that is wrong with the checkpoint in ``path``, one line for each file; empty when it is whole."""
    wrong = []
    with _opened(path) as directory:
        try:
            manifest = manifests.read(path, directory)
        except CheckpointError as error:
            return [str(error)]
        for file in manifest["files"]:
            try:
                descriptor = _open_file(path, directory, file)
                try:
                    _check_hash(path, file, descriptor)
                finally:
                    os.close(descriptor)
            except CheckpointCorrupt as error:
                wrong.append(str(error.fields["reason"]))
    return wrong


def newest(root: Path, emit: Emit, refusal: Callable[[Checkpoint], str | None] = lambda _: None) -> Checkpoint | None:
    """The newest checkpoint under ``root`` that is whole, and for which ``refusal`` knows no reason against it.

    Each one that is passed over is ``checkpoint.skipped``. One that a later meristem saved is an error instead: to go
    on from an older one, or to begin afresh, would abandon what it holds.
    """

    def choose() -> tuple[Checkpoint | None, dict[Path, str]]:
        passed_over: dict[Path, str] = {}
        for entry in reversed(_readable(root, passed_over)):
            try:
                checkpoint = open_checkpoint(entry.path)
                reason = refusal(checkpoint)
            except (NoCheckpoint, CheckpointTooNew):
                raise
            except CheckpointError as error:
                reason = str(error)
            if reason is None:
                return checkpoint, passed_over
            passed_over[entry.path] = reason
        return None, passed_over

    found, passed_over = _again(choose)
    for path, reason in passed_over.items():
        emit(Event("checkpoint.skipped", {"checkpoint": path.name, "reason": reason}, "warning"))
    return found


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is that of one checkpoint, rather than of a directory with some inside."""
    return bool(_STEP.fullmatch(path.name)) or os.path.exists(path / manifests.FILE)


def root_of(path: Path) -> Path:
    """Where the checkpoints of a run are: its ``checkpoints``, unless ``path`` is that already."""
    return path / "checkpoints" if os.path.isdir(path / "checkpoints") else path


def find(path: Path, emit: Emit) -> Checkpoint:
    """The checkpoint that ``path`` means: one itself, or the newest of a ``checkpoints`` or a run directory."""
    if is_checkpoint(path):
        return _again(lambda: open_checkpoint(path))
    root = root_of(path)
    found = newest(root, emit)
    if found is None:
        raise NoCheckpoint(
            f"{_what_is_there(path, n_damaged=len(_directories(root)))} "
            f"Expected a checkpoint (step-...), a checkpoints directory or a run directory with one inside.",
            path=str(path),
        )
    return found


def _what_is_there(path: Path, *, n_damaged: int) -> str:
    """Why there is no checkpoint at a path: nothing is there, with the nearest name that is, or none that is whole."""
    if n_damaged:
        return f"no whole checkpoint in {path}: found {n_damaged} damaged."
    if path.exists():
        return f"no checkpoint in {path}."
    try:
        beside = os.listdir(path.parent)
    except OSError:
        beside = []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"there is no {path}." + (f" Did you mean {path.parent / near[0]}?" if near else "")


def pin(path: Path) -> None:
    """Keep this checkpoint whatever retention says."""
    open_checkpoint(path)
    write_atomic(path / PINNED, b"")
    write_index(path.parent)


def unpin(path: Path) -> None:
    """Leave this checkpoint to retention again."""
    with _opened(path):
        (path / PINNED).unlink(missing_ok=True)
    write_index(path.parent)


def diff(left: Checkpoint, right: Checkpoint) -> dict[str, Any]:
    """What differs between two checkpoints: fields of the manifest, files, and within trees the tensors.

    ``tensors`` maps ``tree/name`` to the largest absolute difference, or to both dtypes and shapes where these differ,
    the absent side being null.
    """
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
