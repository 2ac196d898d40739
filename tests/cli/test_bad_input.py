"""Whatever is typed, the answer is a sentence and a documented exit code, and no traceback."""

import inspect
import io
import itertools
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from meristem import cli, errors
from meristem.checkpoint.run import RunManifest
from meristem.cli import run

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
CODES = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)} - {70}
"""What the documents promise, but for the one which says that somebody overlooked something."""

TINY = ["charrnn", "data.seq_len=17", "data.batch_size=2", "model.dim=12", "model.n_layers=1", "train.steps=1"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Paths with something wrong, by what that is."""
    # Two levels down, so that what leads two levels up is searched in this folder and not in those of all tests.
    root = tmp_path_factory.mktemp("places") / "a" / "b"
    root.mkdir(parents=True)
    text = root / "text.txt"
    text.write_text("a text, as good as any other\n" * 40)
    binary = root / "binary.yaml"
    binary.write_bytes(bytes(range(256)) * 9)
    broken = root / "broken.yaml"
    broken.write_text("a: [1, {b: \n\t- !!python/object:os.system x")
    (root / "deep.yaml").write_text("a: " + "[" * 3000)
    (root / "scalar.yaml").write_text("7\n")
    loop = root / "loop.yaml"
    loop.symlink_to(loop)
    (root / "empty").mkdir()
    torn = root / "torn"
    (torn / "checkpoints" / "step-00000001").mkdir(parents=True)
    for name in ("run.json", "config.yaml", "metrics.ndjson", "events.ndjson", "manifest.json", "tokenizer.json"):
        (torn / name).write_bytes(b'{"status": "running", \xff')
    (torn / "checkpoints" / "step-00000001" / "manifest.json").write_bytes(b"{}")
    strange = root / "strange"
    strange.mkdir()
    for name in ("run.json", "config.yaml", "metrics.ndjson", "events.ndjson", "manifest.json", "tokenizer.json"):
        (strange / name).mkdir()
    RunManifest.create(root / "bare")
    return {
        "missing": root / "nowhere",
        "below-missing": root / "no" / "where.yaml",
        "file": text,
        "below-file": text / "below.yaml",
        "directory": root / "empty",
        "directory-as-yaml": _directory(root / "directory.yaml"),
        "not-writable": Path("/proc/nowhere.yaml"),
        "long": root / ("x" * 300),
        "long-yaml": root / ("x" * 300 + ".yaml"),
        "very-long": Path("y/" * 3000),
        "empty": "",
        "nul": "a\0b.yaml",
        "up": root / ".." / ".." / "nowhere" / "..",
        "binary": binary,
        "broken": broken,
        "deep": root / "deep.yaml",
        "scalar": root / "scalar.yaml",
        "loop": loop,
        "below-loop": loop / "x",
        "torn-run": torn,
        "strange-run": strange,
        "bare-run": root / "bare",
        "surrogate": "\udcff",
        "option": "--",
    }


def _directory(path):
    path.mkdir()
    return path


READING = [
    ["config", "show", "PATH"],
    ["plan", "PATH"],
    ["train", "PATH", "--run-dir", "PLACE"],
    ["data", "prepare", "PATH"],
    ["sample", "PATH"],
    ["chat", "PATH"],
    ["eval", "PATH"],
    ["eval", "GOOD", "--task", "PATH"],
    ["eval", "--merge", "PATH"],
    ["eval", "--continual", "PATH"],
    ["checkpoint", "ls", "PATH"],
    ["checkpoint", "show", "PATH"],
    ["checkpoint", "verify", "PATH"],
    ["checkpoint", "diff", "PATH", "GOOD"],
    ["checkpoint", "diff", "GOOD", "PATH"],
    ["checkpoint", "pin", "PATH"],
    ["checkpoint", "pin", "PATH", "--remove"],
    ["checkpoint", "prune", "PATH"],
    ["checkpoint", "convert", "PATH", "--to", "PLACE"],
    ["export", "hf", "PATH", "--to", "PLACE"],
    ["export", "edge", "PATH", "--to", "PLACE"],
    ["export", "onnx", "PATH", "--to", "PLACE"],
    ["finetune", "PATH", "--run-dir", "PLACE"],
    ["runs", "ls", "PATH"],
    ["runs", "show", "PATH"],
    ["runs", "diff", "PATH", "GOOD"],
    ["runs", "diff", "GOOD", "PATH"],
    ["runs", "export", "PATH"],
    ["runs", "compare", "GOOD", "PATH", "--picture", "PLACE"],
    ["data", "ls", "--root", "PATH"],
    ["data", "verify", "PATH"],
    ["data", "stats", "PATH"],
    ["data", "tokenizer", "inspect", "PATH"],
    ["data", "tokenizer", "encode", "PATH", "Ada"],
    ["data", "tokenizer", "decode", "PATH", "65"],
    ["bench", "evidence", "--config", "PATH", "--out", "PLACE"],
    ["bench", "growth", "--config", "PATH", "--out", "PLACE"],
    ["bench", "continual", "--config", "PATH", "--out", "PLACE"],
    ["bench", "serve", "PATH", "--out", "PLACE"],
    ["bench", "all", "--part", "start", "--limits", "PATH", "--out", "PLACE"],
    ["serve", "PATH", "--data", "PLACE"],
    ["keys", "ls", "--data", "PATH"],
    ["keys", "add", "--data", "PATH", "ada"],
    ["keys", "revoke", "--data", "PATH", "ada"],
    ["watch", "PATH", "PLACE"],  # the second is never there, so that none of them is shown
    ["grow", "request", "PATH", "--why", "ada"],
    ["train", *TINY, "--no-plan", "--run-dir", "PLACE", "--resume", "PATH"],
    ["grow", "run", "PATH", "--run-dir", "PLACE"],
    ["grow", "report", "PATH"],
    ["grow", "library", "ls", "PATH"],
    ["grow", "library", "show", "PATH", "ada"],
    ["grow", "library", "put", "PATH", "ada", "GOOD", "--slot", "blocks.0"],
    ["grow", "library", "put", "PLACE", "ada", "PATH", "--slot", "blocks.0"],
    ["grow", "library", "certify", "PATH", "ada", "GOOD", "--slot", "blocks.0"],
    ["scan", "PATH"],
    ["sweep", "PATH"],
    ["config", "sweep", "PATH"],
    ["policy", "test", "PATH"],
    ["policy", "show", "PATH"],
    ["scan", "--diff", "HEAD", "PATH"],
    ["scan", "--baseline", "PATH"],
]
KINDS = (
    "missing below-missing file below-file directory directory-as-yaml not-writable long long-yaml very-long empty nul "
    "up binary broken deep scalar loop below-loop torn-run strange-run bare-run surrogate option"
).split()


def typed(words, path, finished, tmp_path):
    """The command line with its places put in."""
    found = {"PATH": str(path), "GOOD": str(finished), "PLACE": str(tmp_path / "place")}
    return [found.get(word, word) for word in words]


def answer_to(words, capfd):
    """Exit code and everything said, after the check that it is a promised code and no traceback."""
    code = run(words)
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err, err
    assert code in CODES, (words, code, err)
    assert code in (0, 1) or err.startswith("error: ") or "warning" in err, (code, out, err)
    return code, err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where nothing is, with nothing to read, and a cache of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_gr8_bad_paths(words, places, finished, tmp_path, capfd):
    """Every verb that takes a path, with everything that a path can be wrong in."""
    wrong = []
    for kind in KINDS:
        if (words[0], kind) == ("eval", "option"):
            continue  # where nothing is named the model that comes along is measured, which takes a minute
        try:
            answer_to(typed(words, places[kind], finished, tmp_path), capfd)
        except AssertionError as error:
            wrong.append(f"{kind}: {str(error).splitlines()[0]}")
    assert wrong == [], "\n".join(["", *wrong])


UNWRITABLE = ("below-file", "not-writable", "long", "very-long", "below-loop")
WRITING = ("file", "below-file", "not-writable", "long", "very-long", "nul", "loop", "below-loop")


@pytest.mark.parametrize("kind", WRITING)
@pytest.mark.parametrize("way", ["--run-dir", "run.dir"])
def test_gr8_a_run_that_has_no_place(way, kind, places, capfd, tmp_path):
    """One sentence, before any work: neither a plan is made nor a text prepared."""
    path = str(places[kind])
    words = ["--run-dir", path] if way == "--run-dir" else [f"run.dir={path}"]
    code, err = answer_to(["train", "titans-mag", *words], capfd)
    assert code == (2 if kind == "nul" else 3)
    assert err.count("\n") == 1
    assert os.listdir(tmp_path / "here") == []
    assert not (tmp_path / "cache").exists()


def test_gr8_nothing_is_left_of_a_place_that_was_tried(tmp_path, capfd):
    """A run that is refused for another reason leaves no directory, so that the next one has its name."""
    words = ["train", "charrnn", "--run-dir", str(tmp_path / "a" / "b"), "data.source=nowhere"]
    assert answer_to(words, capfd)[0] == 4
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", [kind for kind in WRITING if kind != "loop"])  # it would be replaced
@pytest.mark.parametrize(
    "words",
    [
        ["runs", "export", "GOOD", "--out", "PATH"],
        ["runs", "compare", "GOOD", "--picture", "PATH"],
        ["scan", "GOOD", "--write-baseline", "PATH"],
        ["bench", "evidence", "--config", "EVIDENCE", "--out", "PATH"],
        ["bench", "stability", "--steps", "1", "--out", "PATH"],
        ["bench", "serve", "--out", "PATH"],
        ["bench", "all", "--part", "start", "--out", "PATH"],
        ["bench", "memory", "--repeats", "1", "--picture", "PATH"],
        ["data", "prepare", *TINY, "data.source='TEXT'", "data.root='PATH'"],
    ],
    ids=" ".join,
)
def test_gr8_a_file_that_cannot_be_written(words, kind, places, finished, tmp_path, capfd):
    """The same of every other thing that is written: it is said before the work."""
    if words[-1] == "PATH" and kind == "file":
        kind = "directory"
    line = [word.replace("PATH", str(places[kind])).replace("TEXT", str(places["file"])) for word in words]
    line = [str(finished) if word == "GOOD" else word for word in line]
    line = [str(Path(__file__).parents[2] / "docs" / "evidence.yaml") if word == "EVIDENCE" else word for word in line]
    code, err = answer_to(line, capfd)
    assert code == (2 if kind == "nul" else 4 if "prepare" in words else 3)
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", [*WRITING, "missing", "directory", "binary", "torn-run", "empty", "surrogate"])
def test_gr8_commands_of_a_chat(kind, places, finished, capfd, monkeypatch):
    """A path typed in the middle of a talk ends neither it nor in a traceback."""
    path = "" if kind == "nul" else str(places[kind])
    lines = [
        f"/load {path}",
        *([f"/save {path}"] if kind in UNWRITABLE else []),
        "/go x",
        "/rollback 9",
        "/fork",
        "/what",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, f"/load {path}\0x", "/forget"])))
    assert run(["chat", str(finished)]) == 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err and err.count("error: ") == len(lines) + 1
    assert out == "everything is forgotten\n"


HUGE = "1" + "0" * 400
NUMBERS = (
    "",
    "-1",
    "0",
    "abc",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "0x10",
    "1_0",
    HUGE,
    f"-{HUGE}",
    "1.5",
    "\u0661",
)


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "GOOD", "--max-tokens", "NUMBER"],
        ["sample", "GOOD", "--max-tokens", "2", "--temperature", "NUMBER"],
        ["sample", "GOOD", "--max-tokens", "2", "--top-k", "NUMBER"],
        ["sample", "GOOD", "--max-tokens", "2", "--top-p", "NUMBER"],
        ["sample", "GOOD", "--max-tokens", "2", "--seed", "NUMBER"],
        ["eval", "GOOD", "--suite", "recall", "data.seq_len=33", "--max-windows", "NUMBER"],
        ["data", "tokenizer", "decode", "GOOD", "NUMBER"],
        ["data", "tokenizer", "inspect", "GOOD", "--longest", "NUMBER"],
        ["checkpoint", "prune", "COPY", "--last", "NUMBER"],
        ["checkpoint", "prune", "COPY", "--best", "NUMBER"],
        ["checkpoint", "prune", "COPY", "--every", "NUMBER"],
        ["checkpoint", "prune", "COPY", "--metric", "NUMBER"],
        ["checkpoint", "prune", "COPY", "--direction", "NUMBER"],
        ["plugins", "check", "--kind", "memory", "--load-s", "NUMBER"],
        ["plugins", "ls", "--kind", "NUMBER"],
        ["doctor", "--drill", "NUMBER"],
        ["bench", "evidence", "--config", "nowhere.yaml", "--jobs", "NUMBER"],
        ["config", "show", "titans-mag", "train.steps=NUMBER"],
        ["config", "show", "titans-mag", "optim.lr=NUMBER"],
        ["config", "show", "titans-mag", "model.n_layers=NUMBER"],
        ["config", "show", "titans-mag", "run.dir=NUMBER"],
        ["config", "show", "titans-mag", "train.max_time=NUMBER"],
        ["config", "show", "titans-mag", "memory.half_life=NUMBER"],
        ["config", "show", "titans-mag", "NUMBER=1"],
        ["config", "show", "NUMBER"],
    ],
    ids=" ".join,
)
def test_gr8_odd_numbers(words, finished, make_run, capfd):
    """Every number that can be typed, with every text that is none, or an odd one."""
    copy = str(make_run("copy")) if "COPY" in words else ""
    wrong = []
    for number in NUMBERS:
        if "--max-tokens" in words and words[-1] == "NUMBER" and number == HUGE:
            continue  # it is what was asked for, and never ends
        line = [word.replace("NUMBER", number).replace("COPY", copy) for word in words]
        try:
            answer_to([str(finished) if word == "GOOD" else word for word in line], capfd)
        except AssertionError as error:
            wrong.append(f"{number[:9]}: {str(error).splitlines()[0]}")
    assert wrong == [], "\n".join(["", *wrong])


ODD_SETTINGS = (
    *("", "=", "=1", "a", ".=1", "a..b=1", "model=1", "model=null", "model=[1]", "model.dim", "model.dim=["),
    *("model.dim={a: 1}", "optim.lr=!!python/object:os.system x", "data.source=", "data.source=null"),
    *('data.source="\\0"', 'data.source="/\\0"', 'data.root="\\0"', "data.source=" + "x" * 300),
    *("data.source=/" + "x" * 300, "data.include=[", "data.include=['[']", "run.name=../x", "run.name=" + "x" * 300),
    *("data.source=installed:..", "data.source=installed:" + "x" * 300, "data.source=installed:torch.nn"),
    *("data.source=/dev/null", "tokenizer.kind=bpe", "data.validation=0.9999999", "model.name=../../x"),
    *("memory.rule=\ud800", "data.source=\udcff", "&a [*a]", "model.layers=&a [*a]", "model.dim=&a {b: *a}"),
    *("data.seq_len=" + "9" * 5000, "data.source=" + "[" * 2000, "device.device=cuda:99", "device.device=x"),
)


@pytest.mark.parametrize("override", ODD_SETTINGS)
def test_gr8_odd_settings(override, tmp_path, capfd):
    """Text where a setting is expected, whatever it holds."""
    (tmp_path / "here" / "text.txt").write_text("few words")
    for words in (["config", "show"], ["data", "prepare"]):
        answer_to([*words, "titans-mag", "data.source=text.txt", "data.root=.", override], capfd)


def test_gr8_the_unforeseen_is_one_sentence_and_a_file(monkeypatch, capfd, tmp_path):
    """An error that nobody foresaw has an exit code of its own; its traceback is in the file that is named."""
    monkeypatch.setattr("meristem.checkpoint.store.entries", lambda root: [][1])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(["checkpoint", "ls", "x"]) == 70
    out, err = capfd.readouterr()
    (kept,) = tmp_path.glob("*.traceback")
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("error: IndexError: list index out of range.") and str(kept) in err
    assert "Traceback" in kept.read_text() and "test_bad_input.py" in kept.read_text()
    assert run(["checkpoint", "ls", "x", "--json"]) == 70
    assert '"traceback":' in capfd.readouterr().out
    assert run(["checkpoint", "ls", "x", "--debug"]) == 70
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, cli.typer.Abort])
def test_gr8_ctrl_c_in_any_verb(interrupt, monkeypatch, capfd):
    """It ends with 130 and without a word."""

    def stop(root):
        raise interrupt

    monkeypatch.setattr("meristem.checkpoint.store.entries", stop)
    assert run(["checkpoint", "ls", "x"]) == 130
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "words", [["config", "schema"], ["runs", "export", "GOOD"], ["--help"], ["data", "ls", "--json"]]
)
def test_gr8_a_reader_of_the_output_that_leaves(words, finished):
    """As ``| head -0`` does: no traceback, no complaint of Python, and the code that a shell knows."""
    line = [str(finished) if word == "GOOD" else word for word in words]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "meristem", *line], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_gr8_a_full_disk_under_the_output(finished):
    """What cannot be printed is the environment's fault, and said."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "meristem", "runs", "show", str(finished)],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 3
    assert "No space left" in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def _hints(function):
    return typing.get_type_hints(inspect.unwrap(function), vars(sys.modules[function.__module__])).values()


ENCODE, SHOW = "data tokenizer encode", "runs show"


@pytest.mark.parametrize(
    "verb, closed, code",
    [(ENCODE, "<&-", 0), (SHOW, ">&-", 0), (SHOW, "2>&-", 0), (SHOW, ">&- 2>&-", 0), (SHOW, ">/dev/full", 3)],
)
def test_gr8_streams_that_are_closed(verb, closed, code, finished):
    """A stream that is not there takes nothing and gives nothing; one that is full is said on the other."""
    command = f"'{sys.executable}' -m meristem {verb} '{finished}' --json {closed}"
    done = subprocess.run(["sh", "-c", command], input="Ada", capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


def test_gr8_the_codes_of_all_errors_are_documented():
    """Every class of the tree has one of the table; a text that a policy blocks is the one negative result."""
    found, kinds = set(), [errors.MeristemError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind is not errors.Blocked:
            found.add(kind.exit_code)
    assert found <= CODES - {0, 1} | {errors.UNEXPECTED}
    assert errors.exit_code(OSError()) == 3 and errors.exit_code(ValueError()) == errors.UNEXPECTED == 70


def test_gr8_every_verb_is_tried():
    """A new verb that takes a path is added to the lists above."""
    command = cli.typer.main.get_command(cli.app)

    def leaves(command, words):
        for name, inner in getattr(command, "commands", {}).items():
            yield from leaves(inner, [*words, name])
        if not hasattr(command, "commands") and any("Path" in str(hint) for hint in _hints(command.callback)):
            yield words

    tried = {tuple(itertools.takewhile(lambda word: word.isalpha() and word.islower(), words)) for words in READING}
    tried |= {("bench", "stability"), ("bench", "all"), ("bench", "memory"), ("doctor",)}
    assert {tuple(words) for words in leaves(command, [])} <= tried
