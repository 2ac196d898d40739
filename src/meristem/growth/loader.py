"""One way to every artifact of a library: found again at once, fetched once, and never waited for without end.

with grow.Loader("seeds") as loader:
    loader.prefetch("arithmetic")
    grow.graft_from(model, "blocks.3", loader.load("arithmetic", within_s=5))
    print(loader.snapshot(reset=True)["loaded"].interval.hit_rate, loader.sweep())

The library is read by processes of its own, which are killed when they are late. Every lookup first reads the library's
feed of changes, so that what another process has put in is seen at once. Source: growth.md section 23.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Protocol, Self, TypeVar

from torch import Tensor

from meristem.checkpoint.catalog import require_same
from meristem.errors import ArtifactFailed, BreakerOpen, MeristemError, WorkerError
from meristem.events import Emit, Event, silent
from meristem.growth.cache import Cache, Statistics
from meristem.growth.library import Artifact, Card
from meristem.growth.weights import unpacked
from meristem.worker.breaker import Breaker
from meristem.worker.pool import Health, Pool
from meristem.worker.process import Worker

T = TypeVar("T")

N_LOADED: Final = 32
N_INDEX: Final = 128
TTL_S: Final = 300.0
N_FETCHES: Final = 2
METADATA_S: Final = 5.0
FETCH_S: Final = 30.0
START_S: Final = 60.0
"""How long a process may take to start; only what it does then has the shorter deadlines."""
WITHIN_S: Final = 60.0
HERE: Final = "meristem.checkpoint.catalog"
REASONS: Final = {
    "WrongValue": "unknown",
    "CheckpointCorrupt": "corrupt",
    "CheckpointTooNew": "corrupt",
    "WorkerTimeout": "late",
    "WorkerDied": "died",
    "QueueFull": "full",
    "BreakerOpen": "breaker",
}
"""Why an artifact could not be had, by the class of what was raised."""


class Source(Protocol):
    """Where a loader finds what it loads; each call ends by itself. Rows are those of ``checkpoint.catalog``."""

    def changes(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """Where the feed stands, and the changes after ``since``, each with the ``name`` that it is of."""
        ...

    def row(self, name: str) -> dict[str, Any]:
        """The newest version of a name."""
        ...

    def tensors(self, row: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """What belongs to a row, checked."""
        ...

    def close(self) -> None:
        """End what runs."""
        ...


class Processes:
    """A library read by other processes, each call with a hard deadline: a disk that hangs takes a process with it.

    A file is copied by such a process, and the copy is read here, with its SHA-256. n_fetches: copies at once.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        n_fetches: int = N_FETCHES,
        metadata_s: float = METADATA_S,
        fetch_s: float = FETCH_S,
        emit: Emit = silent,
    ) -> None:
        self._place, self._metadata_s, self._fetch_s = str(Path(place).absolute()), metadata_s, fetch_s
        self._metadata = Worker("library", imports=[HERE], emit=emit)
        self._fetching = [
            Worker(f"library-{number}", imports=[HERE], n_spare=0, emit=emit) for number in range(n_fetches)
        ]
        self._free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._fetching:
            self._free.put(worker)
        self._copies = tempfile.TemporaryDirectory(prefix="meristem-", ignore_cleanup_errors=True)

    def changes(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """As ``Source`` says; raises WorkerError."""
        payload = {"place": self._place, "since": since}
        at, found = _call(self._metadata, "changes_in", payload, self._metadata_s, list)
        return at, found

    def row(self, name: str) -> dict[str, Any]:
        """As ``Source`` says; raises WorkerError."""
        payload = {"place": self._place, "name": name}
        found: dict[str, Any] = _call(self._metadata, "row_in", payload, self._metadata_s, dict)
        return found

    def tensors(self, row: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """As ``Source`` says; raises WorkerError and CheckpointCorrupt."""
        if not row["weights"]:
            return {}
        payload = {"place": self._place, "row": dict(row), "to": self._copies.name}
        worker = self._free.get()
        try:
            copy = Path(_call(worker, "copy_in", payload, self._fetch_s, str))
            content = copy.read_bytes()
            copy.unlink()
        finally:
            self._free.put(worker)
        require_same(content, row["weights"]["sha256"], row["weights"]["path"], row["name"])
        return unpacked(content, row["name"])

    def close(self) -> None:
        """End all processes within a second."""
        for worker in (self._metadata, *self._fetching):
            worker.stop()
        self._copies.cleanup()


def _call(worker: Worker, name: str, payload: Mapping[str, Any], deadline_s: float, expects: type) -> Any:
    """What a function of ``HERE`` gives in the process of a worker, once that has started."""
    worker.ready(START_S)
    return worker.call(f"{HERE}:{name}", payload, deadline_s, expects=expects)


class Loader:
    """Artifacts of a library, with what was loaded lately at hand. Threads and event loops may share it.

    source: the directory of a library, or what stands for one. n_loaded, n_index: how many artifacts, and how many
    cards, are held; each for ``ttl_s`` seconds. n_fetches: how many artifacts are fetched at once.

    After three failures within a minute nothing is tried for half a minute. clock: seconds, which only grow.
    """

    def __init__(
        self,
        source: str | Path | Source,
        *,
        n_loaded: int = N_LOADED,
        n_index: int = N_INDEX,
        ttl_s: float = TTL_S,
        n_fetches: int = N_FETCHES,
        clock: Callable[[], float] = time.monotonic,
        emit: Emit = silent,
    ) -> None:
        if isinstance(source, str | Path):
            source = Processes(source, n_fetches=n_fetches, emit=emit)
        self._source: Source = source
        self._clock, self._emit = clock, emit
        self._index: Cache[str, dict[str, Any]] = Cache("index", n_index, ttl_s, clock=clock, emit=emit)
        self._loaded: Cache[tuple[str, int], Mapping[str, Tensor]] = Cache(
            "loaded", n_loaded, ttl_s, clock=clock, emit=emit
        )
        self._metadata, self._fetching = Pool("loader-metadata", 1), Pool("loader-fetch", n_fetches)
        self._breaker, self._breaking = Breaker(), threading.Lock()
        self._at = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, name: str, *, within_s: float = WITHIN_S) -> Artifact:
        """The newest version of a name. Nobody may change its tensors: others are given the same.

        within_s: how long to wait. What is late is fetched on, and may be there at the next call.

        Raises ArtifactFailed, and nothing else, where it cannot be had; its field ``reason`` is ``unknown``,
        ``corrupt``, ``unreadable``, ``late``, ``died``, ``full``, ``breaker`` or ``closed``. The event is
        ``artifact.failed``.
        """
        future = self._begun(name)
        try:
            return future.result(within_s)
        except TimeoutError:
            error = self._failed(name, "late", f"it was not there within {within_s:g} s, and is fetched on")
            raise error from None

    def prefetch(self, *names: str) -> list[Future[Artifact]]:
        """Begin to load names, and the futures of their artifacts, in the same order. Never waits.

        It works from a function, a thread and inside a running event loop, where ``asyncio.wrap_future`` makes of a
        future what can be awaited. What a future raises is ArtifactFailed.
        """
        return [self._begun(name) for name in names]

    def sweep(self) -> int:
        """Let go of what was held for too long; how many entries that were. The event is ``cache.evicted``."""
        return self._index.sweep() + self._loaded.sweep()

    def snapshot(self, *, reset: bool = False) -> dict[str, Statistics]:
        """What was counted of ``index`` and ``loaded``. reset: the interval begins anew; the lifetime goes on."""
        return {cache.name: cache.snapshot(reset=reset) for cache in (self._index, self._loaded)}

    @property
    def health(self) -> dict[str, Health]:
        """What its threads are at: those that read the index, and those that fetch."""
        return {"metadata": self._metadata.health, "fetch": self._fetching.health}

    def close(self) -> bool:
        """End all fetches within a second or so, and say whether they did; who waits for one gets ArtifactFailed."""
        self._metadata.stop()
        self._fetching.stop()
        self._source.close()
        is_index_closed = self._metadata.close()
        return self._fetching.close() and is_index_closed

    def _begun(self, name: str) -> Future[Artifact]:
        result: Future[Artifact] = Future()
        result.set_running_or_notify_cancel()
        try:
            found = self._metadata.submit(lambda: self._found(name))
        except WorkerError as cause:
            result.set_exception(self._explained(name, cause))
        else:
            found.add_done_callback(lambda done: self._fetched(name, done, result))
        return result

    def _found(self, name: str) -> tuple[Card, Future[Mapping[str, Tensor]]]:
        """The card of a name as it is now, and the future of its tensors."""
        self._at, changes = self._guarded(lambda: self._source.changes(self._at))
        for change in changes:
            self._index.drop(change["name"])
        row = self._index.ask(name, lambda: self._guarded(lambda: self._source.row(name))).result()
        flight = self._loaded.ask(
            (name, row["version"]), lambda: self._guarded(lambda: self._source.tensors(row)), self._fetching.submit
        )
        return Card.of(row), flight

    def _fetched(self, name: str, found: Future[Any], result: Future[Artifact]) -> None:
        """Hand on the card and the tensors, or the error, once both are there."""
        cause = InterruptedError() if found.cancelled() else found.exception()
        if cause is not None:
            result.set_exception(self._explained(name, cause))
            return
        card, flight = found.result()

        def hand_on(done: Future[Mapping[str, Tensor]]) -> None:
            lost = done.exception()
            if lost is not None:
                result.set_exception(self._explained(name, lost))
            else:
                result.set_result(Artifact(card, done.result()))

        flight.add_done_callback(hand_on)

    def _guarded(self, call: Callable[[], T]) -> T:
        """What a call gives, unless too many have failed; an answer that something is not there is no failure."""
        with self._breaking:
            if self._breaker.state(self._clock()) == "open":
                raise BreakerOpen(
                    f"it is not tried, since it failed too often; it will be in {self._breaker.pause:g} s"
                )
        is_answer = True
        try:
            return call()
        except WorkerError as cause:
            is_answer = cause.fields.get("reason") == "raised"
            raise
        finally:
            with self._breaking:
                now = self._clock()
                self._breaker = self._breaker.succeeded(now) if is_answer else self._breaker.failed(now)

    def _explained(self, name: str, cause: BaseException) -> ArtifactFailed:
        """The one error that all others become."""
        fields = cause.fields if isinstance(cause, MeristemError) else {}
        text = str(cause)
        if isinstance(cause, InterruptedError) or fields.get("reason") == "stopped":
            reason, text = "closed", "the loader was closed"
        elif fields.get("reason") == "raised":
            reason = _reason(str(fields["type"]))
            text = str(fields["cause"]).partition(": ")[2]
        else:
            reason = _reason(type(cause).__name__)
        error = self._failed(name, reason, text)
        error.__cause__ = cause
        return error

    def _failed(self, name: str, reason: str, text: str) -> ArtifactFailed:
        self._emit(Event("artifact.failed", {"name": name, "reason": reason, "cause": text}, "error"))
        return ArtifactFailed(f"'{name}' could not be had from the library: {text}", name=name, reason=reason)


def _reason(kind: str) -> str:
    return REASONS.get(kind, "unreadable")
