"""Readings of the machine while a run goes on, from psutil or, where that is missing, the standard library."""

import importlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from meristem.events import Emit, Event, silent
from meristem.sinks.gpu import Gpus
from meristem.sinks.records import Records


class Machine(Protocol):
    """Reads processor and RAM. ``source`` says through what."""

    source: str

    def read(self) -> dict[str, Any]:
        """The fields ``cpu_percent``, ``ram``, ``swap`` and ``process`` of spec 17.3."""


class SystemSampler:
    """Writes a reading every ``every_s`` seconds while the block runs, and one at its end.

    figures: asked at each reading for ``tokens_per_s``, ``data_wait_fraction`` and ``mfu``, which the machine
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
        """One reading, without the envelope."""
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


def _machine(emit: Emit) -> Machine:
    try:
        return _Psutil(importlib.import_module("psutil"))
    except ImportError as error:
        payload = {"what": "system readings", "source": "stdlib", "reason": str(error)}
        emit(Event("degraded", payload, "warning"))
        return _Stdlib()


class _Psutil:
    source = "psutil"

    def __init__(self, psutil: Any) -> None:
        self._psutil = psutil
        self._process = psutil.Process()
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


class _Stdlib:
    """Without psutil the busy share of the whole machine is not known; the load of the last minute stands in for it."""

    source = "stdlib"

    def __init__(self) -> None:
        self._before = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, Any]:
        before, self._before = self._before, (time.perf_counter(), time.process_time())
        wall_s, busy_s = (now - then for now, then in zip(self._before, before, strict=True))
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        total, available = _pages("SC_PHYS_PAGES"), _pages("SC_AVPHYS_PAGES")
        used = None if total is None or available is None else total - available
        vms, rss = _own_size()
        return {
            "cpu_percent": None if load is None else min(100.0, 100 * load / (os.cpu_count() or 1)),
            "ram": {
                "total": total,
                "available": available,
                "used": used,
                "percent": None if used is None or total is None else 100 * used / total,
            },
            "swap": {"total": None, "used": None, "percent": None},
            "process": {"cpu_percent": 100 * busy_s / max(wall_s, 1e-9), "rss": rss, "vms": vms},
        }


def _pages(name: str) -> int | None:
    """Bytes of RAM by a name of ``os.sysconf``, where the system knows it."""
    known = getattr(os, "sysconf_names", {})
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") if name in known else None


def _own_size() -> tuple[int | None, int | None]:
    """Virtual and resident bytes of this process now; ``ru_maxrss`` would be a peak, in units that differ."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None, None
    vms, rss = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in statm.read_text().split()[:2])
    return vms, rss
