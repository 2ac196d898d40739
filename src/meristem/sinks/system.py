"""Readings of the machine while a run goes on."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from meristem.events import Emit, Event, silent
from meristem.sinks.gpu import Gpus
from meristem.sinks.records import Records


class SystemSampler:
    """Writes a measurement every ``every_s`` seconds while the block runs, and one at its end.

    figures: called at each measurement for ``tokens_per_s``, ``data_wait_fraction`` and ``mfu``, which the machine
    does not know.
    gpu: the number of the one that this process uses, if any.
    """

    def __init__(
        self,
        records: Records,
        every_s: float,
        *,
        emit: Emit = silent,
        figures: Callable[[], Mapping[str, float | None]] = dict,
        gpu: int | None = None,
    ) -> None:
        self._records = records
        self._every_s = every_s
        self._emit = emit
        self._figures = figures
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-sampler", daemon=True)
        self._machine = _machine(emit)
        self._gpus = Gpus(gpu, emit)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._stopped.set()
        self._thread.join()

    def read(self) -> dict[str, Any]:
        """One measurement, without the envelope."""
        reading: dict[str, Any] = {
            "source": self._machine.source,
            "gpu_source": self._gpus.source,
            "cpu_count": os.cpu_count() or 1,
            "load_avg": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
            "disk_free_bytes": shutil.disk_usage(self._records.run_dir).free,
            "gpus": self._gpus.read(),
            "data_wait_fraction": None,
            "tokens_per_s": None,
            "mfu": None,
        }
        return reading | self._machine.read() | dict(self._figures())

    def _sample(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stopped.wait(self._every_s)
            try:
                self._records.system(self.read())
            except Exception as error:  # noqa: BLE001 - a sink's border: readings may end, the run goes on
                payload = {"what": "system readings", "reason": str(error)}
                self._emit(Event("degraded", payload, "warning"))
                return


class _Machine(Protocol):
    """Reads processor and RAM."""

    source: ClassVar[str]

    def read(self) -> dict[str, Any]:
        """The fields ``cpu_percent``, ``ram``, ``swap`` and ``process`` of spec 17.3."""


def _machine(emit: Emit) -> _Machine:
    """By psutil, or, as one event, by the standard library where psutil cannot be loaded."""
    try:
        return _ByPsutil(import_module("psutil"))
    except ImportError as error:
        payload = {"what": "system readings", "source": _ByStdlib.source, "reason": str(error)}
        emit(Event("degraded", payload, "warning"))
        return _ByStdlib()


class _ByPsutil:
    source: ClassVar = "psutil"

    def __init__(self, psutil: Any) -> None:
        self._psutil, self._process = psutil, psutil.Process()
        # The first answer covers the time since the call before, so one is needed now.
        psutil.cpu_percent()
        self._process.cpu_percent()

    def read(self) -> dict[str, Any]:
        ram, swap = self._psutil.virtual_memory(), self._psutil.swap_memory()
        with self._process.oneshot():
            size = self._process.memory_info()
            busy = self._process.cpu_percent()
        return {
            "cpu_percent": self._psutil.cpu_percent(),
            "ram": {"total": ram.total, "available": ram.available, "used": ram.used, "percent": ram.percent},
            "swap": {"total": swap.total, "used": swap.used, "percent": swap.percent},
            "process": {"cpu_percent": busy, "rss": size.rss, "vms": size.vms},
        }


class _ByStdlib:
    """What Linux says of itself in ``/proc``; null where there is none, but for the processor time of this process."""

    source: ClassVar = "stdlib"

    def __init__(self) -> None:
        self._ticks, self._clock = _ticks(), (time.monotonic(), time.process_time())

    def read(self) -> dict[str, Any]:
        before, self._ticks = self._ticks, _ticks()
        busy, passed = (now - then for now, then in zip(self._ticks, before, strict=True))
        (then_s, cpu_then_s), self._clock = self._clock, (time.monotonic(), time.process_time())
        wall_s, cpu_s = self._clock[0] - then_s, self._clock[1] - cpu_then_s
        sizes = {name: int(text.split()[0]) * 1024 for name, text in _lines("meminfo", ":") if text.split()}
        pages: list[int | None] = [int(word) for word in _text("self/statm").split()[:2]] or [None, None]
        vms, rss = (None if n is None else n * os.sysconf("SC_PAGE_SIZE") for n in pages)
        return {
            "cpu_percent": 100 * busy / passed if passed else None,
            "ram": _used(sizes.get("MemTotal"), sizes.get("MemAvailable"), is_ram=True),
            "swap": _used(sizes.get("SwapTotal"), sizes.get("SwapFree"), is_ram=False),
            "process": {"cpu_percent": 100 * cpu_s / wall_s if wall_s else None, "rss": rss, "vms": vms},
        }


def _ticks() -> tuple[int, int]:
    """How many ticks the processors were busy, and how many passed, since the machine was started."""
    found = dict(_lines("stat", " ")).get("cpu", "").split()
    ticks = [int(word) for word in found[:8]]
    return (sum(ticks) - sum(ticks[3:5]), sum(ticks))  # but idle, and waiting for a disk


def _used(total: int | None, free: int | None, *, is_ram: bool) -> dict[str, Any]:
    used = None if total is None or free is None else total - free
    percent = 100 * used / total if used is not None and total else None if used is None else 0.0
    return {"total": total, **({"available": free} if is_ram else {}), "used": used, "percent": percent}


def _lines(name: str, separator: str) -> list[tuple[str, str]]:
    return [(head, rest) for head, _, rest in (line.partition(separator) for line in _text(name).splitlines())]


def _text(name: str) -> str:
    """A file of ``/proc``; empty where it is not there."""
    try:
        return Path("/proc", name).read_text()
    except OSError:
        return ""
