"""``meristem bench serve``: what it counts, what it says of it, and that it leaves nothing behind."""

import asyncio
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from urllib.parse import urlsplit

import orjson
import psutil
import pytest
import torch

import serving
from meristem.bench.measure import Row
from meristem.bench.serving import load, speed, study
from meristem.bench.serving.client import Address, Connection, Heard
from meristem.bench.serving.server import Server
from meristem.cli import run
from meristem.errors import DiskFull, WorkerDied
from meristem.serve.sessions import Sessions


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A small one in a thread of this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with serving.serving(tmp_path_factory.mktemp("data")) as (url, served):
        found = urlsplit(url)
        yield Server(Address(found.hostname, found.port), os.getpid()), served
    torch.set_num_threads(before)


SMALL = SimpleNamespace(model=serving.model_of(1), tokenizer=serving.TOKENIZER)


def by_name(rows) -> dict[str, Row]:
    return {row.name: row for row in rows}


def test_a_spell_is_the_time_in_which_all_write():
    """What one writes alone, before or behind, is not counted; a token without a chunk is."""
    early, late = Heard(times=[0.0, 1.0, 2.0, 3.0], n_tokens=8), Heard(times=[1.0, 1.5, 3.0, 4.0], n_tokens=8)
    found = speed.spell_of([early, late])
    assert found.gaps_s == (1.0, 1.0, 0.5, 1.5)
    assert found.tokens_per_s == 2 * 4 / 2.0


def test_sessions_that_never_wrote_together_write_again(monkeypatch):
    """Twice as much, until all of them write at one time."""
    asked, apart, together = [], [Heard(times=[0.0, 1.0]), Heard(times=[2.0, 3.0])], [Heard(times=[0.0, 1.0, 2.0])]

    async def heard(_server, _n_sessions, n_tokens):
        asked.append(n_tokens)
        return apart if len(asked) < 3 else together

    monkeypatch.setattr(speed, "_heard", heard)
    assert asyncio.run(speed.write(None, 2, 5)).gaps_s == (1.0, 1.0) and asked == [5, 10, 20]


def test_a_stream_is_heard_token_by_token(server):
    async def heard() -> Heard:
        connection, found = await Connection.to(server[0].address), Heard()
        await connection.stream("/v1/completions", {"prompt": "Ada", "max_tokens": 12, "temperature": 0}, found)
        # The connection goes on, and an error of the server is one here.
        with pytest.raises(WorkerDied, match="answered /v1/nothing with 404"):
            await connection.ask("GET", "/v1/nothing")
        assert (await connection.ask("GET", "/readyz"))["model"] == "small"
        connection.close()
        return found

    found = asyncio.run(heard())
    assert found.n_tokens == 12 >= len(found.times) > 0
    assert found.asked_at <= found.times[0] and found.times == sorted(found.times)


def test_figures_of_a_small_server(server, monkeypatch):
    """Every part gives its rows with the targets of the issue, and no session is left."""
    monkeypatch.setattr(speed, "N_FEEDS", 10)
    monkeypatch.setattr(load, "N_TURNS", 3)
    monkeypatch.setattr(speed, "SHORTEST_S", 0.01)
    found = by_name(speed.speeds(server[0], server[0], SMALL, (1, 3), 9, 1))
    rate = found["sessions that write together: 3"]
    assert rate.measured > 0 and rate.figures["sessions"] == 3
    share, single = found["tokens/s of that server to those in process"], found["3 by a server of one thread"]
    in_process = found["3 by one thread in process, without a server"]
    assert share.measured == pytest.approx(single.measured / in_process.measured) and share.target == 0.9
    assert found["that to the median"].target == 3.0
    read, written, size = speed.long_session(server[0], 400)
    assert (read.target, written.target, size.measured, size.is_met) == (1.2, 1.2, 1.0, True)
    health, wait, _ = load.health(server[0], 2, 3000)
    assert (health.target, wait.target) == (100.0, 0.5) and wait.measured > 0 and health.measured > 0
    said = []
    memory, _ = load.requests(server[0], 100, said.append)
    assert memory.target == 1.05 and len(memory.figures["memory_bytes"]) > 50 and said
    assert server[1].sessions.records() == []


def test_idle_sessions_have_files_of_their_own(tmp_path, monkeypatch):
    ids, size_bytes = load._sessions_on_disk(tmp_path, SMALL, 5, lambda line: None)
    sessions = Sessions(tmp_path, SMALL.model, SMALL.tokenizer)
    assert sorted(ids) == [record.id for record in sessions.records()]
    assert {record.n_tokens for record in sessions.records()} == {load.KEPT_TOKENS}
    sessions.close()
    files = list((tmp_path / "states").iterdir())
    assert len(files) == 5 and all(path.stat().st_size <= size_bytes for path in files)
    monkeypatch.setattr(load.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(DiskFull, match="--idle to fewer"):
        load._sessions_on_disk(tmp_path / "full", SMALL, 5, lambda line: None)


def test_parts_that_are_none_are_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "page.md")]
    assert run(["bench", "serve", "--part", "nothing", *out]) == 2
    assert "there are speeds, long, health, requests, idle" in capsys.readouterr().err
    assert run(["bench", "serve", "--part", "idle", "--idle", "0", *out]) == 2
    assert "every part is left out" in capsys.readouterr().err and not (tmp_path / "page.md").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_measures_a_server_of_its_own(tmp_path, capsys):
    """Every part at its smallest, of the model in the box, in processes of their own; exit code 1 where one missed."""
    sizes = "--tokens 8 --repeats 1 --long 300 --text 2000 --requests 20 --idle 3".split()
    out = tmp_path / "new" / "serve-bench.md"
    code = run(["bench", "serve", "--sessions", "2", *sizes, "--out", str(out)])
    parts = orjson.loads(out.with_suffix(".json").read_bytes())["parts"]
    rows = [row for found in parts for row in found["rows"]]
    assert code == (1 if False in [row["is_met"] for row in rows] else 0)
    assert [found["part"] for found in parts] == [*study.PARTS.names]
    assert len(rows) == 18 and "idle session" in capsys.readouterr().out


@pytest.mark.slow
def test_a_measurement_that_is_ended_ends_its_server():
    """SIGTERM, which a time limit sends, leaves no server behind."""
    code = (
        "import tempfile, time\nfrom pathlib import Path\nfrom meristem.bench.serving.server import serving\n"
        "with tempfile.TemporaryDirectory() as place, serving(Path(place), None, 4) as server:\n"
        "    print(server.pid, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        server = psutil.Process(int(process.stdout.readline()))
        process.terminate()
        assert process.wait(90) == 128 + signal.SIGTERM
        assert not server.is_running()
