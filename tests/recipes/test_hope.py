"""S4-M14, S3b-M3: HOPE from a text to a trained model, with four levels of feed-forward layers, and what it is
compared with by a word of its settings."""

import math
import statistics
from collections import Counter

import pytest
import torch

from meristem.models.build import build
from meristem.models.load import load
from meristem.models.online import online_reader
from meristem.nn.cms_mlp import CMSMLPLevel
from meristem.optim.groups import build as build_optimizer
from meristem.recipes.pretrain import pretrain
from meristem.runs.config import load_config
from meristem.sinks.records import history
from meristem.train.loss import cross_entropy
from recipes.small import TEXT, config, write_text

pytestmark = pytest.mark.slow

STEPS = 60
HOPE = (
    *("model.mlp_dim=16", "model.levels.count=4", "model.levels.periods=[1, 2, 4, 8]", "tokenizer.kind=byte"),
    *("memory.head_dim=6", "memory.self_reference.chunk_memory=2", "memory.self_reference.chunk_other=4"),
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
    model, first = load(result.checkpoint).model, build(settings.model, settings.memory, 256, settings.run.seed)
    before = dict(first.named_parameters())
    levels = [(name, module) for name, module in model.named_modules() if isinstance(module, CMSMLPLevel)]
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
    answers = [online_reader(model, learn, cross_entropy)(tokens_bt, None)[0] for learn in ("none", "memory", "levels")]
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("structure", ["matrix", "mlp"])
def test_every_gradient_is_alive_throughout(structure):
    """S3b-M3: the micro model learns for 200 steps, in each of which every gradient is finite and not 0."""
    settings = load_config("hope-micro", [f"memory.self_reference.structure={structure}"], {}).tree
    model = build(settings.model, settings.memory, 256, settings.run.seed)
    optimizer, generator = build_optimizer(model, settings.optim), torch.Generator().manual_seed(0)
    data, losses = torch.tensor(list(TEXT.encode())), []
    for step in range(200):
        starts = torch.randint(len(data) - 33, (2,), generator=generator)
        text_bt = torch.stack([data[start : start + 33] for start in starts.tolist()])
        loss = cross_entropy(model(text_bt[:, :-1], None)[0], text_bt[:, 1:]) / 64
        loss.backward()
        dead = [name for name, p in model.named_parameters() if not (p.grad.any() and p.grad.isfinite().all())]
        assert not dead, f"step {step}: {dead}"
        optimizer.step(loss.detach())
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{structure}: {statistics.fmean(losses[:10]):.3f} -> {statistics.fmean(losses[-10:]):.3f} nats")
    assert max(losses) < 1.5 * math.log(256), "it never diverges"
    assert statistics.fmean(losses[-10:]) < 0.5 * statistics.fmean(losses[:10])


MAG, OWN = "titans-mag-micro", "hope-micro"
CHOICES = {
    "descent": (MAG, "memory.rule", ("delta_descent", "delta")),
    "loss": (OWN, "memory.self_reference.loss", ("dot", "squared")),
    "setting": (OWN, "memory.self_reference.setting", ("self_generated", "adaptive", "static")),
}
BRIEF = ("train.steps=50", "optim.lr=0.01", "model.dim=16", "checkpoint.every=50", "eval.every=null")
STRONG = tuple(f"memory.self_reference.{each}" for each in ("chunk_memory=2", "chunk_other=4", "eta_scale=0.05"))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_a_word_of_the_settings(choice, tmp_path):
    """S4-M10, S4-M11, S4-M14: delta descent or plain, what self-reference is taught by, how far it goes.

    The loss of each from the same start is told (``test_choices`` has more starts); all converge, below what the bytes
    of the text say without their order; and the word is read.
    """
    preset, key, words = CHOICES[choice]
    text, found = write_text(tmp_path), {}
    for word in words:
        settings = (*BRIEF, *(STRONG if preset == OWN else ()), f"{key}={word}", "eval.n_samples=0")
        found[word] = pretrain(config(text, *settings, preset=preset), run_dir=tmp_path / word).nats
    counts = Counter(TEXT.encode())
    bytes_alone = sum(-n / len(TEXT) * math.log(n / len(TEXT)) for n in counts.values())
    print(f"{preset}, {key}: {found}; bytes alone {bytes_alone:.3f}")
    assert max(found.values()) < bytes_alone
    assert len(set(found.values())) == len(words)


def test_what_waits_for_slow_levels_is_recorded(trained):
    """6.4, 9.7: how the waiting gradients of each slow level grow beside those of one step."""
    records = [r["metrics"] for r in history(trained[1].run_dir) if r["split"] == "train"]
    for period in (2, 4, 8):
        ratios = [record[f"optim/pending_ratio/{period}"] for record in records]
        steps = [record[f"optim/pending_steps/{period}"] for record in records]
        assert set(steps) == set(range(period))
        assert all(ratio > 0 for ratio, n_steps in zip(ratios, steps, strict=True) if n_steps)
