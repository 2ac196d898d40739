"""How long the parts of growing take: blends, gates, slots, changes of structure, slot scores (growth.md 30)."""

from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from typing import Any, Final

import torch
from torch import nn

from meristem.bench.measure import Row, Timed, medians, timed
from meristem.config import read_yaml
from meristem.growth import gates
from meristem.growth.attach import attach, slots_in, strip
from meristem.growth.blend import blends
from meristem.growth.plan import Plan, plan_graft, plan_remove
from meristem.growth.score import slot_scores
from meristem.growth.seed import Origin
from meristem.growth.stage import Life, Paired
from meristem.growth.transaction import transaction
from meristem.models.build import build
from meristem.models.growing import GatesConfig
from meristem.optim.groups import build as build_optimizer
from meristem.runs.config import load_config
from meristem.train.loss import cross_entropy

PRESET: Final = "default"
N_ROWS, N_TIME, SLOT = 4, 512, "blocks.1"
APART: Final = frozenset({"confidence", "logit_mix"})
"""Blends that read logits: what they take is the head of the host."""

RANK: Final = 4


def seeds(n_repeats: int) -> Iterator[Row]:
    """Milliseconds of each part in the preset ``default``, beside what it may take (``seeds.yaml``)."""
    budgets_ms = budgets()
    for name, seconds in medians(_candidates(), n_repeats=n_repeats, n_warm=1).items():
        yield Row(name, 1000 * seconds, "ms", budgets_ms[name], "<=")


def budgets() -> Mapping[str, float]:
    """What each part may take in milliseconds, by name."""
    text = files("meristem.bench").joinpath("seeds.yaml").read_text(encoding="utf-8")
    return {name: float(value) for name, value in read_yaml(text, "seeds.yaml").items()}


def _candidates() -> dict[str, Timed]:
    model, tokens_bt = _model(), torch.zeros(N_ROWS, N_TIME, dtype=torch.long)
    (width, _) = slots_in(model)[SLOT].widths

    def loss(read: nn.Module, _: Any) -> torch.Tensor:
        return cross_entropy(read(tokens_bt, None)[0], tokens_bt) / tokens_bt.numel()

    return {
        **{f"blend {name}": timed(_blend(name, width)) for name in blends.names() if name not in APART},
        **_gates(),
        "attach and strip": timed(lambda: attach(strip(model), "blocks.*")),
        "graft, planned and made": timed(_change(lambda host: plan_graft(host, SLOT, "bottleneck"), is_grown=False)),
        "removal, planned and made": timed(_change(lambda host: plan_remove(host, SLOT), is_grown=True)),
        "slot scores of 4 sequences": timed(lambda: slot_scores(model, [None], loss, [*slots_in(model)], RANK)),
    }


def _model() -> nn.Module:
    """The preset with a slot at every block."""
    config = load_config(PRESET).tree
    return attach(build(config.model, config.memory, 256, 0), "blocks.*")


def _blend(name: str, width: int) -> Callable[[], object]:
    """A call of a blend on a batch of hidden vectors."""
    blend = blends.get(name)(width)
    host_btd, delta_btd, weight = torch.ones(N_ROWS, N_TIME, width), torch.ones(N_ROWS, N_TIME, width), torch.ones(())
    return torch.no_grad()(lambda: blend(host_btd, delta_btd, weight))


def _gates() -> dict[str, Timed]:
    """The two gates that judge by pairs; what they judge was measured before."""
    life, config, paired = (
        Life("bench", SLOT, Origin.of("norm", {}, blend="residual", random_seed=0), 0),
        GatesConfig(),
        Paired(),
    )
    for number in range(config.pairs):
        paired = paired.add(0.01 + 1e-4 * number)
    tried = gates.Stability(gained=paired, gradient_ratio=0.1)
    kept = gates.Contribution(gained=paired, params_share=0.1, flops_share=0.1, recovered=0.01)
    return {
        "gate G2": timed(lambda: gates.stability(life, tried, config, step=1000)),
        "gate G6": timed(lambda: gates.contribution(life, kept, config, min_age=200, step=1000)),
    }


def _change(plan: Callable[[nn.Module], Plan], *, is_grown: bool) -> Callable[[], object]:
    """A change of structure from its plan to its last check, and its undoing, which takes little beside it."""
    config, model = load_config(PRESET).tree, _model()
    if is_grown:
        plan_graft(model, SLOT, "bottleneck").apply(model)
    optimizer, probe_bt = build_optimizer(model, config.optim), torch.zeros(1, N_TIME, dtype=torch.long)

    def change() -> None:
        receipt = transaction(
            model, optimizer, plan(model), probe_bt, rebuild=lambda host: build_optimizer(host, config.optim)
        )
        receipt.undo()

    return change
