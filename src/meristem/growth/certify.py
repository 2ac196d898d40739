"""Whether a seed can be trusted in a slot: probes of the very seed, in a copy of the very slot (growth.md 8).

certificate = grow.certify(model, "blocks.1")
print(certificate.band, certificate.complaints)

The copy is fully blended in. The model, the seed and all generators of random numbers are as they were, to the bit.
"""

import copy
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Final, Literal, Self, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meristem.checkpoint.atomic import sha256
from meristem.device.random import random_state, restore_random_state, stream
from meristem.device.room import is_out_of_room
from meristem.errors import CheckpointMismatch
from meristem.growth.attach import find_slot
from meristem.growth.course import Course
from meristem.growth.graft import find_seed
from meristem.growth.seed import Origin, Seed
from meristem.growth.weights import packed
from meristem.nn.slot import Slot

Band: TypeAlias = Literal["low", "medium", "high", "critical", "refused"]
Handling: TypeAlias = Literal["standard", "restricted", "quarantine"]
Outcome: TypeAlias = Literal["passed", "failed", "unmeasured"]

T = TypeVar("T")

VERSION: Final = 1
BANDS: Final[tuple[tuple[float, Band], ...]] = ((0.30, "low"), (0.60, "medium"), (0.85, "high"))
"""A score below the number is in the band; above all of them it is critical."""
HANDLING: Final[Mapping[Band, Handling]] = {
    "low": "standard",
    "medium": "restricted",
    "high": "quarantine",
    "critical": "quarantine",
    "refused": "quarantine",
}
WEIGHTS: Final[Mapping[str, float]] = {
    "nonfinite": 0.6,
    "memory": 0.3,
    "exploding": 0.3,
    "vanishing": 0.2,
    "bf16": 0.2,
    "oscillation": 0.2,
    "watermark": 0.2,
}
"""What each probe that is not passed adds to the score; one that could not be measured is not passed."""
REFUSED: Final = ("causal", "deterministic", "batch")
"""Probes without which there is no trust at all, whatever the score."""

SCALES: Final = tuple(10.0**power for power in range(-3, 4))
LARGEST_GRADIENT: Final = 1e3
SMALLEST_GRADIENT: Final = 1e-8
LARGEST_DIFFERENCE: Final = 0.1
LARGEST_RISE: Final = 0.05
N_STEPS: Final = 50
RATE: Final = 1e-3
"""Learning rate of the steps on noise."""
N_WARM_UP: Final = 5
N_MEASURED: Final = 20
WATERMARK_BYTES: Final = 1 << 28
SAME: Final = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far two outputs may be apart, relative to the largest number in them, that are the same mathematically."""


@dataclass(frozen=True)
class Probe:
    """One probe: what was measured, what is expected, and the outcome.

    value: None where it was not measured, or is not finite. why: what was raised, where it could not be measured.
    """

    name: str
    value: float | None
    bound: float
    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class Benchmark:
    """How fast a seed is, forward, and how much it holds at once. shape: of what it read, ``(b, t, d)``."""

    device: str
    dtype: str
    shape: tuple[int, int, int]
    is_compiled: bool
    p50_ms: float
    p95_ms: float
    tokens_per_s: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Certificate:
    """What was found of a seed in a slot.

    weights_sha256: of the file that ``weights.packed`` makes of it. score: 0 is the best, 1 the worst; band and
    handling follow from it. benchmark: None where it could not be run.
    """

    origin: Origin
    slot: str
    weights_sha256: str
    probes: tuple[Probe, ...]
    benchmark: Benchmark | None

    @property
    def score(self) -> float:
        """The sum of what the probes add that were not passed, at most 1."""
        return min(1.0, sum(WEIGHTS.get(each.name, 0.0) for each in self.probes if each.outcome != "passed"))

    @property
    def band(self) -> Band:
        """``refused`` for a seed that is not causal, not deterministic, or mixes the rows of a batch."""
        if any(each.outcome != "passed" for each in self.probes if each.name in REFUSED):
            return "refused"
        return next((band for below, band in BANDS if round(self.score, 9) < below), "critical")

    @property
    def handling(self) -> Handling:
        """Whether it may be used as it is, when it is allowed, or in a run of its own."""
        return HANDLING[self.band]

    @property
    def complaints(self) -> tuple[str, ...]:
        """Names of the probes that were not passed."""
        return tuple(each.name for each in self.probes if each.outcome != "passed")

    def to_json(self) -> dict[str, Any]:
        """Plain values, of which ``from_json`` makes the same."""
        return {
            "format": VERSION,
            "origin": {**vars(self.origin), "settings": dict(self.origin.settings)},
            "slot": self.slot,
            "weights_sha256": self.weights_sha256,
            "score": self.score,
            "band": self.band,
            "handling": self.handling,
            "probes": [vars(each) for each in self.probes],
            "benchmark": self.benchmark and {**vars(self.benchmark), "shape": [*self.benchmark.shape]},
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave. Raises CheckpointMismatch for a later format."""
        if saved["format"] != VERSION:
            raise CheckpointMismatch(
                f"a certificate of format {saved['format']} was found; this meristem reads {VERSION}. Update meristem, "
                f"or certify again."
            )
        speed = saved["benchmark"]
        return cls(
            origin=Origin(**saved["origin"]),
            slot=saved["slot"],
            weights_sha256=saved["weights_sha256"],
            probes=tuple(Probe(**each) for each in saved["probes"]),
            benchmark=speed and Benchmark(**{**speed, "shape": tuple(speed["shape"])}),
        )


def certify(
    model: nn.Module,
    slot: str,
    seed: Seed | None = None,
    *,
    n_batch: int = 3,
    n_time: int = 24,
    watermark_bytes: int = WATERMARK_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> Certificate:
    """Probe a seed in a copy of a slot of the model: the one that is in it, or one that is to come.

    Hidden vectors are drawn, in the width, layout and dtype of the slot, on its device. Added to the score: NaN or
    infinity in outputs or gradients for finite inputs of the sizes 1e-3 to 1e3 (0.6); no room (0.3); a gradient above
    1e3 (0.3) or below 1e-8 (0.2); bfloat16 apart from float32 by more than 0.1 (0.2); a loss that rises by more than
    0.05 over 50 steps on noise (0.2); more bytes at once than ``watermark_bytes`` (0.2). Refused whatever the score: an
    output that depends on later tokens or other rows, is not the same twice, or lets NaN pass to other rows.

    seed: such as ``seed_for`` builds. n_batch, n_time: rows and tokens of what is read. clock: seconds, for the speed.

    Raises WrongValue where there is no such slot, or no seed in it and none given.
    """
    rows_and_time = n_batch, n_time
    return certify_in(find_slot(model, slot), seed or find_seed(model, slot), rows_and_time, watermark_bytes, clock)


def certify_in(
    place: Slot,
    seed: Seed,
    rows_and_time: tuple[int, int] = (3, 24),
    watermark_bytes: int = WATERMARK_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> Certificate:
    """``certify`` of a seed in a slot that stands by itself."""
    with _untouched(seed):
        probes, measured = _probed(_Bench(place, seed, rows_and_time), watermark_bytes, clock)
    return Certificate(seed.origin, place.name, sha256(packed(seed)), probes, measured)


@contextmanager
def _untouched(seed: Seed) -> Iterator[None]:
    """Inside, gradients are on and autocast is off; outside, no generator of random numbers has moved."""
    device = next(seed.parameters()).device
    values, tensors = random_state(device)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        restore_random_state(values, tensors, device=device)


@dataclass(frozen=True)
class _Bench:
    """A place to try copies of a seed in copies of a slot."""

    place: Slot
    seed: Seed
    rows_and_time: tuple[int, int]

    @property
    def like(self) -> Tensor:
        return next(self.seed.parameters())

    def slot(self, dtype: torch.dtype | None = None) -> Slot:
        """A copy of the slot, and of all that is settled in it, with a copy of the seed, fully blended in.

        Gradients are those of the copied seed alone.
        """
        was = self.place.seed
        memo: dict[int, Any] = {} if was is None else {id(was): None}
        made, seed = copy.deepcopy(self.place, memo), copy.deepcopy(self.seed)
        seed.follow(Course(1.0, 1.0))
        made.requires_grad_(False)
        made.seed = seed.requires_grad_(True)
        made.eval().zero_grad(set_to_none=True)
        return made.to(dtype) if dtype else made

    def inputs(self, name: str, scale: float = 1.0, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """What a module of the slot would give and be given, ``(b, t, d)`` of each, drawn from the stream of a name."""
        generator = stream(0, f"growth.certify.{name}")
        n_batch, n_time = self.rows_and_time
        read, added = self.place.widths
        host = torch.randn(n_batch, n_time, added, generator=generator)
        given = host if self.place.reads == "output" else torch.randn(n_batch, n_time, read, generator=generator)
        found = tuple((scale * each).to(self.like.device, dtype or self.like.dtype) for each in (host, given))
        return found[0], (found[0] if self.place.reads == "output" else found[1])

    def run(self, slot: Slot, host: Tensor, read: Tensor) -> Tensor:
        """What the slot makes of it, ``(b, t, d)``."""
        if slot.layout == "tbd":
            host, read = host.transpose(0, 1), read.transpose(0, 1)
        after: Tensor = slot(host, read, {}, None, has_state=False)
        return after.transpose(0, 1) if slot.layout == "tbd" else after


def _probed(
    bench: _Bench, watermark_bytes: int, clock: Callable[[], float]
) -> tuple[tuple[Probe, ...], Benchmark | None]:
    """Every probe, and the speed. What raises is unmeasured; where there is no room, so is all that comes after it."""
    values: dict[str, float | None] = {}
    why: dict[str, str] = {}
    has_room = True

    def measured(work: Callable[[], T], *names: str) -> T | None:
        nonlocal has_room
        try:
            return work() if has_room else None
        except (RuntimeError, MemoryError) as error:
            has_room = not is_out_of_room(error)
            why.update(dict.fromkeys(names, str(error).partition("\n")[0]))
            return None

    for names, work in PROBES.items():
        values.update(dict.fromkeys(names, measured(partial(work, bench), *names)))
    seconds = measured(lambda: _seconds(bench, clock))
    values["memory"] = 0.0 if has_room else 1.0
    probes = tuple(_judged(name, values[name], watermark_bytes, why.get(name, "")) for name in (*WEIGHTS, *REFUSED))
    return probes, _benchmark(bench, seconds, values["watermark"]) if seconds else None


def _judged(name: str, value: float | None, watermark_bytes: int, why: str) -> Probe:
    bounds = {
        "exploding": LARGEST_GRADIENT,
        "vanishing": SMALLEST_GRADIENT,
        "bf16": LARGEST_DIFFERENCE,
        "oscillation": LARGEST_RISE,
        "watermark": float(watermark_bytes),
    }
    bound = bounds.get(name, 0.0)
    if value is None:
        return Probe(name, None, bound, "unmeasured", why)
    is_passed = value >= bound if name == "vanishing" else value <= bound
    return Probe(name, value if math.isfinite(value) else None, bound, "passed" if is_passed else "failed")


def _n_nonfinite(bench: _Bench) -> float:
    """Of the sizes of inputs: at how many an output or a gradient is NaN or infinite."""
    slot, n_wrong = bench.slot(), 0
    for scale in SCALES:
        slot.zero_grad(set_to_none=True)
        host, read = bench.inputs("finite", scale)
        read = read.detach().requires_grad_(True)
        host = read if bench.place.reads == "output" else host
        after = bench.run(slot, host, read)
        _backward(after)
        found = [after, read.grad, *(each.grad for each in slot.parameters())]
        n_wrong += not all(bool(torch.isfinite(each).all()) for each in found if each is not None)
    return float(n_wrong)


def _backward(after: Tensor) -> None:
    """Gradients for one of the output that has the norm 1; none where nothing that it depends on has any."""
    drawn = torch.randn(after.shape, generator=stream(0, "growth.certify.direction"))
    if after.requires_grad:
        after.backward((drawn / drawn.norm()).to(after.device, after.dtype))


def _gradient(bench: _Bench) -> float:
    """The norm of the gradient of all weights, for inputs of size 1 and a gradient of the output of norm 1."""
    slot = bench.slot()
    after = bench.run(slot, *bench.inputs("gradient"))
    _backward(after)
    squares = [each.grad.double().square().sum() for each in slot.parameters() if each.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


@torch.no_grad()
def _difference(bench: _Bench) -> float:
    """How far the output in bfloat16 is from that in float32, relative to its norm."""
    found = [
        bench.run(bench.slot(dtype), *bench.inputs("precision", dtype=dtype)).double()
        for dtype in (torch.bfloat16, torch.float32)
    ]
    return float((found[0] - found[1]).norm() / found[1].norm())


def _rise(bench: _Bench) -> float:
    """How far the loss stands above its lowest so far, as a root of the mean square over the steps, relative to the
    first loss. Noise is one batch that the seed is to add to another; a loss that falls all the time gives 0.
    """
    slot = bench.slot(torch.float32)
    host, read = bench.inputs("noise", dtype=torch.float32)
    wanted = host + bench.inputs("target", dtype=torch.float32)[0]
    optimizer = torch.optim.AdamW([each for each in slot.parameters() if each.requires_grad], lr=RATE, weight_decay=0.0)
    losses: list[float] = []
    for _ in range(N_STEPS):
        optimizer.zero_grad(set_to_none=True)
        loss = (bench.run(slot, host, read) - wanted).square().mean()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    squares = [(each - lowest) ** 2 for each, lowest in zip(losses, accumulate(losses, min), strict=True)]
    return math.sqrt(math.fsum(squares) / N_STEPS) / losses[0] if all(map(math.isfinite, losses)) else math.inf


Change: TypeAlias = Callable[[Tensor], tuple[Tensor, tuple[slice | Tensor, slice]]]
"""Other inputs, and the rows and tokens of the output that may not differ for it."""


def _same(each: Tensor) -> tuple[Tensor, tuple[slice | Tensor, slice]]:
    return each, (slice(None), slice(None))


def _others(each: Tensor) -> Tensor:
    return torch.randn(each.shape, generator=stream(0, "growth.certify.others")).to(each)


def _later(each: Tensor) -> tuple[Tensor, tuple[slice | Tensor, slice]]:
    cut = each.shape[1] // 2
    return torch.cat([each[:, :cut], _others(each)[:, cut:]], dim=1), (slice(None), slice(0, cut))


def _other_rows(each: Tensor) -> tuple[Tensor, tuple[slice | Tensor, slice]]:
    changed = each.clone()
    changed[0] = _others(each)[0]
    return changed, (slice(1, None), slice(None))


def _row_of_nan(each: Tensor) -> tuple[Tensor, tuple[slice | Tensor, slice]]:
    changed = each.clone()
    changed[0] = torch.nan
    return changed, (slice(1, None), slice(None))


@torch.no_grad()
def _leak(bench: _Bench, change: Change) -> float:
    """1 where the part of the output that may not change does, beyond rounding, and 0 where it does not.

    Computed in float64, where the device has it. Two runs on the same inputs have to agree to the bit.
    """
    dtype = torch.float32 if bench.like.device.type == "mps" else torch.float64
    slot, (host, read) = bench.slot(dtype), bench.inputs("leak", dtype=dtype)
    other_host, kept = change(host)
    other_read = other_host if bench.place.reads == "output" else change(read)[0]
    one, other = bench.run(slot, host, read)[kept], bench.run(slot, other_host, other_read)[kept]
    if change is _same:
        return float(not torch.equal(one, other))
    bound = SAME[dtype] * float(one.abs().max())
    return float(not bool((one - other).abs().max() <= bound))


def _peak_bytes(bench: _Bench) -> float:
    """The most bytes that one pass forward and backward holds at once, beside parameters and inputs."""
    slot, inputs = bench.slot(), bench.inputs("watermark")
    with _Held() as held:
        after = bench.run(slot, *inputs)
        _backward(after)
    return float(held.peak_bytes)


class _Held(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while they are held, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self._bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self._hold(each.untyped_storage())
        return found

    def _hold(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        n_bytes = storage.nbytes()
        self._bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._release, key, n_bytes)

    def _release(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self._bytes -= n_bytes


PROBES: Final[Mapping[tuple[str, ...], Callable[[_Bench], float]]] = {
    ("watermark",): _peak_bytes,
    ("nonfinite",): _n_nonfinite,
    ("exploding", "vanishing"): _gradient,
    ("bf16",): _difference,
    ("oscillation",): _rise,
    ("causal",): lambda bench: _leak(bench, _later),
    ("deterministic",): lambda bench: _leak(bench, _same),
    ("batch",): lambda bench: max(_leak(bench, _other_rows), _leak(bench, _row_of_nan)),
}
"""What is measured, in this order, for the probes of these names."""


@torch.no_grad()
def _seconds(bench: _Bench, clock: Callable[[], float]) -> list[float]:
    slot, inputs, found = bench.slot(), bench.inputs("speed"), []
    for _ in range(N_WARM_UP + N_MEASURED):
        begun = clock()
        bench.run(slot, *inputs)
        if bench.like.device.type == "cuda":
            torch.cuda.synchronize(bench.like.device)
        found.append(clock() - begun)
    return found[N_WARM_UP:]


def _benchmark(bench: _Bench, seconds: list[float], peak_bytes: float | None) -> Benchmark:
    n_batch, n_time = bench.rows_and_time
    half = statistics.median(seconds)
    return Benchmark(
        device=str(bench.like.device),
        dtype=str(bench.like.dtype).removeprefix("torch."),
        shape=(n_batch, n_time, bench.place.widths[0]),
        is_compiled=False,
        p50_ms=1e3 * half,
        p95_ms=1e3 * statistics.quantiles(seconds, n=20, method="inclusive")[-1],
        tokens_per_s=n_batch * n_time / half if half else 0.0,
        peak_bytes=None if peak_bytes is None else int(peak_bytes),
    )
