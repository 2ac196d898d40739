"""A corpus is prepared once per text and settings, whole or not at all, and holds exactly the text."""

import os
import signal
import subprocess
import sys

import numpy as np
import orjson
import pytest

from meristem.data import prepare as preparing
from meristem.data import sources
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.data.tokenizer import byte_tokenizer
from meristem.errors import DataError, FileChanged, SplitError

BPE = TokenizerConfig(kind="bpe", vocab_size=300)
EACH = pytest.mark.parametrize("tokenizer", [TokenizerConfig(), BPE], ids=["byte", "bpe"])


@pytest.fixture
def text(tmp_path):
    """Forty documents of unequal length, one of them empty."""
    root = tmp_path / "text"
    root.mkdir()
    for number in range(40):
        (root / f"{number:02}.txt").write_text(f"Document {number} says wächst 🌱.\n" * (number % 7), "utf-8")
    return root


def settings(tmp_path, source, **more):
    return DataConfig(**{"source": str(source), "root": tmp_path / "cache", "validation": 0.25, **more})


def stored(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "corpora").iterdir() if not path.name.startswith("."))


@EACH
def test_the_splits_together_are_the_text(tmp_path, text, tokenizer):
    corpus = prepare(settings(tmp_path, text), tokenizer)
    whole = {path.name: path.read_bytes() for path in text.iterdir() if path.stat().st_size}
    found = []
    for split in ("train", "val"):
        edges = corpus.documents(split)
        tokens = corpus.tokens(split)
        found += [
            corpus.tokenizer.decode_bytes(tokens[start:stop].tolist())
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
        ]
        assert (edges[0], edges[-1]) == (0, len(tokens))
        assert corpus.text(split) == b"".join(found[-(len(edges) - 1) :])
        assert len(corpus.text(split)) == corpus.size_bytes(split)
        assert corpus.tokenizer.byte_lengths[tokens[:]].sum() == corpus.size_bytes(split)
    assert sorted(found) == sorted(whole.values())


def test_the_manifest_says_what_it_is(tmp_path, text):
    corpus = prepare(settings(tmp_path, text), BPE)
    manifest = orjson.loads((corpus.path / "manifest.json").read_bytes())
    assert manifest["schema"] == "meristem.dataset/1"
    assert len(manifest["sources"]) == 40
    assert {entry["path"] for entry in manifest["files"]} == {path.name for path in corpus.path.iterdir()} - {
        "manifest.json"
    }
    assert manifest["quality"]["empty"] == 6
    assert manifest["split"]["method"] == "document"
    counts = manifest["counts"]
    assert counts["train"]["records"] + counts["val"]["records"] == 34
    assert manifest["max_token_id"] == max(int(corpus.tokens(split)[:].max()) for split in counts)
    assert str(tmp_path) not in (corpus.path / "manifest.json").read_text()


@pytest.mark.parametrize("vocab_size, dtype", [(256, "uint8"), (300, "uint16")])
def test_ids_take_the_smallest_type(tmp_path, text, vocab_size, dtype):
    corpus = prepare(settings(tmp_path, text), TokenizerConfig(kind="bpe", vocab_size=vocab_size))
    assert corpus.tokens("train").dtype == dtype


@EACH
def test_the_same_text_is_found_again_and_is_the_same_elsewhere(tmp_path, text, tokenizer):
    events = []
    first = prepare(settings(tmp_path, text), tokenizer, events.append)
    again = prepare(settings(tmp_path, text), tokenizer, events.append)
    elsewhere = prepare(settings(tmp_path, text, root=tmp_path / "other"), tokenizer, events.append)
    assert [event.name for event in events] == ["data.prepared", "data.reused", "data.prepared"]
    assert first.fingerprint == again.fingerprint == elsewhere.fingerprint
    assert len(stored(tmp_path)) == 1


def test_each_setting_that_shapes_it_makes_another_corpus(tmp_path, text):
    settings_and_tokenizers = [
        ({}, TokenizerConfig()),
        ({}, BPE),
        ({}, TokenizerConfig(kind="bpe", vocab_size=299)),
        ({"validation": 0.2}, TokenizerConfig()),
        ({"include": ("1*.txt",)}, TokenizerConfig()),
        ({"exclude": ("1*.txt",)}, TokenizerConfig()),
    ]
    made = {prepare(settings(tmp_path, text, **more), kind).fingerprint for more, kind in settings_and_tokenizers}
    (text / "05.txt").write_bytes(b"\n" + (text / "05.txt").read_bytes()[1:])
    made.add(prepare(settings(tmp_path, text), TokenizerConfig()).fingerprint)
    assert len(made) == len(stored(tmp_path)) == len(settings_and_tokenizers) + 1


def test_what_only_orders_batches_does_not(tmp_path, text):
    prepare(settings(tmp_path, text), TokenizerConfig())
    prepare(settings(tmp_path, text, seq_len=7, batch_size=3, order="random"), TokenizerConfig(vocab_size=999))
    assert len(stored(tmp_path)) == 1


def test_byte_pairs_are_learned_from_the_training_part_only(tmp_path, text):
    before = prepare(settings(tmp_path, text), BPE)
    assert b"Document 9 " in before.text("val")
    (text / "09.txt").write_text("entirely different words in the part held out " * 9, "utf-8")
    after = prepare(settings(tmp_path, text), BPE)
    assert after.fingerprint != before.fingerprint
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint


def test_a_given_tokenizer_is_used_as_it_is(tmp_path, text):
    learned = prepare(settings(tmp_path, text), BPE).tokenizer
    other = tmp_path / "other.txt"
    other.write_text("Another text, with other pairs. " * 40)
    corpus = prepare(settings(tmp_path, other), learned)
    assert corpus.tokenizer.fingerprint == learned.fingerprint
    assert corpus.fingerprint != prepare(settings(tmp_path, other), byte_tokenizer()).fingerprint


@pytest.mark.parametrize("n_files", [1, 2])
def test_few_documents_are_cut(tmp_path, n_files):
    """Training comes first, what is held out follows, nothing is in both, and no character is torn."""
    root = tmp_path / "few"
    root.mkdir()
    for number in range(n_files):
        (root / f"{number}.txt").write_text(("ä🌱b", "b🌱ä")[number] * 143, "utf-8")
    corpus = prepare(settings(tmp_path, root, validation=0.1), BPE)
    assert corpus.manifest["split"]["method"] == "cut"
    train, held = corpus.text("train"), corpus.text("val")
    assert train + held == b"".join(path.read_bytes() for path in sorted(root.iterdir()))
    assert abs(len(train) - 0.9 * 1001 * n_files) <= 4
    train.decode(), held.decode()


def test_nothing_held_out_is_a_choice(tmp_path, text):
    corpus = prepare(settings(tmp_path, text, validation=0.0), TokenizerConfig())
    assert corpus.splits == ("train",)
    with pytest.raises(SplitError, match=r"has no split 'val'; it has train. .*data.validation above 0"):
        corpus.tokens("val")


def test_an_empty_split_is_refused_and_nothing_stored(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abcd")
    with pytest.raises(SplitError, match="the split 'val' of 'a.txt' would be empty: 4 bytes are too few"):
        prepare(settings(tmp_path, tmp_path / "a.txt", validation=0.1), TokenizerConfig())
    assert stored(tmp_path) == []


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="a.txt' holds no text: every file is empty"):
        prepare(settings(tmp_path, tmp_path / "a.txt"), TokenizerConfig())


def test_bytes_that_are_no_text_are_named(tmp_path, text):
    (text / "odd.bin").write_bytes(b"abc\xffdef")
    with pytest.raises(DataError, match=r"odd.bin is not UTF-8: invalid start byte at byte 3.*data.exclude"):
        prepare(settings(tmp_path, text), BPE)
    prepare(settings(tmp_path, text, exclude=("*.bin",)), BPE)
    prepare(settings(tmp_path, text), TokenizerConfig())


def test_progress_ends_at_the_whole(tmp_path, text, monkeypatch):
    monkeypatch.setattr(preparing, "_BATCH_BYTES", 500)
    seen = []
    prepare(settings(tmp_path, text), BPE, progress=lambda done, total: seen.append((done, total)))
    total = sum(path.stat().st_size for path in text.iterdir())
    assert len(seen) > 4 and seen == sorted(seen) and seen[-1] == (total, total)


@pytest.mark.parametrize("change", ["altered", "added", "removed"])
def test_a_text_that_changes_while_it_is_prepared_is_refused(tmp_path, text, monkeypatch, change):
    """The first reading lists the text, another learns from it; between them a file changes."""
    wrapped, n_readings = sources._read_tree, 0

    def read_tree(*arguments):
        nonlocal n_readings
        n_readings += 1
        if n_readings == 2:
            {
                "altered": lambda: (text / "13.txt").write_bytes(b"other"),
                "added": lambda: (text / "99.txt").write_bytes(b"more"),
                "removed": lambda: (text / "13.txt").unlink(),
            }[change]()
        return wrapped(*arguments)

    monkeypatch.setattr(sources, "_read_tree", read_tree)
    with pytest.raises(FileChanged, match="the text of 'text' changed while it was prepared: (13|99).txt"):
        prepare(settings(tmp_path, text), BPE)
    assert stored(tmp_path) == []


def test_a_builder_that_fails_leaves_nothing(tmp_path, text):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings(tmp_path, text), TokenizerConfig(), progress=stop)
    assert [path for path in (tmp_path / "cache" / "corpora").iterdir() if path.suffix != ".lock"] == []
    prepare(settings(tmp_path, text), TokenizerConfig())


BUILDER = """
import sys
from pathlib import Path
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
def slowly(done, total):
    print("building", flush=True)
    sys.stdin.readline()
corpus = prepare(DataConfig(source=sys.argv[1], root=Path(sys.argv[2])), TokenizerConfig(),
                 lambda event: print(event.name, flush=True), slowly)
print(corpus.fingerprint, flush=True)
"""


def builder(tmp_path, text):
    """It says what happens, a line each, and stands still while it builds until it gets a line or the end of input."""
    command = [sys.executable, "-c", BUILDER, str(text), str(tmp_path / "cache")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_builders_build_one_corpus(tmp_path, text):
    first = builder(tmp_path, text)
    assert first.stdout.readline() == "building\n"
    second = builder(tmp_path, text)
    assert second.stdout.readline() == "data.waiting\n"
    said = [child.communicate()[0].split() for child in (first, second)]
    (built, one), (found, two) = said[0][-2:], said[1]
    assert (built, found) == ("data.prepared", "data.reused")
    assert one == two
    assert len(stored(tmp_path)) == 1


def test_a_killed_builder_leaves_nothing_visible_and_the_next_builds(tmp_path, text):
    child = builder(tmp_path, text)
    assert child.stdout.readline() == "building\n"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert stored(tmp_path) == []
    prepare(settings(tmp_path, text, validation=0.1), TokenizerConfig())
    left = [path.name for path in (tmp_path / "cache" / "corpora").iterdir() if path.name.endswith(".partial")]
    assert left == []


def test_a_store_that_cannot_be_made_is_named(tmp_path, text):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot make .*corpora: .*data.root or \$MERISTEM_CACHE"):
        prepare(settings(tmp_path, text), TokenizerConfig())


def test_the_environment_names_the_store(tmp_path, text, monkeypatch):
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    prepare(settings(tmp_path, text, root=None), TokenizerConfig())
    assert len(stored(tmp_path)) == 1


def test_preparing_needs_no_torch(tmp_path, text):
    script = "import sys, meristem.data.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_prepared_corpus_cannot_be_written_to(tmp_path, text):
    tokens = prepare(settings(tmp_path, text), TokenizerConfig()).tokens("train")
    before = tokens[:].copy()
    tokens[:][0] += 1
    assert np.array_equal(tokens[:], before)
    assert not hasattr(tokens, "__setitem__")
