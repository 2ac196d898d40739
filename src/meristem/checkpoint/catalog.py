"""Named and versioned descriptions in one SQLite file, with tensors in files beside it (growth.md 23).

It knows neither torch nor growth: a process that may be killed reads it without loading either. Several processes may
write at once: SQLite lets one after the other, and a file of tensors is named by its SHA-256 and there before the row
that names it. It is for a local disk, which is what the write-ahead log of SQLite needs.
"""

import contextlib
import functools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import filelock

from meristem.checkpoint.atomic import disk_full, sha256, write_atomic
from meristem.checkpoint.sqlite import Database, Run, in_use
from meristem.config.mistakes import nearest_words
from meristem.config.text import canonical
from meristem.errors import CheckpointCorrupt, RunError, WrongValue
from meristem.events import Emit, Event, silent

FILE: Final = "library.sqlite"
FOLDER: Final = "seeds"
APPLICATION: Final = 0x6D657269
"""What tells a file of ours from any other of SQLite."""
BUSY_S: Final = 30.0
"""How long a writer waits for another."""
SLOW_S: Final = 0.25
"""From here on a transaction is the event ``library.slow``."""
NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]*")
FIRST: Final = "0" * 64
"""What stands before the first certificate."""

MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE blueprints (
        name TEXT NOT NULL, version INTEGER NOT NULL CHECK (version > 0), origin TEXT NOT NULL, trust TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'retired')), sha256 TEXT NOT NULL,
        created REAL NOT NULL, PRIMARY KEY (name, version)
    ) STRICT;
    CREATE TABLE weights (
        name TEXT NOT NULL, version INTEGER NOT NULL, path TEXT NOT NULL, sha256 TEXT NOT NULL,
        size_bytes INTEGER NOT NULL, fitting TEXT NOT NULL, PRIMARY KEY (name, version),
        FOREIGN KEY (name, version) REFERENCES blueprints (name, version)
    ) STRICT;
    CREATE TABLE certificates (
        number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, version INTEGER NOT NULL, score REAL NOT NULL,
        band TEXT NOT NULL, handling TEXT NOT NULL, evidence TEXT NOT NULL, issued REAL NOT NULL,
        previous_sha256 TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL UNIQUE,
        FOREIGN KEY (name, version) REFERENCES blueprints (name, version)
    ) STRICT;
    CREATE TABLE benchmarks (
        number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, version INTEGER NOT NULL, device TEXT NOT NULL,
        dtype TEXT NOT NULL, shape TEXT NOT NULL, is_compiled INTEGER NOT NULL, p50_ms REAL NOT NULL,
        p95_ms REAL NOT NULL, tokens_per_s REAL NOT NULL, peak_bytes INTEGER, issued REAL NOT NULL,
        FOREIGN KEY (name, version) REFERENCES blueprints (name, version)
    ) STRICT;
    CREATE TABLE reports (
        report_id TEXT PRIMARY KEY, blueprint TEXT NOT NULL, outcome TEXT NOT NULL, issued_at TEXT NOT NULL,
        body TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE changes (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL
    ) STRICT;
    """,
)
"""Script n, counted from 1, leads from version n - 1 of the file (``PRAGMA user_version``) to version n."""

CARDS: Final = """
    SELECT b.name, b.version, b.origin, b.trust, b.state, b.created, w.path, w.sha256, w.size_bytes, w.fitting, (
        SELECT handling FROM certificates c WHERE c.name = b.name AND c.version = b.version
        ORDER BY number DESC LIMIT 1
    ) AS handling
    FROM blueprints b LEFT JOIN weights w ON w.name = b.name AND w.version = b.version
"""
NEWEST: Final = " b.version = (SELECT max(version) FROM blueprints n WHERE n.name = b.name)"


class Catalog:
    """The open file of a library; threads may share it. ``close`` ends it, as does the end of a ``with``.

    place: a directory, which is made unless ``is_there`` says that it has to be. clock: seconds since 1970.

    Raises CheckpointCorrupt for a file that is broken or of another program, CheckpointTooNew for one of a later
    version, RunError for a place that cannot be used; nothing is changed then.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        is_there: bool = False,
        busy_s: float = BUSY_S,
        clock: Callable[[], float] = time.time,
        emit: Emit = silent,
    ) -> None:
        self.place, self._clock, self._emit = Path(place), clock, emit
        if is_there and not (self.place / FILE).is_file():
            raise RunError(f"no library was found in {self.place}; expected {FILE} there. Name the place of one.")
        try:
            (self.place / FOLDER).mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.place / f".{FILE}.lock", timeout=busy_s):
                path = self.place / FILE
                self._database = Database(path, "a library of meristem", APPLICATION, MIGRATIONS, busy_s=busy_s)
        except filelock.Timeout as cause:
            raise in_use(self.place / FILE) from cause
        except OSError as cause:
            raise RunError(f"{self.place} cannot hold a library: {cause.strerror}. Choose another place.") from cause

    def __enter__(self) -> "Catalog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; calls afterwards raise RunError."""
        self._database.close()

    def put(self, name: str, *, origin: Mapping[str, Any], trust: str, weights: Mapping[str, Any] | None = None) -> int:
        """The version under which this is stored: a new one, unless the newest is the same already.

        weights: ``content``, the bytes of a file, and ``fitting``, what a slot has to be for them.
        """
        require_name(name)
        described: dict[str, Any] = {"origin": dict(origin), "trust": trust}
        if weights:
            described |= {"weights": sha256(weights["content"]), "fitting": weights["fitting"]}
            path = f"{FOLDER}/{described['weights']}.safetensors"
            with disk_full(self.place / path):
                write_atomic(self.place / path, weights["content"])
        digest = sha256(canonical(described))
        with self._writing() as run:
            newest = run(
                "SELECT version, sha256, state FROM blueprints WHERE name = ? ORDER BY version DESC LIMIT 1", (name,)
            ).fetchone()
            if newest and newest["sha256"] == digest and newest["state"] == "active":
                return int(newest["version"])
            version = newest["version"] + 1 if newest else 1
            run(
                "INSERT INTO blueprints (name, version, origin, trust, sha256, created) VALUES (?, ?, ?, ?, ?, ?)",
                (name, version, _text(origin), trust, digest, self._clock()),
            )
            if weights:
                run(
                    "INSERT INTO weights VALUES (?, ?, ?, ?, ?, ?)",
                    (name, version, path, described["weights"], len(weights["content"]), _text(weights["fitting"])),
                )
            _changed(run, "seed" if weights else "blueprint", name, version)
        return int(version)

    def retire(self, name: str) -> None:
        """Take every version of a name out of what is listed and given; rows and files stay."""
        card = self.card(name)
        with self._writing() as run:
            run("UPDATE blueprints SET state = 'retired' WHERE name = ?", (name,))
            _changed(run, "retired", name, card["version"])

    def card(self, name: str, version: int | None = None) -> dict[str, Any]:
        """What is known of a version, by default of the newest. Raises WrongValue with the nearest names."""
        which, values = (NEWEST, [name]) if version is None else (" b.version = ?", [name, version])
        found = self._read(f"{CARDS} WHERE b.state = 'active' AND b.name = ? AND {which}", values)
        if found:
            return _card(found[0])
        known = [each["name"] for each in self.cards()]
        nearest = f"Nearest: {', '.join(nearest_words(name, known))}." if known else "It is empty: store one first."
        what = name if version is None or name not in known else f"{name}, version {version}"
        raise WrongValue(f"the library in {self.place} holds no '{what}'. {nearest}", value=name)

    def cards(self) -> list[dict[str, Any]]:
        """The newest version of every name, by name."""
        return [_card(each) for each in self._read(f"{CARDS} WHERE b.state = 'active' AND {NEWEST} ORDER BY b.name")]

    def content(self, card: Mapping[str, Any]) -> bytes:
        """The bytes of the file of a card with weights. Raises CheckpointCorrupt unless they are those stored."""
        weights = card["weights"]
        path: Path = self.place / weights["path"]
        try:
            content: bytes = path.read_bytes()
        except OSError as cause:
            raise CheckpointCorrupt(
                f"{path}, the weights of '{card['name']}', cannot be read: {cause.strerror}. Store the seed again.",
                path=str(path),
            ) from cause
        require_same(content, weights["sha256"], path, card["name"])
        return content

    def changes(self, since: int = 0) -> tuple[int, list[dict[str, Any]]]:
        """Where the feed stands, and what was put in, certified or retired after ``since``, in order."""
        rows = self._read("SELECT seq, kind, name, version FROM changes WHERE seq > ? ORDER BY seq", [since])
        return (rows[-1]["seq"] if rows else since), [dict(each) for each in rows]

    def certify(self, name: str, version: int, certificate: Mapping[str, Any]) -> int:
        """Append a certificate to the chain, and its benchmark; its number. It names the SHA-256 of the one before."""
        found, speed = certificate, certificate["benchmark"]
        with self._writing() as run:
            last = run("SELECT sha256 FROM certificates ORDER BY number DESC LIMIT 1").fetchone()
            row = {
                "name": name,
                "version": version,
                **{key: found[key] for key in ("score", "band", "handling")},
                "evidence": _text(found),
                "issued": self._clock(),
                "previous_sha256": last["sha256"] if last else FIRST,
            }
            run(*_insert("certificates", row | {"sha256": sha256(canonical(row))}))
            number = run("SELECT last_insert_rowid()").fetchone()[0]
            if speed:
                columns = speed | {"shape": _text(speed["shape"]), "is_compiled": int(speed["is_compiled"])}
                run(*_insert("benchmarks", {"name": name, "version": version, "issued": row["issued"]} | columns))
            _changed(run, "certificate", name, version)
        return int(number)

    def certificates(self, name: str | None = None) -> list[dict[str, Any]]:
        """Certificates of a name or of all, oldest first. Raises CheckpointCorrupt where the chain does not hold."""
        rows = [dict(each) for each in self._read("SELECT * FROM certificates ORDER BY number")]
        before = FIRST
        for row in rows:
            number, said = row.pop("number"), row.pop("sha256")
            if row["previous_sha256"] != before or sha256(canonical(row)) != said:
                raise CheckpointCorrupt(
                    f"certificate {number}, of '{row['name']}' in {self.place / FILE}, is not the one that was "
                    f"issued: it does not fit into the chain of their checksums. Take the library from a copy, or "
                    f"certify again in a new one.",
                    number=number,
                )
            before = said
            row["evidence"] = json.loads(row["evidence"])
        return [row for row in rows if name in (None, row["name"])]

    def benchmarks(self, name: str) -> list[dict[str, Any]]:
        """What a name was measured at, oldest first."""
        rows = self._read("SELECT * FROM benchmarks WHERE name = ? ORDER BY number", [name])
        return [{**each, "shape": json.loads(each["shape"]), "is_compiled": bool(each["is_compiled"])} for each in rows]

    def report(self, body: Mapping[str, Any]) -> bool:
        """Store a report under its ``report_id``, unless that was stored as late or later; whether it was stored."""
        values = [body["report_id"], body["blueprint"], body["outcome"], body["issued_at"], _text(body)]
        with self._writing() as run:
            done = run(
                "INSERT INTO reports VALUES (?, ?, ?, ?, ?) ON CONFLICT (report_id) DO UPDATE SET outcome = "
                "excluded.outcome, issued_at = excluded.issued_at, body = excluded.body "
                "WHERE excluded.issued_at > issued_at",
                values,
            )
        return done.rowcount == 1

    def reports(self, blueprint: str | None = None) -> list[dict[str, Any]]:
        """Reports of a blueprint or of all, by the time at which they were issued."""
        rows = self._read("SELECT blueprint, body FROM reports ORDER BY issued_at, report_id")
        return [json.loads(each["body"]) for each in rows if blueprint in (None, each["blueprint"])]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Run]:
        begun_s = time.monotonic()
        with self._database.writing() as run:
            yield run
        self._timed("write", begun_s)

    def _read(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        begun_s = time.monotonic()
        rows = self._database.read(query, values)
        self._timed("read", begun_s)
        return rows

    def _timed(self, what: str, begun_s: float) -> None:
        seconds = time.monotonic() - begun_s
        if seconds > SLOW_S:
            self._emit(Event("library.slow", {"what": what, "seconds": round(seconds, 3)}, "warning"))


def require_name(name: str) -> None:
    """Raise WrongValue for what cannot be the name of a blueprint."""
    if not NAME.fullmatch(name):
        raise WrongValue(
            f"'{name}' cannot be the name of a blueprint; expected small letters, digits, '_', '-' and '.'.", value=name
        )


def require_same(content: bytes, expected: str, path: object, name: str) -> None:
    """Raise CheckpointCorrupt unless some bytes have the SHA-256 that was stored with the name."""
    found = sha256(content)
    if found != expected:
        raise CheckpointCorrupt(
            f"{path}, the weights of '{name}', has the SHA-256 {found[:12]}; expected {expected[:12]}: it was altered "
            f"or cut. Store the seed again.",
            path=str(path),
            found=found,
            expected=expected,
        )


def _insert(table: str, row: Mapping[str, Any]) -> tuple[str, list[Any]]:
    return f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", [*row.values()]


def _changed(run: Run, kind: str, name: str, version: int) -> None:
    run("INSERT INTO changes (kind, name, version) VALUES (?, ?, ?)", (kind, name, version))


def _card(row: Any) -> dict[str, Any]:
    card = {key: row[key] for key in ("name", "version", "trust", "created", "handling")}
    weights = None
    if row["path"]:
        fitting = json.loads(row["fitting"])
        weights = {"path": row["path"], "sha256": row["sha256"], "size_bytes": row["size_bytes"], "fitting": fitting}
    return card | {"origin": json.loads(row["origin"]), "weights": weights}


def _text(value: object) -> str:
    return canonical(value).decode()


# What a process does for a loader: plain values in and out. It keeps the library open between two calls.


@functools.cache
def _opened(place: str) -> Catalog:
    return Catalog(place, is_there=True)


def changes_in(payload: Mapping[str, Any]) -> list[Any]:
    """``[seq, changes]`` of the library in ``place`` after ``since``."""
    return [*_opened(payload["place"]).changes(payload["since"])]


def row_in(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The newest version of ``name`` in ``place``."""
    return _opened(payload["place"]).card(payload["name"])


def copy_in(payload: Mapping[str, Any]) -> str:
    """The path of a copy, in the directory ``to``, of the file of a ``row`` of the library in ``place``."""
    found = Path(payload["place"]) / payload["row"]["weights"]["path"]
    return str(shutil.copyfile(found, Path(payload["to"]) / found.name))
