"""The chunk form of the native core is ``scan`` to the last digits, whatever the widths, lengths and threads."""

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memory.inputs import Window, named, variants, window
from meristem.memory import Gates, Rule, run, scan
from meristem.memory.forms import run_trusted
from meristem.memory.gates import LOG_FLOOR
from meristem.memory.kernels import select
from meristem.memory.kernels.select import choose_form, force_reference, native_refusals
from meristem.memory.named import rules
from meristem.native import operations
from meristem.native.library import core, library
from meristem.native.operations import Form, View, chunk_form

pytestmark = pytest.mark.skipif(library() is None, reason=f"there is no native core: {core().said}")

LINEAR = [name for name in rules.names() if named(name).is_linear]
SHAPES = [
    # time, chunk, heads, key width, value width: a tail of 4 and 4 rows, one of one token, widths of no whole vector
    (50, 50, 2, 16, 32),
    (65, 16, 3, 24, 8),
    (26, 64, 2, 5, 7),
]


def given(rule: Rule, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> Window:
    """A window of random numbers that both precisions can hold."""
    n_time, _, heads, *widths = shape
    inputs = window(rule, n_time, heads=heads, widths=(widths[0], widths[1]))
    rounded = {name: x.float().to(dtype) for name, x in inputs.leaves().items()}
    return Window(
        memory={name: rounded[name] for name in inputs.memory},
        keys_bthk=rounded["keys"],
        values_bthv=rounded["values"],
        queries_bthk=rounded["queries"],
        gates=Gates(**{name: rounded.get(name) for name in vars(inputs.gates)}),
    ).tracked()


def results(rule: Rule, inputs: Window, form: str, chunk: int) -> dict[str, Tensor]:
    """Reads, memory, and every gradient of a loss that weighs each number differently."""
    arguments = *inputs.arguments()[:1], inputs.arguments()[1:4], inputs.gates
    read, memory = run_trusted(rule, *arguments, form=form, chunk=chunk)
    outputs = {"read": read} | memory
    generator = torch.Generator().manual_seed(9)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in outputs.values()
    )
    found = torch.autograd.grad(loss, list(inputs.leaves().values()), allow_unused=True)
    gradients = {f"d {name}": x for name, x in zip(inputs.leaves(), found, strict=True) if x is not None}
    return {name: x.detach() for name, x in outputs.items()} | gradients


def apart(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """How far each result is from the truth, over the truth's length; what is nought has to be."""
    assert found.keys() == truth.keys()
    return {
        name: float((x.double() - truth[name]).norm() / truth[name].norm().clamp_min(1e-30))
        for name, x in found.items()
    }


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_form_is_scan(name: str, shape: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads, memory, momentum and all gradients, warm and cold, read before and after: to 1e-13, in float32 to 3e-6."""
    monkeypatch.setattr(operations, "MOST_TOGETHER", 64)
    for rule in variants(named(name)):
        truth = results(rule, given(rule, shape, torch.float64), "scan", 1)
        for dtype, most in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
            inputs = given(rule, shape, dtype)
            assert choose_form(inputs.keys_bthk, inputs.values_bthv) == "native"
            errors = apart(results(rule, inputs, "exact_chunk", shape[1]), truth)
            assert max(errors.values()) < most, errors


@pytest.mark.parametrize("name", ["titans", "gated_delta", "delta_descent"])
@pytest.mark.parametrize("n_threads", [2, 3, 7])
def test_the_bits_do_not_depend_on_the_threads(name: str, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, shape = named(name), (33, 16, 3, 16, 16)
    monkeypatch.setattr(operations, "WORTH_A_THREAD", 1.0)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, n_threads):
            torch.set_num_threads(threads)
            found.append(results(rule, given(rule, shape, torch.float32), "exact_chunk", shape[1]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_strides_are_followed() -> None:
    """Values that are a part of something wider, keys with heads before time, one first memory for all rows."""
    rule = named("titans")
    truth_inputs = given(rule, (21, 8, 2, 16, 8), torch.float64)
    inputs = truth_inputs.tracked()
    wide = torch.cat([inputs.values_bthv, inputs.values_bthv], dim=-1)
    crossed = inputs.keys_bthk.transpose(1, 2).contiguous().transpose(1, 2)
    stacked = torch.stack([inputs.gates.retain_bth, inputs.gates.write_bth], dim=-1)
    strided = replace(
        inputs,
        keys_bthk=crossed,
        values_bthv=wide[..., :8],
        gates=replace(inputs.gates, retain_bth=stacked[..., 0], write_bth=stacked[..., 1]),
        memory={name: x[:1].expand_as(x) for name, x in inputs.memory.items()},
    )
    plain = replace(truth_inputs, memory={name: x[:1].repeat(2, 1, 1, 1) for name, x in truth_inputs.memory.items()})
    for form, window_ in (("exact_chunk", strided), ("scan", plain)):
        read, memory = run(rule, *window_.arguments(), form=form, chunk=8)
        ((read * read).sum() + sum(x.sum() for x in memory.values())).backward()
    for name, leaf in inputs.leaves().items():
        torch.testing.assert_close(leaf.grad, truth_inputs.leaves()[name].grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("of", ["read", "memory"])
def test_a_loss_of_one_output_alone(of: str) -> None:
    rule = named("titans")
    gradients = []
    for form in ("exact_chunk", "scan"):
        inputs = given(rule, (19, 8, 2, 8, 8), torch.float64)
        read, memory = run(rule, *inputs.arguments(), form=form, chunk=8)
        (read if of == "read" else memory["matrix_bhkv"]).square().sum().backward()
        gradients.append({name: x.grad for name, x in inputs.leaves().items()})
    for name, gradient in gradients[1].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=1e-11)


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same() -> None:
    rule = named("titans")
    inputs = given(rule, (70, 16, 2, 16, 16), torch.float32)
    with_gradients, after = run(rule, *inputs.arguments(), form="exact_chunk", chunk=16)
    with torch.no_grad():
        read, memory = run(rule, *inputs.arguments(), form="exact_chunk", chunk=16)
    assert torch.equal(read, with_gradients.detach())
    assert all(torch.equal(x, after[name].detach()) for name, x in memory.items())


def test_a_second_derivative_is_refused() -> None:
    rule = named("delta")
    inputs = given(rule, (9, 4, 1, 8, 8), torch.float64)
    read, _ = run(rule, *inputs.arguments(), form="exact_chunk", chunk=4)
    (gradient,) = torch.autograd.grad(read.square().sum(), inputs.values_bthv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["titans", "delta"])
def test_nan_in_a_key_is_nan_and_no_crash(name: str) -> None:
    """From the chunk of that token on; the chunks before it read what they read without it."""
    rule = named(name)
    inputs = given(rule, (48, 16, 2, 16, 16), torch.float32)
    clean, _ = run_trusted(rule, inputs.memory, inputs.arguments()[1:4], inputs.gates, form="exact_chunk", chunk=16)
    keys = inputs.keys_bthk.detach().clone()
    keys[0, 20, 0, 3] = float("nan")
    vectors = keys.requires_grad_(), inputs.values_bthv, inputs.queries_bthk
    read, memory = run_trusted(rule, inputs.memory, vectors, inputs.gates, form="exact_chunk", chunk=16)
    assert read[0, 32:, 0].isnan().all() and memory["matrix_bhkv"][0, 0].isnan().any()
    assert torch.equal(read[0, :16].detach(), clean[0, :16].detach()) and torch.equal(
        read[1].detach(), clean[1].detach()
    )
    read.sum().backward()
    assert keys.grad is not None and keys.grad[0, 20, 0].isnan().any()


def test_numbers_too_small_to_be_normal_count_as_zero_inside_alone() -> None:
    """What decays for long is zero in the end; the caller's arithmetic is as it was."""
    rule = named("titans")
    inputs = given(rule, (64, 64, 1, 8, 8), torch.float32)
    fading = replace(inputs.gates, retain_bth=torch.full_like(inputs.gates.retain_bth, 0.2))
    nothing = replace(
        fading, write_bth=torch.zeros_like(fading.write_bth), momentum_bth=torch.zeros_like(fading.retain_bth)
    )
    _, memory = run(rule, *inputs.arguments()[:4], nothing, form="exact_chunk", chunk=64)
    assert memory["matrix_bhkv"].detach().abs().max() == 0  # 0.2^64 is 1e-45
    assert float(torch.tensor(1e-40) * torch.tensor(0.5)) > 0


@pytest.mark.parametrize("gate", ["retain_bth", "momentum_bth"])
def test_a_factor_below_the_floor_counts_as_the_floor(gate: str) -> None:
    """And has the gradient 0, as ``Gates`` says."""
    rule, floor = named("titans"), float(torch.tensor(LOG_FLOOR, dtype=torch.float64).exp())
    inputs, found = given(rule, (12, 6, 1, 8, 8), torch.float64), []
    for factor in (0.0, floor * (1 - 1e-9), floor * (1 + 1e-9)):
        leaf = torch.full_like(inputs.gates.retain_bth, factor).requires_grad_()
        read, _ = run(rule, *inputs.arguments()[:4], replace(inputs.gates, **{gate: leaf}), form="exact_chunk", chunk=6)
        read.square().sum().backward()
        found.append((read.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert not found[0][1].any() and not found[1][1].any() and found[2][1].abs().min() > 0


def test_force_reference_turns_it_off() -> None:
    inputs = given(named("titans"), (9, 4, 1, 8, 8), torch.float32)
    assert choose_form(inputs.keys_bthk, inputs.values_bthv) == "native"
    with force_reference():
        assert choose_form(inputs.keys_bthk, inputs.values_bthv) == "reference"
        with force_reference():
            pass
        assert choose_form(inputs.keys_bthk, inputs.values_bthv) == "reference"
    assert choose_form(inputs.keys_bthk, inputs.values_bthv) == "native"


def test_a_backward_pass_runs_as_its_forward_pass_did(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = named("titans")
    inputs = given(rule, (9, 4, 1, 8, 8), torch.float32)
    read, _ = run(rule, *inputs.arguments(), form="exact_chunk", chunk=4)
    with force_reference():
        read.sum().backward()
        plain, _ = run(rule, *inputs.arguments(), form="exact_chunk", chunk=4)
    monkeypatch.setattr(operations, "chunk_form", None)
    plain.sum().backward()
    assert inputs.keys_bthk.grad is not None


def test_it_says_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        wrong = {
            "the device is cuda": torch.empty(2, 9, 3, 16, device="cuda"),
            "the memory is torch.bfloat16": torch.empty(2, 9, 3, 16, dtype=torch.bfloat16),
            "there is nothing to read": torch.empty(0, 9, 3, 16),
        }
        for reason, keys in wrong.items():
            assert native_refusals(keys, keys) == [reason]
    keys = torch.empty(2, 9, 3, 16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert native_refusals(keys, keys) == ["Triton's interpreter is on"]
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(select, "core", lambda: replace(core(), library=None, said="no C++ compiler was found"))
    assert native_refusals(keys, keys) == ["there is no native core: no C++ compiler was found"]
    assert choose_form(keys, keys) == "reference"


@pytest.fixture
def compiled() -> Iterator[list[torch.fx.GraphModule]]:
    """Graphs that were compiled."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


@pytest.mark.compiled
@pytest.mark.slow
def test_the_compiler_sees_one_operation(compiled: list[torch.fx.GraphModule]) -> None:
    """The whole form in one graph, and the same numbers; what is compiled inside ``force_reference`` is plain."""
    rule = named("titans")

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    def form(memory, keys, values, queries, retain, write, momentum):
        return run_trusted(
            rule, memory, (keys, values, queries), Gates(retain, write, momentum), form="exact_chunk", chunk=8
        )

    inputs = given(rule, (19, 8, 2, 8, 8), torch.float64)
    gates = inputs.gates
    arguments = *inputs.arguments()[:4], gates.retain_bth, gates.write_bth, gates.momentum_bth
    read, memory = torch.compile(form, backend=backend, fullgraph=True)(*arguments)
    true_read, true_memory = form(*arguments)
    assert torch.equal(read, true_read) and torch.equal(memory["matrix_bhkv"], true_memory["matrix_bhkv"])
    assert [str(node.target) for node in compiled[-1].graph.nodes].count("meristem.chunk_form.default") == 1
    read.sum().backward()
    assert inputs.keys_bthk.grad is not None
    with force_reference():
        torch.compile(form, backend=backend, fullgraph=True)(*arguments)
    assert "meristem.chunk_form.default" not in [str(node.target) for node in compiled[-1].graph.nodes]


@pytest.mark.parametrize("has_momentum", [False, True])
def test_the_operation_is_what_torch_expects_of_one(has_momentum: bool) -> None:
    """Shapes without values are those with them, and nothing that is given is changed."""
    inputs = given(named("titans"), (11, 4, 2, 5, 7), torch.float64)
    gates, memory = inputs.gates, list(inputs.memory.values())
    arguments = (
        *(inputs.queries_bthk, inputs.keys_bthk, inputs.values_bthv, gates.retain_bth),
        *(gates.momentum_bth if has_momentum else None, gates.write_bth, None),
        *(memory[0], memory[1] if has_momentum else None, 4, 2, False, True),
    )
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.meristem.chunk_form.default, arguments, test_utils=checks)


@pytest.mark.parametrize("probed_at, n_chunks", [("never", 2), ("token", 2), ("start", 1)])
def test_narrow_heads_are_solved_in_short_chunks(probed_at: str, n_chunks: int) -> None:
    """What is kept shows how many chunks there were; residuals at the start of a chunk of 64 are not those of 32."""
    keys = torch.randn(1, 64, 1, 16, requires_grad=True)
    values, gate, memory = torch.randn(1, 64, 1, 32), torch.rand(1, 64, 1), torch.zeros(1, 1, 16, 32)
    vectors, gates = (keys, keys, values), (None, None, gate, None)
    read, *_ = chunk_form(vectors, gates, (memory, None), chunk=64, probed_at=probed_at, reads_before=False)
    assert read.grad_fn.saved_tensors[-1].shape == (1, n_chunks, 16, 32)
    assert operations.chunk_of(16, 64) == operations.MOST_TOGETHER and operations.chunk_of(128, 64) == 64


def test_the_core_refuses_what_does_not_fit() -> None:
    """A code, and nothing is touched: sizes of zero, widths of no whole vector, tensors and room that are missing."""
    found = library()
    assert found is not None
    call = {name: getattr(found, f"meristem_form_{name}") for name in ("forward", "backward")}
    number = torch.zeros(4096)
    sizes = {
        "rows": 1,
        "time": 4,
        "heads": 1,
        "key": 16,
        "value": 16,
        "chunk": 4,
        "threads": 1,
        "levels": 1,
        "probe": 2,
    }
    for wrong in ({"time": 0}, {"key": 15}, {"value": -16}, {"chunk": 5}, {"levels": 3}, {"probe": 3}, {"key": 2**40}):
        form = Form(**(sizes | wrong))
        assert [run_form(ctypes.byref(form)) for run_form in call.values()] == [1, 1], wrong
        assert found.meristem_form_scratch(ctypes.byref(form), 0) == 0
    form = Form(**sizes)
    need = found.meristem_form_scratch(ctypes.byref(form), 1)
    assert need > 0 and [run_form(ctypes.byref(form)) for run_form in call.values()] == [1, 1]
    room = torch.empty(need, dtype=torch.uint8)
    form.scratch, form.n_scratch_bytes = room.data_ptr(), need
    form.query = View(number.data_ptr(), 64, 16, 16)
    assert [run_form(ctypes.byref(form)) for run_form in call.values()] == [2, 2]


def test_the_form_is_scan_where_keys_are_alike_and_writes_strong() -> None:
    """Where a product of powers, or an inverse, would lose all digits."""
    rule = named("titans")
    shape = (64, 64, 3, 32, 16)
    truth_inputs = given(rule, shape, torch.float64)
    keys = torch.nn.functional.normalize(truth_inputs.keys_bthk.detach() + 2.3 / 32**0.5, dim=-1).float()
    gates = {"write_bth": 0.95, "retain_bth": 1 - 1e-3, "momentum_bth": 0.1}
    errors = []
    for dtype, form in ((torch.float64, "scan"), (torch.float32, "exact_chunk")):
        inputs = replace(
            given(rule, shape, dtype),
            keys_bthk=keys.to(dtype),
            gates=Gates(**{name: torch.full((2, 64, 3), value).to(dtype) for name, value in gates.items()}),
        ).tracked()
        errors.append(results(rule, inputs, form, 64))
    assert max(apart(errors[1], errors[0]).values()) < 1e-5


def test_scan_is_the_truth_for_the_law_above() -> None:
    """The comparison can fail: another write rate gives other reads."""
    rule = named("titans")
    inputs = given(rule, (12, 4, 2, 8, 8), torch.float64)
    other = replace(inputs.gates, write_bth=inputs.gates.write_bth * 1.001)
    read, _ = run(rule, *inputs.arguments(), form="exact_chunk", chunk=4)
    truth, _ = scan(rule, *inputs.arguments()[:4], other)
    assert float(((read - truth).norm() / truth.norm()).detach()) > 1e-5
