"""The machine is read, and its cards with whatever is there, which says through what."""

import os
import subprocess
import sys
import threading
import time
import types

import jsonschema
import pytest

from meristem.checkpoint.run import read
from meristem.device.allocator import peak_process_bytes
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import Records, schema
from meristem.sinks.system import SystemSampler
from recipes.small import overrides, write_text

TICKS_S = 0.03
"""How far the coarse clock of the system may lag at both ends."""
ENVELOPE = {"schema": "meristem.system/1", "run": "r", "seq": 1, "ts": "2026-11-29T12:00:00.000Z", "step": 0}
UUID = "7c1d9a52-0000-4000-8000-000000000001"


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path, "r")


def test_this_process_is_read(records):
    """CX-6.3: its own size and work are seen."""
    sampler = SystemSampler(records, 10.0)
    clocks = [(time.perf_counter(), time.process_time())]
    sampler.read()
    clocks.append((time.perf_counter(), time.process_time()))
    while time.process_time() < clocks[1][1] + 0.1:
        pass
    clocks.append((time.perf_counter(), time.process_time()))
    after = sampler.read()
    clocks.append((time.perf_counter(), time.process_time()))
    assert after["source"] == "psutil"
    # A machine short of memory takes pages away, and a busy one takes time: both are bounded by what was had.
    assert 2**20 < after["process"]["rss"] < 1.1 * peak_process_bytes()
    (first_s, first), (begun_s, begun), (ended_s, ended), (last_s, last) = clocks
    least, most = (ended - begun - TICKS_S) / (last_s - first_s), (last - first + TICKS_S) / (ended_s - begun_s)
    assert 100 * least - 0.1 < after["process"]["cpu_percent"] < 100 * most + 0.1
    assert 0 <= after["cpu_percent"] <= 100
    assert 0 < after["ram"]["available"] < after["ram"]["total"]


def test_cx_6_3_without_psutil_the_standard_library_reads_the_same(records, monkeypatch):
    """CX-6.3: as one event; every field has a value on Linux, and those of a record that psutil filled agree."""
    by_psutil = SystemSampler(records, 10.0).read()
    monkeypatch.setitem(sys.modules, "psutil", None)
    events = []
    sampler = SystemSampler(records, 10.0, emit=events.append)
    began_s, began = time.perf_counter(), time.process_time()
    while time.process_time() < began + 0.1:
        pass
    found = sampler.read()
    share = 100 * (time.process_time() - began) / (time.perf_counter() - began_s)
    assert [(event.name, event.payload["source"]) for event in events] == [("degraded", "stdlib")]
    assert found["source"] == "stdlib" and found.keys() == by_psutil.keys()
    jsonschema.validate(found | ENVELOPE, schema("system"))
    assert found["ram"]["total"] == by_psutil["ram"]["total"]
    assert found["process"]["rss"] == pytest.approx(by_psutil["process"]["rss"], rel=0.2)
    assert found["process"]["cpu_percent"] == pytest.approx(share, rel=0.3)
    assert 0 < found["cpu_percent"] <= 100


@pytest.mark.slow
def test_cx_6_3_a_run_goes_on_without_psutil(tmp_path):
    """From the command line to its end, with its readings."""
    hidden = "import sys; sys.modules['psutil'] = None; from meristem.cli import main; main()"
    words = ["train", "charrnn", *overrides(write_text(tmp_path), "train.steps=3"), f"--run-dir={tmp_path / 'run'}"]
    subprocess.run([sys.executable, "-c", hidden, *words], check=True)
    assert read(tmp_path / "run")["status"] == "finished"
    assert {record["source"] for record in read_records(tmp_path / "run" / "system.ndjson")} == {"stdlib"}
    events = [event["payload"] for event in read_records(tmp_path / "run" / "events.ndjson")]
    assert sum(payload.get("source") == "stdlib" for payload in events) == 1


def test_readings_are_written_until_the_end(records, tmp_path):
    """Readings come at their interval with the figures of the run, one more at the end, and no thread is left."""
    with SystemSampler(records, 0.01, figures=lambda: {"tokens_per_s": 12.5}):
        while records.seq < 3:
            time.sleep(0.001)
        n_before_end = records.seq
    found = list(read_records(tmp_path / "system.ndjson"))
    assert len(found) >= n_before_end + 1
    assert {r["tokens_per_s"] for r in found} == {12.5}
    assert "system-sampler" not in {thread.name for thread in threading.enumerate()}


def test_short_run_has_one_reading(records, tmp_path):
    """A run shorter than the interval ends at once and still has a reading."""
    start_s = time.monotonic()
    with SystemSampler(records, 3600.0):
        pass
    assert time.monotonic() - start_s < 60
    assert len(list(read_records(tmp_path / "system.ndjson"))) == 1


def test_full_disk_ends_the_readings_only(records, monkeypatch):
    """When a reading cannot be written the readings end with one event, and the block goes on."""
    events = []
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with SystemSampler(records, 0.001, emit=events.append):
        while not events:
            time.sleep(0.001)
    assert [e.payload["what"] for e in events] == ["system readings"]


class NvmlError(Exception):
    pass


def fake_nvml(**changes):
    """A driver of one card that answers as NVML does, in its units."""

    def lacking(*_):
        raise NvmlError("not supported")

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: {f"GPU-{UUID}": "card"}[uuid],
        "nvmlDeviceGetUtilizationRates": lambda _: types.SimpleNamespace(gpu=83, memory=20),
        "nvmlDeviceGetPowerUsage": lambda _: 251_500,
        "nvmlDeviceGetTotalEnergyConsumption": lacking,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda _: 0x1 | 0x4 | 0x40,
        "nvmlDeviceGetTemperature": lambda _card, _kind: 61,
        "nvmlDeviceGetClockInfo": lambda _card, _kind: 1410,
    }
    constants = {"NVMLError": NvmlError, "NVML_TEMPERATURE_GPU": 0, "NVML_CLOCK_SM": 1}
    return types.SimpleNamespace(**(answers | constants | changes))


@pytest.fixture
def one_gpu(monkeypatch):
    """torch as it answers a process that uses the third card."""
    torch = pytest.importorskip("torch")
    for name, answer in {
        "is_available": lambda: True,
        "mem_get_info": {2: (700, 1000)}.__getitem__,
        "memory_allocated": lambda _: 200,
        "memory_reserved": lambda _: 250,
        "max_memory_allocated": lambda _: 240,
        "get_device_properties": lambda _: types.SimpleNamespace(uuid=UUID),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def test_gpu_through_nvml(records, monkeypatch, one_gpu):
    """CX-6.5: with NVML the card is found by its identity, units are ours, and a reading it lacks is null."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    events = []
    reading = SystemSampler(records, 10.0, emit=events.append, gpu=2).read()
    (card,) = reading["gpus"]
    assert card["index"] == 2
    assert reading["gpu_source"] == "nvml"
    assert (card["used_bytes"], card["total_bytes"], card["allocated"], card["peak"]) == (300, 1000, 200, 240)
    assert (card["util"], card["power_w"], card["energy_j"], card["temp_c"]) == (83, 251.5, None, 61)
    assert card["throttle"] == ["software power cap", "hardware thermal slowdown"]
    assert events == []


def broken():
    raise NvmlError("driver mismatch")


@pytest.mark.parametrize("nvml", [None, fake_nvml(nvmlInit=broken)], ids=["missing", "broken"])
def test_gpu_without_nvml(records, monkeypatch, one_gpu, nvml):
    """CX-6.3: without NVML torch's own counts remain, and the lack is one event."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    events = []
    reading = SystemSampler(records, 10.0, emit=events.append, gpu=2).read()
    assert reading["gpu_source"] == "torch"
    assert (reading["gpus"][0]["allocated"], reading["gpus"][0]["util"]) == (200, None)
    assert [(e.name, e.payload["source"]) for e in events] == [("degraded", "torch")]
