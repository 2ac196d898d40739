"""What a ring gives back is what a checkpoint would, and the last good snapshot is never lost to the next one."""

import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from meristem.checkpoint import snapshots as snapshots_module
from meristem.checkpoint.snapshots import ALIGNMENT_BYTES, SnapshotBuffer, copy_into, needed_bytes
from meristem.checkpoint.store import open_checkpoint, save
from meristem.errors import CapabilityError, CheckpointMismatch, ConfigError, QueueFull, SnapshotTooLarge

from .sample import model_tree

VALUES = {
    "cursor": {"position": 3, "key": "9007199254740993"},
    "progress": [3, 0.1, None, "é"],
    "words": (1, 2**63, -5),
}
BYTES = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def ring_for(trees, n_snapshots=2, **settings):
    size_bytes = needed_bytes(trees)
    return SnapshotBuffer(
        n_snapshots=n_snapshots, capacity_bytes=size_bytes, max_bytes=n_snapshots * size_bytes, **settings
    )


def filled(number, n_bytes=64):
    """One tree of ``n_bytes``, all of them ``number``."""
    return {"model": {"a": torch.full((n_bytes,), number, dtype=torch.uint8)}}


def take(buffer, number, *, is_valid=True, n_bytes=64):
    return buffer.take(filled(number, n_bytes), {"number": number}, step=number, tag="interval", is_valid=is_valid)


def steps(buffer):
    return [snapshot.step for snapshot in buffer.snapshots()]


def same_bits(a, b):
    """Equal to the bit, NaN included."""
    kind = BYTES.get(a.dtype, a.dtype)
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


def contents(path):
    """The bytes of the trees and values of a checkpoint."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}


def test_la3_a_snapshot_saved_is_the_checkpoint_byte_for_byte(tmp_path):
    """Saved from the ring, or from what is live: the same files. Given back by either: the same bits and values."""
    trees = {"model": model_tree(3), "memory": {}, "optim": {"a/step": torch.tensor(7)}}
    snapshot = ring_for(trees).take(trees, VALUES, step=3, tag="save", is_valid=True)
    direct = save(tmp_path / "direct", step=3, trees=trees, values=VALUES, files={}, header={})
    by_ring = save(tmp_path / "ring", step=3, trees=snapshot.trees, values=snapshot.values, files={}, header={})
    assert contents(direct) == contents(by_ring)
    checkpoint = open_checkpoint(direct)
    assert list(snapshot.trees) == list(trees)
    for name, tree in snapshot.trees.items():
        loaded = checkpoint.tree(name)
        assert tree.keys() == loaded.keys()
        assert all(same_bits(tree[key], loaded[key]) for key in tree)
    assert {name: checkpoint.value(name) for name in VALUES} == dict(snapshot.values)
    assert snapshot.values["words"] == [1, 2**63, -5]


def test_la3_restored_from_either_the_run_is_the_same(tmp_path):
    """Training spoils everything; the ring and the store bring back one state, in place."""
    live = {"weight": torch.arange(15.0).reshape(3, 5).t(), "moment": torch.randn(7, dtype=torch.float64)}
    addresses = {name: tensor.data_ptr() for name, tensor in live.items()}
    trees = {"model": live}
    snapshot = ring_for(trees).take(trees, {}, step=1, tag="start", is_valid=True)
    checkpoint = open_checkpoint(save(tmp_path, step=1, trees=trees, values={}, files={}, header={}))
    was = {name: tensor.clone() for name, tensor in live.items()}
    for saved in (snapshot.trees["model"], checkpoint.tree("model")):
        for tensor in live.values():
            tensor.fill_(float("nan"))
        copy_into(live, saved)
        assert all(same_bits(live[name], was[name]) for name in was)
    assert {name: tensor.data_ptr() for name, tensor in live.items()} == addresses


def test_la3_a_changed_topology_is_refused_until_it_is_undone():
    """Both snapshots stay what they were; what does not fit is named, and nothing is touched."""
    before = {"model": {"a": torch.ones(3), "b": torch.ones(5)}}
    after = {"model": {"a": torch.full((3,), 2.0), "seed": torch.full((7,), 2.0)}, "garden": {}}
    buffer = ring_for(after)
    first = buffer.take(before, {}, step=1, tag="interval", is_valid=True)
    second = buffer.take(after, {}, step=2, tag="surgery", is_valid=True)
    with pytest.raises(
        CheckpointMismatch, match=r"'b' is absent and was float32 \[5\]; 'seed' is float32 \[7\] and was"
    ):
        copy_into(after["model"], first.trees["model"])
    assert after["model"]["a"].tolist() == [2.0] * 3
    copy_into(before["model"], first.trees["model"])
    assert list(second.trees) == ["model", "garden"] and second.trees["model"]["seed"].tolist() == [2.0] * 7
    third = buffer.take(before, {}, step=3, tag="interval", is_valid=True)
    assert [list(snapshot.trees["model"]) for snapshot in (second, third)] == [["a", "seed"], ["a", "b"]]


DTYPES = [*BYTES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
shapes = st.lists(st.integers(0, 7), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes, st.booleans()), max_size=9), st.integers(0, 2**32))
def test_every_tensor_comes_back_to_the_bit(kinds, seed):
    """Random bits of every dtype and shape, transposed or not; each begins at a multiple of 64 bytes of its own."""
    random = torch.Generator().manual_seed(seed)
    tree = {}
    for number, (dtype, shape, is_turned) in enumerate(kinds):
        tensor = torch.randint(-(2**62), 2**62, shape, generator=random).view(torch.int64)
        bits = (tensor % 2 == 0) if dtype == torch.bool else tensor.to(BYTES.get(dtype, dtype)).view(dtype)
        tree[f"t{number}"] = bits.transpose(0, -1) if is_turned and shape else bits
    trees = {"all": tree, "none": {}}
    buffer = ring_for(trees, n_snapshots=1)
    taken = buffer.take(trees, {}, step=1, tag="interval", is_valid=True).trees["all"]
    assert taken.keys() == tree.keys() and all(same_bits(taken[name], tree[name]) for name in tree)
    places = [(tensor.data_ptr(), tensor.nbytes) for tensor in taken.values() if tensor.nbytes]
    assert all(place % ALIGNMENT_BYTES == 0 for place, _ in places)
    assert all(a + size_bytes <= b for (a, size_bytes), (b, _) in zip(places, places[1:], strict=False))
    back = {name: torch.zeros_like(tensor) for name, tensor in tree.items()}
    copy_into(back, taken)
    assert all(same_bits(back[name], tree[name]) for name in tree)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tensors_come_back_to_the_bit(monkeypatch, dtype, n_threads):
    """Above torch's grain threads of our own copy: odd sizes, cut into uneven pieces, beside small and turned ones."""
    monkeypatch.setattr(snapshots_module, "_PIECE_BYTES", 70_001)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    tensor = torch.randint(-(2**62), 2**62, (257, 129), generator=torch.Generator().manual_seed(7))
    bits = (tensor % 2 == 0) if dtype == torch.bool else tensor.to(BYTES.get(dtype, dtype)).view(dtype)
    n_before = threading.active_count()
    tree = {"large": bits, "turned": bits.t(), "row": bits[3], "part": bits[:, 1:], "again": bits.flatten()}
    taken = ring_for({"all": tree}).take({"all": tree}, {}, step=1, tag="start", is_valid=True).trees["all"]
    assert all(same_bits(taken[name], tree[name]) for name in tree)
    back = {name: torch.zeros_like(tensor) for name, tensor in tree.items()}
    back["again"] = torch.zeros(len(tree["again"]), 2, dtype=dtype)[:, 0]
    copy_into(back, taken)
    assert all(same_bits(back[name], tree[name]) for name in tree)
    assert threading.active_count() == n_before


@pytest.mark.parametrize("size", [7, 100_003])
def test_autograd_notices_the_restored(size):
    """A graph from before the restore has lost the values that it was made of; its backward pass says so."""
    weight = torch.ones(size, requires_grad=True)
    loss = weight.square().sum()
    copy_into({"w": weight}, {"w": torch.zeros(size)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


GROWTH = """
import psutil, torch
from meristem.checkpoint.snapshots import SnapshotBuffer
trees = {"model": {f"p{number}": torch.ones(1 << 20) for number in range(8)}}
rss = psutil.Process().memory_info
before = rss().rss
ring = SnapshotBuffer(n_snapshots=2, capacity_bytes=32 << 20, max_bytes=64 << 20)
made = rss().rss
for number in range(2):
    ring.take(trees, {}, step=number, tag="interval", is_valid=True)
print(made - before, rss().rss - made)
"""


def test_pages_are_written_before_training_begins():
    """A ring of 64 MiB grows the process when it is made, and taking snapshots does not: first touch costs seconds."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    made, taken = (int(number) for number in done.stdout.split())
    assert made > 60 << 20
    assert taken < 8 << 20


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda saved: saved.pop("b"), r"'b' is float64 \[7\] and was absent"),
        (lambda saved: saved.update(c=torch.ones(1)), r"'c' is absent and was float32 \[1\]"),
        (lambda saved: saved.update(b=torch.ones(1, dtype=torch.float64)), r"float64 \[7\] and was float64 \[1\]"),
        (lambda saved: saved.update(b=torch.ones(7)), r"'b' is float64 \[7\] and was float32 \[7\]"),
    ],
)
def test_nothing_is_copied_unless_all_fits(change, message):
    """A name, a shape that would broadcast, a dtype that would be converted: refused, and the rest untouched too."""
    live = {"a": torch.zeros(3, requires_grad=True), "b": torch.zeros(7, dtype=torch.float64)}
    saved = {"a": torch.ones(3), "b": torch.ones(7, dtype=torch.float64)}
    change(saved)
    with pytest.raises(CheckpointMismatch, match=message):
        copy_into(live, saved)
    assert not any(tensor.any() for tensor in live.values())


def test_parameters_are_copied_outside_the_graph():
    """A parameter keeps its address and its gradient, and neither it nor the snapshot learns of the other."""
    weight = torch.nn.Parameter(torch.ones(5, 3))
    weight.square().sum().backward()
    trees = {"model": {"w": weight}}
    snapshot = ring_for(trees).take(trees, {}, step=1, tag="start", is_valid=True)
    assert not snapshot.trees["model"]["w"].requires_grad
    with torch.no_grad():
        weight.zero_()
    copy_into({"w": weight}, snapshot.trees["model"])
    assert weight.is_leaf and weight.requires_grad and weight.grad.eq(2).all() and weight.eq(1).all()


def test_values_cannot_be_changed_before_or_after():
    """What the caller goes on to change, and what a reader changes in its copy, is not what was taken."""
    values = {"progress": {"steps": [1, 2]}}
    snapshot = ring_for({}).take({}, values, step=1, tag="start", is_valid=True)
    values["progress"]["steps"].append(3)
    snapshot.values["progress"]["steps"].clear()
    assert snapshot.values == {"progress": {"steps": [1, 2]}}


@pytest.mark.parametrize(
    "trees, values, message",
    [
        (filled(2), {"progress": {"best": float("nan")}}, r"value 'progress\.best' is nan"),
        ({"model": {"lost": torch.empty(3, device="meta")}}, {}, "'lost' cannot be saved.*meta"),
        ({"model": {"odd": torch.ones(3, dtype=torch.complex64)}}, {}, "'odd' cannot be saved: torch.complex64"),
    ],
)
def test_what_the_store_refuses_the_ring_refuses(trees, values, message):
    """In the same words and at once, not later in the thread that writes; the ring is as it was."""
    buffer = ring_for(filled(0), n_snapshots=1)
    take(buffer, 1)
    with pytest.raises(ValueError, match=message):
        buffer.take(trees, values, step=2, tag="interval", is_valid=True)
    assert steps(buffer) == [1]


def test_too_many_bytes_are_refused_before_any_is_taken():
    """An error of the configuration that names both keys, with numbers that would do."""
    with pytest.raises(
        SnapshotTooLarge,
        match=r"3 snapshots in memory, 400 bytes each, take 1,200 bytes in all; rollback\.max_bytes allows 1,000\. "
        r"Set rollback\.snapshots to 2 or rollback\.max_bytes to 1200 or more",
    ) as raised:
        SnapshotBuffer(n_snapshots=3, capacity_bytes=400, max_bytes=1000)
    assert isinstance(raised.value, ConfigError) and raised.value.exit_code == 2
    with pytest.raises(SnapshotTooLarge, match=r"allows 300\. Set rollback\.max_bytes to 1200 or more"):
        SnapshotBuffer(n_snapshots=3, capacity_bytes=400, max_bytes=300)
    with pytest.raises(SnapshotTooLarge, match="the system gives no"):
        SnapshotBuffer(n_snapshots=1, capacity_bytes=1 << 60, max_bytes=1 << 61)


def test_a_buffer_grows_within_the_budget():
    """What has grown is taken in a larger buffer; beyond the budget it is refused, and what was there stays."""
    buffer = SnapshotBuffer(n_snapshots=2, capacity_bytes=64, max_bytes=320)
    take(buffer, 1)
    assert buffer.size_bytes == 128
    large = take(buffer, 2, n_bytes=192)
    assert buffer.size_bytes == 256
    with pytest.raises(SnapshotTooLarge, match=r"2 snapshots in memory, 192 bytes each, take 384 bytes in all"):
        take(buffer, 3, n_bytes=192)
    assert steps(buffer) == [1, 2] and buffer.size_bytes == 256
    assert large.trees["model"]["a"].eq(2).all() and buffer.snapshots()[0].trees["model"]["a"].eq(1).all()


def test_the_last_good_one_outlives_any_number_of_bad_ones():
    """However often a sick run is snapshotted, the place to go back to is still there."""
    buffer = ring_for(filled(0))
    good = take(buffer, 1)
    for number in range(2, 9):
        take(buffer, number, is_valid=False)
        assert buffer.latest() is good and steps(buffer) == [1, number]
    assert good.trees["model"]["a"].eq(1).all()


def test_abandoned_steps_are_forgotten():
    """After going back to step 2 what was taken later belongs to a future that never came."""
    buffer = ring_for(filled(0), n_snapshots=3)
    for number in (1, 2, 3):
        take(buffer, number)
    assert buffer.drop_after(2) == 1 and steps(buffer) == [1, 2]
    take(buffer, 7)
    assert steps(buffer) == [1, 2, 7]


def test_a_held_snapshot_is_overwritten_by_none():
    """Another one goes in its place, though it be the newest valid one; when all are held it is said."""
    buffer = ring_for(filled(0))
    first, second = take(buffer, 1), take(buffer, 2)
    with buffer.pinned(first):
        take(buffer, 3)
        assert steps(buffer) == [1, 3] and first.trees["model"]["a"].eq(1).all()
        with (
            buffer.pinned(buffer.latest()),
            pytest.raises(QueueFull, match="all 2 .* being read.*rollback.snapshots to 3"),
        ):
            take(buffer, 4)
        assert steps(buffer) == [1, 3]
    with pytest.raises(ValueError, match="overwritten or dropped step 2"), buffer.pinned(second):
        pass


def test_a_dropped_snapshot_is_read_to_its_end():
    """Going back while a checkpoint is written: what it reads stays as it is, and is no place to go back to."""
    buffer = ring_for(filled(0))
    late = take(buffer, 5)
    with buffer.pinned(late):
        buffer.drop_after(1)
        take(buffer, 2)
        take(buffer, 3)
        assert steps(buffer) == [3] and late.trees["model"]["a"].eq(5).all()
    take(buffer, 4)
    assert steps(buffer) == [3, 4]


def test_a_failing_copy_costs_no_other_snapshot(monkeypatch):
    """The one that was to be overwritten is gone; the newest valid one is not."""
    buffer = ring_for(filled(0))
    take(buffer, 1)
    take(buffer, 2)

    def fail(*_args, **_kwargs):
        raise RuntimeError("device lost")

    monkeypatch.setattr(torch, "_foreach_copy_", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        take(buffer, 3)
    monkeypatch.undo()
    assert steps(buffer) == [2]
    take(buffer, 4)
    assert steps(buffer) == [2, 4]


def test_a_reader_never_sees_two_steps_in_one_snapshot():
    """A thread takes as fast as it can while another reads what it holds: every byte is of the step that it says."""
    n_bytes, buffer = 1 << 16, ring_for(filled(0, 1 << 16), n_snapshots=2)
    is_over, torn, n_read = threading.Event(), [], 0

    def taking():
        number = 0
        while not is_over.is_set():
            number += 1
            take(buffer, number % 251, n_bytes=n_bytes)

    taker = threading.Thread(target=taking)
    taker.start()
    try:
        while n_read < 300:
            snapshot = buffer.latest()
            if snapshot is None:
                continue
            try:
                with buffer.pinned(snapshot):
                    for _ in range(3):
                        low, high = snapshot.trees["model"]["a"].aminmax()
                        torn += [] if int(low) == int(high) == snapshot.step else [(int(low), int(high), snapshot.step)]
                    n_read += 1
            except ValueError:  # it was overwritten before it could be held, and says so
                continue
    finally:
        is_over.set()
        taker.join()
    assert torn == []


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here")
def test_pinned_pages_need_an_accelerator():
    with pytest.raises(CapabilityError, match="pinned snapshots"):
        ring_for(filled(0), is_pinned=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_tensors_of_an_accelerator_come_back():
    """Whole when the snapshot is published, whatever the stream had still to do."""
    device = torch.accelerator.current_accelerator()
    weight = torch.zeros(1 << 20, device=device)
    trees = {"model": {"w": weight, "host": torch.ones(3)}}
    buffer = ring_for(trees, is_pinned=True)
    for number in range(1, 9):
        weight.add_(1)
        taken = buffer.take(trees, {}, step=number, tag="interval", is_valid=True)
        assert taken.trees["model"]["w"].is_pinned() and taken.trees["model"]["w"].eq(number).all()
    weight.fill_(-1)
    copy_into(trees["model"], taken.trees["model"])
    assert weight.eq(8).all()


class NaiveBuffer:
    """The same in the plainest words: places that hold a number, and who reads them."""

    def __init__(self, n_places, size_bytes, max_bytes):
        self.places = [{"size": size_bytes, "entry": None, "readers": 0} for _ in range(n_places)]
        self.max_bytes, self.n_taken = max_bytes, 0

    @property
    def entries(self):
        return sorted((p["entry"] for p in self.places if p["entry"]), key=lambda entry: entry["age"])

    def take(self, step, is_valid, size_bytes):
        """What happened: taken, full or too large."""
        free = [place for place in self.places if place["readers"] == 0]
        if not free:
            return "full"
        empty = [place for place in free if place["entry"] is None]
        valid = [entry for entry in self.entries if entry["is_valid"]]
        if empty:
            place = sorted(empty, key=lambda p: p["size"])[-1]
        else:
            oldest_first = sorted(free, key=lambda p: p["entry"]["age"])
            others = [p for p in oldest_first if not valid or p["entry"] is not valid[-1]]
            place = (others or oldest_first)[0]
        size_after = max(place["size"], size_bytes)
        if sum(p["size"] for p in self.places) - place["size"] + size_after > self.max_bytes:
            return "too large"
        self.n_taken += 1
        place["size"] = size_after
        place["entry"] = {"step": step, "is_valid": is_valid, "size": size_bytes, "age": self.n_taken}
        return place["entry"]


class SnapshotBufferMachine(RuleBasedStateMachine):
    """Any order of calls: the ring holds what the naive one holds, every byte of it, within the budget."""

    snapshots, holds = Bundle("snapshots"), Bundle("holds")

    @initialize(n_snapshots=st.integers(1, 4), size=st.integers(0, 3), room=st.integers(0, 6))
    def begin(self, n_snapshots, size, room):
        max_bytes = 64 * (n_snapshots * size + room)
        self.buffer = SnapshotBuffer(n_snapshots=n_snapshots, capacity_bytes=64 * size, max_bytes=max_bytes)
        self.naive = NaiveBuffer(n_snapshots, 64 * size, max_bytes)

    @rule(target=snapshots, number=st.integers(0, 250), is_valid=st.booleans(), size=st.integers(0, 5))
    def take(self, number, is_valid, size):
        expected = self.naive.take(number, is_valid, 64 * size)
        try:
            snapshot = take(self.buffer, number, is_valid=is_valid, n_bytes=64 * size)
        except QueueFull:
            assert expected == "full"
            return multiple()
        except SnapshotTooLarge:
            assert expected == "too large"
            return multiple()
        assert not isinstance(expected, str), expected
        return snapshot, expected

    @rule(target=holds, taken=snapshots)
    def hold(self, taken):
        snapshot, entry = taken
        holding = self.buffer.pinned(snapshot)
        places = [place for place in self.naive.places if place["entry"] is entry]
        if not places:
            with pytest.raises(ValueError, match="overwritten or dropped"):
                holding.__enter__()
            return multiple()
        holding.__enter__()
        places[0]["readers"] += 1
        return holding, places[0], snapshot, entry

    @rule(held=consumes(holds))
    def release(self, held):
        holding, place, _, _ = held
        holding.__exit__(None, None, None)
        place["readers"] -= 1

    @rule(held=holds)
    def read(self, held):
        _, place, snapshot, entry = held
        if place["readers"]:
            self.check(snapshot, entry)

    @rule(step=st.integers(0, 250))
    def drop_after(self, step):
        late = [place for place in self.naive.places if place["entry"] and place["entry"]["step"] > step]
        assert self.buffer.drop_after(step) == len(late)
        for place in late:
            place["entry"] = None

    @invariant()
    def the_same_is_there(self):
        if not hasattr(self, "ring"):
            return
        found, expected = self.buffer.snapshots(), self.naive.entries
        assert len(found) == len(expected)
        for snapshot, entry in zip(found, expected, strict=True):
            self.check(snapshot, entry)
        valid = [snapshot for snapshot in found if snapshot.is_valid]
        assert self.buffer.latest() is (valid[-1] if valid else None)
        assert self.buffer.size_bytes == sum(place["size"] for place in self.naive.places) <= self.naive.max_bytes

    def check(self, snapshot, entry):
        tensor = snapshot.trees["model"]["a"]
        assert (snapshot.step, snapshot.is_valid, tensor.nbytes) == (entry["step"], entry["is_valid"], entry["size"])
        assert tensor.eq(entry["step"]).all() and snapshot.values == {"number": entry["step"]}


SnapshotBufferMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSnapshotBuffer = SnapshotBufferMachine.TestCase
