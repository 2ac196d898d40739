"""Scans of files, archives and changes: everything within the bounds is read, and what is not is said."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from meristem.errors import RunError
from meristem.safety.scan import UNSCANNABLE, Scan, read_baseline, write_baseline
from meristem.safety.unpack import Limits
from safety.planted import lookalikes, secrets

TOKEN = secrets()["github-token/personal"]


def zipped(members: dict[str, bytes]) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return whole.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, content in members.items():
            head = tarfile.TarInfo(name)
            head.size = len(content)
            archive.addfile(head, io.BytesIO(content))
    return whole.getvalue()


def scanned(place: Path, **limits: int):
    report = Scan(limits=Limits(**limits)).paths([place])
    return report, [(finding.rule, finding.member, finding.line) for finding in report.findings]


def test_cx_9_1_secrets_among_lookalikes(tmp_path: Path) -> None:
    """CX-9.1: all that are planted, in files and in archives in archives, and none of the lookalikes."""
    planted, benign = list(secrets().items()), "\n".join(lookalikes()).encode()
    assert len(planted) >= 40
    for number, (form, text) in enumerate(planted):
        within = benign + b"\n" + text.encode() + b"\n" + benign
        name = f"{number}.txt"
        content = [
            within,
            zipped({"a/b": benign, name: within}),
            gzip.compress(tarred({"c": benign, name: within})),
            zipped({"inner.whl": tarred({"x": lzma.compress(within)})}),
            bz2.compress(within),
            tarred({"y": zipped({"z": zipped({name: within})})}),
        ][number % 6]
        (tmp_path / f"{number}-{form.replace('/', '-')}").write_bytes(content)
    report, _ = scanned(tmp_path)
    by_file = {Path(finding.path).name: finding.rule for finding in report.findings}
    assert by_file == {f"{n}-{form.replace('/', '-')}": form.partition("/")[0] for n, (form, _) in enumerate(planted)}
    assert report.n_findings == len(planted)


def test_cx_9_2_a_report_never_holds_the_secret(tmp_path: Path) -> None:
    """CX-9.2: neither do the report, its JSON, nor a baseline made of it."""
    for number, text in enumerate(secrets().values()):
        (tmp_path / f"{number}.txt").write_text(text)
    job = Scan()
    report = job.paths([tmp_path])
    write_baseline(tmp_path / "known.yaml", report, job.salt, None)
    written = repr(report) + json.dumps(report.as_json()) + (tmp_path / "known.yaml").read_text()
    for text in secrets().values():
        longest = max(text.replace("\n", " ").split(), key=len)
        assert longest[-12:] not in written


@pytest.mark.parametrize(
    "make, member",
    [
        (lambda text: zipped({"a": b"", "b/c": text}), "b/c"),
        (lambda text: tarred({"a": b"", "b/c": text}), "b/c"),
        (gzip.compress, ""),
        (bz2.compress, ""),
        (lzma.compress, ""),
        (lambda text: gzip.compress(tarred({"b": text})), "b"),
        (lambda text: gzip.compress(zipped({"b": text})), "b"),
        (lambda text: zipped({"b": gzip.compress(tarred({"c": text}))}), "b!c"),
    ],
)
def test_archives_are_known_by_their_bytes(tmp_path: Path, make, member: str) -> None:
    """Whatever the file is called; the way to the secret and its line are said."""
    place = tmp_path / "notes.txt"
    place.write_bytes(make(f"one\n{TOKEN}".encode()))
    assert scanned(place)[1] == [("github-token", member, 2)]


def test_deeper_archives_are_a_finding(tmp_path: Path) -> None:
    content = f"{TOKEN}".encode()
    for _ in range(3):
        content = zipped({"in": content})
    (tmp_path / "three").write_bytes(content)
    (tmp_path / "four").write_bytes(zipped({"in": content}))
    report, found = scanned(tmp_path)
    assert found == [(UNSCANNABLE, "in!in!in", 0), ("github-token", "in!in!in", 1)]
    assert report.findings[0].reason == "it is an archive in more than 3 others"


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("pack", [lambda text: zipped({"zeros": text}), gzip.compress, bz2.compress, lzma.compress])
def test_cx_9_1_a_zip_bomb_is_refused(tmp_path: Path, pack, n_layers: int) -> None:
    """CX-9.1: with a sentence, after a few mebibytes."""
    content = bytes(8 << 20)
    for _ in range(n_layers):
        content = pack(content)
    place = tmp_path / "bomb"
    place.write_bytes(content)
    started = time.process_time()
    report, found = scanned(place)
    assert time.process_time() - started < 2
    assert [rule for rule, _, _ in found] == [UNSCANNABLE]
    assert "more than 200 times its size, as a zip bomb does" in report.findings[0].reason


def test_a_bomb_of_many_members_is_refused(tmp_path: Path) -> None:
    """Members that share their bytes, as in the bombs that need no archive within: counted over all of them."""
    place = tmp_path / "bomb"
    place.write_bytes(zipped({f"{n}": bytes(1 << 20) for n in range(40)}))
    assert "200 times" in scanned(place)[0].findings[0].reason
    place.write_bytes(tarred({f"{n}": b"" for n in range(30)}))
    assert scanned(place, n_members=20)[0].findings[0].reason == "it holds more than 20 members"


def test_a_long_member_is_said_and_the_next_is_read(tmp_path: Path) -> None:
    place = tmp_path / "a.tar"
    place.write_bytes(tarred({"long": os.urandom(3 << 20), "short": TOKEN.encode()}))
    _, found = scanned(place, member_bytes=1 << 20)
    assert found == [(UNSCANNABLE, "long", 0), ("github-token", "short", 1)]


def test_cx_9_3_unreadable(tmp_path: Path) -> None:
    """CX-9.3: what cannot be opened, is broken, encrypted, of another kind or no file is a finding with its reason."""
    whole = zipped({"a": os.urandom(4000)})
    locked = bytearray(zipped({"a": b"text"}))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.find(mark) + at] |= 1
    (tmp_path / "broken.zip").write_bytes(whole[:-60])
    (tmp_path / "encrypted.zip").write_bytes(locked)
    (tmp_path / "torn.gz").write_bytes(gzip.compress(os.urandom(4000))[:-900])
    (tmp_path / "torn.xz").write_bytes(lzma.compress(os.urandom(4000))[:-900])
    (tmp_path / "other.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(99))
    os.mkfifo(tmp_path / "pipe")
    report, found = scanned(tmp_path)
    reasons = {Path(finding.path).name: finding.reason for finding in report.findings}
    assert {rule for rule, _, _ in found} == {UNSCANNABLE}
    assert reasons["other.7z"] == "archives of the kind 7z are not read"
    assert reasons["pipe"] == "it is no regular file"
    assert reasons["encrypted.zip"] == "it cannot be unpacked: RuntimeError"
    assert len(reasons) == report.n_findings == 6


def test_hidden_files_are_read_and_git_is_not(tmp_path: Path) -> None:
    for name in (".env", ".git/config", "build/x", "kept/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TOKEN)
    (tmp_path / "link").symlink_to(tmp_path / ".git" / "config")
    report = Scan().paths([tmp_path], exclude=["build"])
    assert [os.path.relpath(finding.path, tmp_path) for finding in report.findings] == [".env", "kept/x"]


def test_a_baseline_allows_what_it_names(tmp_path: Path) -> None:
    """Wherever the secret stands; another one, and the same under another salt, is a finding."""
    text, known = tmp_path / "a.txt", tmp_path / "known.yaml"
    text.write_text(TOKEN)
    first = Scan()
    write_baseline(known, first.paths([text]), first.salt, None)
    text.write_text(f"moved\n{TOKEN}\n{secrets(1)['github-token/personal']}\n")
    report = Scan(read_baseline(known)).paths([text])
    assert [finding.line for finding in report.findings] == [3]
    assert report.n_allowed == 1
    assert Scan().paths([text]).findings[0].fingerprint != first.report.findings[0].fingerprint


def test_changes_are_those_since_a_commit(tmp_path: Path) -> None:
    """Added lines with their numbers, untracked files, and binary files as a whole."""

    def git(*words: str) -> None:
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    old = secrets(1)["github-token/personal"]
    (tmp_path / "a.txt").write_text(f"one\n{old}\ntwo\nthree\n")
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    (tmp_path / "a.txt").write_text(f"one\n{old}\ntwo\n+ +++ b/x\n{TOKEN}\nthree\nfour {TOKEN}")
    (tmp_path / "b.bin").write_bytes(b"\0\1" + TOKEN.encode())
    (tmp_path / "ä new").write_text(TOKEN)
    report = Scan().changes(tmp_path, "HEAD")
    assert [(Path(finding.path).name, finding.line) for finding in report.findings] == [
        ("a.txt", 5),
        ("a.txt", 7),
        ("b.bin", 1),
        ("ä new", 1),
    ]
    with pytest.raises(RunError, match="git diff failed"):
        Scan().changes(tmp_path, "--output=x")
    assert not (tmp_path / "x").exists()


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no file or directory"):
        Scan().paths([tmp_path / "nowhere"])
