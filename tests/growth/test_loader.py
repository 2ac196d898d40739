"""The loader: found at once or fetched once, in bounded time, whoever waits; and counted."""

import asyncio
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

import meristem
import meristem.growth as grow
from growth.catalogue import PLACES, grown, host
from meristem.checkpoint import catalog
from meristem.errors import ArtifactFailed, QueueFull, WorkerError
from meristem.events import Event
from meristem.growth import loader as loading
from meristem.growth.cache import Cache
from meristem.growth.library import Library
from meristem.growth.loader import Loader, Processes
from meristem.worker.pool import Pool

PLACE = PLACES["foreign"]
AMPLE_S = 60.0


class Held(RuleBasedStateMachine):
    """A cache against a model of it: a dict in the order of use, a fake clock, and fetches that end when they like."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.n_fetched, self.events = 0.0, 0, list[Event]()
        self.cache: Cache[int, int] = Cache("held", 3, 10.0, clock=lambda: self.now, emit=self.events.append)
        self.model: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self.flights: dict[int, tuple[Future[int], Callable[[], None], int]] = {}
        self.lost: list[tuple[Future[int], Callable[[], None], int]] = []
        self.hits = self.misses = self.joined = self.evicted = self.failed = 0

    def store(self, key: int, value: int) -> None:
        self.evicted += key in self.model
        self.model.pop(key, None)
        self.model[key] = (value, self.now)
        while len(self.model) > 3:
            self.model.popitem(last=False)
            self.evicted += 1

    def looked_up(self, key: int) -> bool:
        """Whether the model finds it; counts what the lookup is."""
        if key in self.model and self.now - self.model[key][1] < 10:
            self.hits += 1
            self.model.move_to_end(key)
            return True
        self.joined += key in self.flights
        self.misses += key not in self.flights
        return False

    @rule(key=st.integers(0, 5))
    def ask_and_wait(self, key: int) -> None:
        def fetch() -> int:
            self.n_fetched += 1
            return self.n_fetched

        joins, found = key in self.flights, self.looked_up(key)
        n_before, future = self.n_fetched, self.cache.ask(key, fetch)
        if found:
            assert future.result(0) == self.model[key][0] and self.n_fetched == n_before
        elif joins:
            assert future is self.flights[key][0]
        else:
            assert future.result(0) == self.n_fetched == n_before + 1
            self.store(key, self.n_fetched)

    @rule(key=st.integers(0, 5))
    def ask_and_go_on(self, key: int) -> None:
        def fetch() -> int:
            self.n_fetched += 1
            if key == 4:
                raise OSError("it cannot be read")
            return self.n_fetched

        fly = list[Callable[[], None]]()
        joins, found = key in self.flights, self.looked_up(key)
        future = self.cache.ask(key, fetch, fly.append)
        if not found and not joins:
            self.flights[key] = (future, fly[0], key)

    @precondition(lambda self: self.flights or self.lost)
    @rule(pick=st.randoms(use_true_random=False))
    def end_one(self, pick: random.Random) -> None:
        """A fetch that was dropped on the way is given to those who waited, and not kept."""
        chosen = pick.choice([*self.flights.values(), *self.lost])
        future, fly, key = chosen
        fly()
        if key == 4:
            assert isinstance(future.exception(0), OSError)
            self.failed += 1
        else:
            assert future.result(0) == self.n_fetched
        if chosen in self.lost:
            self.lost.remove(chosen)
        else:
            del self.flights[key]
            if key != 4:
                self.store(key, self.n_fetched)

    @rule(key=st.integers(0, 5))
    def drop(self, key: int) -> None:
        self.evicted += self.model.pop(key, None) is not None
        if key in self.flights:
            self.lost.append(self.flights.pop(key))
        self.cache.drop(key)

    @rule(seconds=st.sampled_from([1.0, 4.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        old = [key for key, (_, at) in self.model.items() if self.now - at >= 10]
        n_events = len(self.events)
        assert self.cache.sweep() == len(old)
        assert [event.payload["n_evicted"] for event in self.events[n_events:]] == [len(old)] * bool(old)
        for key in old:
            del self.model[key]
        self.evicted += len(old)

    @invariant()
    def counted(self) -> None:
        found = self.cache.snapshot().lifetime
        assert (found.n_hits, found.n_misses, found.n_joined) == (self.hits, self.misses, self.joined)
        assert (found.n_evicted, found.n_failed) == (self.evicted, self.failed)
        assert self.cache.snapshot().n_held == len(self.model) <= 3


TestK12Cache = Held.TestCase
TestK12Cache.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_k12_threads_share_it(n_each: int = 10_000) -> None:
    """16 threads and a capacity of 8: never more is held, each miss is one fetch, and no two fetches of one key at
    once; each value is that of its key."""
    cache: Cache[int, tuple[int]] = Cache("k12", 8, 1e9)
    lock, under_way, n_fetched, most, wrong = threading.Lock(), set[int](), 0, 0, list[object]()

    def fetch(key: int) -> tuple[int]:
        nonlocal n_fetched
        with lock:
            n_fetched += 1
            if key in under_way:
                wrong.append(key)
            under_way.add(key)
        with lock:
            under_way.discard(key)
        return (key,)

    def work(number: int) -> None:
        nonlocal most
        draws = random.Random(number)
        for _ in range(n_each):
            key = draws.randrange(12)
            if cache.ask(key, partial(fetch, key)).result(AMPLE_S) != (key,):
                wrong.append(key)
            most = max(most, len(cache._entries))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = cache.snapshot().lifetime
    assert wrong == [] and most <= 8 and counts.n_misses == n_fetched
    assert counts.n_hits + counts.n_misses + counts.n_joined == 16 * n_each


def test_k12_the_fetch_runs_outside_of_the_lock_and_once() -> None:
    """While one key is being fetched, another is found, and ten who want the first wait for that one fetch."""
    cache: Cache[str, int] = Cache("k12", 8, 1e9)
    go, n_fetched = threading.Event(), list[int]()

    def slow() -> int:
        n_fetched.append(1)
        go.wait(AMPLE_S)
        return 7

    found = list[int]()
    threads = [threading.Thread(target=lambda: found.append(cache.ask("a", slow).result())) for _ in range(10)]
    for thread in threads:
        thread.start()
    assert cache.ask("b", lambda: 3).result(AMPLE_S) == 3 and cache.ask("b", lambda: 4).result(AMPLE_S) == 3
    go.set()
    for thread in threads:
        thread.join()
    assert found == [7] * 10 and n_fetched == [1]


def test_k13_k15_counts_are_of_an_interval_and_of_the_whole_life() -> None:
    """100 hits, a reset, 10 misses: the rate is 0 now, and 110 lookups are known in all."""
    now = [0.0]
    cache: Cache[int, int] = Cache("k13", 200, 5.0, clock=lambda: now[0])
    cache.ask(0, lambda: 0)
    assert cache.snapshot(reset=True).lifetime.hit_rate == 0.0
    for _ in range(100):
        cache.ask(0, lambda: 0)
    assert cache.snapshot(reset=True).interval.hit_rate == 1.0 and cache.snapshot().interval.hit_rate is None
    now[0] = 5.0
    for key in range(10):
        cache.ask(key, lambda: 0)
    found = cache.snapshot()
    assert (found.interval.hit_rate, found.interval.n_misses, found.interval.n_evicted) == (0.0, 10, 1)
    assert (found.lifetime.n_hits, found.lifetime.n_misses, found.n_held) == (100, 11, 10)


def test_k14_a_sweep_gives_the_number_and_says_so() -> None:
    now, events = [0.0], list[Event]()
    cache: Cache[int, int] = Cache("k14", 8, 10.0, clock=lambda: now[0], emit=events.append)
    assert cache.sweep() == 0 and events == []
    for key in range(3):
        cache.ask(key, lambda: 0)
    now[0] = 5.0
    cache.ask(3, lambda: 0)
    now[0] = 10.0
    assert cache.sweep() == 3
    assert [(each.name, dict(each.payload)) for each in events] == [
        ("cache.evicted", {"cache": "k14", "n_evicted": 3, "n_held": 1})
    ]
    assert cache.sweep() == 0 and len(events) == 1


def test_k18_threads_end_soon_on_an_empty_queue_too() -> None:
    """100 times, idle."""
    for _ in range(100):
        begun = time.monotonic()
        pool = Pool("k18", 2)
        assert pool.close() and pool.health.n_threads == 0
        assert pool.close() and time.monotonic() - begun < 10
    with pytest.raises(WorkerError, match="k18 was closed"):
        pool.submit(lambda: 1)


def test_ta2_the_queue_is_bounded_and_what_waits_can_be_cancelled() -> None:
    go, begun = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        go.wait(AMPLE_S)
        return 1

    pool = Pool("ta2", 1, capacity=2)
    first = pool.submit(work)
    assert begun.wait(AMPLE_S)
    second, third = pool.submit(lambda: 2), pool.submit(lambda: 3)
    with pytest.raises(QueueFull, match="2 pieces of work wait for ta2 already"):
        pool.submit(lambda: 4)
    assert (pool.health.n_waiting, pool.health.n_running, pool.health.is_open) == (2, 1, True)
    assert second.cancel() and not first.cancel()
    go.set()
    assert (first.result(AMPLE_S), third.result(AMPLE_S)) == (1, 3)
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result(AMPLE_S)
    assert pool.submit(lambda: 5).result(AMPLE_S) == 5, "a failure ends no thread"
    assert pool.close()


class Stub:
    """What stands for a library: it counts, waits where it is made to, and says what it is made to say."""

    def __init__(self) -> None:
        self.version, self.calls, self.feed = 1, list[str](), list[dict[str, Any]]()
        self.go, self.lock, self.now, self.most = threading.Event(), threading.Lock(), 0, 0
        self.error: Exception | None = None
        self.go.set()

    def changes(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        return len(self.feed), self.feed[since:]

    def row(self, name: str) -> dict[str, Any]:
        self.calls.append(f"row {name}")
        origin = {"blueprint": "norm", "version": 1, "settings": {}}
        row = {"name": name, "version": self.version, "origin": origin, "trust": "safe", "created": 0.0}
        return row | {"handling": None, "weights": None}

    def tensors(self, row: Mapping[str, Any]) -> Mapping[str, Tensor]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.calls.append(f"tensors {row['name']} {row['version']}")
        self.go.wait(AMPLE_S)
        with self.lock:
            self.now -= 1
        if self.error:
            raise self.error
        return {"x": torch.zeros(3)}

    def close(self) -> None:
        self.go.set()


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def loader(stub: Stub) -> Iterator[Loader]:
    with Loader(stub) as loader:
        yield loader


def test_ka9_ten_requests_two_at_a_time_and_each_once(stub: Stub, loader: Loader) -> None:
    stub.go.clear()
    futures = loader.prefetch(*(f"n{number}" for number in range(10)), *(f"n{number}" for number in range(10)))
    while stub.now < 2 or loader.health["fetch"].n_waiting < 8:
        time.sleep(0.005)
    assert not any(future.done() for future in futures)
    stub.go.set()
    found = [future.result(AMPLE_S) for future in futures]
    assert stub.most == 2 and [artifact.card.name for artifact in found] == [f"n{number}" for number in range(10)] * 2
    assert sorted(stub.calls) == sorted(f"{what}" for n in range(10) for what in (f"row n{n}", f"tensors n{n} 1"))
    counts = loader.snapshot()["loaded"].lifetime
    assert (counts.n_misses, counts.n_hits + counts.n_joined) == (10, 10)


def test_ka9_what_cannot_be_had_is_one_type_of_error_and_is_tried_again(stub: Stub) -> None:
    events, now = list[Event](), [0.0]
    with Loader(stub, emit=events.append, clock=lambda: now[0]) as loader:
        for error, reason in (
            (WorkerError("it is gone", reason="raised", type="CheckpointCorrupt", cause="m.X: it was cut"), "corrupt"),
            (ValueError("a fault of ours"), "unreadable"),
        ):
            stub.error = error
            with pytest.raises(ArtifactFailed, match="'a' could not be had from the library: ") as caught:
                loader.load("a")
            assert caught.value.fields["reason"] == reason and caught.value.__cause__ is error
            assert (events[-1].name, events[-1].payload["reason"]) == ("artifact.failed", reason)
        stub.error = WorkerError("it left", reason="died")
        for _ in range(3):
            with pytest.raises(ArtifactFailed, match="it left"):
                loader.load("a")
        n_calls = len(stub.calls)
        with pytest.raises(ArtifactFailed, match="failed too often") as caught:
            loader.load("a")
        assert caught.value.fields["reason"] == "breaker" and len(stub.calls) == n_calls
        stub.error, now[0] = None, 31.0
        assert loader.load("a").card.name == "a"


def test_ka9_who_waits_is_not_held_up(stub: Stub, loader: Loader) -> None:
    """A budget of 20 ms is kept; what was late is there later; closing ends what waits."""
    stub.go.clear()
    with pytest.raises(ArtifactFailed, match=r"not there within 0\.02 s") as caught:
        loader.load("a", within_s=0.02)
    assert caught.value.fields["reason"] == "late"
    stub.go.set()
    assert loader.load("a").card.version == 1 and stub.calls.count("tensors a 1") == 1
    stub.go.clear()
    waiting = loader.prefetch("b", "c", "d", "e")
    while loader.health["fetch"].n_waiting < 2:
        time.sleep(0.005)
    assert loader.close()
    ends = [future.exception(AMPLE_S) for future in waiting]
    assert [end and end.fields["reason"] for end in ends] == [None, None, "closed", "closed"]
    with pytest.raises(ArtifactFailed, match="the loader was closed"):
        loader.load("a")


def test_ta4_a_change_is_seen_at_the_next_lookup(stub: Stub, loader: Loader) -> None:
    """No time passes, and nothing else is fetched again."""
    assert [loader.load(name).card.version for name in ("a", "b", "a")] == [1, 1, 1]
    stub.version, stub.feed = 2, [{"seq": 1, "name": "a", "kind": "seed", "version": 2}]
    assert [loader.load(name).card.version for name in ("a", "b", "a")] == [2, 1, 2]
    assert stub.calls.count("row a") == 2 and stub.calls.count("row b") == 1


def test_k14_the_loader_sweeps_both(stub: Stub) -> None:
    now = [0.0]
    with Loader(stub, ttl_s=300, n_loaded=2, clock=lambda: now[0]) as loader:
        for name in "abc":
            loader.load(name)
        held = loader.snapshot(reset=True)
        assert (held["index"].n_held, held["loaded"].n_held, held["loaded"].lifetime.n_evicted) == (3, 2, 1)
        now[0] = 300.0
        assert loader.sweep() == 5 and loader.snapshot()["loaded"].interval.n_evicted == 2


def test_k16_k17_prefetch_works_from_a_function_a_loop_and_a_thread(stub: Stub, loader: Loader) -> None:
    """In a loop nothing waits while it is fetched; all of them get the same artifact."""
    assert loader.prefetch("a")[0].result(AMPLE_S).card.name == "a"

    async def inside() -> list[str]:
        stub.go.clear()
        futures = [asyncio.wrap_future(future) for future in loader.prefetch("b", "c")]
        await asyncio.sleep(0)
        assert not any(future.done() for future in futures)
        stub.go.set()
        return [artifact.card.name for artifact in await asyncio.gather(*futures)]

    assert asyncio.run(inside()) == ["b", "c"]
    found = list[object]()
    thread = threading.Thread(target=lambda: found.append(loader.prefetch("b")[0].result(AMPLE_S)))
    thread.start()
    thread.join()
    assert found[0].tensors is loader.load("b").tensors


def test_k17_no_code_of_ours_starts_a_loop_of_its_own() -> None:
    """But for programs that are one: the server, the terminal, and the client that measures a server."""
    place = Path(meristem.__file__).parent
    texts = {path.relative_to(place): path.read_text(encoding="utf-8") for path in place.rglob("*.py")}
    found = {str(path) for path, text in texts.items() if "asyncio.run(" in text or "run_until_complete" in text}
    assert {name for name in found if not name.startswith(("cli/", "serve/", "bench/serving/"))} == set()


@pytest.mark.slow
def test_t20_metadata_and_fetches_have_hard_deadlines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes that hang are killed and those that die are replaced, and each is told apart."""
    monkeypatch.setattr(loading, "HERE", "growth.slow_library")
    for place, name, reason in (("hangs", "a", "late"), ("works", "a", "late"), ("works", "dies", "died")):
        source = Processes(tmp_path / place, metadata_s=AMPLE_S, fetch_s=0.5)
        source._metadata.ready(AMPLE_S)
        source._metadata_s = 0.5 if place == "hangs" else AMPLE_S
        with Loader(source) as loader:
            for worker in source._fetching:
                worker.ready(AMPLE_S)
            begun = time.monotonic()
            with pytest.raises(ArtifactFailed) as caught:
                loader.load(name)
            assert caught.value.fields["reason"] == reason and time.monotonic() - begun < 55


def test_a_real_library_is_loaded_by_processes(tmp_path: Path) -> None:
    """Weights to the bit; what another writes is seen at the next lookup; a harmed file and an unknown name are told
    apart."""
    model, made = grown("foreign", "low_rank")
    with Library(tmp_path / "library") as library:
        library.put_seed("s", model, PLACE)
        library.put_blueprint("b", "norm")
        with Loader(Processes(library.place, n_fetches=1, metadata_s=AMPLE_S, fetch_s=AMPLE_S)) as loader:
            found = loader.load("s")
            assert found.card == library.card("s")
            assert all(
                torch.equal(found.tensors[key], each) for key, each in made.state_dict().items() if key in found.tensors
            )
            assert loader.load("s").tensors is found.tensors and loader.load("b").tensors == {}
            other = grow.attach(host("foreign"), PLACE)
            assert grow.graft_from(other, PLACE, found).origin == made.origin
            with torch.no_grad():
                made.layer.out.weight.add_(1.0)
            library.put_seed("s", model, PLACE)
            assert loader.load("s").card.version == 2
            with pytest.raises(ArtifactFailed, match="holds no 'x'. Nearest: ") as caught:
                loader.load("x")
            assert caught.value.fields["reason"] == "unknown"
            library.put_seed("t", model, PLACE, trust="high_risk")
            file = next(library.place.glob(f"seeds/{library.card('t').sha256}.safetensors"))
            file.write_bytes(file.read_bytes()[:-1])
            with pytest.raises(ArtifactFailed, match="altered or cut") as caught:
                loader.load("t")
            assert caught.value.fields["reason"] == "corrupt"


@pytest.mark.slow
def test_t20_a_library_that_somebody_keeps_locked_is_late_and_comes_back(tmp_path: Path) -> None:
    """The real thing: the file is not let go of while it is opened."""
    with Library(tmp_path / "library") as library:
        library.put_blueprint("b", "norm")
    source = Processes(tmp_path / "library", metadata_s=AMPLE_S)
    source._metadata.ready(AMPLE_S)
    with Loader(source) as loader:
        with filelock.FileLock(tmp_path / "library" / f".{catalog.FILE}.lock"):
            source._metadata_s = 1.0
            with pytest.raises(ArtifactFailed, match="not done after 1 s"):
                loader.load("b")
        source._metadata_s = AMPLE_S
        assert loader.load("b").card.name == "b"
