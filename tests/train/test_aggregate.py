"""Gradients of several losses become one: by the algorithm of the paper, and by nothing at all where none is needed."""

import copy
import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.config import ConfigSection, load
from meristem.errors import DeadKey, ShapeError, UnknownKey, WrongValue
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.auxiliary import auxiliary
from meristem.nn.config import MemoryConfig
from meristem.train.aggregate import Report, changes, combine, gather, keep_graphs, settle, total
from meristem.train.config import AggregateConfig
from meristem.train.loss import cross_entropy

NAMES = ("first", "second", "third", "fourth")
PCGRAD = AggregateConfig(how="pcgrad")


def rng(random_seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(random_seed)


def vector(*values: float) -> list[Tensor]:
    """A source whose only parameter has this gradient."""
    return [torch.tensor(values, dtype=torch.float64)]


def by_parameter(random_seed: int, n_sources: int) -> dict[str, list[Tensor]]:
    """Gradients of four parameters under some losses, of odd sizes; a common part makes some agree and some not."""
    generator = rng(random_seed)
    common = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((3, 5), (7,), (1,), (2, 3, 2))]
    return {
        f"source {n}": [
            torch.randn(1, generator=generator).double() * shared
            + torch.randn(shared.shape, generator=generator, dtype=torch.float64)
            for shared in common
        ]
        for n in range(n_sources)
    }


def paper(sources: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Algorithm 1 of arXiv 2001.06782, line by line, on whole vectors."""
    projected = []
    for i, source in enumerate(sources):
        own = source.clone()
        for j in torch.randperm(len(sources), generator=generator).tolist():
            if j != i and own @ sources[j] < 0:
                own = own - (own @ sources[j]) / (sources[j] @ sources[j]) * sources[j]
        projected.append(own)
    return torch.stack(projected).sum(0)


def long(gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def test_two_tasks_by_hand():
    """(1, 0) and (-1, 1) each give up half a square: (1/2, 1/2) + (0, 1)."""
    sources = {"a": vector(1, 0), "b": vector(-1, 1)}
    (found,), conflict = combine(sources, ["w"], how="pcgrad", generator=rng())
    torch.testing.assert_close(found, torch.tensor([0.5, 1.5]).double(), rtol=0, atol=1e-15)
    assert conflict.report().cosines == {"a/b": pytest.approx(-math.sqrt(0.5))}


def test_three_tasks_by_hand():
    """(2, 0), (-1, 1), (0, -1): the first ends as (1, 0) or (1, 1), the second as 0 and the third as (-1/2, -1/2) or
    (0, -1/2), by the order that is drawn for each."""
    sources = {"a": vector(2, 0), "b": vector(-1, 1), "c": vector(0, -1)}
    found = {
        tuple(combine(sources, ["w"], how="pcgrad", generator=rng(seed))[0][0].round(decimals=12).tolist())
        for seed in range(40)
    }
    assert found == {(0.5, -0.5), (1.0, -0.5), (0.5, 0.5), (1.0, 0.5)}


@pytest.mark.parametrize("n_sources", [2, 3, 5])
@pytest.mark.parametrize("random_seed", range(8))
def test_agrees_with_the_paper(n_sources, random_seed):
    """Over all parameters together the algorithm is the paper's, though no long vector is ever made."""
    sources = by_parameter(random_seed, n_sources)
    found, _ = combine(sources, NAMES, how="pcgrad", generator=rng(random_seed))
    wanted = paper([long(gradients) for gradients in sources.values()], rng(random_seed))
    torch.testing.assert_close(long(found), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("random_seed", range(5))
def test_per_layer_is_the_paper_for_each_parameter(random_seed):
    sources = by_parameter(random_seed, 2)
    found, _ = combine(sources, NAMES, how="pcgrad", per="layer", generator=rng())
    for p, gradient in enumerate(found):
        wanted = paper([gradients[p].flatten() for gradients in sources.values()], rng())
        torch.testing.assert_close(gradient.flatten(), wanted, rtol=0, atol=1e-12)


def test_per_layer_sees_what_the_whole_hides():
    """The second parameter is fought over, and the first agrees more strongly: only per layer is anything changed."""
    sources = {"a": [torch.tensor([3.0]), torch.tensor([1.0])], "b": [torch.tensor([2.0]), torch.tensor([-3.0])]}
    whole, _ = combine(sources, NAMES[:2], how="pcgrad", generator=rng())
    layers, _ = combine(sources, NAMES[:2], how="pcgrad", per="layer", generator=rng())
    assert [gradient.item() for gradient in whole] == [5.0, -2.0]
    assert [gradient.item() for gradient in layers] == [5.0, 0.0]


COMPONENTS = st.floats(-100, 100).filter(lambda value: value == 0 or abs(value) > 1e-6)
VECTORS = st.lists(st.tuples(COMPONENTS, COMPONENTS), min_size=3, max_size=3)
REACHED = st.lists(st.booleans(), min_size=3, max_size=3)


@given(left=VECTORS, right=VECTORS, reached_left=REACHED, reached_right=REACHED, per=st.sampled_from(["all", "layer"]))
@settings(deadline=None, max_examples=200)
def test_nobody_is_worked_against(left, right, reached_left, reached_right, per):
    """Of two sources neither has a negative product with the result, whichever parameters each of them reaches."""

    def source(values, reached):
        pairs = zip(values, reached, strict=True)
        return [torch.tensor(value, dtype=torch.float64) if is_reached else None for value, is_reached in pairs]

    sources = {"a": source(left, reached_left), "b": source(right, reached_right)}
    found, _ = combine(sources, NAMES[:3], how="pcgrad", per=per, generator=rng())
    for own in sources.values():
        products = [float(mine @ its) for mine, its in zip(found, own, strict=True) if its is not None]
        sizes = [float(mine.norm() * its.norm()) for mine, its in zip(found, own, strict=True) if its is not None]
        size = max((float(g.norm()) for gradients in sources.values() for g in gradients if g is not None), default=0)
        assert sum(products) >= -1e-12 * (sum(sizes) + size**2)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e6])
def test_a_source_counts_by_its_direction(scale):
    """How large another gradient is does not change what a source gives up for it; its own size carries through."""
    sources = by_parameter(2, 2)
    one, other = (long(gradients) for gradients in sources.values())
    assert one @ other < 0
    sources["source 1"] = [scale * gradient for gradient in sources["source 1"]]
    found, conflict = combine(sources, NAMES, how="pcgrad", generator=rng())
    given_up_for_other = one - (one @ other) / (other @ other) * other
    given_up_for_one = other - (one @ other) / (one @ one) * one
    wanted = given_up_for_other + scale * given_up_for_one
    torch.testing.assert_close(long(found), wanted, rtol=1e-12, atol=1e-12 * scale)
    _, before = combine(by_parameter(2, 2), NAMES, how="pcgrad", generator=rng())
    assert conflict.report().cosines == pytest.approx(before.report().cosines)
    assert conflict.report().rate == before.report().rate


def test_a_weight_is_a_scale():
    """A weighted source is as good as a gradient of that size, for both ways."""
    sources, weights = by_parameter(2, 3), {"source 0": 0.25, "source 2": 3.0}
    scaled = {name: [weights.get(name, 1) * gradient for gradient in sources[name]] for name in sources}
    for how in ("mean", "pcgrad"):
        found, conflict = combine(sources, NAMES, how=how, weights=weights, generator=rng())
        wanted, true_conflict = combine(scaled, NAMES, how=how, generator=rng())
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert conflict.report().shares == pytest.approx(true_conflict.report().shares)
        assert conflict.report().worst == true_conflict.report().worst


@pytest.mark.parametrize("per", ["all", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_conflict_it_is_the_plain_sum_to_the_bit(per, dtype):
    """Signs of zeros, denormal numbers and all: where nobody is in the way of another, the sum is not touched."""
    first = [torch.tensor([[1e-40, 3.0, -0.0]], dtype=dtype), torch.tensor([0.1], dtype=dtype), None]
    second = [torch.tensor([[2e-40, 0.7, -0.0]], dtype=dtype), None, torch.tensor([-0.0, 0.3], dtype=dtype)]
    third = [torch.tensor([[3e-41, 1 / 3, -0.0]], dtype=dtype), torch.tensor([0.7], dtype=dtype), None]
    sources = {"a": first, "b": second, "c": third}
    found, _ = combine(sources, NAMES[:3], how="pcgrad", per=per, generator=rng())
    wanted = [(first[0] + second[0]) + third[0], first[1] + third[1], second[2]]
    for mine, its in zip(found, wanted, strict=True):
        assert mine.dtype == dtype and torch.equal(mine.view(torch.uint8), its.view(torch.uint8))


def test_what_nobody_shares_is_left_alone():
    """Growth.md section 2: gradients of different parameters have nothing to settle. Both are what they were, and the
    flag says so."""
    sources = {"a": [torch.tensor([1.0, -2.0]), None, None], "b": [None, torch.tensor([-3.0]), None]}
    found, conflict = combine(sources, NAMES[:3], how="pcgrad", generator=rng())
    assert torch.equal(found[0], sources["a"][0]) and torch.equal(found[1], sources["b"][1]) and found[2] is None
    assert conflict.is_idle and conflict.report().is_idle
    assert conflict.report().cosines == {"a/b": None} and conflict.report().rate == 0


@pytest.mark.parametrize("names", [(), ("a",)])
def test_less_than_two_sources_have_nothing_to_settle(names):
    found, conflict = combine(dict.fromkeys(names, vector(1, -2)), ["w"], how="pcgrad", generator=rng())
    assert conflict.is_idle and conflict.report().is_idle
    assert [None if gradient is None else gradient.tolist() for gradient in found] == ([[1, -2]] if names else [None])


def test_a_parameter_of_one_source_is_none_of_the_others_affair():
    """What only one loss reaches keeps its gradient, however hard the two fight over what they share; and it does not
    count when they are compared."""
    sources = {"a": [vector(1, 0)[0], vector(100)[0], None], "b": [vector(-1, 1)[0], None, vector(-100)[0]]}
    found, conflict = combine(sources, NAMES[:3], how="pcgrad", generator=rng())
    assert [gradient.tolist() for gradient in found] == [[pytest.approx(0.5), pytest.approx(1.5)], [100], [-100]]
    assert conflict.report().cosines["a/b"] == pytest.approx(-math.sqrt(0.5))


def test_what_is_given_stays_as_it_is():
    sources = by_parameter(2, 3)
    before = copy.deepcopy(sources)
    combine(sources, NAMES, how="pcgrad", generator=rng())
    torch.testing.assert_close(sources, before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(bad):
    """The optimizer skips a step by its norm: settling must not make a spoilt gradient look sound."""
    for good in (1.0, -1.0):
        sources = {"a": [torch.tensor([bad, 1.0])], "b": [torch.tensor([good, 1.0])]}
        (found,), _ = combine(sources, ["w"], how="pcgrad", generator=rng())
        assert not torch.isfinite(found).all()


def test_report_by_hand():
    """Three losses on four parameters: two of six comparisons point away, and most is lost at the second parameter."""
    t = torch.tensor
    sources = {
        "a": [t([1.0, 0.0]), t([3.0]), t([1.0]), None],
        "b": [t([0.0, 2.0]), t([-2.0]), t([0.1]), t([5.0])],
        "c": [None, None, t([-2.0]), t([1.0])],
    }
    report = combine(sources, NAMES, how="pcgrad", weights={"c": 2.0}, generator=rng())[1].report()
    assert report.cosines == {
        "a/b": pytest.approx((-6 + 0.1) / math.sqrt(11 * 8.01)),
        "a/c": pytest.approx(-1.0),
        "b/c": pytest.approx((-0.2 + 5) / math.sqrt(25.01 * 5)),
    }
    assert report.rate == 3 / 6 and report.level == "ok"
    norms = [math.sqrt(11), math.sqrt(33.01), 2 * math.sqrt(5)]
    assert list(report.shares.values()) == pytest.approx([norm / sum(norms) for norm in norms])
    assert report.worst == ("second", "third") and not report.is_idle
    assert set(report.to_json()) == {"cosines", "rate", "level", "shares", "worst", "is_idle"}


def test_at_most_three_parameters_are_named_the_worst_first():
    sizes = (1.0, 4.0, 2.0, 3.0)
    sources = {"a": [torch.tensor([size]) for size in sizes], "b": [torch.tensor([-1.0])] * 4}
    report = combine(sources, NAMES, how="pcgrad", generator=rng())[1].report()
    assert report.worst == ("second", "fourth", "third")


def told(rate: float = 0.0, text: float = 0.5, is_idle: bool = False) -> Report:
    return Report({"text/layers": 0.0}, rate, {"text": text, "layers": 1 - text}, (), is_idle)


@pytest.mark.parametrize(
    ("rate", "level"), [(0.0, "ok"), (0.5, "ok"), (0.51, "warn"), (0.75, "warn"), (0.76, "high"), (1.0, "high")]
)
def test_levels_of_the_conflict_rate(rate, level):
    assert told(rate).level == level


def test_only_news_are_told():
    """A level that is reached or left, a share that jumps by more than 0.3, sources without a parameter in common."""

    def names(before, now):
        return [(event.name, event.severity) for event in changes(before, now)]

    assert names(None, told()) == []
    assert names(None, told(0.6)) == [("aggregate.conflict", "warning")]
    assert names(told(0.6), told(0.7)) == []
    assert names(told(0.6), told(0.8)) == [("aggregate.conflict", "warning")]
    assert names(told(0.8), told(0.1)) == [("aggregate.conflict", "info")]
    assert names(None, told(is_idle=True)) == [("aggregate.idle", "warning")]
    assert names(told(is_idle=True), told(is_idle=True)) == []
    assert names(told(text=0.25), told(text=0.5)) == []
    jumped = changes(told(text=0.25), told(text=0.6))
    assert [(event.name, dict(event.payload)) for event in jumped] == [
        ("aggregate.share_jumped", {"source": "text", "was": 0.25, "is": 0.6}),
        ("aggregate.share_jumped", {"source": "layers", "was": 0.75, "is": 0.4}),
    ]


def test_another_number_of_gradients_is_refused():
    with pytest.raises(ShapeError, match="source 'a' has 1 gradients for 2 parameters. Give one for each, None where"):
        combine({"a": vector(1)}, NAMES[:2], how="mean", generator=rng())


def with_own_losses(n_layers: int = 2, compute: torch.dtype = torch.float64) -> nn.Module:
    """A model whose layers have a loss of their own, off its first values."""
    levels = {"count": 2, "frequency": "output", "budget": 100.0}
    part = MemoryConfig.model_validate({"head_dim": 8, "levels": levels})
    model = build(ModelConfig(dim=16, n_layers=n_layers, mixer="memory"), part, 256, random_seed=3).to(compute)
    for name, parameter in model.named_parameters():
        if name.endswith("frequency.bias_l"):
            nn.init.zeros_(parameter)
    return model


def losses_of(model: nn.Module, tokens_bt: Tensor, *, of_rows: int) -> dict[str, Tensor]:
    """Both objectives of some rows, as parts of a step of ``of_rows``."""
    logits_bto, state = model(tokens_bt[:, :-1])
    n_targets = of_rows * (tokens_bt.shape[1] - 1)
    text = cross_entropy(logits_bto, tokens_bt[:, 1:]) / n_targets
    return {"text": text, "layers": auxiliary(state) * tokens_bt.shape[0] / of_rows}


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


TOKENS = torch.randint(0, 256, (6, 14), generator=rng(3))


@pytest.mark.parametrize("per", ["all", "layer"])
def test_pieces_of_a_step_are_settled_as_one(per):
    """A batch of six rows, or pieces of one, two and three: the same gradient and the same report, since conflicts are
    looked for once and in the sums."""
    part = AggregateConfig(how="pcgrad", per=per)
    model = with_own_losses()
    whole = settle(model, gather(model, {}, losses_of(model, TOKENS, of_rows=6)), part, rng())
    wanted = gradients_of(model)
    model.zero_grad()
    gathered = {}
    for start, stop in ((0, 1), (1, 3), (3, 6)):
        gathered = gather(model, gathered, losses_of(model, TOKENS[start:stop], of_rows=6))
    pieces = settle(model, gathered, part, rng())
    torch.testing.assert_close(gradients_of(model), wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(pieces.products, whole.products, rtol=1e-4, atol=1e-7)
    assert not whole.is_idle and whole.report().shares["layers"] > 0.1


def test_settled_gradients_are_added_to_those_that_there_are():
    model = with_own_losses()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    settle(model, gather(model, {}, losses_of(model, TOKENS, of_rows=6)), PCGRAD, rng())
    added = gradients_of(model)
    model.zero_grad()
    settle(model, gather(model, {}, losses_of(model, TOKENS, of_rows=6)), PCGRAD, rng())
    for name, gradient in gradients_of(model).items():
        assert torch.equal(added[name], torch.ones_like(added[name]) if gradient is None else 1 + gradient)


def test_one_source_is_its_own_gradient_to_the_bit():
    """A model whose layers have no loss of their own trains with pcgrad as without."""
    model = with_own_losses(compute=torch.float32)
    losses_of(model, TOKENS, of_rows=6)["text"].backward()
    wanted = gradients_of(model)
    model.zero_grad()
    conflict = settle(model, gather(model, {}, {"text": losses_of(model, TOKENS, of_rows=6)["text"]}), PCGRAD, rng())
    found = gradients_of(model)
    assert {name for name in found if found[name] is None} == {name for name in wanted if wanted[name] is None}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if wanted[name] is not None)
    assert conflict.is_idle


def test_mean_is_the_one_backward_of_the_sum():
    """With all weights 1 the loss that is taught is text + layers, to the bit of every gradient; a weight scales."""
    model = with_own_losses(compute=torch.float32)
    losses = losses_of(model, TOKENS, of_rows=6)
    (losses["text"] + losses["layers"]).backward()
    wanted = gradients_of(model)
    model.zero_grad()
    total(losses_of(model, TOKENS, of_rows=6), AggregateConfig()).backward()
    found = gradients_of(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if wanted[name] is not None)
    weighted = AggregateConfig.model_validate({"weights": {"text": 2.0, "layers": 0.5}})
    assert total(losses, weighted).item() == pytest.approx((2 * losses["text"] + losses["layers"] / 2).item())


def test_pieces_share_no_gradient():
    """Two weights that are added to each other are given one gradient; adding to it must not count twice."""
    model = nn.ParameterDict({"left": nn.Parameter(torch.ones(3)), "right": nn.Parameter(torch.ones(3))})
    gathered = {}
    for _ in range(3):
        gathered = gather(model, gathered, {"text": (model["left"] + model["right"]).sum()})
    settle(model, gathered, PCGRAD, rng())
    assert model["left"].grad.tolist() == model["right"].grad.tolist() == [3.0, 3.0, 3.0]
    assert model["left"].grad.data_ptr() != model["right"].grad.data_ptr()


def test_a_loss_that_is_a_constant_reaches_nothing():
    model = nn.Linear(2, 1)
    losses = {"text": model(torch.ones(1, 2)).sum(), "layers": torch.tensor(3.0)}
    conflict = settle(model, gather(model, {}, losses), PCGRAD, rng())
    assert conflict.report().shares == {"text": 1.0, "layers": 0.0} and conflict.is_idle


@pytest.mark.parametrize("how", ["mean", "pcgrad"])
def test_training_two_losses_that_conflict(how):
    """A steep valley, and a slope that leads along it and up its wall: summed, the valley's gradient pushes the slope's
    loss up; with pcgrad both fall at every step, and the report says that they were in conflict."""
    weight = nn.ParameterDict({"w": nn.Parameter(torch.tensor([-1.0, 0.6], dtype=torch.float64))})
    part, before, rose, rates = AggregateConfig(how=how), None, [], []
    for step in range(40):
        x, y = weight["w"]
        losses = {"text": 20 * (y - 0.2 * x) ** 2, "layers": (x - 1) ** 2 + (y - 2) ** 2}
        now = [loss.item() for loss in losses.values()]
        rose.append(before is not None and now[1] > before[1] + 1e-12)
        before = now
        weight.zero_grad()
        report = settle(weight, gather(weight, {}, losses), part, rng(step)).report()
        rates.append(report.rate)
        with torch.no_grad():
            weight["w"] -= 0.005 * weight["w"].grad
    assert max(rates) == 1.0 and report.cosines["text/layers"] < 0
    assert any(rose) == (how == "mean")


class Sizes(TorchDispatchMode):
    """The names of all operations, and the sizes of what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func._schema.name.removeprefix("aten::"))
        sizes = [leaf.numel() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_no_gradient_is_copied_into_a_longer_one():
    """Nothing that settling makes is larger than the largest parameter."""
    model = with_own_losses()
    gathered = gather(model, {}, losses_of(model, TOKENS, of_rows=6))
    with Sizes() as made:
        settle(model, gathered, PCGRAD, rng())
    assert made.largest == max(parameter.numel() for parameter in model.parameters())
    assert not {"cat", "stack"} & made.names


@pytest.mark.parametrize("per", ["all", "layer"])
def test_the_host_waits_for_the_report_alone(per):
    """On a device that has no numbers to read, gradients are settled all the same."""
    model = with_own_losses().to("meta")
    gathered = {
        name: [torch.zeros_like(parameter) for parameter in model.parameters()] for name in ("text", "layers", "others")
    }
    conflict = settle(model, gathered, AggregateConfig(how="pcgrad", per=per), rng())
    assert not conflict.is_idle and all(parameter.grad.is_meta for parameter in model.parameters())
    with pytest.raises(NotImplementedError, match="meta"):
        conflict.report()


class Squeezed(nn.Module):
    """Something of which a compiled backward reads what is neither its input nor its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 25).reshape(5, 5))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.gelu(hidden @ self.weight) @ self.weight


def two_losses(model: nn.Module) -> dict[str, Tensor]:
    out = model(torch.arange(10.0).reshape(2, 5))
    return {"text": out.square().sum(), "layers": out.cos().sum()}


def read_once_and_twice(model: nn.Module) -> dict[str, list[Tensor | None]]:
    gather(model, {}, {"text": two_losses(model)["text"]})
    return gather(model, {}, two_losses(model))


@pytest.mark.compiled
@functorch_config.patch(donated_buffer=True)
def test_compiled_blocks_are_read_twice():
    """With ``keep_graphs`` a compiled model gives each source the gradient that it has when it is not compiled, also
    after a backward for a single source; without, the compiler's own backward refuses."""
    model = Squeezed()
    model.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match="donated buffers"):
        read_once_and_twice(model)
    keep_graphs()
    model = Squeezed()
    model.compile(backend="aot_eager")
    found, wanted = read_once_and_twice(model), read_once_and_twice(Squeezed())
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


class Tree(ConfigSection):
    aggregate: AggregateConfig = AggregateConfig()


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        (
            "aggregate.how=pcgard",
            WrongValue,
            "aggregate.how: found 'pcgard' (command line aggregate.how=pcgard); expected 'mean' or 'pcgrad'.",
        ),
        (
            "aggregate.how=sum",
            WrongValue,
            "aggregate.how: found 'sum' (command line aggregate.how=sum); expected 'mean' or 'pcgrad'.",
        ),
        (
            "aggregate.weight.text=2",
            UnknownKey,
            "unknown key 'aggregate.weight' (command line aggregate.weight.text=2). Did you mean 'aggregate.weights'?",
        ),
        (
            "aggregate.weights.layer=2",
            UnknownKey,
            "unknown key 'aggregate.weights.layer' (command line aggregate.weights.layer=2). "
            "Did you mean 'aggregate.weights.layers'?",
        ),
        (
            "aggregation.how=pcgrad",
            UnknownKey,
            "unknown key 'aggregation' (command line aggregation.how=pcgrad). Did you mean 'aggregate'?",
        ),
        (
            "aggregate.weights.text=0",
            WrongValue,
            "aggregate.weights.text: found 0 (command line aggregate.weights.text=0); expected more than 0.0.",
        ),
    ],
)
def test_l23_one_set_of_options(override, kind, message):
    """What is no option is refused, with what is."""
    with pytest.raises(kind) as caught:
        load(Tree, overrides=[override])
    assert str(caught.value) == message


def test_l23_an_option_that_nothing_would_read_is_refused():
    with pytest.raises(DeadKey, match="aggregate.per is 'layer', but aggregate.how=mean looks for no conflicts. Set"):
        load(Tree, overrides=["aggregate.per=layer"])


@pytest.mark.parametrize("name", ["aggregate", "profile", "loss"])
def test_la2_each_part_stands_alone(name):
    """Of the room ``train`` it loads itself and the settings, and none of the other parts."""
    program = f"""
import sys
import meristem.train.{name}
print(*sorted(name for name in sys.modules if name.startswith("meristem.train.")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {f"meristem.train.{name}", "meristem.train.config"}
