"""What a server does, in numbers for Prometheus: latencies, tokens, queue, sessions, bytes, surprise."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from meristem.device import limits
from meristem.serve.engine import Engine, Reason
from meristem.serve.sessions import Sessions

SHORT_S: Final = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
LONG_S: Final = (0.004, 0.016, 0.064, 0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
NATS: Final = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


class _Histogram:
    """Counts by upper bound. Many equal values are one addition, where the client's histogram takes them one by one."""

    def __init__(self, name: str, what: str, bounds: Sequence[float]) -> None:
        self.name, self.what, self.bounds = name, what, bounds
        self._counts, self._sum, self._lock = [0] * (len(bounds) + 1), 0.0, threading.Lock()

    def add(self, value: float, n: int = 1) -> None:
        with self._lock:
            self._counts[bisect_left(self.bounds, value)] += n
            self._sum += n * value

    def family(self) -> Metric:
        with self._lock:
            counts, total = list(self._counts), self._sum
        buckets, so_far = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
            so_far += count
            buckets.append((bound, float(so_far)))
        return HistogramMetricFamily(self.name, self.what, buckets=buckets, sum_value=total)


class _Gauges(Collector):
    """What is read when somebody wants to know it."""

    def __init__(self, engine: Engine, sessions: Sessions, is_ready: Callable[[], bool]) -> None:
        self._engine, self._sessions, self._is_ready = engine, sessions, is_ready

    def collect(self) -> Iterator[Metric]:
        engine, counts = self._engine, self._sessions.counts()
        for name, what, value in (
            ("ready", "1 once the model has written a token.", self._is_ready() and not engine.has_ended),
            ("requests_working", "Requests that read or write.", engine.n_at_work),
            ("requests_waiting", "Requests that wait for a place.", engine.n_waiting),
            ("available_bytes", "Memory that can be had without swapping.", limits.available_bytes()),
            ("sessions", "Sessions of the model that is served.", counts.n_sessions),
            ("sessions_live", "Sessions whose memory is in RAM.", counts.n_live),
            ("sessions_live_bytes", "RAM that the memories of sessions take.", counts.live_bytes),
            ("sessions_stored_bytes", "Disk that the memories take in which sessions stand.", counts.stored_bytes),
        ):
            yield GaugeMetricFamily(f"meristem_{name}", what, value=float(value))


class _Histograms(Collector):
    def __init__(self, histograms: Sequence[_Histogram]) -> None:
        self._histograms = histograms

    def collect(self) -> Iterator[Metric]:
        return (each.family() for each in self._histograms)


class Metrics:
    """A ``Tally`` of the engine, the counts of requests, and the page that Prometheus reads.

    What happens for every token is added once for each round. is_ready: whether requests are answered.
    """

    def __init__(self, engine: Engine, sessions: Sessions, is_ready: Callable[[], bool]) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        self._first = _Histogram("meristem_first_token_seconds", "From a request to its first token.", LONG_S)
        self._gap = _Histogram("meristem_token_gap_seconds", "Between a token of a reply and the next.", SHORT_S)
        self._whole = _Histogram("meristem_order_seconds", "From a request to the end of its work.", LONG_S)
        self._nats = _Histogram("meristem_surprise_nats", "Surprise for each token read, by portion of a text.", NATS)
        tokens = prometheus.Counter("meristem_tokens", "Tokens read and drawn.", ["kind"], registry=registry)
        self._n_read, self._n_drawn = tokens.labels("read"), tokens.labels("drawn")
        self._ends = prometheus.Counter("meristem_orders", "Work that ended.", ["reason"], registry=registry)
        self._requests = prometheus.Counter(
            "meristem_http_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self._seconds = prometheus.Histogram(
            "meristem_http_request_seconds", "Of a request.", ["route"], buckets=LONG_S, registry=registry
        )
        self.lost_lines = prometheus.Counter(
            "meristem_access_log_lost", "Lines that the access log did not take.", registry=registry
        )
        registry.register(_Histograms((self._first, self._gap, self._whole, self._nats)))
        registry.register(_Gauges(engine, sessions, is_ready))
        prometheus.ProcessCollector(registry=registry)

    def has_read(self, n_tokens: int, nats: float) -> None:
        self._n_read.inc(n_tokens)
        self._nats.add(nats / n_tokens, n_tokens)

    def drew(self, n_tokens: int, gap_s: float, firsts_s: Sequence[float]) -> None:
        self._n_drawn.inc(n_tokens)
        if n_tokens > len(firsts_s):
            self._gap.add(gap_s, n_tokens - len(firsts_s))
        for seconds in firsts_s:
            self._first.add(seconds)

    def ended(self, reason: Reason, seconds: float) -> None:
        self._ends.labels(reason).inc()
        self._whole.add(seconds)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered, or given up."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The numbers, in the format that an Accept header prefers, and its media type."""
        encoder, media_type = choose_encoder(accept)
        return encoder(self._registry), media_type
