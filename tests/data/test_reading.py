"""Text is read in linear work, once, and what it holds twice is held out or trained on, not both."""

import os
import sys
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.data import files, manifest, split
from meristem.data import tokenizer as tokenizer_room
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.data.sources import documents
from meristem.data.tokenizer import train_tokenizer
from meristem.errors import DataError, ManifestMismatch

BPE = TokenizerConfig(kind="bpe", vocab_size=300)
EACH = pytest.mark.parametrize("tokenizer", [TokenizerConfig(), BPE], ids=["byte", "bpe"])
OPENED: list[str] = []
sys.addaudithook(lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None)


def settings(tmp_path, source, **more):
    return DataConfig(**{"source": str(source), "root": tmp_path / "cache", "validation": 0.25, **more})


def written(root: Path, texts: dict[str, bytes]) -> Path:
    root.mkdir(exist_ok=True)
    for name, text in texts.items():
        (root / name).write_bytes(text)
    return root


def numbered(n: int) -> dict[str, bytes]:
    return {f"{number:05}.txt": b"text number %d\n" % number * 3 for number in range(n)}


class Counted(bytes):
    """Bytes that count how often their length is asked for."""

    n_asked = 0

    def __len__(self) -> int:
        Counted.n_asked += 1
        return super().__len__()


@EACH
def test_gr9_the_work_is_linear_in_the_number_of_documents(tmp_path, monkeypatch, tokenizer):
    """Four times the documents are opened, and looked at, four times as often."""
    read, work = files.read, []
    monkeypatch.setattr(files, "read", lambda path: Counted(read(path)))
    for n in (200, 800):
        root = written(tmp_path / str(n), numbered(n))
        Counted.n_asked, n_before = 0, len(OPENED)
        prepare(settings(tmp_path, root), tokenizer)
        n_opened = sum(path.startswith(str(root)) for path in OPENED[n_before:])
        work.append((Counted.n_asked, n_opened))
    (few_asked, few_opened), (many_asked, many_opened) = work
    assert many_opened == 4 * few_opened
    assert many_asked <= 4.2 * few_asked


@EACH
@pytest.mark.parametrize("is_file", [False, True], ids=["directory", "file"])
def test_gr9_a_second_call_reads_sizes_and_times_only(tmp_path, monkeypatch, tokenizer, is_file):
    root = written(tmp_path / "text", numbered(40) | {"a.txt": b"a longer one\n" * 99})
    source = root / "a.txt" if is_file else root
    first = prepare(settings(tmp_path, source), tokenizer)
    monkeypatch.setattr(manifest, "sha256_file", lambda path: pytest.fail(f"{path} was read"))
    n_before, events = len(OPENED), []
    again = prepare(settings(tmp_path, source), tokenizer, events.append)
    assert [path for path in OPENED[n_before:] if path.startswith(str(root))] == []
    assert (again.fingerprint, again.path, [event.name for event in events]) == (
        first.fingerprint,
        first.path,
        ["data.reused"],
    )
    assert again.text("train") == first.text("train")


@pytest.mark.parametrize("change", ["longer", "same size", "time", "added", "removed", "renamed"])
def test_gr9_a_text_that_changed_is_read_again(tmp_path, change):
    root = written(tmp_path / "text", numbered(40))
    first = prepare(settings(tmp_path, root), TokenizerConfig())
    path = root / "00013.txt"
    {
        "longer": lambda: path.write_bytes(b"other text\n" * 9),
        "same size": lambda: path.write_bytes(path.read_bytes().upper()),
        "time": lambda: os.utime(path, ns=(1, 1)),
        "added": lambda: (root / "more.txt").write_bytes(b"more\n"),
        "removed": path.unlink,
        "renamed": lambda: path.rename(root / "00013.md"),
    }[change]()
    again = prepare(settings(tmp_path, root), TokenizerConfig())
    assert (again.fingerprint == first.fingerprint) == (change == "time")
    text = b"".join(sorted(document.text for document in documents(settings(tmp_path, root))))
    assert len(again.text("train") + again.text("val")) == len(text)


@pytest.mark.parametrize("change", ["altered", "cut", "gone"])
def test_gr9_tokens_that_changed_are_verified_again(tmp_path, change):
    root = written(tmp_path / "text", numbered(40))
    first = prepare(settings(tmp_path, root), TokenizerConfig())
    (tokens,) = first.path.glob("tokens.train.*")
    content = tokens.read_bytes()
    {
        "altered": lambda: tokens.write_bytes(b"x" + content[1:]),
        "cut": lambda: tokens.write_bytes(content[1:]),
        "gone": tokens.unlink,
    }[change]()
    with pytest.raises(DataError if change == "gone" else ManifestMismatch):
        prepare(settings(tmp_path, root), TokenizerConfig())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"text": 1}', b'{"files": 3}'])
def test_gr9_a_record_that_cannot_be_read_costs_a_reading(tmp_path, content):
    root = written(tmp_path / "text", numbered(40))
    first = prepare(settings(tmp_path, root), TokenizerConfig())
    (record,) = (tmp_path / "cache" / "corpora").glob(".*.seen")
    record.write_bytes(content)
    assert prepare(settings(tmp_path, root), TokenizerConfig()).fingerprint == first.fingerprint
    assert orjson.loads(record.read_bytes())["corpus"] == first.path.name


def copied(n: int) -> dict[str, bytes]:
    """Texts with Unix line ends, and a copy of each with others under a name that hashes elsewhere."""
    texts = numbered(n)
    return texts | {f"copy of {name}": text.replace(b"\n", b"\r\n") for name, text in texts.items()}


@EACH
def test_gr6_copies_stay_on_one_side(tmp_path, tokenizer):
    """Counted, told, and held out together or not at all."""
    root, events = written(tmp_path / "text", copied(100)), []
    corpus = prepare(settings(tmp_path, root, validation=0.2), tokenizer, events.append)
    assert corpus.manifest["quality"]["duplicates"] == events[0].payload["n_copies"] == 100
    assert (corpus.manifest["split"]["group_key"], corpus.manifest["split"]["method"]) == ("content", "document")
    train, held_out = (set(corpus.text(name).replace(b"\r", b"").splitlines()) for name in ("train", "val"))
    assert not train & held_out and len(train | held_out) == 100
    assert 8 <= len(held_out) <= 32
    again = []
    prepare(settings(tmp_path, root, validation=0.2), tokenizer, again.append)
    assert (again[0].name, again[0].payload["n_copies"]) == ("data.reused", 100)


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
def test_gr6_where_the_text_is_cut_so_are_its_copies(tmp_path, ends):
    """One text under two names is one text: what is held out of it is held out of both."""
    text = b"".join(b"line %d\n" % number for number in range(200))
    root = written(tmp_path / "text", {"a.txt": text, "b.txt": text.replace(b"\n", ends)})
    corpus = prepare(settings(tmp_path, root, validation=0.1), TokenizerConfig())
    assert (corpus.manifest["split"]["method"], corpus.manifest["quality"]["duplicates"]) == ("cut", 1)
    train, held_out = (split.normal(corpus.text(name)) for name in ("train", "val"))
    assert train == train[: len(train) // 2] * 2 and held_out == held_out[: len(held_out) // 2] * 2
    assert train[: len(train) // 2] + held_out[: len(held_out) // 2] == text


@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", b"bc"]), max_size=30))
def test_gr6_a_place_in_a_copy_is_found(parts):
    """The text up to the place has as many bytes as were asked for, once its line ends are one."""
    text = b"".join(parts)
    for n_normal in range(len(split.normal(text)) + 1):
        place = split.place_in(text, n_normal)
        assert split.normal(text[:place]) == split.normal(text)[:n_normal]


def test_gr6_a_text_without_copies_is_divided_as_ever(tmp_path):
    """The corpus of e97c871, to its fingerprint, by which a run that it began finds its text again."""
    corpus = prepare(settings(tmp_path, written(tmp_path / "text", numbered(40))), TokenizerConfig())
    assert corpus.fingerprint == "48dc3a578d9f5ee71a5501dfe765bad42580db03a6722fe7b759ac7aa94ccd88"
    assert corpus.path.name == "7c9e246636a5169e4e2983b2aa50fce4"


def test_gr6_copies_that_lay_together_leave_the_fingerprint(tmp_path):
    """Only the count is another, and follows from the text."""
    texts = numbered(40)
    first = next(name for name in texts if not split.assign(name, split.ratios_for(0.25)))
    other = next(name for name in (f"{n}.md" for n in range(99)) if not split.assign(name, split.ratios_for(0.25)))
    corpus = prepare(settings(tmp_path, written(tmp_path / "text", texts | {other: texts[first]})), TokenizerConfig())
    assert (corpus.manifest["quality"]["duplicates"], corpus.manifest["split"]["group_key"]) == (1, "id")
    assert corpus.fingerprint == "47bcad3db50960fc5eac0994aac121def4cb29c84b3d9f54f543a2b54066e920"


def test_gr6_a_run_that_began_with_copies_on_both_sides_finds_its_text(tmp_path):
    """The fingerprint is what e97c871 gave; without a run that wants it, the text is divided by content."""
    root, was = (
        written(tmp_path / "text", copied(100)),
        "c4b7c3528be5551bb15173119a261bc9ad2870abb8c73626ec4f2e00d214f33c",
    )
    usual = prepare(settings(tmp_path, root), TokenizerConfig())
    assert prepare(settings(tmp_path, root), TokenizerConfig(), wanted=was).fingerprint == was
    assert prepare(settings(tmp_path, root), TokenizerConfig()).fingerprint == usual.fingerprint != was
    assert prepare(settings(tmp_path, root), TokenizerConfig(), wanted="another").fingerprint == usual.fingerprint


def test_binary_files_are_told(tmp_path):
    """How many, and which first; on every call, and as a line that a user sees."""
    binary = {"p.png": b"\x89PNG\r\n\x1a\n\0\0", "q.bin": b"text" * 50 + b"\0"}
    root = written(tmp_path / "text", numbered(20) | binary)
    for name in ("data.prepared", "data.reused"):
        events = []
        prepare(settings(tmp_path, root), TokenizerConfig(), events.append)
        assert [(event.name, event.severity) for event in events] == [("data.binary", "warning"), (name, "info")]
        assert (events[0].payload["n_files"], events[0].payload["first"]) == (2, "p.png")
        assert "data.exclude" in events[0].payload["advice"]
    events = []
    prepare(settings(tmp_path, root, exclude=("*.png", "*.bin")), TokenizerConfig(), events.append)
    assert [event.name for event in events] == ["data.prepared"]


def test_gr3_a_given_tokenizer_reads_bytes_that_are_no_text(tmp_path):
    """Byte pairs are learned from characters, and used on any bytes."""
    learned = train_tokenizer(BPE, [b"text number \n" * 9])
    root = written(tmp_path / "text", numbered(20) | {"latin.txt": "wächst\n".encode("latin-1") * 9})
    corpus = prepare(settings(tmp_path, root), learned)
    assert "wächst".encode("latin-1") in corpus.text("train") + corpus.text("val")


def test_gr7_half_of_the_work_is_done_when_learning_begins(tmp_path, monkeypatch):
    """A bar moves while byte pairs are learned from, and stands in the middle while they are counted."""
    seen, learn = [], tokenizer_room.learn

    def learned(kind, vocab_size, texts):
        content = learn(kind, vocab_size, texts)
        assert seen[-1] == (total // 2, total)
        return content

    monkeypatch.setattr(tokenizer_room, "learn", learned)
    texts = numbered(40)
    total = sum(map(len, texts.values()))
    root = written(tmp_path / "text", texts)
    prepare(settings(tmp_path, root), BPE, progress=lambda done, whole: seen.append((done, whole)))
    assert seen == sorted(seen) and seen[-1] == (total, total)
