"""What a user can get wrong: one sentence that names it, with model and optimizer untouched to the bit (issue 11)."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import meristem.growth as grow
import zoo
from growth.catalogue import bits, host
from growth.site import TinySite, evaluated, loose
from growth.test_gardener import SLOTS, reading
from meristem.errors import MeristemError
from meristem.events import Event
from meristem.growth.garden import Garden
from meristem.growth.gardener import act_on, tend
from meristem.growth.observe import Mask, Reading
from meristem.growth.policy import NoCandidates, Policy, Proposal, decide
from meristem.growth.surgery import plan_extend_vocabulary
from meristem.optim.groups import build
from meristem.optim.state import tensors
from meristem.worker.breaker import Breaker

PLACE = "blocks.1"


def touched(site: TinySite) -> tuple[object, ...]:
    """All that a change of structure could leave behind."""
    model, optimizer = site.model, site.optimizer
    held = {name: each.reshape(-1).tolist() for name, each in tensors(model, optimizer).items()}
    grouped = [(group["name"], [*group["param_names"]], group["lr"]) for group in optimizer.param_groups]
    return bits(model), held, grouped, [(name, type(each)) for name, each in model.named_modules()]


def transacted(site: TinySite, plan: Any, **limits: Any) -> None:
    rebuild = partial(build, config=site.config)
    grow.transaction(site.model, site.optimizer, plan, zoo.ids(1), rebuild=rebuild, limits=grow.Limits(**limits))


def other_seed() -> grow.Seed:
    """A seed of a slot with the same name in a wider model."""
    wide = grow.attach(nn.ModuleDict({"blocks": nn.ModuleDict({"1": nn.Linear(17, 17)})}), PLACE)
    grow.graft(wide, PLACE, "norm")
    return grow.remove(wide, PLACE)


def tied(site: TinySite) -> None:
    """The model as somebody else's code ties it: a weight that an operator would resize is a weight of another too."""
    model: Any = site.model
    model.other = nn.Linear(12, zoo.VOCABULARY, bias=False)
    model.other.weight = model.embedding.weight


def broken(site: TinySite) -> dict[str, Any]:
    log = grow.to_json(site.model)
    return log | {"changes": log["changes"][:-1]}


def of_another(site: TinySite) -> dict[str, Any]:
    return grow.to_json(grow.attach(host("foreign"), "head"))


BAD: dict[str, tuple[Callable[[TinySite], object], str]] = {
    "a pattern that matches nothing": (lambda s: grow.attach(s.model, "block.*"), "no module is called 'block.*'"),
    "an unknown blueprint": (lambda s: transacted(s, grow.plan_graft(s.model, PLACE, "lowrank")), "Nearest: low_rank"),
    "an unknown slot": (lambda s: transacted(s, grow.plan_graft(s.model, "blocks.7", "norm")), "no slot is called"),
    "heads that do not fill the width": (
        lambda s: transacted(s, grow.plan_graft(s.model, PLACE, "memory", head_dim=5)),
        "heads of 5 cannot fill the width 12",
    ),
    "a seed of another width": (lambda s: grow.graft(s.model, PLACE, other_seed()), "reads the width 17.*reads 12"),
    "a seed of another width, planned": (
        lambda s: transacted(s, grow.plan_graft(s.model, PLACE, other_seed())),
        "reads the width 17.*reads 12",
    ),
    "a budget that holds no seed": (
        lambda s: transacted(s, grow.plan_graft(s.model, PLACE, "norm"), n_parameters=11),
        "needs 12 n_parameters, and 11 are left",
    ),
    "a broken log": (lambda s: grow.replay(host("preset-default"), broken(s)), "the topology log is broken"),
    "a log of another model": (lambda s: grow.replay(host("preset-default"), of_another(s)), "is of a host with other"),
    "a weight with two owners": (
        lambda s: transacted(s, plan_extend_vocabulary(s.model, 2)),
        "'embedding.weight', which is 'other.weight' too",
    ),
    "a module with two places": (lambda s: grow.attach(twice(s), "a"), "'a' is 'b' as well"),
}


def twice(site: TinySite) -> nn.Module:
    block: Any = site.model.get_submodule("blocks.0.mlp.out")
    return nn.ModuleDict({"a": block, "b": block})


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_model_and_optimizer_untouched(name: str) -> None:
    change, message = BAD[name]
    site = TinySite.of(*SLOTS)
    if name == "a weight with two owners":
        tied(site)
    before = touched(site)
    with pytest.raises(MeristemError, match=message) as caught:
        change(site)
    assert touched(site) == before
    assert "\n" not in str(caught.value)


def hangs(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
    time.sleep(2)
    return Proposal("wait")


def dies(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
    raise SystemExit(3)


def lies(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
    return Proposal("germinate", "blocks.7", "norm")


def lies_of_its_type(reading: Reading, mask: Mask) -> Any:
    return {"operation": "cull"}


def is_wrong_inside(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
    return Proposal("germinate", "blocks.0", "low_rank", {"rank": "many"})


@pytest.mark.parametrize(
    ("policy", "event"),
    [
        (hangs, "policy.timeout"),
        (dies, "policy.failed"),
        (lies, "order.refused"),
        (lies_of_its_type, "policy.failed"),
        (is_wrong_inside, "order.refused"),
    ],
)
def test_a_policy_that_hangs_lies_or_dies_changes_nothing(policy: Policy, event: str) -> None:
    """One event says what it did; no order comes of it; the run goes on to the bit as with a policy that waits."""
    site, twin, heard = TinySite.of(*SLOTS), TinySite.of(*SLOTS), list[Event]()

    def ask(reading: Reading, mask: Mask, breaker: Breaker | None) -> Any:
        return decide(policy, reading, mask, budget_ms=200.0, breaker=breaker or Breaker(), emit=heard.append)

    garden = tend(evaluated(), reading(Garden()), loose(), ask=ask, slots=SLOTS, free_parameters=10_000)
    assert garden.queue == () and garden.lives == () and [each.name for each in heard] == [event]
    assert act_on(garden, site, loose(), run_id="run", step=2) == garden
    for each in (site, twin):
        each.train()
    assert touched(site) == touched(twin)
    assert torch.equal(site.logits(site.model), twin.logits(twin.model))
