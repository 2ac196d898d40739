"""Readings of the machine while a run goes on."""

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self

import psutil

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
        self._machine = _Machine()
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
            "source": "psutil",
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


class _Machine:
    """Reads processor and RAM."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        # The first answer covers the time since the call before, so one is needed now.
        psutil.cpu_percent()
        self._process.cpu_percent()

    def read(self) -> dict[str, Any]:
        """The fields ``cpu_percent``, ``ram``, ``swap`` and ``process`` of spec 17.3."""
        ram, swap = psutil.virtual_memory(), psutil.swap_memory()
        with self._process.oneshot():
            size = self._process.memory_info()
            busy = self._process.cpu_percent()
        return {
            "cpu_percent": psutil.cpu_percent(),
            "ram": {"total": ram.total, "available": ram.available, "used": ram.used, "percent": ram.percent},
            "swap": {"total": swap.total, "used": swap.used, "percent": swap.percent},
            "process": {"cpu_percent": busy, "rss": size.rss, "vms": size.vms},
        }
