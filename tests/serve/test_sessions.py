"""Sessions on a disk: what was acknowledged is there, what was deleted is not, and no file is taken on trust."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest
import torch

from meristem.data.tokenizer import byte_tokenizer
from meristem.errors import CheckpointCorrupt, CheckpointMismatch, MeristemError, NoSession, RunInUse, SessionBusy
from meristem.memory.state import flatten
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.serve import store
from meristem.serve.moment import FRESH, Moment, read, tensors_of
from meristem.serve.session import KEPT_TURNS, Session
from meristem.serve.sessions import FILE, STATES, Said, SessionRecord, Sessions

TOKENIZER = byte_tokenizer()


def model_of(random_seed: int):
    settings = ModelConfig(dim=12, n_layers=1, n_heads=2, sliding_window=5)
    return build(settings, MemoryConfig(rule="gated_delta", head_dim=6, chunk=7), 256, random_seed)


MODEL = model_of(1)


@pytest.fixture
def sessions(tmp_path):
    opened = Sessions(tmp_path / "data", MODEL, TOKENIZER)
    yield opened
    opened.close()


def say(sessions: Sessions, record: SessionRecord, text: str) -> SessionRecord:
    """Read a text as a turn."""
    ids = TOKENIZER.encode(text)
    with sessions.writing(record.id) as record:
        moment, _ = read(sessions.reader(record.learn), sessions.moment(record), ids)
        return sessions.add(record, moment, Said(text=text, n_read=len(ids), nats=1.5))


def reopened(sessions: Sessions, model=MODEL) -> Sessions:
    sessions.close()
    return Sessions(sessions.directory, model, TOKENIZER)


def assert_same(a: Moment, b: Moment) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert (left.keys(), a.n_tokens) == (right.keys(), b.n_tokens)
    assert all(torch.equal(leaf, right[name]) for name, leaf in left.items())


def files(sessions: Sessions) -> set[str]:
    return set(os.listdir(sessions.directory / STATES))


def test_a_session_outlives_its_process(sessions):
    """After a restart everything that was acknowledged is there, and the session goes on to the bit."""
    record = say(sessions, sessions.create(name="Ada"), "My name is Ada.")
    moment = sessions.moment(record)
    again = reopened(sessions)
    assert again.get(record.id) == record and again.records() == [record]
    assert again._live.get(record.id) is None, "an idle session is in no memory"
    assert_same(again.moment(record), moment)
    (turn,) = again.turns(record.id)
    assert (turn.said.text, turn.said.n_read, turn.said.nats, turn.can_return) == ("My name is Ada.", 15, 1.5, True)
    again.close()


def test_an_idle_session_leaves_memory(sessions, monkeypatch):
    monkeypatch.setattr("meristem.serve.sessions.MOST_LIVE_BYTES", 1)
    first, second = (say(sessions, sessions.create(), text) for text in ("one", "two"))
    moment = sessions.moment(second)
    assert list(sessions._live.moments) == [second.id]
    assert sessions.moment(first).n_tokens == 3
    assert list(sessions._live.moments) == [first.id]
    assert_same(sessions.moment(second), moment)


def test_forks_and_rollback_are_exact(sessions):
    """A fork stands where its session stood; a rollback is never having said it; neither knows of the other."""
    record = say(sessions, sessions.create(), "one")
    one = sessions.moment(record)
    two = sessions.moment(record := say(sessions, record, "two"))
    fork = sessions.fork(record.id, name="other")
    assert (fork.turn, fork.n_tokens, fork.name) == (2, 6, "other")
    back = sessions.roll_back(record.id, to=1)
    assert_same(sessions.moment(back), one)
    assert_same(sessions.moment(fork), two)
    assert_same(sessions.moment(sessions.roll_back(record.id, to=0)), FRESH)
    assert [each.said.text for each in sessions.turns(fork.id)] == ["one", "two"]
    sessions.delete(record.id)
    again = reopened(sessions)
    assert_same(again.moment(fork), two)
    assert_same(again.moment(again.roll_back(fork.id, to=1)), one)
    again.close()


def test_a_stated_number_of_turns_is_kept_and_those_with_a_label(sessions):
    record = say(sessions, sessions.create(), "0")
    saved = sessions.moment(record)
    assert sessions.label(record.id, label="start").label == "start"
    for at in range(KEPT_TURNS + 2):
        record = say(sessions, record, str(at))
    assert [each.turn for each in sessions.turns(record.id) if not each.can_return] == [2, 3]
    assert len(files(sessions)) == KEPT_TURNS + 1
    with pytest.raises(NoSession, match="cannot return to turn 3; it can to 0, 1, 4"):
        sessions.roll_back(record.id, to=3)
    assert_same(sessions.moment(sessions.roll_back(record.id, to=1)), saved)
    assert len(files(sessions)) == 1


def test_a_deleted_session_is_gone_from_the_disk(sessions):
    """No row, no file, and none of its words in any byte of the directory."""
    record = say(sessions, sessions.create(name="zanzibar"), "a very private xylophone")
    sessions.delete(record.id)
    with pytest.raises(NoSession, match="there is no session"):
        sessions.get(record.id)
    assert files(sessions) == set()
    content = b"".join(path.read_bytes() for path in sessions.directory.rglob("*") if path.is_file())
    assert b"xylophone" not in content and b"zanzibar" not in content and record.id.encode() not in content


def test_one_writer_at_a_time(sessions):
    record = sessions.create()
    with sessions.writing(record.id), pytest.raises(SessionBusy, match="is being written to"):
        sessions.delete(record.id)
    sessions.delete(record.id)


def test_owners_do_not_see_each_other(sessions):
    """Of another owner, and of an unknown id, all calls say the same."""
    record = sessions.create(owner="a")
    calls = (sessions.get, sessions.turns, sessions.export, sessions.fork, sessions.delete)
    for call in calls:
        with pytest.raises(NoSession) as foreign:
            call(record.id, "b")
        with pytest.raises(NoSession) as unknown:
            call("0" * 32, "b")
        assert str(foreign.value).replace(record.id, "") == str(unknown.value).replace("0" * 32, "")
    assert sessions.records("b") == [] and sessions.records("a") == [record]


def test_sessions_of_another_model_are_not_seen(sessions):
    record = say(sessions, sessions.create(), "one")
    other = reopened(sessions, model_of(2))
    assert other.records() == []
    with pytest.raises(NoSession):
        other.get(record.id)
    assert reopened(other).get(record.id) == record


def test_a_directory_has_one_server(sessions):
    with pytest.raises(RunInUse, match="another server uses"):
        Sessions(sessions.directory, MODEL, TOKENIZER)


def test_what_a_crash_left_is_swept(sessions):
    """A file that was written and has no row is gone after the next start; those with rows stay."""
    record = say(sessions, sessions.create(), "one")
    kept = files(sessions)
    (sessions.directory / STATES / f"{'f' * 32}.session").write_bytes(b"half")
    (sessions.directory / STATES / ".x.session.partial").write_bytes(b"half")
    again = reopened(sessions)
    assert files(again) == kept and again.moment(record).n_tokens == 3
    again.close()


@pytest.mark.fault
@pytest.mark.timeout(300)
def test_a_kill_loses_at_most_the_turn_in_flight(tmp_path):
    """SIGKILL at random moments of writing: every acknowledged turn is there, and every file opens."""
    program = textwrap.dedent("""
        import sys; from pathlib import Path
        from meristem.models.build import build; from meristem.models.config import ModelConfig
        from meristem.nn.config import MemoryConfig; from meristem.data.tokenizer import byte_tokenizer
        from meristem.serve.moment import read; from meristem.serve.sessions import Said, Sessions
        settings = ModelConfig(dim=12, n_layers=1, n_heads=2, sliding_window=5)
        model = build(settings, MemoryConfig(rule="gated_delta", head_dim=6, chunk=7), 256, 1)
        sessions = Sessions(Path(sys.argv[1]), model, byte_tokenizer())
        record = (sessions.records() or [sessions.create()])[0]
        while True:
            with sessions.writing(record.id) as record:
                moment, _ = read(sessions.reader(), sessions.moment(record), [65 + record.turn % 20])
                record = sessions.add(record, moment, Said(text=str(record.turn)))
            print(record.turn, flush=True)
    """)
    acknowledged = 0
    for n_turns in (1, 3, 8, 2, 5):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as child:
            for _ in range(n_turns):
                acknowledged = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read().split("\n")
            acknowledged = max([acknowledged, *(int(word) for word in rest[:-1])])
        sessions = Sessions(tmp_path, MODEL, TOKENIZER)
        (record,) = sessions.records()
        assert record.turn in (acknowledged, acknowledged + 1)
        assert [each.said.text for each in sessions.turns(record.id)] == [str(at) for at in range(record.turn)]
        moment = FRESH
        for at in range(record.turn):
            moment, _ = read(sessions.reader(), moment, [65 + at % 20])
        assert_same(sessions.moment(record), moment)
        sessions.close()


def test_s5_an_exported_session_goes_on_elsewhere(sessions, tmp_path):
    """Imported, it has the same tokens read, predictions and state to the bit, and what was said; no session in process
    needs more."""
    record = say(sessions, sessions.create(name="Ada"), "My name is Ada.")
    content = sessions.export(record.id)
    elsewhere = Sessions(tmp_path / "elsewhere", MODEL, TOKENIZER)
    found = elsewhere.put(content)
    assert (found.name, found.n_tokens, found.id != record.id) == ("Ada", 15, True)
    assert_same(elsewhere.moment(found), sessions.moment(record))
    assert [each.said.text for each in elsewhere.turns(found.id)] == ["My name is Ada."]
    assert_same(elsewhere.moment(say(elsewhere, found, "!")), sessions.moment(say(sessions, record, "!")))
    (tmp_path / "a.session").write_bytes(content)
    session = Session.load(tmp_path / "a.session", MODEL, TOKENIZER)
    assert_same(session._now, sessions._moment_at(record.id, 1))
    elsewhere.close()


def test_s5_a_session_saved_in_process_is_taken_in(sessions, tmp_path):
    session = Session(MODEL, TOKENIZER, name="Ada")
    for text in ("", "My name is Ada."):
        session.feed(text)
        session.save(tmp_path / "a.session")
        found = sessions.put((tmp_path / "a.session").read_bytes())
        assert_same(sessions.moment(found), session._now)


def hostile(sessions: Sessions) -> dict[str, bytes]:
    """Files that carry a right hash and should not be taken in."""
    record = say(sessions, sessions.create(), "one")
    moment, header = sessions.moment(record), sessions._header(record, 1)
    tensors = tensors_of(moment)
    wide = {name: torch.cat([leaf, leaf]) if leaf.ndim else leaf for name, leaf in tensors.items()}
    renamed = {name.replace("matrix_bhkv", "matrix_hkv"): leaf for name, leaf in tensors.items()}
    junk = tensors | {"state.layer.0.recall.x.junk_hk": torch.zeros(2, 3)}
    infinite = {name: leaf * float("nan") if leaf.is_floating_point() else leaf for name, leaf in tensors.items()}
    short = {name: leaf[..., :1] for name, leaf in tensors.items() if leaf.ndim}
    several = {"learn": "everything", "n_tokens": -1, "learning": {"lr": "x"}, "name": ["a"], "turns": [{"text": 3}]}
    several |= {"turns ": None, "model": 3, "tokenizer": None}
    made = {f"header {key}": store.pack(tensors, header | {key.strip(): value}) for key, value in several.items()}
    made |= {f"count {n}": store.pack(tensors, header | {"turns": [{"n_read": n}]}) for n in (-1, 1 << 60)}
    for name, held in {"wide": wide, "renamed": renamed, "junk": junk, "nan": infinite, "short": short}.items():
        made[name] = store.pack(held, header)
    made["no state"] = store.pack({}, header)
    made["no reading"] = store.pack(tensors, header | {"n_tokens": 0})
    deep = store.pack(tensors, header).replace(b'"session":"', b'"session":"' + b"[" * 100_000, 1)
    made["deep"] = deep
    made["empty"], made["text"], made["long header"] = b"", b"hello, world", b"\xff" * 8 + b"{}"
    made["cut"] = store.pack(tensors, header)[:-9]
    made["altered"] = store.pack(tensors, header).replace(b"n_tokens", b"n_tokans", 1)
    return made


def test_files_that_anybody_may_have_made_are_refused(sessions):
    """Each with an error of ours, and nothing of it stays."""
    made = hostile(sessions)
    before, kept = sessions.records(), files(sessions)
    for what, content in made.items():
        with pytest.raises(MeristemError) as refused:
            sessions.put(content)
        assert isinstance(refused.value, (CheckpointCorrupt, CheckpointMismatch)), what
    assert (sessions.records(), files(sessions)) == (before, kept)


def test_another_model_is_refused(sessions, tmp_path):
    content = sessions.export(say(sessions, sessions.create(), "one").id)
    other = Sessions(tmp_path / "other", model_of(2), TOKENIZER)
    with pytest.raises(CheckpointMismatch, match="another model"):
        other.put(content)
    other.close()


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\\b", "\0", "x" * 300, "CON", "state/../.."])
def test_s6_names_are_no_paths(sessions, name):
    """A name is only ever a value of a row, and an id is looked up, never joined to a directory."""
    record = say(sessions, sessions.create(name=name), "one")
    outside = set(os.listdir(sessions.directory.parent))
    with pytest.raises(NoSession):
        sessions.get(name)
    found = sessions.put(sessions.export(record.id), name=name)
    assert found.name == record.name == name[:200]
    assert set(os.listdir(sessions.directory.parent)) == outside


def test_a_broken_or_foreign_database_is_named(sessions):
    sessions.close()
    path = sessions.directory / FILE
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(CheckpointCorrupt, match="is broken"):
        Sessions(sessions.directory, MODEL, TOKENIZER)
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE x (y)")
    other.close()
    with pytest.raises(CheckpointCorrupt, match="another program"):
        Sessions(sessions.directory, MODEL, TOKENIZER)
    path.unlink()
    sessions.__init__(sessions.directory, MODEL, TOKENIZER)


def test_what_learns_is_of_the_session(sessions):
    """A session with a frozen memory keeps it; one whose weights learn takes them along on the disk."""
    frozen = say(sessions, sessions.create(learn="none"), "one two three")
    matrix = {name: leaf for name, leaf in flatten(sessions.moment(frozen).state).items() if "matrix" in name}
    later = flatten(sessions.moment(say(sessions, frozen, "four")).state)
    assert matrix and all(torch.equal(leaf, later[name]) for name, leaf in matrix.items())
    learning = say(sessions, sessions.create(learn="weights"), "one two three")
    moment = sessions.moment(learning)
    again = reopened(sessions)
    assert_same(again.moment(learning), moment)
    assert again.get(learning.id).learn == "weights"
    again.close()
