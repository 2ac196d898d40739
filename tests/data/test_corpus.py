"""A corpus is opened as it was written or not at all, and a change while it is read is seen."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys

import numpy as np
import orjson
import pytest

from meristem.data import files
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.corpus import open_corpus
from meristem.data.prepare import prepare
from meristem.errors import DataError, FileChanged, ManifestMismatch

NAMES = ["tokens.train.u16", "documents.train.u64", "tokens.val.u16", "documents.val.u64", "tokenizer.json"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    (root / "text.txt").write_text("The corpus is what it says it is. 🌱\n" * 50, "utf-8")
    data = DataConfig(source=str(root / "text.txt"), root=root / "cache", validation=0.2)
    return prepare(data, TokenizerConfig(kind="bpe", vocab_size=280)).path


@pytest.fixture
def path(prepared, tmp_path):
    """A copy to break."""
    return shutil.copytree(prepared, tmp_path / "corpus")


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_opening_gives_what_was_prepared(prepared):
    assert open_corpus(prepared).text("train").startswith(b"The corpus is what it says")


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_is_refused_by_name(path, name):
    """CX-8.5."""
    flip(path / name, -2)
    with pytest.raises(
        ManifestMismatch, match=f"{name} does not have the SHA-256 of its manifest.*prepare the text again"
    ):
        open_corpus(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_short_file_is_refused_even_unread(path, name):
    with open(path / name, "r+b") as file:
        file.truncate(os.path.getsize(path / name) - 1)
    with pytest.raises(ManifestMismatch, match=rf"{name} holds \d+ bytes, its manifest says \d+"):
        open_corpus(path, verify=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_refused_by_name(path, name):
    (path / name).unlink()
    with pytest.raises(DataError, match=rf"cannot open .*{name}: No such file") as caught:
        open_corpus(path)
    assert caught.value.fields["errno"] == 2


def test_a_directory_without_a_manifest_is_no_corpus(path):
    (path / "manifest.json").unlink()
    with pytest.raises(DataError, match=rf"^{path} is no prepared corpus: it holds no manifest.json"):
        open_corpus(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda manifest: manifest | {"name": "another"}, "was altered"),
        (lambda manifest: manifest | {"schema": "meristem.dataset/2"}, "has schema 'meristem.dataset/2', expected"),
        (lambda manifest: manifest | {"more": 1}, r"lacks or adds fields: \['more'\]"),
        (lambda manifest: [manifest], "has schema 'list'"),
    ],
)
def test_an_altered_manifest_is_refused(path, change, message):
    manifest = orjson.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(orjson.dumps(change(manifest)))
    with pytest.raises(ManifestMismatch, match=message):
        open_corpus(path)


def test_a_torn_manifest_is_refused(path):
    content = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(ManifestMismatch, match="manifest.json is not JSON"):
        open_corpus(path)


@pytest.mark.parametrize("change", ["cut", "replaced", "written", "removed"])
def test_a_change_while_it_is_read_is_seen(path, change):
    corpus = open_corpus(path)
    corpus.require_unchanged()
    file = path / "tokens.train.u16"
    content, status = file.read_bytes(), file.stat()
    if change == "cut":
        os.truncate(file, 100)
    elif change == "replaced":
        (path / "new").write_bytes(content)
        os.utime(path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(path / "new", file)
    elif change == "written":
        flip(file, 10)
    else:
        file.unlink()
    with pytest.raises(DataError, match=r"tokens.train.u16( changed while it was in use|: No such file)") as caught:
        corpus.require_unchanged()
    assert isinstance(caught.value, FileChanged) == (change != "removed")


def n_descriptors(root):
    """How many descriptors of this process are open on something below ``root``."""
    gc.collect()
    targets = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            targets.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(target.startswith(str(root)) for target in targets)


@pytest.fixture
def odd(tmp_path):
    """One path of each kind that holds no numbers."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "uneven").write_bytes(b"abc")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "locked").mkdir(mode=0o700)
    (tmp_path / "locked" / "file").write_bytes(b"abcd")
    return tmp_path


ODD = [
    ("missing", r"cannot open .*missing: No such file or directory \(errno 2\)"),
    ("directory", "directory is a directory; expected a regular file"),
    ("pipe", "pipe is a pipe; expected a regular file"),
    ("empty", "empty holds 0 bytes; expected a positive multiple of 2"),
    ("uneven", "uneven holds 3 bytes; expected a positive multiple of 2"),
]


@pytest.mark.parametrize("name, message", ODD)
def test_each_way_not_to_open_has_its_error_and_leaks_nothing(odd, name, message):
    """TR-3."""
    for _ in range(50):
        with pytest.raises(DataError, match=message):
            files.open_numbers(odd / name, "uint16")
    assert n_descriptors(odd) == 0


def test_a_file_that_may_not_be_read_is_named(odd):
    (odd / "locked").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # root may read everything: become nobody for the one call
            os.seteuid(65534)
        with pytest.raises(DataError, match=r"cannot open .*file: Permission denied \(errno 13\)"):
            files.read(odd / "locked" / "file")
    finally:
        os.seteuid(user)
        (odd / "locked").chmod(0o700)


def test_opening_many_times_leaves_no_descriptor(prepared):
    """TR-3."""
    for _ in range(2000):
        files.open_numbers(prepared / "tokens.train.u16", "uint16")
    for _ in range(50):
        open_corpus(prepared)
    assert n_descriptors(prepared) == 0
    held = open_corpus(prepared)
    assert n_descriptors(prepared) == len(held.numbers)


CUT_AND_MEND = """
import os, sys, threading
import numpy as np
from meristem.data.files import open_numbers
from meristem.errors import FileChanged

path, n_reads = sys.argv[1], 3000
content = open(path, "rb").read()
numbers, is_over = open_numbers(path, "uint16"), threading.Event()

def cut():
    while not is_over.is_set():
        os.truncate(path, 10)
        with open(path, "r+b") as file:
            file.write(content)

threading.Thread(target=cut).start()
starts, n_seen = np.arange(0, len(numbers) - 9, 9), 0
try:
    for _ in range(n_reads):
        try:
            numbers.rows(starts, 9)
        except FileChanged:
            n_seen += 1
finally:
    is_over.set()
print(n_seen)
"""


def test_tr9_a_file_cut_in_the_middle_of_a_read_kills_nobody(path):
    """However the cut falls between a look at the file and the read of it: FileChanged, never a SIGBUS."""
    done = subprocess.run(
        [sys.executable, "-c", CUT_AND_MEND, str(path / "tokens.train.u16")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_numbers_are_those_of_the_file(prepared):
    """Slices and rows, up to the end and beyond it, as an array of the whole file gives them."""
    file = prepared / "tokens.train.u16"
    numbers, whole = files.open_numbers(file, "uint16"), np.fromfile(file, "uint16")
    assert len(numbers) == len(whole) and numbers.dtype == whole.dtype
    for part in (slice(None), slice(3, 17), slice(-7, None), slice(len(whole) - 2, len(whole) + 5), slice(5, 2)):
        assert np.array_equal(numbers[part], whole[part])
    starts = np.array([0, 11, len(whole) - 3])
    padded = np.concatenate([whole, np.zeros(5, "uint16")])
    assert np.array_equal(numbers.rows(starts, 5), padded[starts[:, None] + np.arange(5)])
    with pytest.raises(ValueError, match="not every 2-th"):
        numbers[::2]
