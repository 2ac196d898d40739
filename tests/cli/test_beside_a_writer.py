"""What is typed beside a run that trains: readers never fail, writers are refused, one bad run hides no other."""

import json
import os
import subprocess
import sys

import pytest
import torch

from meristem.checkpoint import run as runs
from meristem.checkpoint import store
from meristem.checkpoint.prune import prune
from meristem.checkpoint.run import RunLock, RunManifest
from meristem.cli import run
from meristem.errors import NoCheckpoint
from meristem.events import silent
from meristem.sinks.jsonl import JsonLines, read_records

N_READS = 12
WRITER = """
import os, select, sys
from pathlib import Path
from meristem.checkpoint import store
from meristem.checkpoint.prune import prune
from meristem.checkpoint.run import RunLock, RunManifest

os.fsync = lambda descriptor: None  # nothing here takes the power away
directory = Path(sys.argv[1])
with RunLock(directory):
    manifest, checkpoints = RunManifest.reopen(directory), directory / "checkpoints"
    held = store.find(directory, print)
    trees = {"model": held.tree("model")}
    files = {name: held.file(name) for name in ("config.yaml", "tokenizer.json")}
    values, step = {"device": {"dtype": "fp32"}}, held.step
    while not select.select([sys.stdin], [], [], 0)[0]:
        step += 1
        for _ in range(2):  # the second replaces the first
            store.save(checkpoints, step=step, trees=trees, values=values, files=files, header={"seq": step})
        prune(checkpoints, last=1, best=0, metric="loss", direction="min", every=0)
        manifest.update(checkpoints={"last": f"step-{step:08d}", "best": None})
        print(step, flush=True) if step == held.step + 1 else None
"""


@pytest.fixture
def busy(make_run):
    """A run into which another process saves and from which it prunes, as fast as it can."""
    directory = make_run("ada")
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline()
    yield directory
    writer.communicate("stop\n")
    assert writer.returncode == 0


def saved_last(directory):
    """The step after which the run saved last; 0 before it did."""
    return int((runs.read(directory)["checkpoints"]["last"] or "step-0").removeprefix("step-"))


@pytest.mark.fault
@pytest.mark.parametrize(
    "words",
    [
        ["sample", "RUN", "--prompt", "Ada", "--max-tokens", "3"],
        ["eval", "RUN", "--suite", "recall", "--max-windows", "1", "data.seq_len=33"],
        ["checkpoint", "ls", "RUN"],
        ["checkpoint", "show", "RUN"],
        ["checkpoint", "diff", "RUN", "RUN"],
        ["data", "tokenizer", "encode", "RUN", "Ada"],
        ["runs", "ls", "RUN/.."],
        ["runs", "show", "RUN"],
    ],
    ids=" ".join,
)
def test_gr16_readers_beside_a_run_that_prunes(busy, words, capsys):
    """Again and again, each reader finds something whole, and says nothing of what went away meanwhile."""
    typed = [word.replace("RUN", str(busy)) for word in words]
    codes = {0, 1} if "diff" in words else {0}
    n_reads, first, last = 0, saved_last(busy), 0
    while n_reads < N_READS or last < first + N_READS:
        n_reads, last = n_reads + 1, saved_last(busy)
        code = run([*typed, "--json"])
        out, err = capsys.readouterr()
        assert code in codes, out + err
        assert err == ""
        if words[:2] == ["checkpoint", "ls"]:
            assert json.loads(out), "a run that saved once always has a checkpoint"


def save_one(root, step):
    return store.save(
        root,
        step=step,
        trees={"model": {"w": torch.full((7,), float(step))}},
        values={"v": step},
        files={"f": b"%d" % step},
        header={"seq": step},
    )


def test_gr16_what_was_opened_stays_readable(tmp_path):
    """Pruned or replaced afterwards, a checkpoint gives what it held when it was opened."""
    opened = [store.open_checkpoint(save_one(tmp_path, step)) for step in (1, 2)]
    save_one(tmp_path, 3)
    store.save(tmp_path, step=2, trees={}, values={}, files={}, header={})
    prune(tmp_path, last=1, best=0, metric="loss", direction="min", every=0)
    for checkpoint in opened:
        assert checkpoint.tree("model")["w"].tolist() == [checkpoint.step] * 7
        assert (checkpoint.value("v"), checkpoint.file("f")) == (checkpoint.step, b"%d" % checkpoint.step)


def test_gr16_a_reader_chooses_again(tmp_path):
    """What was listed and is gone when its turn comes is no damage: the list is made anew."""
    for step in (1, 2):
        save_one(tmp_path, step)
    events = []

    def refusal(checkpoint):
        if checkpoint.step == 2:
            save_one(tmp_path, 3)
            store.delete(tmp_path / "step-00000001")
            store.delete(tmp_path / "step-00000002")
            return "it is not wanted"
        return None

    assert store.newest(tmp_path, events.append, refusal).step == 3
    assert events == []


def test_gr16_descriptors_are_given_back(tmp_path):
    """Opening many times leaves none open, also where a checkpoint is damaged."""
    save_one(tmp_path, 1)
    damaged = save_one(tmp_path, 2)
    (damaged / "f").write_bytes(b"3")
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        assert store.find(tmp_path, silent).step == 1
    assert len(os.listdir("/dev/fd")) == before


def test_gr16_a_checkpoint_that_is_gone_is_named(tmp_path):
    """By its own path there is nothing else to choose."""
    path = save_one(tmp_path, 1)
    store.delete(path)
    with pytest.raises(NoCheckpoint, match="there is no checkpoint directory .*step-00000001"):
        store.find(path, silent)


def test_gr16_records_are_read_while_files_are_set_aside(tmp_path):
    """A reader meets every record up to some moment, whenever the file was rotated."""
    path = tmp_path / "metrics.ndjson"
    lines = JsonLines(path, rotate_size_bytes=100)
    for step in range(0, 440, 11):
        lines.append({"step": step})
        found = read_records(path)
        seen = [next(found)["step"]]
        for later in range(step + 1, step + 11):
            lines.append({"step": later})
        seen += [record["step"] for record in found]
        assert seen == list(range(len(seen))) and len(seen) > step
    lines.close()


def test_gr16_a_run_killed_between_two_files_of_records(tmp_path):
    """The last was set aside and the next not begun: what there is can be read."""
    path = tmp_path / "metrics.ndjson"
    lines = JsonLines(path, rotate_size_bytes=100)
    lines.append({"step": 0})
    lines.close()
    path.rename(tmp_path / "metrics.0001.ndjson")
    assert list(read_records(path)) == [{"step": 0}]


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/step-00000010"])
@pytest.mark.parametrize("verb", [["prune", "--last", "1", "--best", "0"], ["pin"], ["pin", "--remove"]], ids=" ".join)
def test_gr10_one_lock_for_every_verb_that_writes(make_run, verb, below, capsys):
    """Beside a run that trains each is refused, however the run is named; then each works, and nothing is made."""
    directory = make_run("ada")
    before = {str(path) for path in directory.rglob("*")}
    words = ["checkpoint", verb[0], str(directory / below), *verb[1:]]
    with RunLock(directory):
        assert run(words) == 3
    assert "in use by process" in capsys.readouterr().err
    assert {str(path) for path in directory.rglob("*")} - before <= {str(directory / "run.lock")}
    assert run(words) == 0
    assert not [path for path in directory.rglob("*.lock") if path.parent != directory]


def test_gr10_checkpoints_of_a_live_run_named_from_inside(make_run, monkeypatch):
    """``.`` in the directory of its checkpoints is the same run."""
    directory = make_run("ada")
    monkeypatch.chdir(directory / "checkpoints")
    with RunLock(directory):
        assert run(["checkpoint", "prune", "."]) == 3
    assert run(["checkpoint", "prune", "."]) == 0


@pytest.mark.parametrize(
    "words, code",
    [
        (["checkpoint", "prune"], 3),
        (["checkpoint", "ls"], 4),
        (["checkpoint", "pin"], 3),
        (["runs", "ls"], 3),
        (["data", "ls", "--root"], 4),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else str(words),
)
def test_gr10_a_mistyped_path_is_an_error_and_makes_nothing(tmp_path, words, code, capsys):
    """The path is named, and still nothing is there."""
    assert run([*words, str(tmp_path / "rnu")]) == code
    assert "rnu" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


BAD_MANIFESTS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "list": b"[]",
    "no-best": b'{"status": "finished", "best": 7}',
    "no-heart": b'{"status": "running"}',
    "odd-name": b'{"name": {}, "status": "finished"}',
}


def test_gr14_one_bad_run_is_one_line(tmp_path, make_run, answered, capsys):
    """With the reason; all others are shown, those before and those after it."""
    for name in ("ada", "zoe"):
        make_run(name)
    for name, content in BAD_MANIFESTS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / runs.FILE).write_bytes(content)
    (tmp_path / "directory" / runs.FILE).mkdir(parents=True)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / runs.FILE).symlink_to(runs.FILE)
    RunManifest.create(tmp_path / "bad-records").end("finished", 0)
    for stream in ("events", "metrics"):
        (tmp_path / "bad-records" / f"{stream}.ndjson").write_bytes(b"{}\n")
    code, rows = answered("runs", "ls", tmp_path)
    bad = {row["name"]: row["reason"] for row in rows if "reason" in row}
    good = [row["name"] for row in rows if row["status"] == "finished" and "reason" not in row]
    assert (code, good) == (0, ["ada", "zoe"])
    assert set(BAD_MANIFESTS) | {"directory", "loop"} <= bad.keys() and len(bad) == len(rows) - 2
    assert run(["runs", "ls", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + len(rows)
    assert all(sum(reason in line for line in shown) == 1 for reason in bad.values())
