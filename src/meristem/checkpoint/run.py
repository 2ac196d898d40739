"""The manifest of a run (``run.json``, schema 17.5) and the lock that keeps a second process out of its directory."""

import contextlib
import datetime
import os
import secrets
import socket
import tempfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import filelock
import orjson

from meristem.checkpoint import migrate
from meristem.checkpoint.atomic import disk_full, write_atomic
from meristem.errors import CheckpointTooNew, RunError, RunInUse
from meristem.events import Emit, Event

FILE = "run.json"
CHECKPOINTS = "checkpoints"
LOCK = "run.lock"
BEAT_EVERY_S = 30.0
DEAD_AFTER_S = 120.0

End = Literal["finished", "failed", "interrupted"]

_FIELDS: dict[str, object] = {
    "schema": f"meristem.run/{migrate.version(FILE)}",
    "id": None,
    "name": None,
    "parent": None,
    "tags": [],
    "status": "created",
    "started": None,
    "heartbeat": None,
    "ended": None,
    "exit": None,
    "command": None,
    "config_sha256": None,
    "code": None,
    "env": {},
    "hardware": {},
    "dataset_fingerprint": None,
    "tokenizer_fingerprint": None,
    "policy_fingerprint": None,
    "random_seed": None,
    "random_streams": {},
    "record_streams": [],
    "checkpoints": {"last": None, "best": None},
    "best": {"metric": None, "value": None, "step": None},
    "plan": {"predicted": None, "measured": None},
    "sinks": [],
    "artifacts": [],
    "bypass": False,
}


_KINDS: dict[str, type | types.UnionType] = {"id": str | None, "name": str | None, "status": str, "best": dict}
"""What readers build on, and what it has to be."""


class RunManifest:
    """``run.json`` of one directory, rewritten atomically at every change. Threads may share it."""

    def __init__(self, directory: Path, content: dict[str, Any]) -> None:
        self.directory = directory
        self._content = content
        self._lock = threading.Lock()

    @classmethod
    def create(cls, directory: Path, **fields: object) -> Self:
        """The manifest of a new run, with a new id. A directory that holds a run already is refused."""
        if (directory / FILE).exists():
            raise RunError(
                f"{directory} already holds the run {read(directory)['id']}. "
                f"Go on with it (--resume auto), or give another directory with --run-dir.",
                path=str(directory),
            )
        directory.mkdir(parents=True, exist_ok=True)
        now = _now()
        run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        manifest = cls(directory, _FIELDS | {"id": run_id, "started": _text(now)})
        manifest.update(**fields)
        return manifest

    @classmethod
    def reopen(cls, directory: Path) -> Self:
        """The manifest of a run that goes on: running again, its end forgotten."""
        manifest = cls(directory, read(directory))
        manifest.update(status="running", ended=None, exit=None)
        return manifest

    @property
    def content(self) -> dict[str, Any]:
        """The fields as they stand."""
        return dict(self._content)

    def update(self, **fields: object) -> None:
        """Set fields of schema 17.5 and write the file. Counts as a heartbeat."""
        unknown = sorted(set(fields) - set(_FIELDS))
        if unknown:
            raise ValueError(f"unknown run fields {unknown}; known are {sorted(_FIELDS)}")
        with self._lock:
            self._content |= fields | {"heartbeat": _text(_now())}
            write_atomic(self.directory / FILE, orjson.dumps(self._content, option=orjson.OPT_INDENT_2) + b"\n")

    def heartbeat(self) -> None:
        """Say that the run is alive."""
        self.update()

    def end(self, status: End, exit_code: int) -> None:
        """Say how the run ended."""
        self.update(status=status, ended=_text(_now()), exit=exit_code)

    @contextlib.contextmanager
    def beating(self, emit: Emit, every_s: float = BEAT_EVERY_S) -> Iterator[None]:
        """Run the block with the status ``running`` and a heartbeat from a thread, since a step may take minutes."""
        self.update(status="running")
        stopped = threading.Event()
        thread = threading.Thread(target=self._beat, args=(stopped, every_s, emit), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def _beat(self, stopped: threading.Event, every_s: float, emit: Emit) -> None:
        has_failed = False
        while not stopped.wait(every_s):
            try:
                self.heartbeat()
                has_failed = False
            except (OSError, RunError) as error:  # a missed beat may not stop the run; the next save will, if it must
                if not has_failed:
                    emit(Event("degraded", {"what": "heartbeat", "reason": str(error)}, "warning"))
                has_failed = True


def read(directory: Path) -> dict[str, Any]:
    """The fields of ``run.json``; absent ones have their default.

    A run that should be alive but has not said so for two minutes has ``died``.
    """
    path = directory / FILE
    try:
        saved = _FIELDS | orjson.loads(path.read_bytes())
        version = migrate.schema_version(saved["schema"], "run")
        if version is None:
            raise ValueError(f"its schema is {saved['schema']!r}")
        content: dict[str, Any] = migrate.migrated(FILE, saved, version, path) | {"schema": _FIELDS["schema"]}
        strange = [name for name, kind in _KINDS.items() if not isinstance(content[name], kind)]
        if strange:
            raise TypeError(f"{', '.join(strange)} of another type than expected")
        if content["status"] in ("created", "running"):
            silent_s = (_now() - datetime.datetime.fromisoformat(content["heartbeat"])).total_seconds()
            content["status"] = "died" if silent_s > DEAD_AFTER_S else content["status"]
    except FileNotFoundError:
        raise RunError(
            f"{directory} holds no {FILE}, so it is no run directory. `meristem runs ls` shows them.",
            path=str(directory),
        ) from None
    except CheckpointTooNew as cause:
        raise RunError(str(cause), path=str(path)) from cause
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise RunError(
            f"{path} cannot be read as a run manifest: {cause!r}. Mend or remove that file.", path=str(path)
        ) from cause
    return content


def run_of(path: Path) -> Path:
    """The run directory that ``path`` means: itself, or that of which it is ``checkpoints`` or one checkpoint."""
    real = Path(os.path.realpath(path))
    above = [real.parent] if real.name == CHECKPOINTS else []
    above += [real.parent.parent] if real.parent.name == CHECKPOINTS else []
    for place in (path, *above):
        if os.path.isfile(place / FILE):
            return place
    raise RunError(f"{path} holds no {FILE}, so it is no run directory. `meristem runs ls` shows them.", path=str(path))


def require_writable(directory: Path) -> None:
    """Refuse, as a RunError, a run directory that cannot be made or written into; tried out of everybody's way."""
    whole = Path(os.path.abspath(directory))
    try:
        there = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
        with tempfile.TemporaryDirectory(dir=there, prefix=".") as trial:
            Path(trial, whole.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as cause:
        raise unusable(directory, cause) from cause


def unusable(directory: Path, cause: OSError | ValueError) -> RunError:
    """The error for a run directory that the system refuses."""
    reason = cause.strerror if isinstance(cause, OSError) else cause
    return RunError(
        f"the run directory {directory} cannot be made or written: {reason}. Give another with --run-dir.",
        path=str(directory),
    )


class RunLock:
    """Keeps other processes out of a run directory while the block runs. The system frees it when the holder dies."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._lock = filelock.FileLock(self._path)

    def __enter__(self) -> Self:
        directory = self._path.parent
        try:
            with disk_full(self._path):
                directory.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=0)
                # Only for the message to whoever comes second: the lock itself is the system's, not this text.
                self._path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except filelock.Timeout:
            holder = self._holder()
            raise RunInUse(
                f"run directory {directory} is in use by {holder}. "
                f"Wait for it to end, stop it, or give another directory with --run-dir.",
                path=str(directory),
                holder=holder,
            ) from None
        except (OSError, ValueError, RunError) as cause:
            self._lock.release()
            raise cause if isinstance(cause, RunError) else unusable(directory, cause) from cause
        return self

    def __exit__(self, *_raised: object) -> None:
        self._lock.release()

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            return self._path.read_text() or "another process"
        return "another process"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _text(time: datetime.datetime) -> str:
    return time.isoformat(timespec="milliseconds")
