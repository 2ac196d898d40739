"""`meristem grow library`: a seed of a checkpoint is stored, certified, listed and shown; what is wrong is named."""

from pathlib import Path

import pytest
import torch

import meristem.growth as grow
from meristem.checkpoint import store
from meristem.cli import run
from meristem.events import silent
from meristem.models.load import load
from meristem.models.topology import to_json


@pytest.fixture
def grown(make_run) -> Path:
    """A run whose newest checkpoint has a slot without a seed and one with a seed that has learned."""
    directory = make_run("grown")
    old, model = store.find(directory, silent), load(directory).model
    grow.attach(model, "blocks.*")
    with torch.no_grad():
        grow.graft(model, "blocks.1", "low_rank", rank=3).layer.out.weight.fill_(0.01)
    store.save(
        directory / "checkpoints",
        step=30,
        trees={"model": model.state_dict()},
        values={"progress": {"step": 30}, "topology": to_json(grow.topology(model))},
        files={name: old.file(name) for name in ("config.yaml", "tokenizer.json")},
        header={"seq": 30},
    )
    return directory


def test_a_seed_of_a_run_is_kept(grown: Path, tmp_path: Path, answered, capsys) -> None:
    place = tmp_path / "seeds"
    code, card = answered("grow", "library", "put", place, "s", grown, "--slot", "blocks.1")
    assert (code, card["version"], card["fitting"]["widths"], card["risk"]) == (0, 1, [12, 12], "experimental")
    code, found = answered("grow", "library", "certify", place, "s", grown, "--slot", "blocks.0")
    assert (code, found["band"], found["slot"]) == (0, "low", "blocks.0") and len(found["probes"]) == 10
    code, rows = answered("grow", "library", "ls", place)
    assert code == 0 and [(row["name"], row["handling"], row["sha256"]) for row in rows] == [
        ("s", "standard", card["sha256"])
    ]
    code, shown = answered("grow", "library", "show", place, "s")
    assert (code, len(shown["certificates"]), len(shown["benchmarks"]), shown["reports"]) == (0, 1, 1, [])
    assert run(["grow", "library", "ls", str(place)]) == run(["grow", "library", "show", str(place), "s"]) == 0
    words = capsys.readouterr().out
    assert "low_rank" in words and "certificates: 1" in words and "reports: none" in words


def test_what_is_wrong_is_named(grown: Path, tmp_path: Path, capsys) -> None:
    place = str(tmp_path / "seeds")
    assert run(["grow", "library", "ls", place]) == 3
    assert "no library was found" in capsys.readouterr().err and not Path(place).exists()
    for words, message in (
        (["--slot", "blocks.0"], "is empty"),
        (["--slot", "blocks.9"], "no slot is called 'blocks.9'"),
        (["--slot", "blocks.1", "--trust", "total"], "the trust 'total'"),
    ):
        assert run(["grow", "library", "put", place, "s", str(grown), *words]) == 2
        assert message in capsys.readouterr().err
    assert run(["grow", "library", "show", place, "s"]) == 2
    assert "It is empty: store one first" in capsys.readouterr().err
