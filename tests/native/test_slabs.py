"""Blocks in large pages: zeros, apart from each other, free again when nothing refers to them, and not before."""

import gc
import mmap
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.native import slabs
from meristem.native.slabs import LINE_BYTES, PAGE_BYTES, SLAB_BYTES, Slabs

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no large pages to ask for")


def places(*blocks: torch.Tensor) -> list[int]:
    return [block.data_ptr() for block in blocks]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 99)), max_size=60),
    st.sampled_from([(1, torch.float32), (37, torch.float32), (70_000, torch.float64), (300_000, torch.float64)]),
)
@settings(deadline=None, max_examples=30)
def test_blocks_that_are_held_are_apart(steps: list[tuple[bool, int]], of: tuple[int, torch.dtype]) -> None:
    """Taken and let go in any order: each holds what was written to it, and is zeros when it is new."""
    size, dtype = of
    made, held = Slabs(size, dtype), list[tuple[torch.Tensor, int]]()
    for number, (is_taken, at) in enumerate(steps):
        if is_taken or not held:
            (block,) = made.blocks(1)
            assert block.shape == (size,) and block.dtype == dtype and not block.any()
            assert block.data_ptr() % LINE_BYTES == 0
            held.append((block.fill_(number + 1), number + 1))
        else:
            del held[at % len(held)]
        assert all((block == value).all() for block, value in held)


def test_a_place_is_free_when_the_last_view_is_gone() -> None:
    """Until then it is given to nobody."""
    made = Slabs(100, torch.float32)
    first = made.blocks(1)
    view, at = first[0, 50:], places(first)[0]
    del first
    gc.collect()
    others = [made.blocks(1) for _ in range(len(made._free))]
    assert at not in places(*others)
    del view
    assert places(made.blocks(1)) == [at]


def test_blocks_lie_side_by_side_in_large_pages() -> None:
    """One by one as far as a piece goes, many in a piece of their own, and each larger than a page too."""
    made = Slabs(1000, torch.float32)
    found = [made.blocks(1) for _ in range(5)]
    assert [at - places(found[0])[0] for at in places(*found)] == [4032 * index for index in range(5)]
    assert places(found[0])[0] % PAGE_BYTES == 0
    many = made.blocks(1500)
    assert many.shape == (1500, 1000) and many.is_contiguous() and places(many)[0] % PAGE_BYTES == 0
    assert len(made._free) == SLAB_BYTES // 4032 - 5
    large = Slabs(PAGE_BYTES, torch.float32)
    assert places(large.blocks(1))[0] % PAGE_BYTES == 0 and not large._free


def test_without_large_pages_they_are_tensors_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "mmap", object())
    made = Slabs(5, torch.float64)
    assert torch.equal(made.blocks(3), torch.zeros(3, 5, dtype=torch.float64)) and not made._free


def test_threads_take_and_let_go() -> None:
    """No place is given twice at a time."""
    made, wrong = Slabs(64, torch.float32), list[int]()

    def work(number: int) -> None:
        for _ in range(300):
            held = [made.blocks(1).fill_(number) for _ in range(7)]
            wrong.extend(number for block in held if not (block == number).all())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
