"""S1-M2, S4-M10: choices compared fairly: the same text, grid of rates, first gates, starts and size."""

import math
import statistics
from dataclasses import dataclass

import pytest
import torch

from meristem.bench.learn import learn
from meristem.device.random import stream
from meristem.device.resolve import Device
from meristem.evaluate.levels import level_figures
from meristem.evaluate.recall import HELD_OUT, Questions
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import LevelsConfig, MemoryConfig

CPU = Device(torch.device("cpu"), torch.float32, torch.float32)
RATES, STARTS, STEPS = (1e-2, 3e-2), range(5), 40
PERIODS = (1, 8)


@dataclass(frozen=True)
class Regimes:
    """x_(t+1) = (3 x_t + 1 mod V / R) + regime V / R, and the regime is floor(t / 8) mod R: slow beside fast."""

    vocabulary: int = 16
    n_regimes: int = 2
    window: int = 32
    name = "regimes"

    def questions(self, n_rows: int, random_seed: int) -> Questions:
        per = self.vocabulary // self.n_regimes
        x_b = torch.randint(per, (n_rows,), generator=stream(random_seed, "regimes"))
        columns = []
        for t in range(self.window + 1):
            columns.append(x_b + t // 8 % self.n_regimes * per)
            x_b = (3 * x_b + 1) % per
        tokens_bt = torch.stack(columns, dim=1)
        return Questions(tokens_bt[:, :-1], tokens_bt[:, 1:])


GUESS = math.log(16)


def model_of(levels: LevelsConfig, random_seed: int, hidden: int, rule: str = "gated_delta") -> torch.nn.Module:
    part = ModelConfig.model_validate({"mixer": "memory", "dim": 16, "n_layers": 1, "mlp_dim": hidden})
    memory = MemoryConfig(rule=rule, head_dim=8, chunk=8, levels=levels)
    return build(part, memory, Regimes().vocabulary, random_seed)


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def final_nats(model: torch.nn.Module, rate: float, start: int) -> float:
    """Of a model that is trained for it, in place."""
    return learn(model, Regimes(), steps=STEPS, batch=4, rate=rate, random_seed=start, device=CPU).nats


def first_biases(model: torch.nn.Module) -> list[torch.Tensor]:
    """What the gates of each level begin with."""
    return [value for name, value in model.state_dict().items() if name.endswith("gates.bias_h")]


@pytest.mark.slow
def test_two_levels_are_no_worse_than_one():
    """S1-M2: both converge, the second level costs nothing (L2 <= 1.05 L1), and each level tells of its gates."""
    one, two = LevelsConfig(), LevelsConfig(count=2, periods=PERIODS)
    # The single level is padded by a wider feed-forward layer, three rows of weights for each unit.
    hidden = 32 + round((size(model_of(two, 0, 32)) - size(model_of(one, 0, 32))) / 48)
    assert abs(size(model_of(one, 0, hidden)) / size(model_of(two, 0, 32)) - 1) < 0.02
    (alone,), together = first_biases(model_of(one, 0, hidden)), first_biases(model_of(two, 0, 32))
    assert len(together) == 2 and all(torch.equal(bias_h, alone) for bias_h in together)
    found, figures = {}, {}
    for name, levels, width in (("one", one, hidden), ("two", two, 32)):
        tried = {rate: final_nats(model_of(levels, 99, width), rate, 99) for rate in RATES}
        models = [model_of(levels, start, width) for start in STARTS]
        found[name] = [
            final_nats(model, min(tried, key=tried.__getitem__), start)
            for start, model in zip(STARTS, models, strict=True)
        ]
        figures[name] = level_figures(models[0], Regimes().questions(1, HELD_OUT).tokens_bt)
    ratio = statistics.fmean(found["two"]) / statistics.fmean(found["one"])
    print(f"two levels over one: {ratio:.3f}, {found}")
    assert max(found["one"] + found["two"]) < 0.5 * GUESS
    assert ratio <= 1.05
    print(figures)
    assert not figures["one"], "one level is the plain memory"
    assert [path.rpartition(".")[2] for path in figures["two"]] == ["0", "1"]
    fast, slow = figures["two"].values()
    assert (fast["n_fires"], slow["n_fires"]) == (16, 2)
    assert all(
        0 < each["write_budget"] < 1 < each["half_life"] and each["memory_change"] > 1e-3 for each in (fast, slow)
    )


@pytest.mark.slow
def test_delta_descent_and_plain_descent_both_converge():
    """S4-M10: one word of the settings apart, from three starts each; the losses are told."""
    found = {}
    for rule in ("delta_descent", "delta"):
        models = [model_of(LevelsConfig(), start, 32, rule) for start in range(3)]
        learned = [
            learn(model, Regimes(), steps=STEPS, batch=4, rate=RATES[1], random_seed=start, device=CPU)
            for start, model in enumerate(models)
        ]
        found[rule] = [result.nats for result in learned]
    print({rule: (statistics.fmean(nats), statistics.stdev(nats)) for rule, nats in found.items()})
    assert max(nats for losses in found.values() for nats in losses) < 0.5 * GUESS
    assert found["delta"] != found["delta_descent"]
