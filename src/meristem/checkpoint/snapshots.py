"""Snapshots in RAM: what a run was at a few steps, for a rollback within half a second.

A snapshot holds the trees and values that ``store.save`` takes, in the form in which it takes them: what comes back
from here is what would come back from a checkpoint, byte for byte. Every buffer is allocated and written to once when
the buffer is made. The system hands out a page when it is first written, and for 1.2 GB that took twenty times as long
as the copy (growth.md sections 2 and 12).

One thread takes snapshots; another may read one, as long as it holds it.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt
import orjson
import torch
from torch import Tensor

from meristem.checkpoint.tensors import check_savable
from meristem.checkpoint.values import to_json
from meristem.errors import CapabilityError, CheckpointMismatch, QueueFull, SnapshotTooLarge

ALIGNMENT_BYTES: Final = 64
"""Where a tensor may begin in a buffer: what the widest vector instructions like, and a multiple of every dtype."""

_GRAIN: Final = 32768
"""Up to so many elements torch copies with one thread."""

_PIECE_BYTES: Final = 1 << 24
_MOST_THREADS: Final = 8
"""More than a few threads do not find more bandwidth."""

Trees = Mapping[str, Mapping[str, Tensor]]
_Bytes = npt.NDArray[np.uint8]
_Layout = tuple[tuple[str, tuple[tuple[str, torch.dtype, torch.Size], ...]], ...]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a run was after ``step``, to be read while the buffer has it: later its bytes are those of another step.

    tag: why it was taken, as ``interval`` or ``save``.
    is_valid: the guard was quiet then, so that a run may roll back to it.
    trees: tensors on the CPU that lie in the buffer; to be copied from, never to be changed.
    values: each access gives a new copy.
    """

    step: int
    tag: str
    is_valid: bool
    trees: Trees
    values: Mapping[str, object]


class _Values(Mapping[str, object]):
    """Values as the JSON that a checkpoint would hold: nobody can change what was taken, neither before nor after."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._texts = {name: to_json(name, value) for name, value in values.items()}

    def __getitem__(self, name: str) -> object:
        return orjson.loads(self._texts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


class _Slot:
    """One buffer, the views of the tensors that it was last laid out for, and the snapshot that is in it."""

    def __init__(self, size_bytes: int, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self.buffer = _touched(size_bytes, is_pinned)
        self._layout: _Layout = ()
        self.trees: Trees = {}
        self.tensors: list[Tensor] = []
        self.snapshot: Snapshot | None = None
        self.order = 0
        self.n_readers = 0

    @property
    def size_bytes(self) -> int:
        return self.buffer.nbytes

    def make_room(self, needed_bytes: int) -> None:
        """Give the buffer ``needed_bytes``. The old one goes first, since there may be no room for both."""
        self._layout, self.trees, self.tensors = (), {}, []
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.buffer = _touched(needed_bytes, self._is_pinned)

    def lay_out(self, trees: Trees) -> None:
        """Cut the buffer for tensors like these, unless it already is, as it mostly is after the first snapshot."""
        layout = tuple(
            (name, tuple((key, tensor.dtype, tensor.shape) for key, tensor in tree.items()))
            for name, tree in trees.items()
        )
        if layout == self._layout:
            return
        cut: dict[str, Mapping[str, Tensor]] = {}
        start = 0
        for name, tree in trees.items():
            views = {}
            for key, tensor in tree.items():
                flat = self.buffer[start : start + tensor.nbytes]
                views[key] = flat.view(tensor.dtype).view(tensor.shape)
                start += _aligned(tensor.nbytes)
            cut[name] = MappingProxyType(views)
        self._layout, self.trees = layout, MappingProxyType(cut)
        self.tensors = [tensor for tree in cut.values() for tensor in tree.values()]


class SnapshotBuffer:
    """A few buffers, used in rotation. The newest valid snapshot is overwritten last, and one that is held never.

    n_snapshots: how many buffers (``rollback.snapshots``). With two or more, a reader never stops the taker.
    capacity_bytes: the size of each to begin with; ``needed_bytes`` of what is to be taken.
    max_bytes: what all of them may take together (``rollback.max_bytes``); more is SnapshotTooLarge.
    is_pinned: lock the pages, so that an accelerator copies into them at full speed and without waiting for the host.
    """

    def __init__(self, *, n_snapshots: int, capacity_bytes: int, max_bytes: int, is_pinned: bool = False) -> None:
        if n_snapshots * capacity_bytes > max_bytes:
            raise _too_large(n_snapshots, capacity_bytes, n_snapshots * capacity_bytes, max_bytes)
        if is_pinned and not torch.accelerator.is_available():
            raise CapabilityError(
                "pinned snapshots were requested, and there is no accelerator to copy from. Make the buffer without.",
                device="cpu",
                reason="no accelerator",
            )
        self._max_bytes = max_bytes
        self._slots = [_Slot(capacity_bytes, is_pinned) for _ in range(n_snapshots)]
        self._lock = threading.Lock()
        self._n_taken = 0

    @property
    def size_bytes(self) -> int:
        """What all buffers take, full or not."""
        return sum(slot.size_bytes for slot in self._slots)

    def take(self, trees: Trees, values: Mapping[str, object], *, step: int, tag: str, is_valid: bool) -> Snapshot:
        """Copy everything into the buffer that can best be spared, and give what is then in it.

        SnapshotTooLarge where that buffer would have to grow beyond ``max_bytes``, and QueueFull where all are held,
        leave the buffer unchanged. Whatever else fails costs the spared snapshot and no other.
        """
        frozen = _Values(values)
        sources = [_checked(name, tensor) for tree in trees.values() for name, tensor in tree.items()]
        size_bytes = needed_bytes(trees)
        slot = self._spare(size_bytes)
        if slot.size_bytes < size_bytes:
            slot.make_room(size_bytes)
        slot.lay_out(trees)
        _copy(slot.tensors, sources)
        snapshot = Snapshot(step=step, tag=tag, is_valid=is_valid, trees=slot.trees, values=frozen)
        with self._lock:
            self._n_taken += 1
            slot.order, slot.snapshot = self._n_taken, snapshot
        return snapshot

    def latest(self, *, is_valid: bool = True) -> Snapshot | None:
        """The one taken last of the valid ones, or with ``is_valid=False`` of all."""
        for snapshot in reversed(self.snapshots()):
            if snapshot.is_valid or not is_valid:
                return snapshot
        return None

    def snapshots(self) -> tuple[Snapshot, ...]:
        """All that are here, in the order in which they were taken."""
        with self._lock:
            return self._by_age()

    @contextlib.contextmanager
    def pinned(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """Keep one from being overwritten while the block runs. A ValueError when that has happened already.

        The block may be entered by one thread and left by another (``Saver.submit``).
        """
        with self._lock:
            slot = self._slot_of(snapshot)
            if slot is None:
                raise ValueError(f"the buffer has overwritten or dropped step {snapshot.step}; hold it before")
            slot.n_readers += 1
        try:
            yield snapshot
        finally:
            with self._lock:
                slot.n_readers -= 1

    def drop_after(self, step: int) -> int:
        """Forget the snapshots of later steps, whose future was abandoned by a rollback; says how many those were."""
        with self._lock:
            late = [slot for slot in self._slots if slot.snapshot is not None and slot.snapshot.step > step]
            for slot in late:
                slot.snapshot = None
        return len(late)

    def _by_age(self) -> tuple[Snapshot, ...]:
        by_age = sorted(self._slots, key=lambda slot: slot.order)
        return tuple(slot.snapshot for slot in by_age if slot.snapshot is not None)

    def _slot_of(self, snapshot: Snapshot) -> _Slot | None:
        return next((slot for slot in self._slots if slot.snapshot is snapshot), None)

    def _spare(self, size_bytes: int) -> _Slot:
        """The slot to overwrite, its snapshot forgotten: an empty one, else the oldest, the newest valid one last."""
        with self._lock:
            free = [slot for slot in self._slots if not slot.n_readers]
            if not free:
                raise QueueFull(
                    f"all {len(self._slots)} snapshots in memory are being read, so that none can be overwritten. "
                    f"Wait for the checkpoint that is being written, or set rollback.snapshots to "
                    f"{len(self._slots) + 1}."
                )
            empty = [slot for slot in free if slot.snapshot is None]
            if empty:
                spared = max(empty, key=lambda slot: slot.size_bytes)
            else:
                kept = next((snapshot for snapshot in reversed(self._by_age()) if snapshot.is_valid), None)
                spared = min(free, key=lambda slot: (slot.snapshot is kept, slot.order))
            grown_bytes = self.size_bytes - spared.size_bytes + max(size_bytes, spared.size_bytes)
            if grown_bytes > self._max_bytes:
                total_bytes = max(grown_bytes, len(self._slots) * size_bytes)
                raise _too_large(len(self._slots), size_bytes, total_bytes, self._max_bytes)
            spared.snapshot = None
            return spared


def needed_bytes(trees: Trees) -> int:
    """The capacity that a snapshot of these trees needs."""
    return sum(_aligned(tensor.nbytes) for tree in trees.values() for tensor in tree.values())


def copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Give the live tensors the saved content in place: whoever holds their addresses finds it there.

    Names, shapes and dtypes must all fit; else CheckpointMismatch, and nothing has changed.
    """
    wrong = [name for name in sorted({*live, *saved}) if _described(live.get(name)) != _described(saved.get(name))]
    if wrong:
        listed = "; ".join(
            f"'{name}' is {_described(live.get(name))} and was {_described(saved.get(name))}" for name in wrong[:3]
        )
        raise CheckpointMismatch(
            f"what was saved does not fit what is there: {listed}" + (", and more" if len(wrong) > 3 else "") + ". "
            f"{len(wrong)} of {len({*live, *saved})} tensors differ and nothing was changed. "
            f"Bring the model and its optimizer into the form that they had then.",
            tensors=wrong,
        )
    _copy([live[name] for name in saved], list(saved.values()))


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _checked(name: str, tensor: Tensor) -> Tensor:
    check_savable(name, tensor)
    return tensor


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target: large ones on the host by threads of our own, all else in one call of torch.

    An accelerator copies beside the host, and is waited for once, at the end. On the host torch would share out every
    tensor by itself and have its threads wait for each other hundreds of times: as fast on an idle machine, 1.4 to 9
    times as slow on one where a thread finds its core taken.
    """
    pairs = list(zip(targets, sources, strict=True))
    apart = [_is_for_threads(target) and _is_for_threads(source) for target, source in pairs]
    together = [pair for pair, is_apart in zip(pairs, apart, strict=True) if not is_apart]
    devices = {tensor.device for pair in together for tensor in pair if tensor.device.type != "cpu"}
    if together:
        with torch.no_grad():
            torch._foreach_copy_(
                [target for target, _ in together], [source for _, source in together], non_blocking=bool(devices)
            )
    _copy_by_threads([pair for pair, is_apart in zip(pairs, apart, strict=True) if is_apart])
    for device in devices:
        torch.accelerator.synchronize(device)


def _is_for_threads(tensor: Tensor) -> bool:
    return tensor.numel() > _GRAIN and tensor.device.type == "cpu" and tensor.is_contiguous()


def _copy_by_threads(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors of one layout as bytes, cut into pieces that as many threads as torch has share evenly."""
    if not pairs:
        return
    pieces = []
    for target, source in pairs:
        into, of = _bytes(target), _bytes(source)
        pieces += [
            (into[start : start + _PIECE_BYTES], of[start : start + _PIECE_BYTES])
            for start in range(0, len(into), _PIECE_BYTES)
        ]
    n_threads = min(torch.get_num_threads(), _MOST_THREADS, len(pieces))
    with ThreadPoolExecutor(n_threads, thread_name_prefix="copy") as pool:
        list(pool.map(_copy_pieces, [pieces[first::n_threads] for first in range(n_threads)]))
    torch.autograd.graph.increment_version([target for target, _ in pairs])  # as torch's own copy would


def _copy_pieces(pieces: list[tuple[_Bytes, _Bytes]]) -> None:
    for into, of in pieces:
        np.copyto(into, of)


def _bytes(tensor: Tensor) -> _Bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _touched(size_bytes: int, is_pinned: bool) -> Tensor:
    """A buffer of which every page has been written."""
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=is_pinned).fill_(0)
    except RuntimeError as cause:  # torch has no type of its own for an allocation that failed on the host
        raise SnapshotTooLarge(
            f"the system gives no {size_bytes:,} bytes for a snapshot in memory. Set rollback.snapshots or "
            f"rollback.max_bytes lower.",
            snapshot_bytes=size_bytes,
        ) from cause


def _too_large(n_snapshots: int, each_bytes: int, total_bytes: int, max_bytes: int) -> SnapshotTooLarge:
    fitting = min(n_snapshots - 1, max_bytes // each_bytes)
    fewer = f"rollback.snapshots to {fitting} or " if fitting else ""
    return SnapshotTooLarge(
        f"{n_snapshots} snapshots in memory, {each_bytes:,} bytes each, take {total_bytes:,} bytes in all; "
        f"rollback.max_bytes allows {max_bytes:,}. Set {fewer}rollback.max_bytes to {total_bytes} or more.",
        snapshot_bytes=each_bytes,
        total_bytes=total_bytes,
        max_bytes=max_bytes,
        n_snapshots=n_snapshots,
    )


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
