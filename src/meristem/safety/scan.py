"""Which secrets stand in files, in what archives hold, and in what changed since a commit.

A finding says where a secret is and what kind of one, and has a fingerprint of it; it never holds the secret. What
cannot be read is a finding too, so that nothing is passed over without a word.
"""

import fnmatch
import hashlib
import io
import os
import re
import secrets as generators
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from pydantic import Field

from meristem.checkpoint.atomic import write_atomic
from meristem.config import ConfigSection, dump_yaml, load
from meristem.errors import RunError
from meristem.safety.secrets import Readable, Secret, find_secrets
from meristem.safety.unpack import Limits, Unpacking

UNSCANNABLE: Final = "unscannable"
MOST_FINDINGS: Final = 1000
"""That a report lists; more are counted."""

_MOST_HELD_BYTES: Final = 1 << 25
"""Of a text that comes in pieces; a longer one is put on the disk while it is searched."""

_DIFF: Final = (
    *("diff", "--unified=0", "--relative", "--no-color", "--no-ext-diff", "--no-textconv"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--end-of-options"),
)
_HUNK: Final = re.compile(rb"^@@ -\d+(?:,\d+)? \+(\d+)(?:,\d+)? @@")


class AllowedFinding(ConfigSection):
    """A finding that is no longer one. rule, path: for the reader; the fingerprint decides."""

    fingerprint: str = Field(pattern=r"^[0-9a-f]{24}$")
    rule: str = ""
    path: str = ""
    reason: str = ""


class Baseline(ConfigSection):
    """The findings that are known and allowed. salt: of the fingerprints, without which they could be guessed from
    lists of passwords by whoever has another file of them."""

    salt: str = Field(pattern=r"^[0-9a-f]{32}$", default_factory=lambda: generators.token_hex(16))
    allowed: tuple[AllowedFinding, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A secret, or what could not be read. member: the way to it through archives. length: of the secret, in bytes.

    reason: why it could not be read, and else the kind of secret in words.
    """

    rule: str
    path: str
    member: str
    line: int
    length: int
    fingerprint: str
    reason: str


@dataclass
class ScanReport:
    """What was found. n_findings: also those beyond ``MOST_FINDINGS``. n_allowed: by the baseline, not among them."""

    findings: list[Finding] = field(default_factory=list)
    n_findings: int = 0
    n_allowed: int = 0
    n_files: int = 0
    n_members: int = 0
    n_bytes: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {"schema": "meristem.scan/1", **asdict(self)}

    def counts(self) -> dict[str, int]:
        """How many findings that are listed each rule has."""
        rules = [finding.rule for finding in self.findings]
        return {rule: rules.count(rule) for rule in dict.fromkeys(rules)}


class Scan:
    """Reads whatever it is given and gathers one report.

    baseline: what is allowed; without one the fingerprints of this scan have a salt that no other has.
    """

    def __init__(self, baseline: Baseline | None = None, limits: Limits | None = None) -> None:
        self.report = ScanReport()
        self._baseline, self._limits = baseline or Baseline(), limits or Limits()
        self._allowed = {each.fingerprint for each in self._baseline.allowed}
        self._started = time.monotonic()

    @property
    def salt(self) -> str:
        """Of the fingerprints."""
        return self._baseline.salt

    def paths(self, paths: Iterable[Path], exclude: Sequence[str] = ()) -> ScanReport:
        """Scan files, and directories with all below them, hidden files too; ``.git`` and links in them are not."""
        for path in paths:
            if not os.path.lexists(path):
                raise RunError(f"there is no file or directory {path}. Give one that is there.", path=str(path))
            if path.is_dir():
                for found in self._below(path, exclude):
                    self._file(found)
            else:
                self._file(path)
        return self._done()

    def changes(self, root: Path, commit: str) -> ScanReport:
        """Scan the lines that the files of a git repository have and had not at ``commit``, untracked files too."""
        text = _git(root, *_DIFF, commit, "--", ".")
        seen = set()
        for path, line, added in _added(text):
            if added is None:
                self._file(root / path)
            else:
                self._bytes(io.BytesIO(added), str(root / path), "", line - 1)
                self.report.n_bytes += len(added)
                seen.add(path)
        self.report.n_files += len(seen)
        for name in _git(root, "ls-files", "--others", "--exclude-standard", "-z").split(b"\0"):
            if name:
                self._file(root / os.fsdecode(name))
        return self._done()

    def texts(self, texts: Iterable[tuple[str, bytes, bool]]) -> ScanReport:
        """Scan texts that come with their names, as the documents of a source; of each, whether the next is the rest of
        it. A secret may stand where one ends and its rest begins."""
        for name, text, goes_on in (pieces := iter(texts)):
            self.report.n_files += 1
            with tempfile.SpooledTemporaryFile(_MOST_HELD_BYTES) as whole:
                whole.write(text)
                while goes_on:
                    _, text, goes_on = next(pieces)
                    whole.write(text)
                size_bytes = whole.tell()
                whole.seek(0)
                self._whole(whole, size_bytes, name)
        return self._done()

    def _done(self) -> ScanReport:
        self.report.seconds = round(time.monotonic() - self._started, 3)
        return self.report

    def _below(self, root: Path, exclude: Sequence[str]) -> Iterator[Path]:
        def refused(cause: OSError) -> None:
            self._refuse(os.fsdecode(cause.filename), "", f"it cannot be listed: {cause.strerror}")

        for directory, folders, files in os.walk(root, onerror=refused):
            place = Path(directory)
            folders[:] = sorted(
                each for each in folders if each != ".git" and not _matches(place / each, root, exclude)
            )
            for name in sorted(files):
                path = place / name
                if not path.is_symlink() and not _matches(path, root, exclude):
                    yield path

    def _file(self, path: Path) -> None:
        name = str(path)
        self.report.n_files += 1
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                self._refuse(name, "", "it is no regular file")
                return
            with open(path, "rb") as file:
                self._whole(file, os.fstat(file.fileno()).st_size, name)
        except OSError as cause:
            self._refuse(name, "", f"it cannot be opened: {cause.strerror}")

    def _whole(self, file: IO[bytes], size_bytes: int, name: str) -> None:
        """Scan all that a file, or a text, holds."""
        self.report.n_bytes += size_bytes
        unpacking = Unpacking(
            self._limits,
            lambda member, stream: self._bytes(stream, name, member, 0),
            lambda member, why: self._refuse(name, member, why),
        )
        self.report.n_members += unpacking.file(file, size_bytes)

    def _bytes(self, stream: Readable, path: str, member: str, lines_before: int) -> None:
        for secret in find_secrets(stream):
            self._add(_finding(secret, path, member, lines_before, self._fingerprint(secret.pattern.id, secret.value)))

    def _refuse(self, path: str, member: str, why: str) -> None:
        mark = self._fingerprint(UNSCANNABLE, f"{path}\0{member}\0{why}".encode("utf-8", "surrogateescape"))
        self._add(Finding(UNSCANNABLE, path, member, 0, 0, mark, why))

    def _add(self, finding: Finding) -> None:
        if finding.fingerprint in self._allowed:
            self.report.n_allowed += 1
            return
        self.report.n_findings += 1
        if len(self.report.findings) < MOST_FINDINGS:
            self.report.findings.append(finding)

    def _fingerprint(self, rule: str, value: bytes) -> str:
        key = bytes.fromhex(self._baseline.salt)
        return hashlib.blake2b(rule.encode() + b"\0" + value, digest_size=12, key=key).hexdigest()


def read_baseline(path: Path) -> Baseline:
    """The findings that a file allows."""
    return load(Baseline, file=path).tree


def write_baseline(path: Path, report: ScanReport, salt: str, before: Baseline | None) -> None:
    """Allow what a report lists, and what was allowed before."""
    known = {each.fingerprint: each for each in (before.allowed if before else ())}
    for finding in report.findings:
        allowed = AllowedFinding(fingerprint=finding.fingerprint, rule=finding.rule, path=finding.path)
        known.setdefault(finding.fingerprint, allowed)
    write_atomic(path, dump_yaml(Baseline(salt=salt, allowed=tuple(known.values()))).encode())


def _finding(secret: Secret, path: str, member: str, lines_before: int, mark: str) -> Finding:
    pattern, line = secret.pattern, secret.line + lines_before
    return Finding(pattern.id, path, member, line, len(secret.value), mark, pattern.description)


def _matches(path: Path, root: Path, globs: Sequence[str]) -> bool:
    relative = path.relative_to(root).as_posix()
    return any(fnmatch.fnmatchcase(relative if "/" in glob else path.name, glob) for glob in globs)


def _git(root: Path, *words: str) -> bytes:
    """What git says in a directory."""
    command = ["git", "-c", "core.quotePath=false", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError as cause:
        raise RunError("changes are read with git, which is not installed. Scan the files without --diff.") from cause
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason"]
        raise RunError(f"git {words[0]} failed in {root}: {said[0]}. Give a commit of a repository.", path=str(root))
    return done.stdout


def _added(diff: bytes) -> Iterator[tuple[str, int, bytes | None]]:
    """What a diff without context adds: path, first line and text of each hunk; None for a binary file."""
    path, line, added, n_left = "", 0, list[bytes](), 0
    for each in diff.split(b"\n"):
        hunk = _HUNK.match(each)
        if n_left == 0 and added:
            yield path, line, b"\n".join(added)
            added = []
        if n_left and each.startswith(b"+"):
            added.append(each[1:])
            n_left -= 1
        elif each.startswith(b"+++ b/"):
            path = os.fsdecode(each[6:].rstrip(b"\t"))
        elif hunk:
            line = int(hunk[1])
            count = re.search(rb"\+\d+,(\d+)", hunk[0])
            n_left = int(count[1]) if count else 1
        elif binary := re.fullmatch(rb"Binary files .* and b/(.*) differ", each):
            yield os.fsdecode(binary[1]), 1, None
    if added:
        yield path, line, b"\n".join(added)
