"""The adapter for lm-eval: its requests answered by a model of ours; with the library itself where it is installed."""

import json
import string
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from meristem.data.tokenizer import byte_tokenizer
from meristem.device.config import DeviceConfig
from meristem.device.resolve import resolve
from meristem.errors import CapabilityError, DataError, MissingExtra, NonFinite, WrongValue
from meristem.evaluate.asking import Reading
from meristem.evaluate.harness import Answers, entries, examine, require_library
from meristem.events import silent
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig

DEVICE = resolve(DeviceConfig(device="cpu", dtype="fp32", threads=1), silent)


def reading() -> Reading:
    model = build(ModelConfig(name="chargru", dim=7, n_layers=1), MemoryConfig(), 256, 5)
    return Reading(model, byte_tokenizer(), DEVICE, 4, 6)


def requests(*args: tuple[object, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in args]


def test_log_likelihoods_have_the_sign_and_the_order_of_the_requests():
    """White space at the end of a context goes to the continuation; an empty context is read as a beginning."""
    own = reading()
    asked = [("Oslo is in", " Norway"), ("Oslo is in", " France"), ("A: ", "b"), ("", "b")]
    found = Answers(own).loglikelihood(requests(*asked))
    expected = [
        *own.likelihoods("Oslo is in", [" Norway", " France"]),
        own.likelihoods("A:", [" b"])[0],
        own.likelihoods("", ["b"])[0],
    ]
    assert [nats for nats, _ in found] == [pytest.approx(-one.nats) for one in expected]
    assert [is_greedy for _, is_greedy in found] == [one.n_top == one.n_tokens for one in expected]
    prompt = next(each for each in string.ascii_letters if own.continuation(each, 1, []).isascii())
    assert Answers(own).loglikelihood(requests((prompt, own.continuation(prompt, 1, []))))[0][1] is True
    rolling = Answers(own).loglikelihood_rolling(requests(("Oslo is in Norway",), ("b",)))
    assert rolling == [-own.likelihoods("", [text])[0].nats for text in ("Oslo is in Norway", "b")]


def test_texts_are_greedy_and_end_where_the_request_says():
    own = reading()
    whole = own.continuation("Oslo", 6, [])
    settings = [{"until": [], "max_gen_toks": 6, "do_sample": False}, {"until": whole[2:4], "max_gen_toks": 6}]
    found = Answers(own).generate_until(requests(*(("Oslo", each) for each in settings)))
    assert found == [whole, whole[: whole.find(whole[2:4])]]
    with pytest.raises(CapabilityError, match="Set do_sample: false"):
        Answers(own).generate_until(requests(("Oslo", {"do_sample": True})))


def test_a_prediction_that_is_no_number_ends_the_evaluation():
    own = reading()
    with torch.no_grad():
        next(own.reader.parameters()).fill_(float("nan"))
    for asked in (Answers(own).loglikelihood, Answers(own).loglikelihood_rolling):
        with pytest.raises(NonFinite, match="Use another checkpoint"):
            asked(requests(("Oslo", "b")))


FOUND = {
    "results": {
        "choose": {"name": "choose", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": "N/A", "acc,strict": 0.25},
        "group": {"acc,none": 0.5},
    },
    "versions": {"choose": 1.0},
    "higher_is_better": {"choose": {"acc": True}},
    "n-samples": {"choose": {"original": 3, "effective": 2}},
    "samples": {"choose": [{"doc_hash": "a", "prompt_hash": "b", "target_hash": "c"}]},
}
"""As lm-eval 0.4.13 gives it."""


def test_what_the_library_found_stands_in_the_summary():
    (task,) = entries(FOUND)
    assert (task["name"], task["n"]) == ("lm-eval/choose", 2)
    assert task["metrics"] == {
        "acc": {"value": 0.5, "version": "1.0", "direction": "max"},
        "acc/strict": {"value": 0.25, "version": "1.0", "direction": "max"},
    }


@pytest.fixture
def library(monkeypatch):
    """A stand-in that has what is used of lm-eval: it makes one request of each kind."""
    heard = {}

    class LM:
        def __init__(self) -> None:
            self.rank = 0

    def simple_evaluate(*, model, tasks, limit, bootstrap_iters, task_manager):
        print("noise")
        heard.update(tasks=tasks, limit=limit, defaults=task_manager.include_defaults, is_model=isinstance(model, LM))
        if tasks == ["broken.yaml"]:
            raise KeyError("doc_to_text")
        model.loglikelihood(requests(("a", "b")))
        model.loglikelihood_rolling(requests(("a",)))
        model.generate_until(requests(("a", {"max_gen_toks": 1})))
        return FOUND

    parts = {"lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"LM": LM}}
    parts |= {"lm_eval.evaluator": {"simple_evaluate": simple_evaluate}}
    parts |= {"lm_eval.tasks": {"TaskManager": lambda include_defaults: SimpleNamespace(**locals())}}
    for name, attributes in parts.items():
        module = ModuleType(name)
        vars(module).update(attributes, __spec__=SimpleNamespace(name=name))
        monkeypatch.setitem(sys.modules, name, module)
    return heard


def test_the_library_is_given_a_model_of_its_class(library, capsys):
    """Files alone need none of its public tasks; what it prints is no result; its errors become one of ours."""
    assert examine(reading(), ["choose.yaml"], 2) == entries(FOUND)
    assert library == {"tasks": ["choose.yaml"], "limit": 2, "defaults": False, "is_model": True}
    assert capsys.readouterr().out == ""
    examine(reading(), ["choose.yaml", "hellaswag"], None)
    assert library["defaults"] is True
    with pytest.raises(DataError, match=r"lm-eval cannot evaluate broken\.yaml: KeyError: 'doc_to_text'\. Correct"):
        examine(reading(), ["broken.yaml"], None)
    require_library(["hellaswag"])
    with pytest.raises(WrongValue, match=r"there is no task file nowhere\.yaml"):
        require_library(["nowhere.yaml"])


def test_cx5_6_a_missing_library_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("meristem.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'meristem\[eval\]'"):
        require_library(["hellaswag"])


CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{town}} is in"
doc_to_choice: "{{lands}}"
doc_to_target: "{{lands.index(land)}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.mark.long  # it needs the extra eval, which no lane installs
def test_the_library_itself_finds_what_a_task_file_of_ours_finds(tmp_path, monkeypatch):
    """The same three questions in both formats have the same share of right answers."""
    from meristem.evaluate.asking import ask
    from meristem.evaluate.results import Shard, entry
    from meristem.evaluate.tasks import open_task

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lands = {"Oslo": "Norway", "Paris": "France", "Kyoto": "Japan"}
    rows = [{"town": town, "land": land, "lands": list(lands.values())} for town, land in lands.items()]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "theirs.yaml").write_text(CHOOSE.replace("DATA", str(tmp_path / "data.jsonl")))
    (tmp_path / "ours.yaml").write_text(
        "{kind: choice, data: data.jsonl, prompt: '{town} is in', choices: '{lands}', answer: '{land}'}"
    )
    require_library([])
    (theirs,) = examine(reading(), [str(tmp_path / "theirs.yaml")], None)
    task = open_task(str(tmp_path / "ours.yaml"))
    ours = entry(task, list(ask(reading(), task, range(3))), Shard())
    assert (theirs["name"], theirs["n"]) == ("lm-eval/choose", 3)
    assert theirs["metrics"]["acc"]["value"] == ours["metrics"]["accuracy"]["value"]
