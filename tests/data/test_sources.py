"""Every document is found, in the same order, and what cannot be read is named."""

import os
import subprocess
import sys

import pytest

from meristem.data.config import DataConfig
from meristem.data.sources import documents, find, resolve
from meristem.errors import DataError


def plant(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"text of {name}\n".encode())


def read(source, **settings):
    return {document.id: document.text for document in documents(DataConfig(source=str(source), **settings))}


def test_a_tree_is_walked_whole_and_sorted(tmp_path):
    """TR-4."""
    names = ["b.txt", "a/z.txt", "a/b/c.md", "a.txt", "ä/ü.txt"]
    plant(tmp_path, names)
    (tmp_path / "empty" / "er").mkdir(parents=True)
    found = find(tmp_path, (), ())
    independent = subprocess.run(["find", ".", "-type", "f"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(found) == sorted(line.removeprefix("./") for line in independent.stdout.splitlines())
    assert found == sorted(names)
    assert list(read(tmp_path).values()) == [f"text of {name}\n".encode() for name in sorted(names)]


@pytest.mark.parametrize(
    "include, exclude, expected",
    [
        ((), (), ["a.md", "d/b.txt", "d/c.py", "e/b.txt"]),
        (("*.txt",), (), ["d/b.txt", "e/b.txt"]),
        (("d/*",), (), ["d/b.txt", "d/c.py"]),
        ((), ("d",), ["a.md", "e/b.txt"]),
        ((), ("*.txt", "a*"), ["d/c.py"]),
        (("*.txt",), ("e/*",), ["d/b.txt"]),
        (("*", ".*"), (), [".git/x.txt", ".hidden", "a.md", "d/.y.txt", "d/b.txt", "d/c.py", "e/b.txt"]),
        ((".git/*",), (), [".git/x.txt"]),
    ],
)
def test_globs_say_what_is_used(tmp_path, include, exclude, expected):
    plant(tmp_path, ["a.md", "d/b.txt", "d/c.py", "e/b.txt", ".hidden", ".git/x.txt", "d/.y.txt"])
    assert find(tmp_path, include, exclude) == expected


def test_a_link_to_elsewhere_is_followed(tmp_path):
    plant(tmp_path, ["tree/a.txt", "other/b.txt"])
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "other")
    assert find(tmp_path / "tree", (), ()) == ["a.txt", "link/b.txt"]


def test_a_link_that_leads_back_is_found(tmp_path):
    """TR-4."""
    plant(tmp_path, ["a/b/c.txt"])
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match=r"a/b/loop leads back to a directory above it.*'loop' to data.exclude"):
        find(tmp_path, (), ())
    assert find(tmp_path, (), ("loop",)) == ["a/b/c.txt"]


def test_a_broken_link_is_named(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot open .*gone.txt: No such file") as caught:
        find(tmp_path, (), ())
    assert caught.value.fields["errno"] == 2


def test_a_pipe_among_the_files_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe is no regular file. Add 'pipe' to data.exclude"):
        find(tmp_path, (), ())


@pytest.mark.parametrize("names", [[], [".hidden"], ["a.bin"]])
def test_a_directory_without_a_usable_file_is_refused(tmp_path, names):
    plant(tmp_path, names)
    with pytest.raises(DataError, match=r"holds no usable file: none .* matches \*\.txt"):
        read(tmp_path, include=("*.txt",))


def test_a_file_name_of_any_bytes_has_an_id(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_bytes(b"odd")
    assert read(tmp_path) == {"\\xff.txt": b"odd"}


def test_a_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x00\xffany\r\nbytes")
    assert read(tmp_path / "a.txt") == {"a.txt": b"\x00\xffany\r\nbytes"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot open .*/no.txt: No such file or directory \(errno 2\)"):
        read(tmp_path / "no.txt")


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(DataError, match="'shakespear' is neither a file.*Did you mean shakespeare"):
        read("shakespear")


def test_a_misspelt_file_gets_the_nearest_of_those_that_are_there(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("A text.")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="'bok.txt' is neither a file.*Did you mean book.txt"):
        read("bok.txt")


def test_the_standard_library_is_there_without_its_tests():
    texts = read("stdlib")
    assert "json/decoder.py" in texts
    assert len(texts) > 300
    assert sum(map(len, texts.values())) > 5_000_000
    assert not [name for name in texts if "test" in name.split("/")[:-1] or "site-packages" in name]


def test_the_manual_is_there():
    texts = read("stdlib-docs")
    assert b"assert" in texts["assert"]
    assert sum(map(len, texts.values())) > 300_000


def test_the_sources_of_a_package_are_found_without_importing_it():
    script = (
        "import sys; from meristem.data.sources import documents; from meristem.data.config import DataConfig; "
        "ids = [d.id for d in documents(DataConfig(source='installed:typer'))]; "
        "assert 'main.py' in ids and 'typer' not in sys.modules and 'torch' not in sys.modules, ids"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["no_such_package", "sys", "a.b", "../x", "__main__"])
def test_a_package_without_sources_is_refused(name):
    with pytest.raises(DataError, match="no package|not the name of a package"):
        resolve(DataConfig(source=f"installed:{name}"))


def test_texts_are_joined_by_a_plus(tmp_path):
    """Each document with its own name; a file of that very name comes first."""
    for name in ("one", "two", "one+two"):
        (tmp_path / f"{name}.txt").write_text(f"the text of {name}")
    one, two = str(tmp_path / "one.txt"), str(tmp_path / "two.txt")
    joined = resolve(DataConfig(source=f"{one}+{two}"))
    assert [(each.id, each.text) for each in joined.read()] == [
        ("one.txt", b"the text of one"),
        ("two.txt", b"the text of two"),
    ]
    assert [path.name for path in joined.paths()] == ["one.txt", "two.txt"]
    (single,) = resolve(DataConfig(source=str(tmp_path / "one+two.txt"))).read()
    assert single.text == b"the text of one+two"
    prose, licence = resolve(DataConfig(source="stdlib-docs")), resolve(DataConfig(source="stdlib-docs+stdlib")).licence
    assert licence == "PSF-2.0" == prose.licence and joined.licence is None


def test_joined_texts_stand_side_by_side(tmp_path):
    """Wherever one stops reading, each text is read as far as the others, to a document of each."""
    for name, sizes in (("long", [100] * 50), ("short", [30] * 7)):
        plant(tmp_path / name, [f"{number:02}" for number in range(len(sizes))])
        for number, size in enumerate(sizes):
            (tmp_path / name / f"{number:02}").write_bytes(name[0].encode() * size)
    found = list(resolve(DataConfig(source=f"{tmp_path / 'long'}+{tmp_path / 'short'}")).read())
    read = {"l": 0, "s": 0}
    for document in found:
        read[document.text[:1].decode()] += len(document.text)
        assert abs(read["l"] / 5000 - read["s"] / 210) <= 100 / 5000 + 30 / 210
    assert read == {"l": 5000, "s": 210}


@pytest.mark.parametrize(("name", "part"), [("stdlib+nonsense", "nonsense"), ("stdlib+", r"stdlib\+"), ("+", r"\+")])
def test_a_part_that_is_no_text_is_named(name, part):
    with pytest.raises(DataError, match=f"data.source '{part}' is neither"):
        resolve(DataConfig(source=name))


def test_a_hundred_documents_come_in_the_same_order_twice(tmp_path):
    plant(tmp_path, [f"{number * 37 % 100:02}.txt" for number in range(100)])
    assert list(read(tmp_path)) == list(read(tmp_path)) == [f"{number:02}.txt" for number in range(100)]
