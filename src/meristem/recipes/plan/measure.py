"""What rehearsals say about one training step, at their own length or at a longer one."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from meristem.recipes.plan.fit import extrapolate
from meristem.recipes.plan.ledger import Storage
from meristem.recipes.plan.rehearse import Rehearsal
from meristem.recipes.plan.report import Held

Rehearse = Callable[[int], Rehearsal]
Group = tuple[str, str, str, str]

MOST_OPERATIONS: Final = 30_000
"""A rehearsal of more operations than this takes some seconds; short ones are tried instead."""

LIMIT: Final = 4 * MOST_OPERATIONS
"""No rehearsal may take more operations than this, unless it is the second."""

TOLERANCE: Final = 1e-5
"""How far apart two predictions may be that stand on one line: a loop over time is linear to the byte."""


@dataclass(frozen=True)
class Measured:
    """One forward and backward pass over ``window`` tokens per row, and the highest moment of the whole step.

    flops: by stage and module. samples: the rehearsals it comes from, by their window.
    is_certain: rehearsed in full, or continued along a line on which three rehearsals lie.
    """

    window: int
    samples: Mapping[int, Rehearsal]
    flops: Mapping[tuple[str, str], int]
    peak_bytes: int
    stage: str
    module: str
    by_category: Mapping[str, int]
    largest: tuple[Held, ...]
    is_certain: bool = True

    @property
    def is_fitted(self) -> bool:
        """Extrapolated from shorter sequences, not rehearsed in full."""
        return len(self.samples) > 1

    @property
    def longest(self) -> Rehearsal:
        """The sample with the longest sequence."""
        return self.samples[max(self.samples)]


def short(window: int) -> tuple[int, int]:
    """Two lengths that show how the number of operations grows towards this one."""
    unit = max(8, 1 << max(0, (window - 1).bit_length() - 6))
    return unit, 2 * unit


def measure(rehearse: Rehearse, window: int, n_operations: Callable[[int], int]) -> Measured:
    """One step at ``window``; where a loop over time makes that slow and all is linear in time, from short sequences.

    The lengths are doubled until three of them lie on one line. Where that never happens, as with dense attention, the
    full step is rehearsed, or where even that would take too long, the last line is taken as uncertain.

    n_operations: about how many a rehearsal of a sequence takes.
    """
    if n_operations(window) <= MOST_OPERATIONS:
        return combine({window: rehearse(window)}, window)
    samples: dict[int, Rehearsal] = {}
    for length in _doubled(window, n_operations):
        if len(samples) >= 2 and n_operations(length) > LIMIT:
            break
        samples[length] = rehearse(length)
        if length == window:
            return combine({window: samples[window]}, window)
        if len(samples) >= 3 and agree(_line(samples, window, -2), _line(samples, window, -3)):
            return _line(samples, window, -2)
    return replace(_line(samples, window, -2), is_certain=False)


def _doubled(window: int, n_operations: Callable[[int], int]) -> Iterator[int]:
    """Lengths from where the loop over time begins to be most of the work, doubled, up to the whole."""
    per_token = max(1, n_operations(1) - n_operations(0))
    length = min(short(window)[0], 1 << max(3, (n_operations(0) // per_token).bit_length()))
    while length < window:
        yield length
        length *= 2
    yield window


def _line(samples: Mapping[int, Rehearsal], window: int, first: int) -> Measured:
    """What two successive samples say about ``window``."""
    lengths = list(samples)[first:][:2]
    return combine({length: samples[length] for length in lengths}, window)


def agree(one: Measured, other: Measured) -> bool:
    """Whether peak and work are the same."""
    pairs = ((one.peak_bytes, other.peak_bytes), (sum(one.flops.values()), sum(other.flops.values())))
    return all(abs(a - b) <= TOLERANCE * b for a, b in pairs)


def combine(samples: Mapping[int, Rehearsal], window: int) -> Measured:
    """The figures of all samples continued to ``window``; of one sample, its own.

    Each place is continued for itself before the highest is looked for: at a short window it may be another.
    """
    moments = {length: sample.ledger.moments() for length, sample in samples.items()}
    places = set.intersection(*(set(found) for found in moments.values()))
    sizes = extrapolate(
        {n: {place: found[place].size_bytes for place in places} for n, found in moments.items()}, window
    )
    highest = max(places, key=lambda place: sizes[place])
    return Measured(
        window=window,
        samples=samples,
        flops=extrapolate({length: _flops(sample) for length, sample in samples.items()}, window),
        peak_bytes=sizes[highest],
        stage=highest[0],
        module=highest[1],
        by_category=extrapolate({length: found[highest].by_category for length, found in moments.items()}, window),
        largest=_largest({n: sample.ledger.living(moments[n][highest]) for n, sample in samples.items()}, window),
    )


def scale(shapes: Mapping[int, tuple[int, ...]], window: int) -> tuple[int, ...]:
    """A shape that was seen at some windows, at this one."""
    axes = extrapolate({length: dict(enumerate(shape)) for length, shape in shapes.items()}, window)
    return tuple(axes[axis] for axis in sorted(axes))


def _flops(sample: Rehearsal) -> dict[tuple[str, str], int]:
    return {place: n // sample.n_batches for place, n in sample.ledger.flops.items()}


def _largest(living: Mapping[int, Iterable[tuple[Storage, str]]], window: int) -> tuple[Held, ...]:
    """The ten groups of tensors (same category, module, operation) that hold most."""
    bytes_of: dict[int, Counter[Group]] = {}
    count_of: dict[int, Counter[Group]] = {}
    shape_of: dict[Group, dict[int, tuple[int, ...]]] = {}
    for length, storages in living.items():
        bytes_of[length], count_of[length] = Counter(), Counter()
        for storage, category in sorted(storages, key=lambda entry: entry[0].size_bytes):
            group = (category, storage.module, storage.operation, storage.dtype)
            bytes_of[length][group] += storage.size_bytes
            count_of[length][group] += 1
            shape_of.setdefault(group, {})[length] = storage.shape
    sizes, counts = extrapolate(bytes_of, window), extrapolate(count_of, window)
    ordered = sorted(sizes, key=lambda group: -sizes[group])[:10]
    return tuple(
        Held(
            category=group[0],
            module=group[1],
            operation=group[2],
            dtype=group[3],
            shape=scale(shape_of[group], window),
            n_tensors=counts[group],
            size_bytes=sizes[group],
        )
        for group in ordered
    )
