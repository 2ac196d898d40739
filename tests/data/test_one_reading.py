"""A text is read once, in pieces that fit into memory, and the corpus is what two readings of whole files gave."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.data import files, reading
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.errors import FileChanged

BYTES = TokenizerConfig()
ENDED = TokenizerConfig(special_tokens=("<end>",), eos_token="<end>")
BPE = TokenizerConfig(kind="bpe", vocab_size=300)

TEXT = st.lists(st.sampled_from(["ä🌱", "word ", "\n", "\r\n", "x=1\n", "\r", "y"]), max_size=60).map("".join)


def fingerprints(place: Path, source: str, **more: object) -> list[str]:
    """Of the corpora by each way to cut it into tokens, from new stores."""
    found = []
    for number, tokenizer in enumerate((BYTES, ENDED, BPE)):
        root = place / f"store-{len(list(place.glob('store-*')))}-{number}"
        found.append(prepare(DataConfig(source=source, root=root, **more), tokenizer).fingerprint)
    return found


@settings(max_examples=12, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=6), copied=st.booleans(), piece=st.integers(5, 40))
def test_pieces_of_files_give_the_corpus_of_whole_files(texts, copied, piece):
    """Also where they are cut into splits, and where copies with other line ends lie in them."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        place = Path(folder)
        (place / "text").mkdir()
        texts = ["first\n" * 9, *texts, *([texts[0].replace("\r\n", "\n")] if copied else [])]
        for number, text in enumerate(texts):
            (place / "text" / f"{number}.txt").write_bytes(text.encode())
        whole = fingerprints(place, str(place / "text"), validation=0.2)
        patch.setattr(files, "PIECE_BYTES", piece)
        patch.setattr(reading.Guess, "is_right", lambda *_: False)
        again = fingerprints(place, str(place / "text"), validation=0.2)
        assert again == whole
        patch.undo()
        patch.setattr(files, "PIECE_BYTES", piece)
        assert fingerprints(place, str(place / "text"), validation=0.2) == whole


def test_pieces_end_between_characters(tmp_path, monkeypatch):
    """No character and no line end is torn, and joined they are the file."""
    content = "aä\r\n🌱\r\n".encode() * 50 + b"\xff\x80\x80\x80\x80\x80" * 10
    (tmp_path / "a.txt").write_bytes(content)
    for size_bytes in range(5, 30):
        monkeypatch.setattr(files, "PIECE_BYTES", size_bytes)
        found = list(files.pieces(tmp_path / "a.txt"))
        assert b"".join(text for text, _ in found) == content
        assert [goes_on for _, goes_on in found] == [True] * (len(found) - 1) + [False]
        assert not any(one.endswith(b"\r") and two.startswith(b"\n") for (one, _), (two, _) in pairwise(found))
        for text, _ in itertools.takewhile(lambda each: b"\xff" not in each[0], found):
            text.decode()


def test_each_file_is_opened_once(tmp_path, monkeypatch):
    """Where nothing is learned from the text: by documents, in one that is cut, and in several joined."""
    opened, n_of = files.opened, Counter[str]()

    def counted(path):
        n_of[path.name] += 1
        return opened(path)

    monkeypatch.setattr(files, "opened", counted)
    for number in range(40):
        folder = tmp_path / ("one" if number == 0 else "many")
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(f"document {number}\n" * 20)
    one, many = (str(tmp_path / name) for name in ("one", "many"))
    for source, n_files in ((one, 1), (many, 39), (f"{one}+{many}", 40)):
        n_of.clear()
        prepare(DataConfig(source=source, root=tmp_path / f"store-{n_files}"), BYTES)
        assert {name: n for name, n in n_of.items() if name.endswith(".txt")}.values() and len(n_of) >= n_files
        assert {n for name, n in n_of.items() if name.endswith(".txt")} == {1}


def test_copies_on_the_other_side_cost_no_second_reading(tmp_path, monkeypatch):
    """A copy goes where the first one went, which is known when it comes."""
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number:02}.txt").write_text(f"document {number % 30}\n" * 9)
    opened, n_opened = files.opened, Counter[str]()

    def counted(path):
        n_opened[path.name] += 1
        return opened(path)

    monkeypatch.setattr(files, "opened", counted)
    corpus = prepare(DataConfig(source=str(tmp_path / "text"), root=tmp_path / "store", validation=0.3), BYTES)
    assert corpus.manifest["split"]["group_key"] == "content" and corpus.manifest["quality"]["duplicates"] == 30
    assert {n for name, n in n_opened.items() if name.endswith(".txt")} == {1}


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 64)
    path = tmp_path / "a.txt"
    path.write_text("text\n" * 100)
    found = files.pieces(path)
    next(found)
    path.write_text("other\n" * 100)
    with pytest.raises(FileChanged, match=r"a.txt changed while it was read: .*Prepare the text again"):
        list(found)


def test_the_corpus_of_a_known_text_is_the_one_of_old(tmp_path):
    """What was prepared by earlier releases is found again: same key, same fingerprint, from files and from records."""
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number:02}.txt").write_bytes(f"document {number % 20}\r\nä🌱\n".encode() * number)
    lines = [json.dumps({"text": f"record {number % 50}"}) for number in range(60)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    found = {}
    for name in ("text", "records.jsonl", "text/29.txt"):
        corpus = prepare(DataConfig(source=str(tmp_path / name), root=tmp_path / "store"), BYTES)
        found[name] = (corpus.path.name, corpus.fingerprint[:16])
    assert found == {
        "text": ("14752d233b3cbe7b7c3d941cc1ae85df", "959601283fb7e824"),
        "records.jsonl": ("76dc4e8c0e4659a9ef0b5d48e5c7208f", "f10c34a2eba024b0"),
        "text/29.txt": ("881c0c2a9623f4a19a9f006ca04124ff", "8892bdb6424de6e3"),
    }


PEAK = """
import sys
from pathlib import Path
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.device.allocator import peak_process_bytes
prepare(DataConfig(source=sys.argv[1], root=Path(sys.argv[2])), TokenizerConfig(kind=sys.argv[3], vocab_size=256))
print(peak_process_bytes() // 1000)
"""


@pytest.mark.slow
def test_the_memory_does_not_grow_with_the_size_of_a_file(tmp_path):
    """One file of 200 MB takes what one of 40 MB does, and less than itself."""
    peaks_kb = []
    for n_mb in (1, 40, 200):
        path = tmp_path / f"{n_mb}.txt"
        with open(path, "wb") as file:
            for number in range(n_mb):
                file.write((b"line %d of a long text\n" % number) * 45_455)
        words = [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"store-{n_mb}"), "byte"]
        peaks_kb.append(int(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout))
        path.unlink()
    # Of 160 MB more: what may wait for its hash, 32 MiB, and a few pieces of 16; beside other programs they do wait.
    least, small, large = peaks_kb
    assert large - small < 80_000
    assert large - least < 200_000
