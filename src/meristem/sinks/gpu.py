"""Readings of the GPU that this process uses: through NVML where it loads, else what torch itself counts."""

import importlib
import sys
from typing import Any, Literal

from meristem.events import Emit, Event

Source = Literal["nvml", "torch", "none"]

_EMPTY: dict[str, Any] = {
    "util": None,
    "used_bytes": None,
    "total_bytes": None,
    "allocated": None,
    "reserved": None,
    "peak": None,
    "temp_c": None,
    "power_w": None,
    "energy_j": None,
    "sm_clock_mhz": None,
    "throttle": [],
}
_THROTTLES = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


class Gpus:
    """The GPU of this process, none when it uses none. ``source`` says who reads it.

    index: its number. To read any other one would start that one too, and take some of its memory.
    """

    def __init__(self, index: int | None, emit: Emit) -> None:
        torch = sys.modules.get("torch")
        self._index = index
        self._cuda = torch.cuda if torch is not None and index is not None else None
        self._nvml: Any = None
        self.source: Source = "none"
        if self._cuda is None:
            return
        self.source = "torch"
        try:
            pynvml = importlib.import_module("pynvml")
            pynvml.nvmlInit()
        except Exception as error:  # noqa: BLE001 - the border to a driver: whatever it raises, torch's counts remain
            emit(Event("degraded", {"what": "gpu readings", "source": "torch", "reason": repr(error)}, "warning"))
        else:
            self._nvml, self.source = pynvml, "nvml"

    def read(self) -> list[dict[str, Any]]:
        """One measurement of each GPU that is read (spec 17.3)."""
        return [] if self._cuda is None or self._index is None else [self._read_one(self._index)]

    def _read_one(self, index: int) -> dict[str, Any]:
        cuda: Any = self._cuda
        free_bytes, total_bytes = cuda.mem_get_info(index)
        reading = _EMPTY | {
            "index": index,
            "used_bytes": total_bytes - free_bytes,
            "total_bytes": total_bytes,
            "allocated": cuda.memory_allocated(index),
            "reserved": cuda.memory_reserved(index),
            "peak": cuda.max_memory_allocated(index),
        }
        if self._nvml is not None:
            # By identity, not by number: CUDA_VISIBLE_DEVICES renumbers for torch and not for NVML.
            handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{cuda.get_device_properties(index).uuid}")
            reading |= _read_nvml(self._nvml, handle)
        return reading


def _read_nvml(nvml: Any, handle: Any) -> dict[str, Any]:
    """What only the driver knows. A card may lack any single figure; it is null then."""

    def asked(name: str, *arguments: object) -> Any:
        try:
            return getattr(nvml, name)(handle, *arguments)
        except nvml.NVMLError:
            return None

    util = asked("nvmlDeviceGetUtilizationRates")
    power_mw, energy_mj = asked("nvmlDeviceGetPowerUsage"), asked("nvmlDeviceGetTotalEnergyConsumption")
    reasons = asked("nvmlDeviceGetCurrentClocksEventReasons") or 0
    return {
        "util": None if util is None else util.gpu,
        "temp_c": asked("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "power_w": None if power_mw is None else power_mw / 1000,
        "energy_j": None if energy_mj is None else energy_mj / 1000,
        "sm_clock_mhz": asked("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "throttle": [text for bit, text in _THROTTLES.items() if reasons & bit],
    }
