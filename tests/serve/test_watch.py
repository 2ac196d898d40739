"""What the page of runs is given: each record once, of the branch that survived, while the run writes on."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.checkpoint.run import RunManifest
from meristem.cli import run
from meristem.errors import RunError
from meristem.events import Event
from meristem.serve.access import Access
from meristem.serve.watch import make_watch
from meristem.serve.watched import Place, WatchedRun
from meristem.sinks.records import Records, history


class Run:
    """A run directory, with what a run that trains writes into it."""

    def __init__(self, directory: Path, rotate_size_bytes: int = 1 << 20) -> None:
        self.directory, self._rotate_size_bytes = directory, rotate_size_bytes
        self.manifest = RunManifest.create(directory, name="ada")
        self.step = 0
        self.open()

    def open(self) -> None:
        """As a process does that begins or goes on."""
        self.records = Records(self.directory, self.manifest.content["id"], rotate_size_bytes=self._rotate_size_bytes)

    def steps(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.step += 1
            values = {"bits_per_byte": 8 / self.step, "rate": 0.1}
            self.records.metrics(self.step, 10 * self.step, 0.0, "train", values)

    def go_to(self, step: int, name: str = "rollback.done") -> None:
        """Return to an earlier step."""
        self.step = min(step, self.step)
        self.records.event(Event(name, {"resumed_from": self.step}))


@pytest.fixture
def a_run(tmp_path):
    return Run(tmp_path / "ada")


def client(*watched: WatchedRun) -> TestClient:
    return TestClient(make_watch(watched, Access()), base_url="http://127.0.0.1:8001")


class Reader:
    """What a page keeps of one run."""

    def __init__(self, directory: Path, most_bytes: int = 1 << 20) -> None:
        self._run, self._most_bytes = WatchedRun(directory), most_bytes
        self.place, self.records, self.news = Place(), [], {}

    def read(self) -> None:
        is_end = False
        while not is_end:
            self.news = self._run.news(self.place, self._most_bytes)
            self.place, is_end = Place.of(self.news["after"]), self.news["is_end"]
            if self.news["is_new"]:
                self.records = []
            self.records += self.news.get("metrics", [])
            for seq, step in self.news.get("returns", []):
                self.records = [each for each in self.records if each["seq"] > seq or each["step"] <= step]

    @property
    def seqs(self) -> list[int]:
        return [record["seq"] for record in self.records]


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), st.integers(1, 4)),
        st.tuples(st.just("return"), st.integers(0, 12)),
        st.tuples(st.just("kill"), st.integers(0, 12)),
        st.tuples(st.just("read"), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(acts=ACTS, most_bytes=st.integers(1, 600), rotate_size_bytes=st.sampled_from([300, 1 << 20]))
def test_what_was_read_is_the_history(tmp_path_factory, acts, most_bytes, rotate_size_bytes) -> None:
    """One value per step, of the branch that survived, whatever was read before a return and in what portions."""
    run = Run(tmp_path_factory.mktemp("runs") / "ada", rotate_size_bytes)
    reader = Reader(run.directory, most_bytes)
    for act, number in [*acts, ("read", 0)]:
        if act == "steps":
            run.steps(number)
        elif act == "return":
            run.go_to(number)
        elif act == "kill":
            run.records.close()
            with open(run.directory / "metrics.ndjson", "ab") as file:
                file.write(b'{"torn": ')
            reader.read()
            run.open()
            run.go_to(number, "run.resumed")
        else:
            reader.read()
            assert reader.news["problem"] is None
    assert reader.seqs == [record["seq"] for record in history(run.directory)]


def test_a_return_that_lies_behind_the_portion_is_known(a_run) -> None:
    """Metrics of an abandoned branch never go out once the event is there, however little is read at a time."""
    a_run.steps(5)
    a_run.go_to(2)
    a_run.steps(1)
    news = WatchedRun(a_run.directory).news(Place())
    assert [record["step"] for record in news["metrics"]] == [1, 2, 3]
    assert [step for _, step in news["returns"]] == [2]


def test_all_that_the_page_shows_goes_out(a_run) -> None:
    a_run.records.metrics(1, 10, 0.0, "val", {"nats": float("nan")}, task="copy")
    a_run.records.event(Event("checkpoint.saved", {"path": "x"}, "warning"))
    a_run.records.sample(1, "Once", " upon", {})
    news = client(WatchedRun(a_run.directory)).get("/runs/0").json()
    (metrics,), (event,), (sample,) = news["metrics"], news["events"], news["samples"]
    assert (metrics["step"], metrics["tokens"], metrics["split"], metrics["task"]) == (1, 10, "val", "copy")
    assert metrics["metrics"] == {"nats": None}
    assert (event["name"], event["severity"], event["payload"]) == ("checkpoint.saved", "warning", {"path": "x"})
    assert (sample["step"], sample["prompt"], sample["text"]) == (1, "Once", " upon")
    assert (news["name"], news["status"], news["is_end"]) == ("ada", "created", True)


def test_an_empty_run_is_no_problem(a_run) -> None:
    news = WatchedRun(a_run.directory).news(Place())
    assert (news["metrics"], news["is_end"], news["problem"]) == ([], True, None)
    for stream in ("metrics", "events", "samples", "system"):
        (a_run.directory / f"{stream}.ndjson").unlink()
    assert WatchedRun(a_run.directory).news(Place())["problem"] is None


def test_a_run_that_is_deleted_is_one_sentence_and_comes_back_as_another(a_run) -> None:
    reader = Reader(a_run.directory)
    a_run.steps(3)
    reader.read()
    shutil.rmtree(a_run.directory)
    reader.read()
    assert (
        reader.news["problem"] == f"{a_run.directory} is gone: it was deleted or moved. Shown is what was read before."
    )
    assert len(reader.records) == 3
    other = Run(a_run.directory)
    other.steps(1)
    reader.read()
    assert reader.news["problem"] is None
    assert [record["step"] for record in reader.records] == [1]


def test_a_run_under_the_same_id_that_was_cut_begins_anew(a_run) -> None:
    reader = Reader(a_run.directory)
    a_run.steps(3)
    reader.read()
    a_run.records.close()
    (a_run.directory / "metrics.ndjson").write_bytes(b"")
    a_run.open()
    a_run.steps(1)
    reader.read()
    assert [record["step"] for record in reader.records] == [4]


def test_what_cannot_be_read_is_one_sentence(a_run) -> None:
    a_run.steps(1)
    a_run.records.close()
    with open(a_run.directory / "metrics.ndjson", "ab") as file:
        file.write(b'nonsense\n{"seq": 2, "step": 7}\n')
    news = WatchedRun(a_run.directory).news(Place())
    assert [record["step"] for record in news["metrics"]] == [1]
    assert news["problem"] == f"2 lines of {a_run.directory} hold no record and were passed over."
    watched = WatchedRun(a_run.directory)
    (a_run.directory / "run.json").write_bytes(b"{")
    assert "cannot be read as a run manifest" in watched.news(Place())["problem"]


@pytest.mark.parametrize(
    "text", ["x", "x/0.0/0.0", "x/0.0/0.0/0", "x/0.0/0.0/-1.0", f"x/0.0/0.0/0.{10**30}", "x/0.0/0.0/0.٣"]
)
def test_a_place_that_is_none_is_refused(a_run, text) -> None:
    answer = client(WatchedRun(a_run.directory)).get("/runs/0", params={"after": text})
    assert answer.status_code == 400
    assert "is no place in a run" in answer.json()["error"]["message"]


def test_a_place_is_its_text() -> None:
    text = "an/id/0.3/2.4/5.6"
    assert str(Place.of(text)) == text
    assert Place.of("") == Place()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8001", "[::1]:8001", "LOCALHOST"])
def test_own_names_are_answered(a_run, host) -> None:
    answer = client(WatchedRun(a_run.directory)).get("/runs", headers={"host": host})
    assert answer.json() == {"runs": [{"number": 0, "name": "ada", "path": str(a_run.directory)}]}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8001", "127.0.0.1.evil.example", "", "[::2]:8001"])
@pytest.mark.parametrize("path", ["/", "/runs", "/runs/0", "/page/watch.js"])
def test_a_foreign_name_is_refused(a_run, host, path) -> None:
    """A page of another site whose name leads here (DNS rebinding) can read nothing."""
    answer = client(WatchedRun(a_run.directory)).get(path, headers={"host": host})
    assert answer.status_code == 421 and "is not called" in answer.json()["error"]["message"]


def test_everything_is_answered_with_the_headers_of_a_page(a_run) -> None:
    asked = client(WatchedRun(a_run.directory))
    for path in ("/", "/page/watch.js", "/page/watch.css", "/page/style.css", "/page/chart.js", "/runs", "/runs/0"):
        answer = asked.get(path)
        assert answer.status_code == 200, path
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert asked.get("/runs/1").status_code == 404
    assert asked.post("/runs/0").status_code == 405


def test_a_link_is_called_after_the_run(a_run, tmp_path) -> None:
    (tmp_path / "latest").symlink_to("ada")
    assert WatchedRun(tmp_path / "latest").name == "ada"


def test_a_directory_without_a_run_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(RunError, match=r"holds no run\.json"):
        WatchedRun(tmp_path)
    assert run(["watch", str(tmp_path / "nowhere")]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_a_port_that_is_taken_is_one_sentence(a_run, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["watch", str(a_run.directory), "--port", str(port)]) == 3
    assert f"127.0.0.1:{port} cannot be listened at" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::"])
def test_it_listens_on_this_machine_alone(a_run, host, capsys) -> None:
    assert run(["watch", str(a_run.directory), "--host", host]) == 2
    assert "ssh -L" in capsys.readouterr().err


def test_it_says_where_it_is_and_opens_it(a_run, capsys, monkeypatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: [each.close() for each in sockets])
    assert run(["watch", str(a_run.directory), "--port", "0", "--open"]) == 0
    (url,) = opened
    assert url.startswith("http://127.0.0.1:") and not url.endswith(":0")
    assert capsys.readouterr().out == f"ada at {url}. Ctrl-C stops it.\n"


@pytest.mark.fault
def test_the_command_says_where_it_is_and_ends_on_a_signal(a_run) -> None:
    a_run.steps(1)
    words = ["watch", str(a_run.directory), str(a_run.directory), "--port", "0", "--json"]
    with subprocess.Popen([sys.executable, "-m", "meristem", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            assert said["runs"] == [str(a_run.directory)]
            with urllib.request.urlopen(f"{said['url']}/runs/0", timeout=60) as answer:
                assert len(json.load(answer)["metrics"]) == 1
            process.terminate()
            assert process.wait(60) != 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
