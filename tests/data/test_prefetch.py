"""Batches read ahead are the same ones, bounded in bytes, and stop with whoever takes them."""

import threading
from dataclasses import replace

import pytest
import torch

from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prefetch import MOST, prefetched
from meristem.data.prepare import prepare
from meristem.data.stream import Batch, Cursor, Stream
from meristem.errors import FileChanged

AMPLE_S = 30


class Counted:
    """Batches of 2 x 3 ids that say at which position they stand; ``reached`` is set when that position is read."""

    def __init__(self, watched: int = -1, fails_at: int = -1) -> None:
        self.read: list[int] = []
        self.reached, self._watched, self._fails_at = threading.Event(), watched, fails_at

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        self.read.append(cursor.position)
        if cursor.position == self._watched:
            self.reached.set()
        if cursor.position == self._fails_at:
            raise FileChanged(f"position {cursor.position} changed")
        ids_bt = torch.full((2, 3), cursor.position)
        return Batch(ids_bt, ids_bt, 6, 6, starts=True), replace(cursor, position=cursor.position + 1)


BEGIN = Cursor(0, "text", "layout")
BATCH_BYTES = 2 * 6 * 8


def test_cx_8_7_a_slow_consumer_stops_the_reader():
    """CX-8.7: what waits is bounded in bytes, whoever is slow; and the reader does go ahead as far as that."""
    counted, cursor = Counted(watched=8), BEGIN
    with prefetched(counted, 4 * BATCH_BYTES + 1) as batches:
        for taken in range(1, 6):
            batch, cursor = batches.next(cursor)
            assert int(batch.tokens_bt[0, 0]) == taken - 1
            assert max(counted.read) <= taken - 1 + 4
        assert counted.reached.wait(AMPLE_S), "four are read beside the fifth"
    assert counted.read == list(range(9))


@pytest.mark.parametrize("most_bytes, n_ahead", [(1, 1), (BATCH_BYTES * 10_000, MOST)])
def test_at_least_one_batch_and_no_more_than_some_are_read_ahead(most_bytes, n_ahead):
    counted = Counted(watched=n_ahead)
    with prefetched(counted, most_bytes) as batches:
        batches.next(BEGIN)
        assert counted.reached.wait(AMPLE_S)
    assert counted.read == list(range(n_ahead + 1))


def test_another_cursor_begins_anew_there():
    """As of a run that goes back: what was read ahead is forgotten."""
    counted = Counted()
    with prefetched(counted, 3 * BATCH_BYTES) as batches:
        for position in (0, 1, 2, 0, 1, 7, 8):
            batch, after = batches.next(replace(BEGIN, position=position))
            assert (int(batch.tokens_bt[0, 0]), after.position) == (position, position + 1)


def test_what_a_reading_raises_is_raised_where_its_batch_is_taken():
    counted, cursor = Counted(fails_at=3), BEGIN
    with prefetched(counted, 10 * BATCH_BYTES) as batches:
        for _ in range(3):
            _, cursor = batches.next(cursor)
        for _ in range(2):
            with pytest.raises(FileChanged, match="position 3 changed"):
                batches.next(cursor)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_without_bytes_nothing_is_read_ahead():
    counted = Counted()
    with prefetched(counted, 0) as batches:
        assert batches is counted


@pytest.mark.parametrize("order", ["shuffled", "documents"])
def test_the_batches_are_those_of_the_stream(tmp_path, order):
    """To the bit, masks included; and a stream may be asked while it is read ahead."""
    (tmp_path / "text").mkdir()
    for number in range(9):
        (tmp_path / "text" / f"{number}.txt").write_text(f"Document {number}. " * (3 + number))
    corpus = prepare(DataConfig(source=str(tmp_path / "text"), root=tmp_path, validation=0), TokenizerConfig())
    read, plain = (Stream(corpus, "train", window=7, batch=3, order=order, random_seed=2) for _ in range(2))
    with prefetched(read, 1 << 20) as batches:
        cursor = plain.start()
        for _ in range(80):
            ahead, _ = batches.next(cursor)
            read.read(replace(cursor, position=cursor.position // 2))
            batch, cursor = plain.next(cursor)
            assert torch.equal(ahead.tokens_bt, batch.tokens_bt) and torch.equal(ahead.targets_bt, batch.targets_bt)
            assert ahead.masks.keys() == batch.masks.keys()
            assert all(torch.equal(mask_bt, batch.masks[name]) for name, mask_bt in ahead.masks.items())
