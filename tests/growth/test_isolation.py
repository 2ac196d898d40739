"""Who owns which parameter, how far two losses agree on the same tensors, and whether a host is isolated."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meristem.growth as grow
from growth.catalogue import PLACES, grown, host
from meristem.errors import OwnershipRefused
from meristem.events import Event
from meristem.growth.isolation import Training, check_isolation, cosine, drawn_entries, enter
from meristem.growth.ownership import Owners, Validation
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import HOST, origin_of
from meristem.train.progress import Progress
from meristem.train.state import Held
from zoo import ids

SEED = "seed:blocks.1"


def draws(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def test_k10_sampling_takes_memory_for_what_it_draws_alone() -> None:
    """256 of a thousand million entries, of a tensor that has one in memory; the same step draws the same."""
    large = torch.ones(1).expand(10**5, 10**4)
    at = drawn_entries(large.shape, 256, draws(3))
    assert large[at].shape == (256,) and sum(each.nbytes for each in at) < 10**4
    assert all(torch.equal(a, b) for a, b in zip(at, drawn_entries(large.shape, 256, draws(3)), strict=True))
    assert not torch.equal(at[0], drawn_entries(large.shape, 256, draws(4))[0])
    found = cosine({"w": large}, {"w": large}, generator=draws(3))
    assert found.value == pytest.approx(1, abs=1e-12)


def test_k10_every_entry_is_drawn_as_often_as_another() -> None:
    """Chi squared of 100 000 draws over 400 entries: its mean is 399 and its deviation 28."""
    rows, columns = drawn_entries((20, 10**4), 10**5, draws(1))
    counts = torch.bincount(rows * 20 + columns // 500, minlength=400).double()
    expected = 10**5 / 400
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 399) < 4 * 28.2


def test_k10_a_small_tensor_is_read_whole() -> None:
    at = drawn_entries((3, 4), 256, draws(0))
    assert torch.equal(torch.arange(12.0).view(3, 4)[at], torch.arange(12.0))


def test_k11_interference_is_a_cosine_of_the_same_tensors() -> None:
    """Scaled it is the same, parallel 1, orthogonal 0, against each other -1; of zeros there is none, and counted."""
    a = {"w": torch.randn(30, 20, generator=draws(0)), "b": torch.randn(7, generator=draws(1))}
    b = {name: x + torch.randn(x.shape, generator=draws(2)) for name, x in a.items()}
    plain = cosine(a, b, generator=draws(5)).value
    assert plain is not None and 0 < plain < 1
    for scale in (1e6, 1e-6):
        scaled = {name: scale * x for name, x in b.items()}
        assert cosine(a, scaled, generator=draws(5)).value == pytest.approx(plain, rel=1e-5)
    assert cosine(a, a, generator=draws(5)).value == pytest.approx(1)
    assert cosine(a, {name: -x for name, x in a.items()}, generator=draws(5)).value == pytest.approx(-1)
    one, other = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    assert cosine(one, other, generator=draws(5)).value == 0
    zero = cosine({"w": torch.zeros(3)}, {"w": torch.ones(3)}, generator=draws(5))
    assert zero.value is None and (zero.n_tensors, zero.n_zero) == (1, 1)
    apart = cosine({"a": torch.ones(3)}, {"b": torch.ones(3)}, generator=draws(5))
    assert apart.value is None and apart.n_tensors == 0


def test_k11_what_is_sampled_stands_for_the_whole() -> None:
    """Of a large and a small tensor, the cosine that all entries give, but for the noise of the draw."""
    a = {"large": torch.randn(300, 400, generator=draws(0)), "small": torch.randn(9, generator=draws(1))}
    b = {"large": a["large"] + torch.randn(300, 400, generator=draws(2)), "small": -a["small"]}
    flat = [torch.cat([x.flatten() for x in each.values()]) for each in (a, b)]
    assert cosine(a, b, generator=draws(7)).value == pytest.approx(float(torch.cosine_similarity(*flat, 0)), abs=0.1)


def owners() -> Owners:
    model = grow.attach(host("preset-default"), PLACES["preset-default"])
    grow.graft(model, PLACES["preset-default"], "norm")
    return Owners.of(model)


def test_every_parameter_has_one_owner() -> None:
    held = owners().holders
    assert {held[name] for name in held} == {HOST, SEED} and all(origin_of(name) == held[name] for name in held)


def test_a_parameter_in_two_places_is_refused() -> None:
    """A seed that shared a weight with its host would train it."""
    model, seed = grown("preset-default", "norm")
    place = model.get_submodule(PLACES["preset-default"])
    name = next(name for name, each in place.named_parameters() if each.shape == seed.layer.gain_d.shape)
    seed.layer.gain_d = place.get_parameter(name)
    with pytest.raises(
        OwnershipRefused, match=f"{SEED}.*held by 'host'.*other_seed. Give each seed parameters"
    ) as caught:
        enter(model, PLACES["preset-default"], "shadow")
    assert caught.value.fields["holder"] == HOST and seed.is_live


def test_k19_a_new_teacher_takes_the_place_of_the_old_one_at_once() -> None:
    """A's parameters can be claimed then and B's cannot; a teacher that is refused changes nothing."""
    first = owners().with_teacher("teacher:a", ["a.weight", "a.bias"])
    assert first.validate(SEED, ["a.weight"]) == Validation(False, "teacher_clash", ("a.weight",), "teacher:a")
    both = first.with_teacher("teacher:b", ["b.weight"])
    assert both.teacher == "teacher:b" and both.validate(SEED, ["a.weight", "a.bias"]).is_ok
    assert both.validate(SEED, ["b.weight"]).code == "teacher_clash"
    own = [name for name, holder in first.holders.items() if holder == SEED]
    with pytest.raises(OwnershipRefused, match="'teacher:c' cannot own"):
        first.with_teacher("teacher:c", own)
    assert first.teacher == "teacher:a" and not first.validate(SEED, ["a.weight"]).is_ok
    assert both.release("teacher:b").teacher is None


@pytest.mark.parametrize(
    "code, names, holder",
    [
        ("teacher_clash", ("t.weight",), "teacher:t"),
        ("unregistered", ("nowhere.weight",), None),
        ("other_seed", ("blocks.1.slot.seed.layer.gain_d",), SEED),
    ],
)
def test_k20_a_refusal_says_code_names_and_holder(code: str, names: tuple[str, ...], holder: str | None) -> None:
    held = owners().with_teacher("teacher:t", ["t.weight"])
    assert held.validate("seed:blocks.0", ["norm.gain_d", *names]) == Validation(False, code, names, holder)
    with pytest.raises(OwnershipRefused, match=f"'seed:blocks.0' cannot own {names[0]}.*{code}. ") as caught:
        held.claim("seed:blocks.0", names)
    assert caught.value.fields == {"code": code, "names": names, "holder": holder}
    claimed = held.claim("seed:blocks.0", ["norm.gain_d"])
    assert claimed.holders["norm.gain_d"] == "seed:blocks.0" and held.holders["norm.gain_d"] == HOST
    assert claimed.release("seed:blocks.0") == held


def read(state: Training, batches: Sequence[Any], memory: None, take: Any) -> Tensor:
    """The loss of a few random tokens."""
    found, _ = state.model(ids(2))
    loss = found.square().mean()
    take(loss)
    return loss


class Leaky(nn.Module):
    """A layer that moves a weight of its host whenever its seed is live: what isolation is there to find."""

    def __init__(self, layer: nn.Module, host_weight: Tensor) -> None:
        super().__init__()
        self.layer, self.host = layer, [host_weight]

    def forward(self, hidden: Tensor) -> Tensor:
        self.host[0].data.mul_(1.01)
        return self.layer(hidden)


class Restless(nn.Module):
    """A layer that never gives the same twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.n = layer, 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.n += 1
        return self.layer(hidden) * self.n


def shadowed(*, is_moved: bool = True) -> tuple[nn.Module, grow.Seed, MultiPeriodOptimizer]:
    model, seed = grown("preset-default", "low_rank", is_moved=is_moved)
    enter(model, PLACES["preset-default"], "shadow")
    return model, seed, build(model, OptimConfig())


def check(model: nn.Module, optimizer: MultiPeriodOptimizer, events: list[Event]) -> Any:
    state = Held.alone(model, optimizer, Progress(cursor=None)).state  # type: ignore[arg-type]
    generators = {"cpu": torch.get_rng_state()}
    places = (PLACES["preset-default"],)
    return check_isolation(state, [], None, generators, read=read, slots=places, emit=events.append)


def test_the_gradients_of_a_host_are_the_same_bits_with_and_without_its_seed() -> None:
    """Checked, with the cosine of what both losses ask of the host, and without a trace."""
    (model, seed, optimizer), events = shadowed(), list[Event]()
    before = copy.deepcopy(model.state_dict())
    found = check(model, optimizer, events)
    assert found.is_isolated and found.differing == ()
    value = found.cosines[PLACES["preset-default"]].value
    assert 0 < value < 0.999 and [event.name for event in events] == ["isolation.checked"]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items()) and not seed.is_live
    assert all(each.grad is None for each in model.parameters())
    model, _, optimizer = shadowed(is_moved=False)
    assert check(model, optimizer, events).cosines[PLACES["preset-default"]].value == pytest.approx(1)


def test_a_seed_that_reaches_into_its_host_is_found_out() -> None:
    (model, seed, optimizer), events = shadowed(), list[Event]()
    seed.layer = Leaky(seed.layer, model.get_submodule("blocks.0").mlp.out.weight)
    found = check(model, optimizer, events)
    assert found.is_isolated is False and [event.name for event in events] == ["isolation.violated"]
    assert events[0].severity == "error" and events[0].payload["differing"]


def test_a_device_that_does_not_repeat_itself_proves_nothing() -> None:
    (model, _, optimizer), events = shadowed(), list[Event]()
    model.blocks[0].mlp.out = Restless(model.blocks[0].mlp.out)
    found = check(model, optimizer, events)
    assert found.is_isolated is None and found.differing == () and events[0].name == "isolation.checked"
