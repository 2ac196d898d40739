"""Sessions that last: what they are and what was said in SQLite, what they remember in files.

A directory holds ``sessions.sqlite`` and, in ``states``, one session file for each turn that can be returned to. A turn
is written in this order: its file, synced; then one transaction with its row and the new head of the session; only then
is it acknowledged. A crash loses at most the turn in flight, and files without a row are deleted at the next start. A
session that is not used is in no memory: ``moment`` reads it from its file.
"""

import contextlib
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

from pydantic import Field, ValidationError
from torch import nn

from meristem.checkpoint.atomic import sync_directory
from meristem.checkpoint.sqlite import Database
from meristem.config import ConfigSection
from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointCorrupt, NoSession, SessionBusy, TooManySessions
from meristem.memory.state import alike_by
from meristem.models.config import LearnConfig
from meristem.models.online import Learn, online_reader
from meristem.models.recorded import Reader
from meristem.serve import store
from meristem.serve.moment import FRESH, Moment, identity, moment_of, read, require_same, tensors_of
from meristem.serve.session import KEPT_TURNS
from meristem.serve.sharing import STATES, Share, new_id
from meristem.train.loss import cross_entropy

FILE: Final = "sessions.sqlite"
APPLICATION: Final = 0x4D535345
MOST_LIVE_BYTES: Final = 1 << 29
"""What the moments of sessions may take in memory together; those used least recently leave first."""
LONGEST_NAME: Final = 200
MOST_SESSIONS: Final = 100_000
MOST_KEPT_IDS: Final = 2048
"""Of a turn, so that it can be read once more to be looked into; of a longer one these are the first."""

MIGRATIONS: Final = (
    """
    CREATE TABLE sessions (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, owner TEXT NOT NULL, model TEXT NOT NULL, tokenizer TEXT NOT NULL,
        learn TEXT NOT NULL, learning TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL, turn INTEGER NOT NULL,
        n_tokens INTEGER NOT NULL, size_bytes INTEGER NOT NULL, is_open INTEGER NOT NULL
    );
    CREATE TABLE turns (
        session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE, turn INTEGER NOT NULL, text TEXT NOT NULL,
        reply TEXT NOT NULL, finish TEXT NOT NULL, seed TEXT, n_read INTEGER NOT NULL, n_drawn INTEGER NOT NULL,
        nats REAL NOT NULL, n_tokens INTEGER NOT NULL, size_bytes INTEGER NOT NULL, is_open INTEGER NOT NULL,
        label TEXT, file TEXT, created REAL NOT NULL, PRIMARY KEY (session, turn)
    );
    CREATE INDEX turns_by_file ON turns (file);
    """,
    "CREATE UNIQUE INDEX sessions_by_owner ON sessions (owner, model, tokenizer, id);",
    "ALTER TABLE turns ADD COLUMN ids BLOB NOT NULL DEFAULT x'';",
)


@dataclass(frozen=True)
class SessionRecord:
    """A session. Times are seconds since 1970.

    turn: the last one; 0 before the first. n_tokens: read so far. is_open: its last reply was broken off, so that what
    ends a reply has still to be read.
    """

    id: str
    name: str
    owner: str
    learn: Learn
    learning: LearnConfig
    created: float
    used: float
    turn: int
    n_tokens: int
    size_bytes: int
    is_open: bool


Count: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 53)]


@dataclass(frozen=True)
class Said:
    """What happened in a turn: a text that was read, and the reply.

    finish: why it ended. seed: of its draws, None where nothing was drawn. n_read, n_drawn: tokens of the text and of
    the reply. nats: surprise of the text. ids: of the text and then of the reply, the first ``MOST_KEPT_IDS``.
    """

    text: str = ""
    reply: str = ""
    finish: str = "length"
    seed: int | None = None
    n_read: Count = 0
    n_drawn: Count = 0
    nats: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    is_open: bool = False
    ids: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 32)], ...], Field(max_length=MOST_KEPT_IDS)] = ()


@dataclass(frozen=True)
class TurnRecord:
    """A turn of a session, the tokens read by its end, and whether the session can return to it."""

    turn: int
    said: Said
    n_tokens: int
    size_bytes: int
    created: float
    label: str | None
    can_return: bool


@dataclass
class _Live:
    """Moments in memory by session and turn, least recently used first; for one thread at a time."""

    moments: OrderedDict[tuple[str, int], Moment] = field(default_factory=OrderedDict)

    def put(self, session_id: str, turn: int, moment: Moment) -> None:
        self.moments.pop((session_id, turn), None)
        self.moments[session_id, turn] = moment
        while len(self.moments) > 1 and sum(each.size_bytes for each in self.moments.values()) > MOST_LIVE_BYTES:
            self.moments.popitem(last=False)

    def get(self, session_id: str, turn: int) -> Moment | None:
        if (session_id, turn) in self.moments:
            self.moments.move_to_end((session_id, turn))
        return self.moments.get((session_id, turn))

    def drop(self, session_id: str) -> None:
        for key in [key for key in self.moments if key[0] == session_id]:
            del self.moments[key]


@dataclass(frozen=True)
class SessionCounts:
    """What there is of all owners. stored_bytes: of the states in which sessions stand. live: those in memory."""

    n_sessions: int
    stored_bytes: int
    n_live: int
    live_bytes: int


class Sessions:
    """All sessions of one model in a directory; calls come from any thread.

    One process uses the directory at a time, or several with a ``share`` each, which use different sessions.

    Sessions of another model or tokenizer may be in the directory as well, and are not seen. NoSession where there is
    none of the id and owner given.

    most_sessions: of one owner.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        tokenizer: Tokenizer,
        share: Share | None = None,
        *,
        most_sessions: int = MOST_SESSIONS,
    ) -> None:
        self.most_sessions = most_sessions
        self.directory, self.model, self.tokenizer = directory, model, tokenizer
        self.share = share or Share()
        self.identity = identity(model, tokenizer)
        self._live, self._busy, self._lock = _Live(), set[str](), threading.RLock()
        self._readers: dict[tuple[Learn, LearnConfig], Reader] = {}
        self._held = self.share.hold(directory)
        try:
            self._database = Database(directory / FILE, "sessions of meristem", APPLICATION, MIGRATIONS, forgets=True)
        except BaseException:
            self._held.close()
            raise
        self._sweep()

    def close(self) -> None:
        """Let go of the directory; every turn that was acknowledged is in it."""
        self._database.close()
        self._held.close()

    def reader(self, learn: Learn = "memory", learning: LearnConfig | None = None) -> Reader:
        """The model as sessions with these settings read it. CapabilityError where it has nothing that learns so."""
        with self._lock:
            key = learn, learning or LearnConfig()
            if key not in self._readers:
                self._readers[key] = online_reader(self.model, learn, cross_entropy, key[1])
            return self._readers[key]

    def create(
        self,
        *,
        name: str | None = None,
        owner: str = "",
        learn: Learn = "memory",
        learning: LearnConfig | None = None,
        place: str = "",
    ) -> SessionRecord:
        """A session that has read nothing. place: how its id begins, ``sharing.PLACE`` hexadecimal digits or none."""
        self.reader(learn, learning)
        return self._insert(name, owner, learn, learning or LearnConfig(), place=place)

    def counts(self) -> SessionCounts:
        """How many sessions there are, and the bytes of their memories."""
        query = "SELECT count(*) AS n, coalesce(sum(size_bytes), 0) AS size FROM sessions WHERE model=? AND tokenizer=?"
        (row,) = self._database.read(query, self.identity)
        with self._lock:
            live = [each.size_bytes for each in self._live.moments.values()]
        return SessionCounts(row["n"], row["size"], len(live), sum(live))

    def records(self, owner: str = "", *, limit: int = 100, after: str = "") -> list[SessionRecord]:
        """Sessions by their id, those that come behind ``after``."""
        query = f"SELECT * FROM {_SESSIONS} WHERE {_OWN} AND id > ? ORDER BY id LIMIT ?"
        return [_record(row) for row in self._database.read(query, (owner, *self.identity, after, limit))]

    def get(self, session_id: str, owner: str = "") -> SessionRecord:
        """One session."""
        query = f"SELECT * FROM {_SESSIONS} WHERE {_OWN} AND id = ?"
        rows = self._database.read(query, (owner, *self.identity, session_id))
        if not rows:
            raise NoSession(
                f"there is no session '{session_id[:64]}'. List them, or create one.", session=session_id[:64]
            )
        return _record(rows[0])

    def turns(self, session_id: str, owner: str = "") -> list[TurnRecord]:
        """What was said in a session, oldest first."""
        self.get(session_id, owner)
        rows = self._database.read("SELECT * FROM turns WHERE session = ? ORDER BY turn", (session_id,))
        return [_turn(row) for row in rows]

    @contextlib.contextmanager
    def writing(self, session_id: str, owner: str = "") -> Iterator[SessionRecord]:
        """The session, for one writer at a time: SessionBusy where there is another."""
        self.get(session_id, owner)
        with self._lock:
            if session_id in self._busy:
                raise SessionBusy(
                    f"session '{session_id}' is being written to. Wait for that request to end, or fork the session.",
                    session=session_id,
                )
            self._busy.add(session_id)
        try:
            yield self.get(session_id, owner)
        finally:
            with self._lock:
                self._busy.discard(session_id)

    def moment(self, record: SessionRecord) -> Moment:
        """Where a session stands; read from its file where it left memory."""
        with self._lock:
            found = self._live.get(record.id, record.turn)
        return found or self._moment_at(record.id, record.turn)

    def moment_after(self, session_id: str, turn: int, owner: str = "") -> Moment:
        """Where a session stood at the end of a turn that it can return to; 0 is before the first. It stays there."""
        self.get(session_id, owner)
        with self._lock:
            found = self._live.get(session_id, turn)
        if found or not turn:
            return found or FRESH
        query = "SELECT file FROM turns WHERE session=? AND turn=? AND file IS NOT NULL"
        rows = self._database.read(query, (session_id, turn))
        if not rows:
            raise NoSession(
                f"where session '{session_id}' stood after turn {turn} is not kept; the last {KEPT_TURNS} turns are, "
                f"and those that were saved.",
                session=session_id,
                turn=turn,
            )
        return moment_of(store.read(self.directory / STATES / rows[0]["file"]), self.model)

    def add(self, record: SessionRecord, moment: Moment, said: Said) -> SessionRecord:
        """Store a turn that led to ``moment``, inside ``writing``; once this returns it is on the disk."""
        turn = record.turn + 1
        name = self._write_state(record, turn, moment)
        size_bytes, now = moment.size_bytes, time.time()
        row = {"session": record.id, "turn": turn, **asdict(said), "file": name, "n_tokens": moment.n_tokens}
        row |= {"size_bytes": size_bytes, "created": now, "seed": None if said.seed is None else str(said.seed)}
        row["ids"] = struct.pack(f"<{len(said.ids)}I", *said.ids)
        with self._database.writing() as run:
            if not run("SELECT 1 FROM sessions WHERE id=? AND turn=?", (record.id, record.turn)).fetchone():
                (self.directory / STATES / name).unlink()
                raise SessionBusy(f"session '{record.id}' was changed meanwhile. Try again.", session=record.id)
            run(f"INSERT INTO turns ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", [*row.values()])
            values = (turn, moment.n_tokens, size_bytes, said.is_open, now, record.id)
            run("UPDATE sessions SET turn=?, n_tokens=?, size_bytes=?, is_open=?, used=? WHERE id=?", values)
            is_old = "session=? AND turn<=? AND label IS NULL AND file IS NOT NULL"
            old = (record.id, turn - KEPT_TURNS)
            let_go = [each["file"] for each in run(f"SELECT file FROM turns WHERE {is_old}", old)]
            run(f"UPDATE turns SET file=NULL WHERE {is_old}", old)
        self._unlink(let_go)
        with self._lock:
            self._live.drop(record.id)
            self._live.put(record.id, turn, moment)
        return self.get(record.id, record.owner)

    def label(self, session_id: str, owner: str = "", *, label: str) -> TurnRecord:
        """Save the last turn under a label: however much is said later, the session can return to it."""
        with self.writing(session_id, owner) as record:
            if not record.turn:
                raise NoSession("nothing was said in this session, so there is no turn to save.", session=session_id)
            with self._database.writing() as run:
                run("UPDATE turns SET label=? WHERE session=? AND turn=?", (label, session_id, record.turn))
            return self.turns(session_id, owner)[-1]

    def fork(self, session_id: str, owner: str = "", *, name: str | None = None) -> SessionRecord:
        """A second session that stands where this one stands; from here on neither knows of the other."""
        with self.writing(session_id, owner) as record:
            made = self._insert(name, owner, record.learn, record.learning, like=record)
            with self._lock:
                moment = self._live.get(session_id, record.turn)
                if moment:
                    self._live.put(made.id, record.turn, moment)
            return made

    def roll_back(self, session_id: str, owner: str = "", *, to: int) -> SessionRecord:
        """Return to the end of turn ``to``, as if nothing had been said since; 0 is before the first."""
        with self.writing(session_id, owner) as record:
            turns = {each.turn: each for each in self.turns(session_id, owner)}
            if to and (to not in turns or not turns[to].can_return):
                kept = ", ".join(str(each.turn) for each in turns.values() if each.can_return)
                raise NoSession(
                    f"session '{session_id}' cannot return to turn {to}; it can to 0{', ' if kept else ''}{kept}.",
                    session=session_id,
                    turn=to,
                )
            stands = (to, turns[to].n_tokens, turns[to].size_bytes, turns[to].said.is_open) if to else (0, 0, 0, False)
            with self._database.writing() as run:
                let_go = [
                    row["file"] for row in run("SELECT file FROM turns WHERE session=? AND turn>?", (record.id, to))
                ]
                run("DELETE FROM turns WHERE session=? AND turn>?", (record.id, to))
                values = (*stands, time.time(), record.id)
                run("UPDATE sessions SET turn=?, n_tokens=?, size_bytes=?, is_open=?, used=? WHERE id=?", values)
            self._forget(record.id, let_go)
            return self.get(session_id, owner)

    def delete(self, session_id: str, owner: str = "") -> None:
        """Delete a session from memory and disk: rows are overwritten, and files go unless a fork needs them."""
        with self.writing(session_id, owner) as record:
            with self._database.writing() as run:
                let_go = [row["file"] for row in run("SELECT file FROM turns WHERE session=?", (record.id,))]
                run("DELETE FROM sessions WHERE id=?", (record.id,))
            self._forget(record.id, let_go)

    def export(self, session_id: str, owner: str = "") -> bytes:
        """A session as one session file, with what was said; ``Session.load`` opens it as well."""
        record = self.get(session_id, owner)
        said = [{"turn": each.turn, **asdict(each.said)} for each in self.turns(session_id, owner)]
        header = self._header(record, record.turn) | {"is_open": record.is_open, "turns": said}
        return store.pack(tensors_of(self.moment(record)), header)

    def put(self, content: bytes, owner: str = "", *, name: str | None = None, place: str = "") -> SessionRecord:
        """A new session from an exported one, or from one that ``Session.save`` wrote.

        It can return to the moment of its export and later. CheckpointMismatch where it belongs to another model,
        CheckpointCorrupt where it is no intact session of this one, whoever wrote its hash.
        """
        file_name = "the file"
        file = store.unpack(content, file_name)
        header = _checked(file.header, file_name)
        require_same(header.model_dump(), self.identity, self.model, file_name)
        moment = self._fitting(file, self.reader(header.learn, header.learning), file_name)
        record = self._insert(name or header.name, owner, header.learn, header.learning, place=place)
        if moment.n_tokens:
            last = header.turns[-1] if header.turns else Said(is_open=header.is_open)
            with self.writing(record.id, owner):
                record = self.add(record, moment, last)
        return record

    def _fitting(self, file: store.SessionFile, reader: Reader, place: str) -> Moment:
        """The moment of a file that anybody may have written, if the model can go on from it."""
        try:
            moment = moment_of(file, self.model)
            after, logits_bto = read(reader, moment, [0])
            last_bo, n_ids = moment.logits_bo, logits_bto.shape[-1]
            shape = None if last_bo is None else (tuple(last_bo.shape), last_bo.dtype)
            wanted = ((1, n_ids), logits_bto.dtype) if moment.n_tokens else None
            for each in (moment, after):
                alike_by(each.state or {})
            if shape != wanted or not logits_bto.amax().isfinite():
                raise ValueError("its state is not one of this model")
        except Exception as cause:
            raise CheckpointCorrupt(
                f"{place} is no session of this model: {cause}. Export it again.", path=place
            ) from cause
        return moment

    def _insert(
        self,
        name: str | None,
        owner: str,
        learn: Learn,
        learning: LearnConfig,
        *,
        like: SessionRecord | None = None,
        place: str = "",
    ) -> SessionRecord:
        session_id, now = new_id(like.id if like else place), time.time()
        stands = (like.turn, like.n_tokens, like.size_bytes, like.is_open) if like else (0, 0, 0, False)
        row = (session_id, (name or session_id[-8:])[:LONGEST_NAME], owner, *self.identity, learn)
        with self._database.writing() as run:
            own = (owner, *self.identity, self.most_sessions - 1)
            if run(f"SELECT 1 FROM {_SESSIONS} WHERE {_OWN} LIMIT 1 OFFSET ?", own).fetchone():
                raise TooManySessions(
                    f"there are {self.most_sessions} sessions of this owner, which is the most. Delete some.",
                    limit=self.most_sessions,
                )
            values = (*row, learning.model_dump_json(), now, now, *stands)
            run(f"INSERT INTO sessions VALUES ({', '.join('?' * len(values))})", values)
            if like:
                columns = [each["name"] for each in run("PRAGMA table_info(turns)")]
                copied = ", ".join("?" if each == "session" else each for each in columns)
                run(f"INSERT INTO turns SELECT {copied} FROM turns WHERE session=?", (session_id, like.id))
        return self.get(session_id, owner)

    def _header(self, record: SessionRecord, turn: int) -> dict[str, Any]:
        """What ``Session.save`` writes."""
        return {
            "id": record.id,
            "name": record.name,
            **self.identity._asdict(),
            "turn": turn,
            "n_tokens": record.n_tokens,
            "learn": record.learn,
            "learning": record.learning.model_dump(),
        }

    def _write_state(self, record: SessionRecord, turn: int, moment: Moment) -> str:
        name = self.share.new_file()
        header = self._header(record, turn) | {"n_tokens": moment.n_tokens}
        store.write(self.directory / STATES / name, tensors_of(moment), header)
        return name

    def _moment_at(self, session_id: str, turn: int) -> Moment:
        if not turn:
            return FRESH
        query = "SELECT file FROM turns WHERE session=? AND turn=?"
        (row,) = self._database.read(query, (session_id, turn))
        moment = moment_of(store.read(self.directory / STATES / row["file"]), self.model)
        with self._lock:
            self._live.put(session_id, turn, moment)
        return moment

    def _forget(self, session_id: str, files: list[str | None]) -> None:
        with self._lock:
            self._live.drop(session_id)
        self._unlink(files)
        self._database.empty_log()

    def _unlink(self, files: list[str | None]) -> None:
        """Delete files of states that no turn names any more."""
        for name in filter(None, files):
            if not self._database.read("SELECT 1 FROM turns WHERE file=? LIMIT 1", (name,)):
                (self.directory / STATES / name).unlink(missing_ok=True)
        if files:
            sync_directory(self.directory / STATES)

    def _sweep(self) -> None:
        """Delete what a crash left: files that were written, or let go, and have no row."""
        named = {row["file"] for row in self._database.read("SELECT DISTINCT file FROM turns WHERE file IS NOT NULL")}
        for path in (self.directory / STATES).iterdir():
            if path.name not in named and self.share.has(path.name):
                path.unlink(missing_ok=True)
        self._database.empty_log()


_OWN: Final = "owner=? AND model=? AND tokenizer=?"
_SESSIONS: Final = "sessions INDEXED BY sessions_by_owner"
"""Searched by its owner first, an id of another is as absent as an id of nobody: its row is never touched, so that no
time differs."""


def _record(row: Mapping[str, Any]) -> SessionRecord:
    learning = LearnConfig.model_validate_json(row["learning"])
    own = {name: row[name] for name in ("id", "name", "owner", "learn", "created", "used", "turn", "n_tokens")}
    return SessionRecord(**own, learning=learning, size_bytes=row["size_bytes"], is_open=bool(row["is_open"]))


def _turn(row: Mapping[str, Any]) -> TurnRecord:
    own = {name: row[name] for name in ("text", "reply", "finish", "n_read", "n_drawn", "nats")}
    seed, ids = row["seed"], struct.unpack(f"<{len(row['ids']) // 4}I", row["ids"])
    said = Said(**own, seed=None if seed is None else int(seed), is_open=bool(row["is_open"]), ids=ids)
    beside = {name: row[name] for name in ("turn", "n_tokens", "size_bytes", "created", "label")}
    return TurnRecord(said=said, can_return=row["file"] is not None, **beside)


def _checked(header: Mapping[str, Any], place: str) -> "_Header":
    """The header of a session file that anybody may have written: what is read of it has the right types."""
    try:
        read = {key: header[key] for key in _Header.model_fields.keys() & header.keys()}
        if isinstance(read.get("turns"), list):
            said = {each.name for each in fields(Said)}
            read["turns"] = [_only(said, each) for each in read["turns"]]
        return _Header.model_validate(read)
    except ValidationError as cause:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in cause.errors()[:3])
        raise CheckpointCorrupt(
            f"{place} has a header that is not that of a session ({wrong}). Export it again.", path=place
        ) from cause


def _only(keys: Collection[str], value: object) -> object:
    """A mapping without its other keys; what is none stays as it is, to be refused."""
    return {key: value[key] for key in value if key in keys} if isinstance(value, Mapping) else value


class _Header(ConfigSection):
    """What is read of the header of a session file; whatever else is there is passed over."""

    name: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None
    n_tokens: Count = 0
    learn: Learn = "memory"
    learning: LearnConfig = LearnConfig()
    is_open: bool = False
    turns: list[Said] = []
    model: str | None
    named_model: str | None = None
    tokenizer: str
