"""A batch is a function of seed, position and layout; every window is seen; rows that read on read all."""

import dataclasses
import itertools
import os
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from meristem.data.config import DataConfig, DifficultyConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.data.stream import IGNORED, N_BLOCKS, Cursor, Stream, held_out, held_out_documents
from meristem.errors import ConflictingKeys, CorpusTooShort, DataError, FileChanged, ManifestMismatch

SIZES = [3, 41, 97, 12, 211, 5, 29, 83]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")

    def corpus(name, sizes, **more):
        """Documents of these sizes, all text for training; every byte says where it stands."""
        text = root / name
        if not text.exists():
            text.mkdir()
            places = itertools.count()
            for number, size in enumerate(sizes):
                (text / f"{number:02}").write_bytes(bytes(next(places) * 7 % 251 for _ in range(size)))
        data = DataConfig(source=str(text), root=root / "cache", **{"validation": 0.0, **more})
        return prepare(data, TokenizerConfig())

    return corpus


@pytest.fixture(scope="module")
def corpus(make):
    return make("mixed", SIZES)


def mixed(corpus, weights):
    """The same corpus as a mixture of two sources, the second of its last three documents."""
    counts = corpus.manifest["counts"]["train"]
    manifest = corpus.manifest | {
        "loader": {"name": "mixture", "args": {"parts": [{"name": "first"}, {"name": "second"}]}},
        "counts": {"train": counts | {"sources": [counts["records"] - 3, 3]}},
    }
    return dataclasses.replace(corpus, manifest=manifest, weights=weights)


def stream(corpus, weights=(), difficulty=None, **more):
    corpus = mixed(corpus, weights) if weights else corpus
    corpus = dataclasses.replace(corpus, difficulty=DifficultyConfig(**difficulty or {}))
    return Stream(corpus, "train", **{"window": 5, "batch": 3, "random_seed": 1} | more)


def take(stream, n_batches, cursor=None):
    cursor = cursor or stream.start()
    batches = []
    for _ in range(n_batches):
        batch, cursor = stream.next(cursor)
        batches.append(batch)
    return batches, cursor


LAYOUTS = [
    {"order": "shuffled"},
    {"order": "shuffled", "documents": "within", "stride": 2},
    {"order": "curriculum"},
    {"order": "random"},
    {"order": "sequential"},
    {"order": "documents"},
    {"order": "shuffled", "documents": "reset"},
    {"order": "sequential", "documents": "mask"},
    {"order": "shuffled", "weights": (3, 1)},
    {"order": "curriculum", "weights": (1, 2), "documents": "within"},
    {"order": "random", "weights": (0.7, 0.3)},
    {"order": "documents", "weights": (1, 5)},
    {"order": "shuffled", "documents": "within", "difficulty": {"score": "length"}},
    {"order": "shuffled", "weights": (3, 1), "difficulty": {"score": "rarity", "cap": 0.7, "epochs": 0.5}},
    {"order": "documents", "difficulty": {"score": "rarity", "epochs": 2.0}},
]
EACH = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())).replace("'", "")
)


@EACH
def test_targets_are_the_tokens_that_follow(corpus, layout):
    text = corpus.text("train")
    for batch in take(stream(corpus, **layout), 40)[0]:
        assert batch.tokens_bt.dtype == batch.targets_bt.dtype == torch.int64
        begins_bt = batch.reset_mask_bt if batch.reset_mask_bt is not None else torch.zeros(3, 5, dtype=torch.bool)
        for row in zip(batch.tokens_bt.tolist(), batch.targets_bt.tolist(), begins_bt.tolist(), strict=True):
            cuts = [0, *(at for at in range(1, 5) if row[2][at]), 5]
            for start, stop in itertools.pairwise(cuts):
                tokens, targets = row[0][start:stop], row[1][start:stop]
                assert tokens[1:] == targets[:-1]
                assert bytes([*tokens, targets[-1]]) in text
        assert (batch.n_targets, batch.n_bytes) == (15, 15)


@EACH
@given(position=st.integers(0, 300))
@settings(max_examples=20, deadline=None)
def test_a_batch_is_found_from_its_position_alone(corpus, layout, position):
    """S1-M15: a stream made anew, given a cursor that went through JSON, goes on where the first one would."""
    walked, cursor = take(stream(corpus, **layout), position + 3)
    resumed = Cursor.from_json(Cursor(position, cursor.fingerprint, cursor.layout).to_json())
    for batch, again in zip(walked[position:], take(stream(corpus, **layout), 3, resumed)[0], strict=True):
        assert torch.equal(batch.tokens_bt, again.tokens_bt)
        assert torch.equal(batch.targets_bt, again.targets_bt)
        assert batch.starts == again.starts
        resets = layout["order"] == "documents" or layout.get("documents") == "reset"
        assert list(batch.masks) == ["reset_mask_bt"] * resets + ["attend_mask_bt"] * ("mask" in layout.values())
        assert all(torch.equal(mask_bt, again.masks[name]) for name, mask_bt in batch.masks.items())


@pytest.mark.parametrize("documents", ["mask", "reset"])
@pytest.mark.parametrize("order", ["shuffled", "sequential", "random"])
def test_dd1_masks_say_where_documents_begin(make, order, documents):
    """DD-1: at each token whether it is the first of a document; tokens and targets are those of ``join``."""
    corpus = make("no byte twice", [3, 41, 97, 12, 29, 5])
    made, joined = (stream(corpus, order=order, documents=how) for how in (documents, "join"))
    text, edges = bytes(corpus.tokens("train")[:].tolist()), corpus.documents("train").tolist()
    n_begun = 0
    for batch, plain in zip(take(made, 30)[0], take(joined, 30)[0], strict=True):
        assert torch.equal(batch.tokens_bt, plain.tokens_bt) and torch.equal(batch.targets_bt, plain.targets_bt)
        (mask_bt,) = batch.masks.values()
        rows = zip(batch.tokens_bt.tolist(), batch.targets_bt[:, -1].tolist(), mask_bt.tolist(), strict=True)
        for tokens, last, begins in rows:
            start = text.index(bytes([*tokens, last]))
            assert [at for at in range(5) if begins[at]] == [
                edge - start for edge in edges if start <= edge < start + 5
            ]
            n_begun += sum(begins)
    assert n_begun > 4


def documents_read(batches):
    """The documents that each row reads one after the other, the last of them as far as it was read."""
    found = []
    for row in range(len(batches[0].tokens_bt)):
        tokens, targets, begins = (
            torch.cat([getattr(batch, name)[row] for batch in batches]).tolist()
            for name in ("tokens_bt", "targets_bt", "reset_mask_bt")
        )
        edges = [at for at, is_first in enumerate(begins) if is_first] + [len(tokens)]
        assert edges[0] == 0
        found.append([(*tokens[start:stop], targets[stop - 1]) for start, stop in itertools.pairwise(edges)])
    return found


def test_rows_read_whole_documents_each_once_per_epoch(corpus):
    made = stream(corpus, order="documents")
    batches, cursor = take(made, 4 * made.batches_per_epoch)
    text, edges = corpus.tokens("train")[:].tolist(), corpus.documents("train")
    every = [tuple(text[start:stop]) for start, stop in itertools.pairwise(edges)]
    rows = documents_read(batches)
    whole = [document for row in rows for document in row[:-1]]
    assert set(whole) == set(every)
    assert all(row[-1] == next(each for each in every if each[0] == row[-1][0])[: len(row[-1])] for row in rows)
    counts = [whole.count(document) for document in every]
    assert max(counts) - min(counts) <= 2, "rows that still read a long one are an epoch behind"
    n_inputs = sum(size - 1 for size in SIZES)
    assert made.n_windows == n_inputs // 5 and made.epoch(cursor) == cursor.position * 15 / n_inputs
    assert [batch.starts for batch in batches] == [True] + [False] * (len(batches) - 1)


def test_a_row_takes_the_next_document_when_it_has_read_one(corpus):
    """The epoch's order is that in which rows become free; another epoch and another seed have another."""
    orders = []
    for random_seed in (1, 2):
        batches, _ = take(stream(corpus, order="documents", random_seed=random_seed), 130)
        begun = sorted(
            (int(at) + 5 * number, int(row), int(batch.tokens_bt[row, at]))
            for number, batch in enumerate(batches)
            for row, at in batch.reset_mask_bt.nonzero()
        )
        firsts = [first for _, _, first in begun]
        orders += [firsts[:8], firsts[8:16]]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_a_position_long_gone_is_found_again(make):
    """Also beyond the states that are kept, forwards and back."""
    corpus = make("many", [2 + n % 7 for n in range(40)])
    made = stream(corpus, order="documents", window=3)
    walked, _ = take(made, 600)
    for position in (599, 300, 255, 256, 257, 0):
        cursor = dataclasses.replace(made.start(), position=position)
        for fresh in (made, stream(corpus, order="documents", window=3)):
            batch, _ = fresh.next(cursor)
            assert torch.equal(batch.tokens_bt, walked[position].tokens_bt)
            assert torch.equal(batch.reset_mask_bt, walked[position].reset_mask_bt)


def test_documents_of_one_token_are_left_out_and_too_few_are_refused(make):
    corpus = make("few", [1, 9, 1, 7])
    assert all(
        len(each) > 1 for row in documents_read(take(stream(corpus, order="documents", batch=2), 9)[0]) for each in row
    )
    with pytest.raises(CorpusTooShort, match=r"2 documents of two tokens.*one for each of 3 rows.*batch_size to 2"):
        stream(corpus, order="documents")


@pytest.mark.parametrize("max_windows", [None, 4, 1])
def test_held_out_documents_read_on_in_rows_of_their_own(corpus, max_windows):
    text, edges = corpus.tokens("train")[:].tolist(), corpus.documents("train")
    every = {tuple(text[start:stop]) for start, stop in itertools.pairwise(edges)}
    groups, n_targets = [], 0
    for batch in held_out_documents(corpus, "train", window=7, batch=3, max_windows=max_windows):
        groups += [[]] if batch.starts else []
        groups[-1].append(batch)
        is_target_bt = batch.targets_bt != IGNORED
        assert batch.n_targets == batch.n_bytes == int(is_target_bt.sum())
        n_targets += batch.n_targets
    found = []
    for group in groups:
        tokens_bt, targets_bt = (
            torch.cat([getattr(b, name) for b in group], 1) for name in ("tokens_bt", "targets_bt")
        )
        for tokens, targets in zip(tokens_bt.tolist(), targets_bt.tolist(), strict=True):
            n = sum(target != IGNORED for target in targets)
            found.append((tokens[0], *targets[:n]))
            assert tokens[1:n] == targets[: n - 1]
    if max_windows is None:
        assert sorted(found) == sorted(every)
    else:
        assert n_targets <= 7 * max_windows
        assert all(any(document[: len(each)] == each for document in every) for each in found)


def seen(batches, n_windows, first=0):
    rows = torch.cat([torch.cat([batch.tokens_bt, batch.targets_bt[:, -1:]], 1) for batch in batches])
    return sorted(map(tuple, rows[first : first + n_windows].tolist()))


@pytest.mark.parametrize("batch", [1, 3, 7, 200])
@pytest.mark.parametrize("documents, stride", [("join", 5), ("within", 5), ("within", 1), ("join", 3)])
def test_an_epoch_shows_each_window_once(corpus, batch, documents, stride):
    """Also where the batch does not divide the windows, and where it is larger than all of them."""
    made = stream(corpus, batch=batch, documents=documents, stride=stride)
    text = corpus.tokens("train")
    edges = corpus.documents("train") if documents == "within" else [0, len(text)]
    every = sorted(
        tuple(text[start : start + 6].tolist())
        for left, right in itertools.pairwise(edges)
        for start in range(int(left), int(right) - 5, stride)
    )
    assert made.n_windows == len(every)
    batches, cursor = take(made, 2 * made.batches_per_epoch)
    assert seen(batches, len(every)) == seen(batches, len(every), first=len(every)) == every
    assert made.epoch(cursor) == cursor.position * batch / len(every) >= 2


def test_epochs_and_seeds_order_otherwise(corpus):
    made = stream(corpus, batch=1)
    n = made.n_windows
    first, second = np.split(torch.cat([batch.tokens_bt for batch in take(made, 2 * n)[0]]).numpy(), 2)
    other = torch.cat([batch.tokens_bt for batch in take(stream(corpus, batch=1, random_seed=2), n)[0]]).numpy()
    assert (first != second).any(axis=1).mean() > 0.8
    assert (first != other).any(axis=1).mean() > 0.8


@pytest.mark.parametrize("n_windows", [7, 20, 49])
def test_a_curriculum_reads_one_part_of_the_text_after_the_other(make, n_windows):
    """Every window once per epoch, no two parts mixed, and within a part another order for another epoch."""
    corpus = make(f"rising-{n_windows}", [5 * n_windows + 1])
    made = stream(corpus, order="curriculum", batch=1)
    place = {
        tuple(corpus.tokens("train")[start : start + 6].tolist()): start // 5 for start in range(0, 5 * n_windows, 5)
    }
    read = [
        place[(*batch.tokens_bt[0].tolist(), int(batch.targets_bt[0, -1]))] for batch in take(made, 2 * n_windows)[0]
    ]
    size = -(-n_windows // N_BLOCKS)
    first, second = read[:n_windows], read[n_windows:]
    for epoch in (first, second):
        assert [number // size for number in epoch] == [at // size for at in range(n_windows)]
        assert sorted(epoch) == list(range(n_windows))
    assert (first != second) == (size > 1)


def test_random_order_reaches_the_first_and_the_last_window(make):
    """B7.7: Every offset is drawn, not only multiples of the window."""
    corpus = make("short", [9])
    made = stream(corpus, order="random", batch=4)
    assert made.n_windows == 4
    rows = {tuple(row) for batch in take(made, 30)[0] for row in batch.tokens_bt.tolist()}
    assert rows == {tuple(corpus.tokens("train")[start : start + 5].tolist()) for start in range(4)}


def test_rows_that_read_on_read_their_part_without_a_gap(corpus):
    made = stream(corpus, order="sequential")
    per_row = made.batches_per_epoch
    for epoch in range(4):
        cursor = Cursor(epoch * per_row, made.start().fingerprint, made.start().layout)
        batches, _ = take(made, per_row, cursor)
        read = torch.cat([batch.tokens_bt for batch in batches], 1)
        following = torch.cat([batch.targets_bt for batch in batches], 1)
        assert torch.equal(read[:, 1:], following[:, :-1])
        assert [batch.starts for batch in batches] == [True] + [False] * (per_row - 1)
        joined = bytes(torch.cat([read.flatten(), following[-1, -1:]]).tolist())
        assert joined in corpus.text("train")
        assert len(joined) == 3 * per_row * 5 + 1


def test_what_the_rows_do_not_share_evenly_is_read_in_other_epochs(make):
    """49 windows on 3 rows leave one over; it is at the front or at the back, by turns."""
    corpus = make("over", [5 * 49 + 1])
    made = stream(corpus, order="sequential")
    assert (made.n_windows, made.batches_per_epoch) == (49, 16)
    firsts = {
        tuple(made.next(Cursor(16 * epoch, made.start().fingerprint, made.start().layout))[0].tokens_bt[0].tolist())
        for epoch in range(20)
    }
    tokens = corpus.tokens("train")
    assert firsts == {tuple(tokens[:5].tolist()), tuple(tokens[5:10].tolist())}


def test_ids_that_no_tokenizer_gave_are_refused(corpus):
    """As from a disk that gives other bytes than those whose hash was compared when the files were opened."""
    known = types.SimpleNamespace(byte_lengths=corpus.tokenizer.byte_lengths[:100])
    made = stream(dataclasses.replace(corpus, tokenizer=known))
    with pytest.raises(ManifestMismatch, match=r"gave the id \d+, and its tokenizer has 100 entries.*Check the disk"):
        take(made, made.batches_per_epoch)


@EACH
def test_other_orders_start_afresh_at_every_batch(corpus, layout):
    starts = [batch.starts for batch in take(stream(corpus, **layout), 9)[0]]
    assert all(starts) == (layout["order"] not in ("sequential", "documents"))


def test_bytes_are_counted_by_token(tmp_path):
    (tmp_path / "text").write_text("wächst 🌱 und wächst 🌿\n" * 60, "utf-8")
    data = DataConfig(source=str(tmp_path / "text"), root=tmp_path / "cache", validation=0.2)
    corpus = prepare(data, TokenizerConfig(kind="bpe", vocab_size=290))
    for batch in take(stream(corpus), 9)[0]:
        assert (
            batch.n_bytes == len(corpus.tokenizer.decode_bytes(batch.targets_bt.flatten().tolist())) > batch.n_targets
        )


def test_a_text_shorter_than_a_window_says_what_to_do(make):
    corpus = make("tiny", [5])
    with pytest.raises(
        CorpusTooShort,
        match="'tiny' holds 5 tokens .* a sequence of 5 needs at least 6. Add text, or set data.seq_len to 4",
    ):
        stream(corpus)
    assert stream(corpus, window=4).n_windows == 1


def test_a_window_longer_than_every_document_says_so(corpus):
    assert stream(corpus, window=300).n_windows == 1
    with pytest.raises(CorpusTooShort, match="holds 211 tokens in the longest run .*data.seq_len to 210 or less"):
        stream(corpus, window=211, documents="within")
    assert stream(corpus, window=210, documents="within").n_windows == 1


def test_more_rows_than_windows_cannot_read_on(make):
    corpus = make("short", [9])
    with pytest.raises(
        CorpusTooShort, match="has 1 sequences of 5 .* one for each of 3 rows.*data.batch_size to 1 or less"
    ):
        stream(corpus, order="sequential")


def test_a_cursor_of_another_text_is_refused(corpus, make):
    """S1-M15."""
    cursor = stream(make("short", [9])).start()
    with pytest.raises(ManifestMismatch, match="the cursor belongs to data .* the text, its split or its tokenizer"):
        stream(corpus).next(cursor)


@pytest.mark.parametrize(
    "more",
    [
        {"window": 6},
        {"batch": 4},
        {"stride": 1},
        {"random_seed": 2},
        {"order": "random"},
        {"documents": "within"},
        {"weights": (1, 1)},
        {"difficulty": {"score": "length"}},
    ],
)
def test_a_cursor_of_another_layout_is_refused(corpus, more):
    """S1-M15."""
    with pytest.raises(DataError, match="counts batches of 'train shuffled join window=5 .* this stream gives"):
        stream(corpus, **more).next(stream(corpus).start())


def test_a_text_cut_while_it_is_read_stops_the_stream(make):
    corpus = make("cut", [200], validation=0.5)
    made = stream(corpus)
    _, cursor = made.next(made.start())
    os.truncate(corpus.path / "tokens.train.u8", 10)
    with pytest.raises(FileChanged, match="tokens.train.u8 changed while it was in use"):
        made.next(cursor)


@pytest.mark.parametrize("window", [1, 5, 40, 500])
@pytest.mark.parametrize("batch", [1, 7])
def test_held_out_text_is_covered_once(corpus, window, batch):
    """Each document from its second token to its last, in order; what pads a row counts nowhere."""
    batches = list(held_out(corpus, "train", window=window, batch=batch))
    targets = torch.cat([made.targets_bt.flatten() for made in batches])
    targets = targets[targets != IGNORED].tolist()
    tokens = corpus.tokens("train")
    documents = [tokens[left:right] for left, right in itertools.pairwise(corpus.documents("train").tolist())]
    assert targets == [token for document in documents for token in document[1:].tolist()]
    assert sum(made.n_targets for made in batches) == sum(made.n_bytes for made in batches) == sum(SIZES) - len(SIZES)
    for made in batches:
        real = made.targets_bt[:, :-1] != IGNORED
        assert torch.equal(made.tokens_bt[:, 1:][real], made.targets_bt[:, :-1][real])
        assert made.starts


def test_part_of_the_held_out_text_is_spread_evenly(corpus):
    whole = [row for batch in held_out(corpus, "train", window=9, batch=1) for row in batch.tokens_bt.tolist()]
    some = [
        row for batch in held_out(corpus, "train", window=9, batch=4, max_windows=7) for row in batch.tokens_bt.tolist()
    ]
    assert some == [whole[number * len(whole) // 7] for number in range(7)]
    more = sum(len(batch.tokens_bt) for batch in held_out(corpus, "train", window=9, batch=4, max_windows=10_000))
    assert more == len(whole)


def test_held_out_text_of_single_tokens_is_too_short(make):
    with pytest.raises(CorpusTooShort, match="holds 1 tokens .* needs at least 2. Add text.$"):
        next(held_out(make("single", [1]), "train", window=5, batch=2))


@pytest.mark.parametrize("more", [{"documents": "within"}, {"stride": 3}])
def test_reading_on_excludes_what_would_break_it(more):
    with pytest.raises(ConflictingKeys, match="data.order=sequential"):
        DataConfig(order="sequential", **more)


@pytest.mark.parametrize("wrong", [{"validation": 1.0}, {"window": 0}, {"mirror": "ftp://x"}, {"sorce": "x"}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        DataConfig(**wrong)


@EACH
@given(n_ranks=st.sampled_from([1, 2, 3, 4, 6, 12]), position=st.integers(0, 60))
@settings(max_examples=25, deadline=None)
def test_s2_m2_processes_share_a_batch_without_overlap(make, layout, n_ranks, position):
    """Whatever their number, their rows one under the other are those of one process, and so are counts and cursor."""
    whole = stream(make("shared", SIZES * 2), batch=12, **layout)
    cursor = Cursor(position, whole.start().fingerprint, whole.start().layout)
    joined, after = whole.next(cursor)
    parts = [whole.share(rank, n_ranks).next(cursor) for rank in range(n_ranks)]
    assert torch.equal(torch.cat([part.tokens_bt for part, _ in parts]), joined.tokens_bt)
    assert torch.equal(torch.cat([part.targets_bt for part, _ in parts]), joined.targets_bt)
    masks = [part.reset_mask_bt for part, _ in parts if part.reset_mask_bt is not None]
    assert joined.reset_mask_bt is None or torch.equal(torch.cat(masks), joined.reset_mask_bt)
    assert [part.n_targets for part, _ in parts] == [joined.n_targets // n_ranks] * n_ranks
    assert sum(part.n_bytes for part, _ in parts) == joined.n_bytes
    assert {(part.starts, cursor) for part, cursor in parts} == {(joined.starts, after)}


def test_a_cursor_goes_on_with_another_number_of_processes(corpus):
    whole = stream(corpus, batch=12)
    _, cursor = take(whole.share(1, 2), 5)
    first, _ = whole.share(0, 3).next(cursor)
    assert torch.equal(first.tokens_bt, take(whole, 6)[0][5].tokens_bt[:4])
    assert whole.share(2, 4).epoch(cursor) == whole.epoch(cursor)


def test_a_batch_that_processes_cannot_share_is_refused(corpus):
    with pytest.raises(
        ConflictingKeys, match="data.batch_size is 12 rows.* 5 processes .*Set data.batch_size to 15, or"
    ):
        stream(corpus, batch=12).share(0, 5)
