"""Whatever the form, what is read back and the memory left behind are those of the plain scan."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memory.inputs import Window, named, variants, window
from meristem.errors import ConflictingKeys, ShapeError, WrongValue
from meristem.memory import Gates, Rule, run, scan
from meristem.memory.bias import absolute, squared
from meristem.memory.forms import accepting, forms, run_trusted
from meristem.memory.forms.by_chunk import finished
from meristem.memory.forms.frozen_chunk import overshoot, refined
from meristem.memory.named import rules
from meristem.memory.retention import decay
from meristem.memory.rule import read
from meristem.memory.state import beside, flatten
from meristem.memory.structure import matrix
from meristem.memory.update import momentum

PAIRS = [(name, form) for name in rules.names() for form in accepting(named(name))]
EXACT = [(name, form) for name, form in PAIRS if forms.get(form).is_exact]
EXACT += [("hebbian", "frozen_chunk"), ("omega", "frozen_chunk")]
RETENTIONS = {name: named(name).retention for name in rules.names()}
ROUGH = [(name, form) for name, form in PAIRS if (name, form) not in EXACT and forms.get(form).approaches_scan]
WINDOWED = [(name, form) for name, form in PAIRS if form in ("exact_chunk", "frozen_chunk")]


def outcome(rule: Rule, inputs: Window, form: str, chunk: int) -> dict[str, Tensor]:
    """Reads, memory left behind, and the gradient of a loss that weighs every number of both differently."""
    inputs = inputs.tracked()
    read_bthv, memory = run(rule, *inputs.arguments(), form=form, chunk=chunk)
    results = {"read": read_bthv} | finished(memory)
    loss = sum(
        (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x).add(0.1 * index)).sum()
        for index, x in enumerate(results.values())
    )
    gradients = torch.autograd.grad(loss, list(inputs.leaves().values()), allow_unused=True)
    named_gradients = {f"d {name}": g for name, g in zip(inputs.leaves(), gradients, strict=True) if g is not None}
    return {name: x.detach() for name, x in results.items()} | named_gradients


@pytest.mark.parametrize("name, form", EXACT)
@pytest.mark.parametrize("n_time, chunk", [(1, 64), (7, 3), (16, 8), (67, 64)])
def test_form_agrees_with_scan(name: str, form: str, n_time: int, chunk: int) -> None:
    """S1-M4, S1-M5, S1-M6, S1-M18, S1-M21: reads, memory, momentum and gradients, at any chunk, in every order."""
    for rule in variants(named(name)):
        if forms.get(form).refusals(rule):
            continue
        inputs = window(rule, n_time)
        torch.testing.assert_close(
            outcome(rule, inputs, form, chunk), outcome(rule, inputs, "scan", chunk), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("name, form", ROUGH)
def test_a_rough_form_with_chunks_of_one_token_is_scan(name: str, form: str) -> None:
    """S1-M17, S1-M9: what is frozen at the start of a chunk of one token is not frozen."""
    for rule in variants(named(name)):
        if forms.get(form).refusals(rule):
            continue
        inputs = window(rule, 9)
        torch.testing.assert_close(outcome(rule, inputs, form, 1), outcome(rule, inputs, "scan", 1), rtol=0, atol=1e-10)


EVOLVING = [
    (name, form)
    for name, form in ROUGH
    if form != "lattice" and named(name).slope != 0 and RETENTIONS[name].is_linear and not RETENTIONS[name].is_mapped
]


@pytest.mark.parametrize("name, form", EVOLVING)
def test_a_rough_form_ends_in_scan_as_write_rates_shrink(name: str, form: str) -> None:
    """S1-M17: a tenth of the write rate leaves less than a tenth of the deviation, relative to what is written."""
    rule = named(name)
    inputs = window(rule, 24)
    # A LayerNorm over weights that fade, or drift away with the momentum, makes steps large however small the rate.
    ones_bth = torch.ones_like(inputs.gates.write_bth)
    memory = {key: torch.zeros_like(x) if "momentum" in key else x for key, x in inputs.memory.items()}

    def deviation(scale: float) -> float:
        gates = replace(inputs.gates, write_bth=scale * inputs.gates.write_bth, retain_bth=ones_bth)
        rest = inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk, gates
        rough_bthv, _ = run(rule, memory, *rest, form=form, chunk=8)
        return float((rough_bthv - scan(rule, memory, *rest)[0]).abs().max())

    assert deviation(0.1) > 1e-12, "nothing was approximated: the test shows nothing"
    assert deviation(0.01) < 0.2 * deviation(0.1)


@pytest.mark.parametrize("name", [name for name, form in PAIRS if form == "refined"])
def test_enough_passes_of_refinement_are_scan(name: str) -> None:
    """S1-M11: after chunk - 1 passes."""
    rule = named(name)
    inputs = window(rule, 12)
    read_bthv, memory = refined(rule, *inputs.arguments(), chunk=6, n_passes=5)
    true_bthv, after = scan(rule, *inputs.arguments())
    torch.testing.assert_close(read_bthv, true_bthv, rtol=0, atol=1e-10)
    torch.testing.assert_close(memory, after, rtol=0, atol=1e-10)
    worse_bthv, _ = refined(rule, *inputs.arguments(), chunk=6, n_passes=1)
    if rule.slope != 0:
        assert (worse_bthv - true_bthv).abs().max() > 1e-6


def test_linearised_slots_are_off_by_the_square_of_the_step() -> None:
    """S1-M20: exact at one token; in a chunk a tenth of the rate leaves a hundredth of the error; writing learns."""
    rule = named("lattice")

    def away(scale: float, n_time: int) -> tuple[float, Tensor]:
        inputs = window(rule, n_time)
        gates = replace(inputs.gates, write_bth=(scale * inputs.gates.write_bth).requires_grad_())
        rest = *inputs.arguments()[:4], gates
        # The chunk is never of one token: that one is run by scan itself.
        _, rough = run(rule, *rest, form="lattice", chunk=8)
        _, true = scan(rule, *rest)
        (slope_bth,) = torch.autograd.grad(rough["slots_bhgk"][..., 0].sum(), gates.write_bth)
        return float((rough["slots_bhgk"] - true["slots_bhgk"]).detach().abs().max()), slope_bth

    assert away(0.1, 1)[0] < 1e-10
    (large, slope_bth), (small, _) = away(0.1, 8), away(0.01, 8)
    assert large > 1e-6, "nothing was approximated: the test shows nothing"
    assert 60 < large / small < 170
    assert (slope_bth != 0).all()


@pytest.mark.parametrize("name", [name for name in rules.names() if name not in ("hebbian", "omega")])
def test_the_associative_form_takes_what_never_looks_at_the_memory(name: str) -> None:
    """S1-M18: all other rules are rejected, for it would be wrong about them."""
    rule = named(name)
    inputs = window(rule, 3)
    with pytest.raises(ConflictingKeys, match="form 'associative' cannot run this rule.*Forms that can: .*scan"):
        run(rule, *inputs.arguments(), form="associative")
    assert {name for name, form in PAIRS if form == "associative"} == {"hebbian", "omega"}


def test_the_gradient_of_ftrl_is_that_of_differences_above_its_threshold() -> None:
    """S0-M1: where nothing is near the threshold, passing it straight through is right."""
    rule = named("ftrl")
    inputs = window(rule, 3, batch=1, heads=1, widths=(2, 3))
    far = {name: x.sign() * (x.abs() + 9) for name, x in inputs.memory.items()}
    inputs = replace(inputs, memory=far).tracked()

    def answer(*leaves: Tensor) -> tuple[Tensor, ...]:
        fresh = dict(zip(inputs.leaves(), leaves, strict=True))
        gates = Gates(**{key: fresh.get(key) for key in vars(inputs.gates)})
        memory = {key: fresh[key] for key in inputs.memory}
        read_bthv, after = run(rule, memory, fresh["keys"], fresh["values"], fresh["queries"], gates, form="scan")
        return read_bthv, *after.values()

    assert torch.autograd.gradcheck(answer, tuple(inputs.leaves().values()), atol=1e-7, rtol=1e-5)


# The threshold of ftrl is passed straight through: its gradient is meant to be another than that of what is read.
SMOOTH = [(name, form) for name, form in PAIRS if form != "scan" and name != "ftrl"]


@pytest.mark.parametrize("name, form", SMOOTH)
def test_gradients_agree_with_finite_differences(name: str, form: str) -> None:
    """S0-M1, and independent of autograd through scan: the backward pass against differences, in float64."""
    rule = named(f"{name}(n_slots=3)" if named(name).structure.n_codes else name)
    inputs = window(rule, 3, batch=1, heads=1, widths=(2, 3)).tracked()

    def answer(*leaves: Tensor) -> Tensor:
        fresh = dict(zip(inputs.leaves(), leaves, strict=True))
        memory = {key: fresh[key] for key in inputs.memory}
        gates = Gates(**{key: fresh.get(key) for key in vars(inputs.gates)})
        read_bthv, after = run(
            rule, memory, fresh["keys"], fresh["values"], fresh["queries"], gates, form=form, chunk=2
        )
        # One number in which every output has a weight of its own: a backward pass an output would cost minutes.
        numbers = torch.cat([x.flatten() for x in (read_bthv, *finished(after).values()) if x.requires_grad])
        return (numbers * torch.linspace(0.5, 1.7, len(numbers), dtype=numbers.dtype)).sum()

    assert torch.autograd.gradcheck(answer, tuple(inputs.leaves().values()), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name, form", PAIRS)
@pytest.mark.parametrize("cuts", [[1], [13], [5, 6, 29]])
def test_a_window_may_be_cut_anywhere(name: str, form: str, cuts: list[int]) -> None:
    """S1-M5, S1-M17, law 3: two calls are one, momentum and unfinished chunks included."""
    rule = named(name)
    whole = window(rule, 37)
    read_bthv, memory_after = run(rule, *whole.arguments(), form=form, chunk=8)
    memory, reads = whole.memory, []
    for start, stop in itertools.pairwise([0, *cuts, 37]):
        read, memory = run(rule, *whole.cut(start, stop, memory).arguments(), form=form, chunk=8)
        reads.append(read)
    torch.testing.assert_close(torch.cat(reads, dim=1), read_bthv, rtol=0, atol=1e-10)
    torch.testing.assert_close(flatten(memory), flatten(memory_after), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name, form", PAIRS)
def test_no_read_depends_on_a_later_token(name: str, form: str) -> None:
    """Law 2."""
    rule = named(name)
    inputs, other = window(rule, 23), window(rule, 23, random_seed=1)
    read_bthv, _ = run(rule, *inputs.arguments(), form=form, chunk=8)
    for n_same in (1, 7, 8, 19):
        mixed = {
            key: torch.cat([x[:, :n_same], other.leaves()[key][:, n_same:]], 1)
            for key, x in inputs.leaves().items()
            if key not in inputs.memory
        }
        gates = Gates(**{key: mixed.get(key) for key in vars(inputs.gates)})
        changed_bthv, _ = run(
            rule, inputs.memory, mixed["keys"], mixed["values"], mixed["queries"], gates, form=form, chunk=8
        )
        torch.testing.assert_close(changed_bthv[:, :n_same], read_bthv[:, :n_same], rtol=0, atol=1e-12)
        assert (changed_bthv[:, n_same:] - read_bthv[:, n_same:]).abs().max() > 1e-3


@pytest.mark.parametrize("name, form", PAIRS)
def test_rows_of_a_batch_never_meet(name: str, form: str) -> None:
    """Law 8: turning the rows turns reads and memory with them, and nothing else."""
    rule = named(name)
    inputs = window(rule, 19, batch=3)
    rotated = {key: x.roll(1, dims=0) for key, x in inputs.leaves().items()}
    gates = Gates(**{key: rotated.get(key) for key in vars(inputs.gates)})
    memory = {key: rotated[key] for key in inputs.memory}
    read_bthv, after = run(rule, *inputs.arguments(), form=form, chunk=8)
    turned_bthv, turned_after = run(
        rule, memory, rotated["keys"], rotated["values"], rotated["queries"], gates, form=form, chunk=8
    )
    torch.testing.assert_close(turned_bthv, read_bthv.roll(1, dims=0), rtol=0, atol=1e-12)
    rolled = {key: x if isinstance(x, int) else x.roll(1, dims=0) for key, x in flatten(after).items()}
    torch.testing.assert_close(flatten(turned_after), rolled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, form", EXACT)
def test_float32_stays_close_to_the_truth(name: str, form: str) -> None:
    """Inside the stability limits an exact form loses no more to rounding than a few units of float32 per chunk."""
    rule = named(name)
    inputs = window(rule, 256)
    truth_bthv, _ = scan(rule, *inputs.arguments())
    single = Window(
        memory={key: x.float() for key, x in inputs.memory.items()},
        keys_bthk=inputs.keys_bthk.float(),
        values_bthv=inputs.values_bthv.float(),
        queries_bthk=inputs.queries_bthk.float(),
        gates=inputs.gates.to(torch.float32),
    )
    plain_bthv, _ = scan(rule, *single.arguments())
    read_bthv, _ = run(rule, *single.arguments(), form=form)
    scale = truth_bthv.abs().max()
    allowed = max(2 * (plain_bthv - truth_bthv).abs().max(), 4e-6 * scale)
    assert (read_bthv - truth_bthv).abs().max() <= allowed


@pytest.mark.parametrize("name, form", PAIRS)
def test_memory_keeps_its_dtype_under_autocast(name: str, form: str) -> None:
    """Law 5: and whatever the autocast, the numbers are those without it."""
    rule = named(name)
    inputs = window(rule, 11, dtype=torch.float32)
    read_bthv, memory = run(rule, *inputs.arguments(), form=form, chunk=4)
    low = Window(
        memory=inputs.memory,
        keys_bthk=inputs.keys_bthk.bfloat16().float(),
        values_bthv=inputs.values_bthv,
        queries_bthk=inputs.queries_bthk,
        gates=inputs.gates,
    )
    with torch.autocast("cpu", torch.bfloat16):
        cast_bthv, cast_memory = run(rule, *inputs.arguments(), form=form, chunk=4)
        from_low_bthv, _ = run(
            rule, low.memory, low.keys_bthk.bfloat16(), low.values_bthv, low.queries_bthk, low.gates, form=form, chunk=4
        )
    torch.testing.assert_close(cast_bthv, read_bthv, rtol=0, atol=0)
    torch.testing.assert_close(flatten(cast_memory), flatten(memory), rtol=0, atol=0)
    assert from_low_bthv.dtype == torch.float32


@pytest.mark.parametrize("name, form", WINDOWED)
def test_no_tensor_of_time_times_key_times_value(name: str, form: str) -> None:
    """Section 12, cost: neither forward nor backward makes a tensor that holds the weights per token; a window is worth
    having only without."""
    rule = named(name)
    n_time, chunk = 96, 8
    inputs = window(rule, n_time).tracked()
    limit = n_time * min(inputs.memory[weight].numel() for weight in rule.structure.weights)

    class Largest(TorchDispatchMode):
        n_elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, Tensor):
                    self.n_elements = max(self.n_elements, x.numel())
            return result

    def largest(form: str) -> int:
        with Largest() as mode:
            read_bthv, _ = run(rule, *inputs.arguments(), form=form, chunk=chunk)
            read_bthv.sum().backward()
        return mode.n_elements

    assert largest(form) < limit
    kept = list(_graph(run(rule, *inputs.arguments(), form=form, chunk=chunk)[0]))
    assert kept and max(kept) < limit
    # The law can fail: scan under autograd keeps one memory per token.
    assert sum(_graph(run(rule, *inputs.arguments(), form="scan")[0])) > limit


COUNTED = [pair for pair in PAIRS if pair[1] in ("exact_chunk", "frozen_chunk", "tnt", "lattice", "atlas")]


@pytest.mark.parametrize("name, form", COUNTED)
def test_the_number_of_kernels_depends_on_chunks_alone(name: str, form: str) -> None:
    """Section 12, cost: not on rows, heads or tokens at a fixed number of chunks; and the device is never read from."""
    rule = named(name)
    few, many = window(rule, 24, batch=3), window(rule, 48, batch=3)
    counts = [
        len(_operations(rule, few, form, chunk=6)),
        len(_operations(rule, _rows(few, slice(2)), form, chunk=6)),
        len(_operations(rule, _heads(few, slice(2)), form, chunk=6)),
        len(_operations(rule, many, form, chunk=12)),
    ]
    assert len(set(counts)) == 1, counts
    read_back = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
    assert not read_back & set(_operations(rule, few, form, chunk=6))


def _operations(rule: Rule, inputs: Window, form: str, chunk: int) -> list[str]:
    """What runs in a window and its backward pass, the checks at the door apart."""
    inputs, found = inputs.tracked(), []

    class Named(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    vectors = inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk
    with Named():
        read_bthv, _ = run_trusted(rule, inputs.memory, vectors, inputs.gates, form=form, chunk=chunk)
        read_bthv.sum().backward()
    return found


def _rows(inputs: Window, rows: slice) -> Window:
    return _cut(inputs, lambda x, is_memory: x[rows])


def _heads(inputs: Window, heads: slice) -> Window:
    return _cut(inputs, lambda x, is_memory: x if x.dim() == 1 else x[:, heads] if is_memory else x[:, :, heads])


def _cut(inputs: Window, cut: Callable[[Tensor, bool], Tensor]) -> Window:
    gates = {name: None if x is None else cut(x, False) for name, x in vars(inputs.gates).items()}
    return Window(
        memory={name: cut(x, True) for name, x in inputs.memory.items()},
        keys_bthk=cut(inputs.keys_bthk, False),
        values_bthv=cut(inputs.values_bthv, False),
        queries_bthk=cut(inputs.queries_bthk, False),
        gates=Gates(**gates),
    )


@pytest.mark.parametrize("name, form", PAIRS)
def test_the_same_window_twice_is_the_same_to_the_bit(name: str, form: str) -> None:
    """Section 12, determinism."""
    rule = named(name)
    inputs = window(rule, 19, dtype=torch.float32)
    once, again = (run(rule, *inputs.arguments(), form=form, chunk=8) for _ in range(2))
    torch.testing.assert_close(flatten(again[1]), flatten(once[1]), rtol=0, atol=0)
    assert torch.equal(again[0], once[0])


@pytest.mark.parametrize("name", ["delta", "gated_delta", "titans", "momentum_delta"])
@pytest.mark.parametrize("chunk, allowed", [(64, 2e-6), (128, 4e-6)])
def test_correlated_keys_cost_no_digits(name: str, chunk: int, allowed: float) -> None:
    """4.3: keys of a mean cosine of 0.84 in single precision, where squaring the inverse out would be off by 1e7."""
    rule, width = named(name), 64
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(width, generator=generator, dtype=torch.float64)
    keys_bthk = shared + 0.44 * torch.randn(1, 256, 2, width, generator=generator, dtype=torch.float64)
    keys_bthk = keys_bthk / keys_bthk.norm(dim=-1, keepdim=True)
    cosine = torch.einsum("bthk,bshk->bhts", keys_bthk, keys_bthk).mean()
    assert 0.8 < cosine < 0.88
    values_bthv = torch.randn(1, 256, 2, 32, generator=generator, dtype=torch.float64)
    ones_bth = torch.ones(1, 256, 2, dtype=torch.float64)
    gates = Gates(0.99 * ones_bth, 0.5 * ones_bth)
    if rule.update.has_momentum:
        gates = replace(gates, write_bth=0.05 * ones_bth, momentum_bth=0.5 * ones_bth)
    memory = rule.init(1, 2, width, 32, like=keys_bthk)
    true_bthv, _ = scan(rule, memory, keys_bthk, values_bthv, keys_bthk, gates)
    single = {key: x.float() for key, x in memory.items()}
    vectors = (x.float() for x in (keys_bthk, values_bthv, keys_bthk))
    read_bthv, _ = run(rule, single, *vectors, gates.to(torch.float32), form="exact_chunk", chunk=chunk)
    assert (read_bthv - true_bthv).abs().max() <= allowed * true_bthv.abs().max()


@pytest.mark.parametrize("name, form", EXACT)
def test_low_precision_errs_no_more_than_twice_the_plain_maths_in_it(name: str, form: str) -> None:
    """Section 12, precision: a window in bfloat16 against scan with memory and gates in bfloat16 too."""
    rule = named(name)
    inputs = window(rule, 100)
    true_bthv, _ = scan(rule, *inputs.arguments())
    low = (x.bfloat16() for x in (inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk))
    keys_bthk, values_bthv, queries_bthk = low
    plain = {key: x.bfloat16() for key, x in inputs.memory.items()}
    plain_bthv, _ = scan(rule, plain, keys_bthk, values_bthv, queries_bthk, inputs.gates.to(torch.bfloat16))
    single = {key: x.float() for key, x in inputs.memory.items()}
    rest = keys_bthk, values_bthv, queries_bthk, inputs.gates.to(torch.float32)
    read_bthv, after = run(rule, single, *rest, form=form, chunk=16)
    assert {x.dtype for x in finished(after).values()} == {torch.float32}
    assert (read_bthv - true_bthv).abs().max() <= 2 * (plain_bthv - true_bthv).abs().max()


def _graph(result: Tensor) -> list[int]:
    """Sizes of all tensors that the autograd graph behind ``result`` keeps."""
    sizes, seen, waiting = [], set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += list(getattr(node, "saved_tensors", ()))
        sizes += [x.numel() for x in saved if isinstance(x, Tensor)]
        waiting += [following for following, _ in node.next_functions]
    return sizes


def test_a_form_that_cannot_run_a_rule_says_why_and_names_those_that_can() -> None:
    """S1-M22, S1-M18."""
    rule = Rule(structure=matrix(), bias=absolute(), retention=decay(), update=momentum())
    inputs = window(rule, 5)
    with pytest.raises(ConflictingKeys, match=r"bias is not affine in what is recalled. Forms that can: .*scan"):
        run(rule, *inputs.arguments(), form="exact_chunk")
    auto, _ = run(rule, *inputs.arguments())
    torch.testing.assert_close(auto, scan(rule, *inputs.arguments())[0])
    linear = Rule(structure=matrix(), bias=squared(), retention=decay(), update=momentum())
    assert accepting(linear) == ["exact_chunk", "frozen_chunk", "refined", "scan", "tnt"]


@pytest.mark.parametrize("name", ["titans", "titans_mlp", "memora"])
def test_tnt_is_a_global_memory_and_local_ones_that_start_afresh(name: str) -> None:
    """S1-M19, memory.md 4.7: against both memories run by themselves, chunk by chunk, with queries turned by hand."""
    rule = named(name)
    inputs, chunk = window(rule, 10), 4
    reset = {key: 1.1 * value for key, value in inputs.memory.items() if key in rule.structure.weights}
    held = inputs.memory | {beside(key, "reset"): value for key, value in reset.items()}
    read_bthv, after = run(rule, held, *inputs.arguments()[1:], form="tnt", chunk=chunk)
    whole, reads = inputs.memory, []
    for begin in range(0, 10, chunk):
        part = inputs.cut(begin, begin + chunk, whole)
        local = reset | rule.retention.carry(reset) | rule.update.carry(reset)
        score_bhts = torch.einsum("bthk,bshk->bhts", part.queries_bthk, part.keys_bthk).tril()
        turned_bthk = torch.einsum("bhts,bshk->bthk", score_bhts, part.keys_bthk)
        rest = part.keys_bthk, part.values_bthv, turned_bthk, part.gates
        local_bthv, _ = run(rule, local, *rest, form="frozen_chunk", chunk=chunk)
        asked = [read(rule, whole, part.queries_bthk[:, t]) for t in range(part.keys_bthk.shape[1])]
        reads.append(local_bthv + torch.stack(asked, dim=1))
        _, whole = run(rule, *part.arguments(), form="frozen_chunk", chunk=chunk)
    torch.testing.assert_close(read_bthv, torch.cat(reads, dim=1), rtol=0, atol=1e-10)
    kept = {key: after[key] for key in finished(whole)}
    torch.testing.assert_close(kept, finished(whole), rtol=0, atol=1e-10)


def test_a_memory_of_another_rule_or_width_is_refused_with_every_difference() -> None:
    """S1-M22."""
    rule = named("titans")
    inputs = window(rule, 5)
    other = named("titans_mlp").init(2, 3, 5, 7)
    with pytest.raises(ShapeError, match=r"no 'matrix_bhkv'.*no 'matrix_momentum_bhkv'.*holds 'in_bhkf'.*rule.init"):
        run(rule, other, *inputs.arguments()[1:])
    wide = rule.init(3, 3, 6, 7, like=inputs.keys_bthk)
    told = r"'matrix_bhkv' is \(3, 6, 7\).*expected \(3, 5, 7\).*holds 3 rows, the inputs have 2"
    with pytest.raises(ShapeError, match=told):
        run(rule, wide, *inputs.arguments()[1:])
    with pytest.raises(ShapeError, match="needs the gates momentum_bth"):
        run(rule, *inputs.arguments()[:4], replace(inputs.gates, momentum_bth=None))


def test_gates_out_of_range_and_keys_that_are_no_numbers_are_refused() -> None:
    """S1-M22: nothing is clamped in silence."""
    rule = named("titans")
    inputs = window(rule, 5)
    keys_bthk = inputs.keys_bthk.clone()
    keys_bthk[0, 0, 0, 0] = torch.nan
    with pytest.raises(WrongValue, match="keys are not all finite"):
        run(rule, inputs.memory, keys_bthk, *inputs.arguments()[2:])
    gates = replace(inputs.gates, retain_bth=inputs.gates.retain_bth + 1, write_bth=-inputs.gates.write_bth)
    with pytest.raises(WrongValue, match=r"retain_bth spans 1.* expected 0 to 1; write_bth spans -"):
        run(rule, *inputs.arguments()[:4], gates)


def test_an_exact_form_goes_on_from_an_unfinished_chunk_as_if_it_were_whole() -> None:
    """A memory that a rough form left inside a chunk is a memory like any other."""
    rule = named("titans")
    inputs = window(rule, 10)
    _, memory = run(rule, *inputs.cut(0, 5).arguments(), form="frozen_chunk", chunk=4)
    assert "unfinished" in memory
    read_bthv, after = run(rule, *inputs.cut(5, 10, memory).arguments(), form="exact_chunk", chunk=4)
    true_bthv, _ = scan(rule, *inputs.cut(5, 10, finished(memory)).arguments())
    torch.testing.assert_close(read_bthv, true_bthv)
    assert "unfinished" not in after


@pytest.mark.parametrize("write_rate, is_stable", [(0.02, True), (0.03, True), (0.05, False)])
def test_the_overshoot_tells_where_frozen_chunks_diverge(write_rate: float, is_stable: bool) -> None:
    """S1-M17, memory.md 4.4: one key of length one, nothing forgotten: stable below 2; at 3.2, 113 times in six."""
    rule = named("delta")
    keys_bthk = torch.zeros(1, 384, 1, 4, dtype=torch.float64)
    keys_bthk[..., 0] = 1
    ones_bth = torch.ones(1, 384, 1, dtype=torch.float64)
    gates = Gates(ones_bth, write_rate * ones_bth)
    worst = overshoot(rule, keys_bthk, gates, 64)
    torch.testing.assert_close(worst, torch.full_like(worst, 64 * write_rate), rtol=1e-4, atol=1e-4)
    first = {"matrix_bhkv": torch.ones(1, 1, 4, 1, dtype=torch.float64)}
    values_bthv = torch.zeros(1, 384, 1, 1, dtype=torch.float64)
    _, after = run(rule, first, keys_bthk, values_bthv, keys_bthk, gates, form="frozen_chunk", chunk=64)
    residual = abs(after["matrix_bhkv"][0, 0, 0, 0].item())
    assert residual == pytest.approx(abs(1 - 64 * write_rate) ** 6, rel=1e-6)
    assert (residual < 1) == (worst.max() < 2) == is_stable


@pytest.mark.parametrize("name, form", PAIRS)
def test_gates_that_a_rule_does_not_ask_for_change_nothing(name: str, form: str) -> None:
    """One gate layer may serve a loop over names."""
    rule = named(name)
    inputs = window(rule, 7)
    other_bth = inputs.gates.retain_bth
    more = {key: other_bth if gate is None else gate for key, gate in vars(inputs.gates).items() if key in MORE}
    read_bthv, _ = run(rule, *inputs.arguments(), form=form, chunk=4)
    again_bthv, _ = run(rule, *inputs.arguments()[:4], replace(inputs.gates, **more), form=form, chunk=4)
    torch.testing.assert_close(again_bthv, read_bthv, rtol=0, atol=0)


MORE = ("momentum_bth", "threshold_bth", "weight_bth")
