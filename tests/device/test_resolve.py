"""The device and the dtypes are those asked for, or the best here, and they were tried."""

import contextlib
import re
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

from meristem.device import resolve as resolving
from meristem.device.config import DeviceConfig
from meristem.device.resolve import Device, available, probe, resolve
from meristem.errors import CapabilityError
from meristem.events import silent

CPU = torch.device("cpu")


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def with_units(monkeypatch, *units, gain=5.0):
    """A processor with these bf16 units, on which bf16 products are ``gain`` times faster."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
    monkeypatch.setattr(resolving, "bf16_gain", lambda: gain)


@pytest.mark.parametrize(
    "cuda, mps, expected",
    [
        (0, False, ["cpu"]),
        (0, True, ["mps", "cpu"]),
        (2, True, ["cuda:0", "cuda:1", "mps", "cpu"]),
    ],
)
def test_best_device_first(monkeypatch, cuda, mps, expected):
    """CX-2.2: CUDA before MPS before the CPU, each CUDA device by its number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert available() == expected


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps"])
def test_absent_device_is_an_error(cpu_only, name):
    """CX-2.2: A device that is named must be there; the message says what is."""
    with pytest.raises(CapabilityError, match=f"no device '{name}' here; found cpu. Set device.device") as caught:
        resolve(DeviceConfig(device=name), silent)
    assert caught.value.fields["alternatives"] == ["cpu"]


@pytest.mark.parametrize(
    "units, gain, compute, why",
    [
        ((), 9.0, "fp32", "no units for bf16"),
        (("amx_bf16",), 5.0, "bf16", "5.0 times the speed of fp32 \\(amx_bf16\\)"),
        (("avx512_bf16",), 1.1, "fp32", "1.1 times the speed of fp32 in spite of avx512_bf16"),
    ],
)
def test_auto_takes_bf16_where_it_pays(cpu_only, monkeypatch, units, gain, compute, why):
    """On a CPU ``auto`` means bf16 only with units for it that are really faster; the event says why."""
    with_units(monkeypatch, *units, gain=gain)
    events = []
    device = resolve(DeviceConfig(), events.append)
    assert device == Device(CPU, torch.float32, resolving.DTYPES[compute])
    (event,) = events
    assert event.name == "capability.chosen"
    assert (event.payload["device"], event.payload["dtype"]) == ("cpu", compute)
    assert event.payload["asked"] == {"device": "auto", "param_dtype": "fp32", "dtype": "auto"}
    assert re.search(why, event.payload["why"])


def test_auto_falls_back_when_bf16_fails(cpu_only, monkeypatch):
    """Units that multiply wrongly are not used, and the event says so."""
    with_units(monkeypatch, "amx_bf16")
    matmul = torch.matmul
    monkeypatch.setattr(
        torch, "matmul", lambda a, b: matmul(a, b) * (torch.nan if torch.is_autocast_enabled("cpu") else 1)
    )
    events = []
    assert resolve(DeviceConfig(), events.append).dtype == torch.float32
    assert events[0].payload["why"] == "bf16 failed its probe: the product is not finite"


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("parameters", ["fp32", "bf16"])
def test_asked_for_is_what_runs(cpu_only, parameters, compute):
    """Inside ``autocast`` a product has the compute dtype whatever the parameters are kept in; outside, theirs.

    CX-2.2.
    """
    if (parameters, compute) == ("bf16", "fp32"):
        with pytest.raises(ValueError, match="stored in bf16 cannot be computed with in fp32"):
            DeviceConfig(param_dtype=parameters, dtype=compute)
        return
    device = resolve(DeviceConfig(device="cpu", param_dtype=parameters, dtype=compute), silent)
    linear = torch.nn.Linear(3, 5, dtype=device.param_dtype)
    hidden = torch.ones(2, 3, dtype=device.param_dtype)
    with device.autocast():
        assert linear(hidden).dtype == resolving.DTYPES[compute]
    assert linear(hidden).dtype == resolving.DTYPES[parameters]


def test_fp16_on_cpu_is_refused(cpu_only):
    """CX-3.3: fp16 training on a CPU is an error with alternatives, not a slow surprise."""
    with pytest.raises(CapabilityError, match="fp16 does not work on cpu.*device.dtype=fp32 or device.dtype=bf16"):
        resolve(DeviceConfig(dtype="fp16"), silent)


def broken(*_args, **_kwargs):
    raise RuntimeError("no kernel image is available\nlong story")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "place, name, reason",
    [
        (torch, "matmul", "no kernel image is available"),
        (F, "scaled_dot_product_attention", "no kernel image is available"),
        (torch.autograd, "grad", "no kernel image is available"),
    ],
)
def test_failing_operation_is_found_by_the_probe(monkeypatch, place, name, reason, dtype):
    """CX-2.3: A product, an attention or a backward that fails is an error before any weight is loaded."""
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(CapabilityError, match=f"does not work on cpu: {reason}. Try") as caught:
        probe(CPU, torch.float32, dtype)
    assert caught.value.fields["dtype"] == resolving.NAMES[dtype]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "place, name, what",
    [(torch, "matmul", "product"), (F, "scaled_dot_product_attention", "attention")],
)
def test_result_that_is_not_finite_is_found(monkeypatch, place, name, what, bad):
    """CX-2.3: Numbers that come out broken are as bad as an error."""
    real = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **kwargs: real(*args, **kwargs) * bad)
    with pytest.raises(CapabilityError, match=f"{what} is not finite"):
        probe(CPU, torch.float32, torch.float32)


def test_autocast_without_effect_is_found(monkeypatch):
    """A8.14: Mixed precision changes dtypes or raises: an autocast that does nothing does not pass."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_kwargs: contextlib.nullcontext())
    with pytest.raises(CapabilityError, match="the product came out in torch.float32"):
        probe(CPU, torch.float32, torch.bfloat16)


def test_resolving_draws_no_random_number(cpu_only):
    """Whatever is probed, the global generator stands where it stood."""
    before = torch.get_rng_state()
    resolve(DeviceConfig(), silent)
    assert torch.equal(before, torch.get_rng_state())


def test_move_puts_tensors_on_the_device():
    """TR-6: Tensors arrive on the device in the order given; meta stands in for a second device."""
    tokens_bt, targets_bt = Device(torch.device("meta"), torch.float32, torch.float32).move(
        torch.zeros(2, 7), torch.zeros(2, 5)
    )
    assert (tokens_bt.device.type, tokens_bt.shape, targets_bt.shape) == ("meta", (2, 7), (2, 5))


def test_threads_are_set(cpu_only):
    """The number of threads asked for is the number used."""
    before = torch.get_num_threads()
    try:
        resolve(DeviceConfig(threads=1, dtype="fp32"), silent)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_gain_leaves_the_threads_alone():
    """Measuring bf16 gives a positive ratio and the number of threads is as before."""
    before = torch.get_num_threads()
    assert resolving.bf16_gain() > 0
    assert torch.get_num_threads() == before


def test_gain_is_of_the_processor_not_of_what_runs_beside(monkeypatch):
    """Where every product in fp32 has to wait, as beside other programs, the ratio is still that of the products."""
    calm, product = resolving.bf16_gain.__wrapped__(), torch.Tensor.__matmul__

    def waits(left, right):
        if left.dtype == torch.float32:
            time.sleep(0.1)
        return product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", waits)
    assert resolving.bf16_gain.__wrapped__() < 3 * calm


@pytest.mark.parametrize(
    "wrong", [{"device": "gpu"}, {"device": "cuda:x"}, {"dtype": "fp8"}, {"threads": 0}, {"nam": 1}]
)
def test_part_refuses_what_cannot_be(wrong):
    """Unknown devices, dtypes and keys are refused before torch is asked."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DeviceConfig.model_validate(wrong)


def test_parts_need_no_torch():
    """The parts of these rooms are read without importing torch."""
    rooms = ", ".join(f"meristem.{room}.config" for room in ("device", "checkpoint", "sinks"))
    code = f"import sys, {rooms}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_gpu_that_was_chosen_is_that_of_calls_which_name_none(monkeypatch):
    """A pinned buffer or an emptied cache names no GPU; without this it would start the first one beside it."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(resolving, "probe", lambda *given: chosen.append("probe"))
    resolve(DeviceConfig(device="cuda:1", dtype="fp32"), silent)
    assert chosen == [torch.device("cuda", 1), "probe"]
