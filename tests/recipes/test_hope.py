"""S4-M14: HOPE from a text to a trained model, with four levels of feed-forward layers."""

import pytest
import torch

from meristem.models.build import build
from meristem.models.load import load
from meristem.models.reader import reader_of
from meristem.nn.chain import ChainLevel
from meristem.recipes.pretrain import pretrain
from meristem.sinks.records import history
from meristem.train.loss import cross_entropy
from recipes.small import config, write_text

STEPS = 60
HOPE = (
    *("model.hidden=16", "model.levels.count=4", "model.levels.periods=[1, 2, 4, 8]", "tokenizer.kind=byte"),
    *("memory.head_width=6", "memory.self_reference.chunk_memory=2", "memory.self_reference.chunk_other=4"),
    *("memory.self_reference.adaptive_query=true", f"train.steps={STEPS}", "checkpoint.every=27", "checkpoint.last=20"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The settings of a small run, and what it came to."""
    place = tmp_path_factory.mktemp("hope")
    settings = config(write_text(place), *HOPE, preset="hope")
    return settings, pretrain(settings, run_dir=place / "whole"), place


def test_it_converges(trained):
    """S4-M14: AdamW does not diverge, and what is read is predicted better and better."""
    _, result, _ = trained
    nats = [r["metrics"]["nats"] for r in history(result.run_dir) if r["split"] == "train"]
    assert len(nats) == STEPS and sum(nats[-4:]) < 0.8 * sum(nats[:4])


def test_all_four_levels_contribute(trained):
    """S4-M14: each was moved, in every layer."""
    settings, result, _ = trained
    model, first = load(result.checkpoint).model, build(settings.model, settings.memory, 256, settings.run.random_seed)
    before = dict(first.named_parameters())
    levels = [(name, module) for name, module in model.named_modules() if isinstance(module, ChainLevel)]
    assert [module.period for _, module in levels] == 2 * [1, 2, 4, 8]
    for path, level in levels:
        assert all((w - before[name]).norm() > 0 for name, w in level.named_parameters(prefix=path))


def test_every_memory_gets_a_gradient(trained):
    """S4-M14: the first values of M_k, M_v, M_q, of those that make rates, and of the memory itself."""
    _, result, _ = trained
    model = load(result.checkpoint).model
    tokens_bt = torch.arange(60).reshape(2, 30) * 3 % 101 + 32
    cross_entropy(model(tokens_bt, None)[0][:, :-1], tokens_bt[:, 1:]).backward()
    for block in model.blocks:
        found = {name: value.grad.norm() for name, value in block.mixer.initial.items()}
        assert len(found) >= 6 and all(norm > 0 for norm in found.values()), found


def test_a_restored_run_takes_the_same_path(trained):
    """S4-M14: from a checkpoint between two updates of the slow levels, bitwise."""
    settings, result, place = trained
    middle = next(path for path in (result.run_dir / "checkpoints").iterdir() if path.name.endswith("27"))
    again = pretrain(settings, run_dir=place / "restored", resume=str(middle))
    weights, restored = (load(run.checkpoint).model.state_dict() for run in (result, again))
    assert again.step == STEPS and weights.keys() == restored.keys()
    assert all(torch.equal(tensor, restored[name]) for name, tensor in weights.items())


def test_reading_changes_the_memory_and_no_weight(trained):
    """S4-M14: whatever learns while it reads."""
    model, tokenizer = load(trained[1].checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens_bt = torch.tensor([tokenizer.encode("7 times 7 is 49, they say. " * 6)])
    answers = [reader_of(model, learn, cross_entropy)(tokens_bt, None)[0] for learn in ("off", "memory", "levels")]
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
