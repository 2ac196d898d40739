"""Task files, what a model makes of their examples, and what shards come to together."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meristem.data.tokenizer import byte_tokenizer
from meristem.device.config import DeviceConfig
from meristem.device.resolve import resolve
from meristem.errors import BadRecords, DataError, NonFinite, RunError, UnknownKey, WrongValue
from meristem.evaluate.asking import Reading, ask
from meristem.evaluate.results import (
    SUMMARY,
    Shard,
    entry,
    merge,
    require_free,
    shard_of,
    write_predictions,
    write_summary,
)
from meristem.evaluate.tasks import Example, Task, open_task
from meristem.events import silent
from meristem.models.build import build
from meristem.models.config import LearnConfig, ModelConfig
from meristem.models.online import frozen, online_reader
from meristem.nn.config import MemoryConfig
from meristem.train.loss import cross_entropy

DEVICE = resolve(DeviceConfig(device="cpu", dtype="fp32", threads=1), silent)
MODEL = build(ModelConfig(dim=12, n_layers=1, n_heads=2, sliding_window=5), MemoryConfig(head_dim=6, chunk=7), 256, 3)


def reading(batch: int = 3, piece: int = 5, reader=MODEL) -> Reading:
    return Reading(reader, byte_tokenizer(), DEVICE, batch, piece)


@pytest.fixture
def described(tmp_path: Path):
    """Writes a task file with its data and opens it."""

    def describe(yaml: str, *records: object, name: str = "t.yaml") -> Task:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        (tmp_path / name).write_text(yaml)
        return open_task(str(tmp_path / name))

    return describe


def test_fields_fill_templates(described):
    """A field alone gives what it holds, in a text it is text; braces double for themselves; the name is the file's."""
    task = described(
        "kind: choice\ndata: data.jsonl\nid: 'q{n}'\nprompt: '{{{q}}} {n}?'\nchoices: '{options}'\nanswer: '{a}'\n",
        {"n": 1, "q": "who", "options": ["Ada", "Eva"], "a": 1},
        "",
        {"n": 2, "q": "{who}", "options": ["Ada", "Eva"], "a": "Ada"},
    )
    assert task.name == "t"
    assert task.examples == (
        Example("q1", "{who} 1?", ("Eva",), ("Ada", "Eva"), 1),
        Example("q2", "{{who}} 2?", ("Ada",), ("Ada", "Eva"), 0),
    )
    written = described(
        "kind: generate\ndata: data.jsonl\nprompt: '{q}'\nanswer: '{a}'\n", {"q": "x", "a": ["b", 3]}, name="u.yaml"
    )
    assert written.examples == (Example("1", "x", ("b", "3")),)
    assert [name for name, _ in written.measures] == ["exact_match", "f1"]


def test_cx5_3_bits_per_byte_is_always_reported(described):
    task = described("{kind: likelihood, data: data.jsonl, answer: '{a}', metrics: [perplexity]}", {"a": "b"})
    assert [name for name, _ in task.measures] == ["perplexity", "bits_per_byte"]


CHOICE = "kind: choice\ndata: data.jsonl\nprompt: '{q}'\nchoices: [x, y]\nanswer: '{a}'\n"
REFUSED = [
    ("kind: chioce\ndata: data.jsonl\n", [{}], WrongValue, "no task is called 'chioce'. Nearest: choice"),
    (f"{CHOICE}metric: [f1]\n", [{}], UnknownKey, "metrics"),
    (f"{CHOICE}metrics: [f1]\n", [{"q": 1, "a": 0}], WrongValue, "needs a generated text, which a task of kind choice"),
    (f"{CHOICE}metrics: [f1, nothing]\n", [{"q": 1, "a": 0}], WrongValue, "no metric is called 'nothing'"),
    (f"{CHOICE}metrics: [accuracy, Accuracy]\n", [{"q": 1, "a": 0}], WrongValue, "metric accuracy twice"),
    (CHOICE, [{"q": 1, "a": 0}, "{"], BadRecords, "line 2 of .* is no JSON"),
    (CHOICE, [[1]], BadRecords, "line 1 of .* is a JSON list; expected an object"),
    (CHOICE, [{"q": 1}], BadRecords, "has no field 'a', which answer names; it has q"),
    (CHOICE, [{"q": None, "a": 0}], BadRecords, "'prompt' of .* is None; expected a text"),
    (CHOICE, [{"q": 1, "a": 2}], BadRecords, "expected one of its choices .* from 0 to 1"),
    (CHOICE, [{"q": 1, "a": True}], BadRecords, "expected one of its choices"),
    (CHOICE.replace("[x, y]", "[x, x]"), [{"q": 1, "a": 0}], BadRecords, "no two alike"),
    (CHOICE.replace("[x, y]", "'{q}'"), [{"q": 1, "a": 0}], BadRecords, "expected a list of texts"),
    (CHOICE.replace("{q}", "{q.x}"), [{"q": 1, "a": 0}], WrongValue, "only the name of a field"),
    (CHOICE.replace("{q}", "{q"), [{"q": 1, "a": 0}], WrongValue, "no template"),
    (CHOICE, [], DataError, "holds no record"),
    (CHOICE.replace("choices: [x, y]\n", ""), [{}], WrongValue, "Give choices with kind: choice"),
    ("kind: choice\nchoices: [x, y]\nanswer: x\n", [], WrongValue, "has no data. Write a task file"),
    ("kind: likelihood\ndata: data.jsonl\n", [{}], WrongValue, "has no answer. Give the key answer"),
    ("{kind: generate, data: data.jsonl, metrics: [f1]}", [{}], WrongValue, "without answers does not have"),
    ("{kind: generate, data: data.jsonl, answer: '{a}'}", [{"a": []}], BadRecords, "a text that is not empty"),
    ("{kind: generate, data: nowhere.jsonl}", [], DataError, "cannot open"),
]


@pytest.mark.parametrize("yaml, records, kind, said", REFUSED, ids=[case[3][:40] for case in REFUSED])
def test_cx5_1_what_is_wrong_is_said_before_anything_is_read(described, yaml, records, kind, said):
    with pytest.raises(kind, match=said) as caught:
        described(yaml, *records)
    assert str(caught.value).count("\n") == 0


def test_no_task_file_and_no_plugin_is_neither():
    with pytest.raises(WrongValue, match=r"neither a task file, whose name ends in \.yaml, nor a task of a plug-in"):
        open_task("capitals")
    with pytest.raises(WrongValue, match="has no data"):
        open_task("choice")


def nats_by_hand(prompt: bytes, text: str) -> tuple[float, int]:
    """Byte by byte, each predicted from all before it by one forward."""
    ids = list(prompt or b"\n")
    nats, n_top = 0.0, 0
    for byte in text.encode():
        with torch.no_grad():
            logits_bto, _ = MODEL(torch.tensor([ids]), None)
        nats -= float(logits_bto[0, -1].log_softmax(-1)[byte])
        n_top += int(logits_bto[0, -1].argmax()) == byte
        ids.append(byte)
    return nats, n_top


def test_likelihoods_are_those_of_one_forward_a_byte():
    """However many are read side by side, in pieces or whole, with a prompt or none."""
    texts = ["", "a", " Oslo", "x" * 7]
    for prompt in ("", "What is it?"):
        for how in (reading(), reading(batch=1, piece=64)):
            found = how.likelihoods(prompt, texts[1:])
            for one, text in zip(found, texts[1:], strict=True):
                nats, n_top = nats_by_hand(prompt.encode(), text)
                assert (one.text, one.n_tokens, one.n_bytes) == (text, len(text), len(text))
                assert (one.nats, one.n_top) == (pytest.approx(nats, rel=1e-5), n_top)


def test_what_a_tokenizer_puts_around_texts_stands_there_once():
    """The token that begins a document before the prompt; what comes before every text not behind it; an end ends."""
    plain = byte_tokenizer()
    own = replace(
        plain, bos_id=0, prefix=b" ", encode_batch=lambda texts: plain.encode_batch([b" " + text for text in texts])
    )
    (found,) = replace(reading(), tokenizer=own).likelihoods("Q", [" Oslo"])
    assert (found.nats, found.n_bytes) == (pytest.approx(nats_by_hand(b"\0 Q", " Oslo")[0], rel=1e-5), 5)
    (found,) = replace(reading(), tokenizer=own).likelihoods("", [" Oslo"])
    assert found.nats == pytest.approx(nats_by_hand(b"\0", " Oslo")[0], rel=1e-5)
    with torch.no_grad():
        likeliest = int(MODEL(torch.tensor([list(b"Q")]), None)[0][0, -1].argmax())
    assert reading().continuation("Q", 1, []) == bytes([likeliest]).decode("utf-8", "replace")
    assert replace(reading(), tokenizer=replace(plain, eos_id=likeliest)).continuation("Q", 1, []) == ""


def test_a_text_of_no_tokens_costs_nothing():
    """As a harness may give one."""
    assert [(one.nats, one.n_tokens) for one in reading().likelihoods("Q", [""])] == [(0.0, 0)]
    assert [one.n_tokens for one in reading().likelihoods("Q", ["", "ab"])] == [0, 2]


def test_texts_are_greedy_and_end_before_a_stop():
    """What the same model says one byte at a time; a stop of several characters is found across tokens."""
    ids = list(b"Ada")
    for _ in range(9):
        with torch.no_grad():
            logits_bto, _ = MODEL(torch.tensor([ids]), None)
        ids.append(int(logits_bto[0, -1].argmax()))
    text = bytes(ids[3:]).decode("utf-8", "replace")
    assert reading().continuation("Ada", 9, []) == text
    stop = text[3:5]
    assert reading().continuation("Ada", 9, ["never there", stop]) == text[: text.find(stop)]


def test_distance_is_counted_from_where_the_answer_stands_last():
    assert reading().distance("Oslo Oslo, where?", " Oslo") == len(", where?")
    assert reading().distance("Oslo", "Paris") is None


TASKS = [
    Task(
        "who",
        "choice",
        tuple(Example(str(n), f"Eva {n} Ada {n}", ("Ada",), ("Eva", "Ada", "Bo"), 1) for n in range(7)),
        ("accuracy", "calibration_error", "recall_by_distance", "nats"),
    ),
    Task(
        "say",
        "generate",
        tuple(Example(str(n), "ab" * n, ("ab",)) for n in range(3)),
        ("f1", "distinct(n=1)", "exact_match"),
        max_tokens=3,
    ),
    Task("read", "likelihood", tuple(Example(str(n), "", (f"To be {n}",)) for n in range(1, 3))),
]


def evaluated(place: Path, shard: Shard, tasks: list[Task] = TASKS, **other: object) -> Path:
    """A directory of results as the verb leaves it."""
    require_free(place)
    found = {task.name: list(ask(reading(), task, shard.numbers(len(task.examples)))) for task in tasks}
    write_predictions(place, [one for predictions in found.values() for one in predictions])
    summary = {"schema": "meristem.evaluation/1", "checkpoint": "c", "checkpoint_sha256": "0" * 64, "suite": "tasks"}
    summary |= {"reading": {"learn": "memory"}, "shard": str(shard)}
    summary |= {"tasks": [entry(task, found[task.name], shard) for task in tasks], **other}
    write_summary(place, summary)
    return place


def bytes_in(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluated(tmp_path_factory.mktemp("results") / "whole", Shard())


@pytest.mark.parametrize("of", [2, 8])
def test_cx5_2_shards_merge_to_the_bits_of_the_whole(whole, tmp_path, of):
    """Uneven shards, empty ones too, in any order: the same three files, byte by byte."""
    shards = [evaluated(tmp_path / str(number), Shard(number, of)) for number in range(1, of + 1)]
    summary, predictions = merge(shards[::-1])
    require_free(tmp_path / "merged")
    write_predictions(tmp_path / "merged", predictions)
    write_summary(tmp_path / "merged", summary)
    assert bytes_in(tmp_path / "merged") == bytes_in(whole)
    assert all(task["metrics"] == {} for task in json.loads((shards[0] / SUMMARY).read_bytes())["tasks"])
    assert all(len(task["metrics"]) >= 3 for task in summary["tasks"])


def test_what_is_no_whole_is_not_merged(tmp_path):
    """A shard that is missing, comes twice, or is of something else."""
    first, second = (evaluated(tmp_path / str(number), Shard(number, 2)) for number in (1, 2))
    with pytest.raises(DataError, match="expected each of 1/2 to 2/2 once, of which 2/2 is missing"):
        merge([first])
    again = evaluated(tmp_path / "again", Shard(1, 2))
    with pytest.raises(DataError, match="found the shards 1/2, 1/2, 2/2"):
        merge([first, again, second])
    other = evaluated(tmp_path / "other", Shard(2, 2), reading={"learn": "none"})
    with pytest.raises(DataError, match="differ in reading"):
        merge([first, other])
    changed = evaluated(tmp_path / "changed", Shard(2, 2), [replace(TASKS[0], delimiter=""), *TASKS[1:]])
    with pytest.raises(DataError, match="tasks that have changed"):
        merge([first, changed])
    suite = tmp_path / "suite"
    suite.mkdir()
    write_summary(suite, {"schema": "meristem.evaluation/1", "suite": "recall", "tasks": []})
    with pytest.raises(DataError, match="an evaluation without parts"):
        merge([suite])
    for content in ("{", "[]", '{"schema": "meristem.evaluation/1", "tasks": [1]}'):
        (suite / SUMMARY).write_text(content)
        with pytest.raises(BadRecords, match="Evaluate again"):
            merge([suite])
    lines = (second / "predictions.ndjson").read_bytes().splitlines(keepends=True)
    (second / "predictions.ndjson").write_bytes(b"".join(lines[1:]))
    with pytest.raises(DataError, match="hold 6 predictions of task 'who', which has 7 examples"):
        merge([first, second])
    (second / "predictions.ndjson").write_text('{"schema": "meristem.prediction/1", "task": 3}\n')
    with pytest.raises(BadRecords, match="holds no prediction"):
        merge([first, second])
    with pytest.raises(RunError, match="holds an evaluation already"):
        require_free(first)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "\u0661/2", "a/b", "1 /2"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(WrongValue, match="Write the second of four as 2/4"):
        shard_of(text)


def test_cx5_5_a_likelihood_that_is_no_number_is_refused():
    """No record holds it, and no metric is made of it."""
    broken = build(ModelConfig(name="chargru", dim=7, n_layers=1), MemoryConfig(), 256, 0)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    for task in (TASKS[0], TASKS[1]):
        with pytest.raises(NonFinite, match="Use another checkpoint"):
            list(ask(reading(reader=broken), task, [0]))


def test_what_reads_is_what_was_chosen():
    """A frozen memory predicts otherwise than one that is written, and so do weights that learn from the prompt, of
    which each choice has its own."""
    learning = online_reader(MODEL, "weights", cross_entropy, LearnConfig(which="head", chunk=4, lr=0.1))
    found = [next(ask(reading(reader=each), TASKS[0], [6])).scored for each in (MODEL, frozen(MODEL), learning)]
    assert found[0] != found[1] != found[2] != found[0]
    alone = next(ask(reading(batch=1, reader=learning), TASKS[0], [6])).scored
    assert [one.nats for one in alone] == pytest.approx([one.nats for one in found[2]], rel=1e-5)
