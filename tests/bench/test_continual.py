"""A second text after a first: arms of one size from one host, the first text to the bit, resumable, in plain words."""

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from meristem.bench.continual.host import Size, Texts, grow_beside, maker, sizes, slotted
from meristem.bench.continual.page import Arm, page, sentences
from meristem.bench.continual.settings import read_continual
from meristem.bench.continual.study import continual, is_kept
from meristem.bench.continual.trial import measured
from meristem.bench.trial import Outcome
from meristem.cli import run
from meristem.config import dump_yaml
from meristem.errors import BadRecords, ConfigError, ConflictingKeys
from recipes.small import TEXT

ROOT = Path(__file__).parents[2]
LOW_RANK = {"seeds": [{"slots": "blocks.*.mixer", "reads": "input", "blueprint": "low_rank", "settings": {"rank": 25}}]}
LLAMA = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
ARMS = {
    "all": {},
    "replay": {"replay_every": 2},
    "low_rank": LOW_RANK,
    "grown": {"seeds": [{"slots": "blocks.0", "blueprint": "bottleneck", "sized": "hidden"}]},
}


def listed(place: Path, *, host: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A file of two short texts and hosts that are trained for a few steps, written into ``place``."""
    (place / "first.txt").write_text(TEXT)
    (place / "second.txt").write_text("Rain fell on the old harbour, and nobody came home.\n" * 99)
    ours = {"preset": "attention", "rate": 3e-3, "same_size_as": "low_rank", "arms": ARMS}
    ours["settings"] = ["model.dim=16", "model.n_layers=1", "model.n_heads=2"]
    tree = {
        "first": str(place / "first.txt"),
        "second": str(place / "second.txt"),
        "first_tokens": 600,
        "second_tokens": 300,
        "seeds": [0, 1],
        "rates": [1.0e-3, 1.0e-2],
        "n_windows": 4,
        "settings": [f"data.root={place}", "tokenizer.kind=byte", "data.seq_len=16", "data.batch_size=2"],
        "hosts": {"ours": ours | (host or {})},
    }
    path = place / "continual.yaml"
    path.write_text(dump_yaml(tree | changes))
    return path


def test_it_runs_writes_and_is_not_run_again(tmp_path, monkeypatch):
    """Rates are tried, each arm runs from each seed; a host whose package is missing is left out, and that is said."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    other = {"transformers": LLAMA, "rate": 1e-3, "same_size_as": "low_rank", "arms": {"low_rank": LOW_RANK}}
    path, out, heard = listed(tmp_path), tmp_path / "continual.md", []
    tree = read_continual(path).model_dump(mode="json")
    path.write_text(dump_yaml(tree | {"hosts": tree["hosts"] | {"theirs": other}}))
    report = continual(path, out, command="meristem bench continual", say=heard.append)
    assert json.loads(out.with_suffix(".json").read_text()) == report
    assert len(report["outcomes"]) == 4 * 2 + 4 * 2 and is_kept(report)
    for one in report["outcomes"]:
        is_beside = "low_rank" in one["name"] or "grown" in one["name"]
        assert ("is_same" in one["figures"]) is is_beside
        assert one["figures"]["on/second"] != one["figures"]["before/second"]
        if is_beside:
            assert one["figures"]["off/first"] == one["figures"]["before/first"] != one["figures"]["on/first"]
    text = out.read_text()
    assert "the same bits as before in 4 of 4 runs" in text and "`grown` against `low_rank`: second text" in text
    assert "needs transformers, which is not installed" in text and "theirs is left out: " in text and heard[0] in text
    assert out.with_suffix(".png").stat().st_size > 0 and "(continual.png)" in text
    heard.clear()
    assert continual(path, out, command="", say=heard.append)["outcomes"] == report["outcomes"]
    assert len(heard) == 1, "only that a host is left out"
    left = report | {"outcomes": [*report["outcomes"], report["outcomes"][0] | {"name": "theirs, low_rank"}]}
    left["outcomes"][-1]["fingerprint"] = "of a host that cannot be made here"
    out.with_suffix(".json").write_text(json.dumps(left))
    assert continual(path, out, command="", say=heard.append)["outcomes"] == left["outcomes"]


def test_what_is_grown_has_the_size_of_the_adapters(tmp_path):
    """Within a fiftieth, by the setting that is sized; and it is what the seeds in the model have."""
    tree = read_continual(listed(tmp_path))
    host, make = tree.hosts["ours"], maker(tree, tree.hosts["ours"], 256)
    found = sizes(make, host, 16)
    for name, (size, said) in found.items():
        model = make(0)
        n_host = sum(each.numel() for each in model.parameters())
        grow_beside(model, slotted(model, host.arms[name], size), random_seed=0)
        learning = sum(each.numel() for each in model.parameters() if each.requires_grad)
        assert learning == (said.n_parameters or n_host)
        assert not said.n_parameters or abs(said.n_parameters / found["low_rank"][1].n_parameters - 1) <= 0.02
    assert found["grown"][1].chosen == f"hidden={found['grown'][0]}"


def test_a_bit_that_changes_is_seen(tmp_path):
    """The digest is of the logits: it is another one where a weight of the host was moved by the least there is."""
    tree = read_continual(listed(tmp_path))
    host, texts = tree.hosts["ours"], Texts.of(tree)
    model = maker(tree, host, 256)(0)
    other = deepcopy(model)
    assert measured(model, host, texts, texts.first, 4)[1] == measured(other, host, texts, texts.first, 4)[1]
    with torch.no_grad():
        other.norm.gain_d[0] = torch.nextafter(other.norm.gain_d[0], torch.tensor(2.0))
    assert measured(model, host, texts, texts.first, 4)[1] != measured(other, host, texts, texts.first, 4)[1]


def test_what_is_listed_in_the_documents_can_be_compared():
    """docs/continual.yaml: a host of ours and one of Hugging Face, three seeds, three rates, each arm of one size."""
    tree = read_continual(ROOT / "docs" / "continual.yaml")
    assert len(tree.seeds) >= 3 and len(tree.rates) >= 3
    ours, theirs = tree.hosts["ours"], tree.hosts["hugging-face"]
    assert theirs.transformers is not None and {"fine_tuning", "low_rank", "block"} <= set(theirs.arms)
    assert {"fine_tuning", "low_rank", "gated_feedforward", "block", "memory"} <= set(ours.arms)
    assert len({name for name, (_, size) in sizes(maker(tree, ours, 1024), ours, 256).items() if size.chosen}) == 3


def test_figures_that_are_a_fault_are_said(tmp_path):
    """Other bits with the seeds off, and an arm that could not be trained."""
    tree = read_continual(listed(tmp_path))
    figures = {f"{when}/{text}": 2.0 for when in ("before", "on", "off") for text in ("first", "second")}
    bad = {0: Outcome("ours", "a", figures | {"is_same": 0.0}, (), "")}
    failed = {0: Outcome("ours", "b", {}, (), "", "the gradient of step 3 is not finite.")}
    arms = [Arm("low_rank", Size(800, 1.0, ""), 1e-2, bad), Arm("grown", Size(800, 1.0, "hidden=23"), 1e-3, failed)]
    said = list(sentences(tree.hosts["ours"], arms))
    assert said[0].endswith("in 0 of 1 runs: **that is a fault**.")
    assert said[1] == "`grown` from seed 0 ended before it had learned: the gradient of step 3 is not finite."
    text = page(tree, {"ours": arms}, title="", left_out=[], picture=None)
    assert "OTHER BITS" in text and "0.01 (largest)" in text and "`grown` |" not in text
    assert not is_kept({"outcomes": [bad[0].to_json()]}) and is_kept({"outcomes": [failed[0].to_json()]})
    nothing = [Arm("low_rank", Size(800, 1.0, ""), None, {})]
    assert "Not measured yet." in page(tree, {"ours": nothing}, title="", left_out=[], picture=None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"transformers": LLAMA}, "a host is a preset or a model of transformers; give one"),
        ({"same_size_as": "all"}, "same_size_as names 'all', which is no arm with seeds"),
        ({"preset": None, "transformers": {"hidden_size": 8}}, "no model_type"),
        ({"arms": {"low_rank": {"seeds": [ARMS["grown"]["seeds"][0]] * 2}}}, "an arm has one size to be found"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        read_continual(listed(tmp_path, host=change))


def test_an_arm_of_another_size_is_refused(tmp_path):
    one = {"seeds": [{"slots": "blocks.0", "blueprint": "conv"}]}
    tree = read_continual(listed(tmp_path, host={"arms": ARMS | {"conv": one}}))
    with pytest.raises(ConflictingKeys, match="'low_rank' adds 800 parameters.*conv has 336 with no sized setting"):
        sizes(maker(tree, tree.hosts["ours"], 256), tree.hosts["ours"], 16)


def test_from_the_command_line(tmp_path, capsys):
    """The page stands where it was asked for; results of something else are not overwritten."""
    few = {"low_rank": LOW_RANK}
    path, out = listed(tmp_path, seeds=[3], rates=[1e-2], host={"arms": few}), tmp_path / "pages" / "mine.md"
    assert run(["bench", "continual", "--config", str(path), "--out", str(out)]) == 0
    assert "ours, low_rank, seed 3 at 0.01: first" in capsys.readouterr().out
    assert run(["bench", "continual", "--config", str(path), "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "meristem.continual/1" and len(report["outcomes"]) == 1
    assert f"`meristem bench continual --config {path}`" in out.read_text()
    out.with_suffix(".json").write_text('{"schema": "meristem.evidence/1"}')
    with pytest.raises(BadRecords, match="holds no evidence.*evidence/1.*another --out"):
        continual(path, out, command="", say=print)
