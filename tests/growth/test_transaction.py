"""Changes of structure as transactions: whole, or not at all (growth.md 11.1; K1, K2, L14, V2, V5)."""

import copy
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import meristem.growth as grow
import zoo
from growth.catalogue import PLACES, SEEDS, Says, bits, grown, host, logits
from meristem.distributed.agreement import Agreement
from meristem.errors import MeristemError, OverBudget, StateTransferFailed, TransactionUndone
from meristem.events import Event
from meristem.growth.plan import Applied, Carry, Plan, draft
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.surgery import appended

every_host = pytest.mark.parametrize("name", PLACES)


def rebuild(model: nn.Module, kind: str = "adamw") -> MultiPeriodOptimizer:
    return build(model, OptimConfig(name=kind, lr=1e-3))


def trained(name: str, kind: str = "adamw", n_steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A host with an empty slot after a few steps, and its optimizer: of ours, or of torch for the foreign one."""
    model = grow.attach(host(name, torch.float32), PLACES[name])
    foreign = name == "foreign"
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3) if foreign else rebuild(model, kind)
    for number in range(n_steps):
        step(model, optimizer, number)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    logits(model, zoo.ids(2, random_seed=number)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that an optimizer holds, by the names of parameters, and how its groups are set."""
    held: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            held[f"{name}/{key}"] = value.tolist() if isinstance(value, Tensor) else value
    names = {id(each): name for name, each in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        held[f"group {index}"] = settings | {"params": [names[id(each)] for each in group["params"]]}
    return held


def structure(model: nn.Module) -> list[tuple[str, int, type, list[str]]]:
    return [(name, id(module), type(module), sorted(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize(
    ("name", "seed"),
    [("preset-default", seed) for seed in SEEDS if "-" not in seed]
    + [("foreign", seed) for seed in ("low_rank", "conv", "memory-trellis")],
)
def test_v2_a_seed_that_comes_and_goes_leaves_nothing(name: str, seed: str) -> None:
    """Model, optimizer and outputs are afterwards to the bit what they were; the receipt says what it cost."""
    model, optimizer = trained(name)
    before, held, wanted = bits(model), gathered(model, optimizer), logits(model, zoo.ids(3))
    blueprint, settings = SEEDS[seed]
    plan = grow.plan_graft(model, PLACES[name], blueprint, **settings)
    assert bits(model) == before
    came = grow.transaction(model, optimizer, plan, zoo.ids(2), rebuild=rebuild)
    made = grow.seeds_in(model)[PLACES[name]]
    assert came.model is model and came.max_error == 0 and came.topology == grow.topology(model)
    assert plan.n_parameters == sum(each.numel() for each in made.parameters())
    assert came.optimizer is not None and (came.optimizer is optimizer) == (name == "foreign")
    assert gathered(model, came.optimizer).items() >= {k: v for k, v in held.items() if "group" not in k}.items()
    assert torch.equal(logits(model, zoo.ids(3)), wanted)
    went = grow.transaction(model, came.optimizer, grow.plan_remove(model, PLACES[name]), zoo.ids(2), rebuild=rebuild)
    assert went.optimizer is not None and went.plan.n_parameters == -plan.n_parameters
    assert went.plan.flops_per_token == -plan.flops_per_token
    assert bits(model) == before and gathered(model, went.optimizer) == held
    assert torch.equal(logits(model, zoo.ids(3)), wanted)


class Leak(nn.Module):
    """Adds nothing at first, and later what it read of the last token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return self.out(hidden_btd[:, -1:].expand_as(hidden_btd))


@pytest.fixture
def leak() -> Iterator[None]:
    settings = grow.blueprints.get("norm").settings
    grow.blueprints.register("leak", grow.Blueprint(lambda w, s: Leak(w[0]), settings))
    yield
    del grow.blueprints._entries["leak"]


def leaking(model: nn.Module, place: str) -> Plan:
    return grow.plan_graft(model, place, "leak")


def spoilt(spoil: Callable[[nn.Module, str], None]) -> Callable[[nn.Module, str], Plan]:
    """The plan of a graft after which something else happens as well."""

    def plan(model: nn.Module, place: str) -> Plan:
        planned = grow.plan_graft(model, place, "bottleneck", hidden=3)

        def apply(found: nn.Module) -> Applied:
            planned.apply(found)
            torch.rand(3), random.random(), np.random.rand()
            spoil(found, place)
            return Applied(found)

        return draft(model, "graft", {}, apply, shapes=planned.apply, preserves="exact")

    return plan


def _raise(model: nn.Module, place: str) -> None:
    raise RuntimeError("the disk is on fire")


@torch.no_grad()
def _write(model: nn.Module, place: str) -> None:
    next(model.parameters()).add_(1.0)


@torch.no_grad()
def _spoil(model: nn.Module, place: str) -> None:
    next(grow.seeds_in(model)[place].parameters()).fill_(float("nan"))


def _replace(model: nn.Module, place: str) -> None:
    model.norm = nn.LayerNorm(12)


def _convert(model: nn.Module, place: str) -> None:
    grow.seeds_in(model)[place].double()


def _drop(model: nn.Module, place: str) -> None:
    grow.strip(model)


FAULTS: dict[str, tuple[Callable[[nn.Module, str], Plan], str]] = {
    "raises": (spoilt(_raise), "disk is on fire"),
    "writes": (spoilt(_write), "outputs differ"),
    "not finite": (spoilt(_spoil), "is not finite"),
    "replaces": (spoilt(_replace), "differences in all|not the one"),
    "converts": (spoilt(_convert), "float64"),
    "drops": (spoilt(_drop), "not there"),
    "leaks": (leaking, "not causal"),
}


@every_host
@pytest.mark.usefixtures("leak")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_is_undone_to_the_bit(name: str, fault: str) -> None:
    """Whatever a change does before it fails; the next steps are those of a twin that knows nothing of it."""
    model, optimizer = trained(name)
    twin, twin_optimizer = trained(name)
    make, message = FAULTS[fault]
    plan = make(model, PLACES[name])
    before, held, shape = bits(model), gathered(model, optimizer), structure(model)
    torch.manual_seed(4), random.seed(4), np.random.seed(4)
    heard: list[Event] = []
    with pytest.raises(TransactionUndone, match=message) as raised:
        grow.transaction(model, optimizer, plan, zoo.ids(2), rebuild=rebuild, emit=heard.append)
    drawn = torch.rand(3).tolist(), random.random(), np.random.rand()
    assert raised.value.__cause__ is not None and [each.name for each in heard] == ["graft.undone"]
    assert bits(model) == before and gathered(model, optimizer) == held and structure(model) == shape
    torch.manual_seed(4), random.seed(4), np.random.seed(4)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == drawn
    for number in range(3):
        step(model, optimizer, number)
        step(twin, twin_optimizer, number)
    assert bits(model) == bits(twin)


def test_v8_a_change_takes_the_time_of_the_clock_that_it_is_given() -> None:
    """The receipt and the event say the same; what a slow machine takes changes nothing of the model."""
    model, optimizer = trained("preset-default")
    twin, its = trained("preset-default")
    ticks, heard = iter([3.0, 3.25]), list[Event]()
    for each, moves, more in ((model, optimizer, {"clock": lambda: next(ticks)}), (twin, its, {})):
        plan = grow.plan_graft(each, PLACES["preset-default"], "low_rank", rank=3)
        receipt = grow.transaction(each, moves, plan, zoo.ids(2), rebuild=rebuild, emit=heard.append, **more)
        assert receipt.seconds == heard[-1].payload["seconds"]
    assert heard[0].payload["seconds"] == 0.25 and bits(model) == bits(twin)


def test_a_key_that_is_pressed_undoes_the_change_and_goes_on() -> None:
    model, optimizer = trained("foreign")

    def press(found: nn.Module, place: str) -> None:
        raise KeyboardInterrupt

    plan, before = spoilt(press)(model, PLACES["foreign"]), bits(model)
    with pytest.raises(KeyboardInterrupt):
        grow.transaction(model, optimizer, plan, zoo.ids(2))
    assert bits(model) == before


def widened(model: nn.Module) -> Plan:
    """Two rows more for the head of a foreign model."""

    def apply(found: nn.Module) -> Applied:
        old = found.head
        found.head = nn.Linear(12, 31, dtype=old.weight.dtype, device=old.weight.device)
        with torch.no_grad():
            for new, was in ((found.head.weight, old.weight), (found.head.bias, old.bias)):
                new.fill_(0.0)
                new[:29] = was
        places = {"head.weight": (appended(29, 31), None), "head.bias": (appended(29, 31),)}
        return Applied(found, {name: Carry(name, each) for name, each in places.items()})

    return draft(model, "more rows", {}, apply, preserves="nothing", writes=frozenset())


def test_moments_of_what_was_resized_follow() -> None:
    """Old rows keep theirs, fresh ones begin at 0 and at the mean of the squares (growth.md 10.3)."""
    model, optimizer = trained("foreign")
    was = {key: value.clone() for key, value in optimizer.state[model.head.weight].items()}
    grow.transaction(model, optimizer, widened(model), zoo.ids(2))
    now = optimizer.state[model.head.weight]
    assert torch.equal(now["exp_avg"][:29], was["exp_avg"]) and torch.equal(now["exp_avg_sq"][:29], was["exp_avg_sq"])
    assert not now["exp_avg"][29:].any() and now["step"] == was["step"]
    torch.testing.assert_close(now["exp_avg_sq"][29:], was["exp_avg_sq"].mean().expand(2, 12))
    step(model, optimizer, 5)


def test_l14_moments_without_a_rule_undo_the_change() -> None:
    """An optimizer that gathers something of another shape cannot follow; it stays in use as it was."""
    model, optimizer = trained("foreign")
    optimizer.state[model.head.weight]["preconditioner"] = torch.eye(12)
    before, held = bits(model), gathered(model, optimizer)
    with pytest.raises(TransactionUndone, match="preconditioner.*no rule") as raised:
        grow.transaction(model, optimizer, widened(model), zoo.ids(2))
    assert isinstance(raised.value.__cause__, StateTransferFailed)
    assert bits(model) == before and gathered(model, optimizer) == held


def test_l14_an_optimizer_of_another_kind_undoes_the_change() -> None:
    model, optimizer = trained("preset-default")
    plan, before = grow.plan_graft(model, PLACES["preset-default"], "norm"), bits(model)
    for other in (lambda found: rebuild(found, "sgd"), lambda found: torch.optim.SGD(found.parameters(), lr=1.0)):
        with pytest.raises(TransactionUndone, match="SGD") as raised:
            grow.transaction(model, optimizer, plan, zoo.ids(2), rebuild=other)
        assert isinstance(raised.value.__cause__, StateTransferFailed) and bits(model) == before


def half_made(model: nn.Module) -> None:
    logits(model, zoo.ids(1)).sum().backward()


REFUSED: list[tuple[dict[str, Any], Callable[[nn.Module], object] | None, type[Exception], str]] = [
    ({"limits": grow.Limits(n_parameters=71)}, None, OverBudget, "needs 72 n_parameters, and 71 are left"),
    ({"limits": grow.Limits(flops_per_token=10.0)}, None, OverBudget, "needs 144 flops_per_token"),
    ({"limits": grow.Limits(size_bytes=3)}, None, OverBudget, "size_bytes, and 3 are left"),
    ({"rebuild": None}, None, MeristemError, "rebuild= was not given"),
    ({}, half_made, MeristemError, "a step is half made: .* has a gradient"),
    ({}, lambda model: model.blocks.append(copy.deepcopy(model.blocks[0])), MeristemError, "Plan it anew"),
]


@pytest.mark.parametrize(("given", "prepare", "error", "message"), REFUSED)
def test_what_can_be_known_before_is_refused_before(
    given: dict[str, Any], prepare: Callable[[nn.Module], object] | None, error: type[Exception], message: str
) -> None:
    model, optimizer = trained("preset-default")
    plan = grow.plan_graft(model, PLACES["preset-default"], "low_rank", rank=3)
    if prepare is not None:
        prepare(model)
    before, held, heard = bits(model), gathered(model, optimizer), []
    with pytest.raises(error, match=message):
        grow.transaction(model, optimizer, plan, zoo.ids(2), emit=heard.append, **({"rebuild": rebuild} | given))
    assert bits(model) == before and gathered(model, optimizer) == held and heard == []


def test_a_weight_with_two_names_is_not_changed() -> None:
    """Its other owner would change with it, or be left behind."""
    model, optimizer = trained("foreign")
    model.head.weight = model.embedding.weight
    before = bits(model)
    with pytest.raises(MeristemError, match=r"would change 'head.weight', which is 'embedding.weight' too"):
        grow.transaction(model, optimizer, widened(model), zoo.ids(2))
    assert bits(model) == before


def test_a_wrapped_model_is_refused() -> None:
    model, optimizer = trained("foreign")
    plan = grow.plan_graft(model, PLACES["foreign"], "norm")
    with pytest.raises(MeristemError, match="wrapped by DataParallel"):
        grow.transaction(nn.DataParallel(model), optimizer, plan, zoo.ids(2))


def test_a_model_that_never_was_causal_says_so() -> None:
    model = grow.attach(
        nn.Sequential(nn.Embedding(29, 12), nn.TransformerEncoderLayer(12, 2, 17, batch_first=True)), "1"
    )
    plan = grow.plan_graft(model, "1", "low_rank", rank=2)
    with pytest.raises(TransactionUndone, match="not causal"):
        grow.transaction(model, None, plan, zoo.ids(2))
    assert grow.transaction(model, None, plan, zoo.ids(2), limits=grow.Limits(is_causal=False)).optimizer is None


def test_a_fused_seed_is_a_transaction_as_well() -> None:
    """The weight is written in place; of what the seed was, the optimizer keeps nothing."""
    model = grow.attach(host("preset-default", torch.float32), "blocks.1.mlp.gate_up", reads="input")
    optimizer: Any = rebuild(model)
    plan = grow.plan_graft(model, "blocks.1.mlp.gate_up", "low_rank", rank=3)
    cost = plan.flops_per_token
    optimizer = grow.transaction(model, optimizer, plan, zoo.ids(2), rebuild=rebuild).optimizer
    step(model, optimizer, 1)
    wanted = logits(model, zoo.ids(3))
    plan = grow.surgery.plan_fossilize(model, "blocks.1.mlp.gate_up")
    receipt = grow.transaction(model, optimizer, plan, zoo.ids(2), rebuild=rebuild)
    assert plan.flops_per_token == -cost < 0
    assert 0 < receipt.max_error < 1e-5 and grow.seeds_in(model) == {}
    torch.testing.assert_close(logits(model, zoo.ids(3)), wanted, rtol=1e-5, atol=1e-5)
    step(model, receipt.optimizer, 2)


@pytest.mark.parametrize("kind", ["adamw", "muon", "m3", "sgd"])
def test_what_was_set_on_a_group_outlives_a_graft(kind: str) -> None:
    """And so does the norm of clipping: the optimizer that follows has them."""
    model, optimizer = trained("preset-default", kind)
    assert isinstance(optimizer, MultiPeriodOptimizer)
    optimizer.param_groups[0]["weight_decay"], optimizer.clip = 0.25, 0.5
    plan = grow.plan_graft(model, PLACES["preset-default"], "bottleneck", hidden=3)
    receipt = grow.transaction(model, optimizer, plan, zoo.ids(2), rebuild=lambda found: rebuild(found, kind))
    assert receipt.optimizer.param_groups[0]["weight_decay"] == 0.25 and receipt.optimizer.clip == 0.5


def test_a_removed_seed_goes_back_as_it_was_by_a_plan() -> None:
    model, made = grown("foreign", "conv")
    before, wanted = bits(model), logits(model, zoo.ids(2))
    assert grow.transaction(model, None, grow.plan_remove(model, PLACES["foreign"]), zoo.ids(2)).max_error > 0
    grow.transaction(model, None, grow.plan_graft(model, PLACES["foreign"], made), zoo.ids(2))
    assert bits(model) == before and torch.equal(logits(model, zoo.ids(2)), wanted)


@pytest.mark.parametrize("mood", ["willing", "refuses", "plans otherwise", "fails"])
def test_ka7_two_processes_change_or_neither_does(mood: str) -> None:
    """Whatever the second one does: both have the same new model, or both are to the bit what they were."""
    store, lock, place = dist.HashStore(), threading.Lock(), PLACES["preset-default"]
    trainings = [trained("preset-default") for _ in range(2)]
    before = [bits(model) for model, _ in trainings]
    found: list[Any] = [None, None]

    def process(rank: int) -> None:
        model, optimizer = trainings[rank]
        is_odd = rank == 1

        def plan(order: bytes) -> Plan:
            with lock:  # the two share the generators of one process here
                if is_odd and mood == "refuses":
                    raise OverBudget("no room")
                planned = grow.plan_graft(model, place, "norm" if is_odd and "otherwise" in mood else order.decode())
                return replace(planned, apply=fail) if is_odd and mood == "fails" else planned

        def fail(host: nn.Module) -> Applied:
            planned = grow.plan_graft(host, place, "low_rank")
            planned.apply(host)
            raise RuntimeError("half done")

        def make(planned: Plan) -> Any:
            with lock:
                return grow.transaction(model, optimizer, planned, zoo.ids(2), rebuild=rebuild)

        try:
            found[rank] = grow.together(Agreement(rank, 2, store, timeout_s=60), b"low_rank", plan, make)
        except MeristemError as error:
            found[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    after = [bits(model) for model, _ in trainings]
    if mood == "willing":
        assert after[0] == after[1] != before[0] and found[0].topology == found[1].topology
        return
    assert after == before
    assert all(isinstance(each, TransactionUndone) for each in found)
    assert all("process 1" in str(each) for each in found)


@pytest.mark.parametrize("blend", grow.blends.names())
def test_k1_blending_is_pure(blend: str) -> None:
    """Neither hidden vectors nor what is added are written, views of others as little, and gradients are right."""
    module = grow.blends.get(blend)(6).double()
    if blend == "confidence":
        module.bind(Says(0.7), 6)
    host_btd = torch.randn(1, 1, 6, dtype=torch.float64).expand(2, 3, 6)
    delta_btd = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(0.7, dtype=torch.float64)
    before = host_btd.tolist(), delta_btd.tolist(), weight.item()
    assert module(host_btd, delta_btd, weight) is not host_btd
    assert (host_btd.tolist(), delta_btd.tolist(), weight.item()) == before
    assert host_btd._version == delta_btd._version == weight._version == 0
    assert torch.autograd.gradcheck(module, (host_btd.clone().requires_grad_(), delta_btd, weight))
    assert not module(host_btd, torch.zeros_like(host_btd), weight).any()


@pytest.mark.parametrize("weight", [-1.0, 2.0, float("nan")])
def test_k1_a_blend_weight_out_of_bounds_changes_nothing(weight: float) -> None:
    model, _ = grown("foreign", "conv")
    before = bits(model)
    with pytest.raises(MeristemError, match="expected a number from 0"):
        grow.set_blend(model, PLACES["foreign"], weight)
    assert bits(model) == before


@pytest.mark.parametrize("vector", ["missing", "wrong length", "empty"])
def test_k2_a_channel_blend_without_its_vector_raises(vector: str) -> None:
    """There is no other blend to fall back to: weights without the vector are refused by its name."""
    model, _ = grown("foreign", "low_rank", blend="channel")
    name = f"{PLACES['foreign']}.slot.seed.blend.logit_d"
    saved = dict(model.state_dict())
    lost = saved.pop(name)
    if vector != "missing":
        saved[name] = lost[: 0 if vector == "empty" else 5]
    with pytest.raises(RuntimeError, match="blend.logit_d"):
        model.load_state_dict(saved)


def test_k2_a_channel_vector_that_is_not_finite_is_undone_and_said() -> None:
    model, made = grown("foreign", "low_rank", blend="channel")
    grow.remove(model, PLACES["foreign"])
    with torch.no_grad():
        made.blend.logit_d[3] = float("nan")
    before, heard = bits(model), []
    plan = grow.plan_graft(model, PLACES["foreign"], made)
    with pytest.raises(TransactionUndone, match="blend.logit_d is not finite"):
        grow.transaction(model, None, plan, zoo.ids(2), emit=heard.append)
    assert bits(model) == before and [each.name for each in heard] == ["graft.undone"]
