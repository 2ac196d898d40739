"""The keys of a server, beside its sessions in SQLite. A key is shown once, when it is made; the file holds hashes.

A key is 256 random bits, so nobody finds it by trying, however fast the hash: SHA-256 with a salt is enough, where a
password would need a slow one, and checking it costs a request microseconds. The salt keeps two files from showing that
they hold the same key. What a key opens belongs to its name: a new key under the same name opens the same sessions.
"""

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from meristem.checkpoint.sqlite import Database
from meristem.errors import KeyRefused, RunError, WrongValue

FILE: Final = "keys.sqlite"
APPLICATION: Final = 0x4D534B59
LONGEST_NAME: Final = 64
PREFIX: Final = "mst"

Opens: TypeAlias = Literal["sessions", "metrics"]

MIGRATIONS: Final = (
    """
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, opens TEXT NOT NULL, salt BLOB NOT NULL, digest BLOB NOT NULL,
        created REAL NOT NULL, revoked REAL
    );
    CREATE UNIQUE INDEX keys_in_force ON keys (name) WHERE revoked IS NULL;
    """,
)

_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._@-]{{0,{LONGEST_NAME - 1}}}")
_KEY: Final = re.compile(rf"{PREFIX}_([0-9a-f]{{16}})_([0-9a-f]{{64}})")
_NOBODY: Final[dict[str, Any]] = {"salt": bytes(16), "digest": bytes(32)}
"""What a key with an unknown id is compared with, so that it is refused as slowly as a wrong secret."""


@dataclass(frozen=True)
class KeyRecord:
    """A key without its secret. Times are seconds since 1970.

    opens: sessions, or /metrics alone. revoked: since when it opens nothing; None while it is in force.
    """

    id: str
    name: str
    opens: Opens
    created: float
    revoked: float | None


class Keys:
    """The keys in a directory of sessions; several processes may change and read them, calls come from any thread."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
        except OSError as cause:
            raise RunError(f"{self.path} cannot hold keys: {cause.strerror}. Choose another --data.") from cause
        self._database = Database(self.path, "keys of a server", APPLICATION, MIGRATIONS, forgets=True)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def add(self, name: str, *, opens: Opens = "sessions", replaces: bool = False) -> str:
        """A new key, which can be read here and nowhere later.

        replaces: the name may have had one, which is revoked in the same transaction; whoever has the new one gets the
        sessions of the old. WrongValue for a name that has had a key, unless it is to be replaced.
        """
        if not _NAME.fullmatch(name):
            raise WrongValue(
                f"'{name[:LONGEST_NAME]}' is no name for a key: up to {LONGEST_NAME} letters, digits, and . _ @ - "
                f"behind the first, are one.",
                key="name",
            )
        key_id, secret, salt, now = secrets.token_hex(8), secrets.token_hex(32), secrets.token_bytes(16), time.time()
        with self._database.writing() as run:
            if run("SELECT 1 FROM keys WHERE name=?", (name,)).fetchone() and not replaces:
                raise WrongValue(
                    f"'{name}' has or had a key, whose sessions the new one would open. Choose another name, or give "
                    f"--replace.",
                    key="name",
                    value=name,
                )
            run("UPDATE keys SET revoked=? WHERE name=? AND revoked IS NULL", (now, name))
            values = (key_id, name, opens, salt, _digest(salt, secret), now)
            run("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, NULL)", values)
        return f"{PREFIX}_{key_id}_{secret}"

    def records(self) -> list[KeyRecord]:
        """All keys that ever were, oldest first."""
        return [_record(row) for row in self._database.read("SELECT * FROM keys ORDER BY created, id")]

    def revoke(self, name: str) -> None:
        """Let the key of a name open nothing any more, from the next request on. WrongValue where it has none."""
        with self._database.writing() as run:
            found = run("UPDATE keys SET revoked=? WHERE name=? AND revoked IS NULL", (time.time(), name))
            if not found.rowcount:
                raise WrongValue(
                    f"'{name[:LONGEST_NAME]}' has no key in force. `meristem keys ls` lists those there are.",
                    key="name",
                )

    @property
    def are_required(self) -> bool:
        """Whether a key was ever made. Revoking the last one opens the server to nobody."""
        return bool(self._database.read("SELECT 1 FROM keys LIMIT 1"))

    def check(self, key: str) -> KeyRecord:
        """Whose key this is. KeyRefused for every other text, whatever is wrong with it, and as fast."""
        parts = _KEY.fullmatch(key)
        key_id, secret = parts.groups() if parts else ("", "")
        rows = self._database.read("SELECT * FROM keys WHERE id=?", (key_id,))
        row = rows[0] if rows else _NOBODY
        is_right = hmac.compare_digest(_digest(row["salt"], secret), row["digest"])
        if not rows or not is_right or row["revoked"] is not None:
            raise KeyRefused("the key is not valid here. Send `Authorization: Bearer KEY` with one that is in force.")
        return _record(row)


def _digest(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode()).digest()


def _record(row: Any) -> KeyRecord:
    return KeyRecord(**{name: row[name] for name in KeyRecord.__dataclass_fields__})
