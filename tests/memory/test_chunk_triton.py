"""The Triton kernels of the chunk form are ``scan`` to the last digits, by Triton's interpreter or on a GPU.

The interpreter must be asked for before Triton is imported, and stays on; it therefore runs in a process of its own,
which answers with how far each result is from the truth.
"""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memory.inputs import Window, named, variants, window
from meristem.memory import Gates, Rule
from meristem.memory.forms import run_trusted
from meristem.memory.kernels.chunk_operation import LEAST, chunk_form
from meristem.memory.kernels.select import choose_form, force_reference
from meristem.memory.named import rules

pytestmark = [pytest.mark.extras, pytest.mark.timeout(300)]

LINEAR = [name for name in rules.names() if named(name).is_linear]
Results = dict[str, Tensor]
Shape = tuple[int, int, int, int, int]

SHAPES: dict[str, Shape] = {
    # time, chunk, heads, key width, value width
    "two chunks and a tail": (37, 16, 1, 16, 32),
    "heads, and widths of no power of two": (21, 16, 2, 24, 40),
    "shorter than a chunk": (7, 64, 1, 8, 5),
    "blocks of 16, merged once": (50, 32, 1, 32, 16),
    "merged, and more columns than are at hand": (65, 64, 1, 16, 64),
    "keys of two halves": (24, 16, 1, 72, 16),
}


def given(
    rule: Rule, shape: Shape, dtype: torch.dtype, device: str = "cpu", *, resets: bool = False, batch: int = 1
) -> Window:
    """A window of random numbers that both precisions can hold; resets: where gates forget everything, twice."""
    n_time, _, heads, *widths = shape
    inputs = window(rule, n_time, batch=batch, heads=heads, widths=(widths[0], widths[1]))
    if resets:
        gates = {name: x for name, x in vars(inputs.gates).items() if x is not None}
        for name in {"retain_bth", "momentum_bth"} & set(gates):
            gates[name][:, n_time // 3] = 0.0
            gates[name][:, n_time // 2] = 1e-20
        inputs = replace(inputs, gates=Gates(**gates))
    leaves = {name: x.float().to(device, dtype) for name, x in inputs.leaves().items()}
    return Window(
        memory={name: leaves[name] for name in inputs.memory},
        keys_bthk=leaves["keys"],
        values_bthv=leaves["values"],
        queries_bthk=leaves["queries"],
        gates=Gates(**{name: leaves.get(name) for name in vars(inputs.gates)}),
    ).tracked()


def results(rule: Rule, inputs: Window, form: str, chunk: int) -> Results:
    """Reads, memory, and every gradient of a loss that weighs each number differently."""
    memory, keys, values, queries, gates = inputs.arguments()
    read, after = run_trusted(rule, memory, (keys, values, queries), gates, form=form, chunk=chunk)
    outputs = {"read": read} | after
    generator = torch.Generator().manual_seed(9)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in outputs.values()
    )
    found = torch.autograd.grad(loss, list(inputs.leaves().values()), allow_unused=True)
    gradients = {f"d {name}": x for name, x in zip(inputs.leaves(), found, strict=True) if x is not None}
    return {name: x.detach() for name, x in outputs.items()} | gradients


def apart(found: Results, truth: Results) -> float:
    """How far the worst result is from the truth, over the truth's length; what is nought has to be."""
    assert found.keys() == truth.keys()
    return max(
        float((x.cpu().double() - truth[name].cpu()).norm() / truth[name].cpu().norm().clamp_min(1e-30))
        for name, x in found.items()
    )


def against_scan(
    rule: Rule,
    shape: Shape,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    form: str = "exact_chunk",
    resets: bool = False,
) -> float:
    """How far the kernels are from ``scan`` in float64, or from the plain code of a form that is no ``scan``."""
    chunk = shape[1]
    with force_reference() if form != "exact_chunk" else nullcontext():
        truth_form = "scan" if form == "exact_chunk" else form
        truth = results(rule, floored(given(rule, shape, torch.float64, resets=resets)), truth_form, chunk)
    inputs = given(rule, shape, dtype, device, resets=resets)
    assert choose_form(inputs.keys_bthk, inputs.values_bthv) == "triton"
    found = results(rule, inputs, form, chunk)
    for name in {"d retain_bth", "d momentum_bth"} & set(found):
        # Such a factor has the gradient 0, as ``Gates`` says, but for what a warm probe sends.
        is_floored = inputs.leaves()[name[2:]].detach() < LEAST
        assert rule.probe == "warm" or not found[name][is_floored].any()
        found[name].masked_fill_(is_floored, 0.0)
        truth[name].masked_fill_(is_floored.cpu(), 0.0)
    return apart(found, truth)


def floored(inputs: Window) -> Window:
    """With factors that count as the least one made that one."""
    gates = {name: x for name, x in vars(inputs.gates).items() if x is not None}
    gates |= {name: gates[name].detach().clamp_min(LEAST) for name in {"retain_bth", "momentum_bth"} & set(gates)}
    return replace(inputs, gates=Gates(**gates)).tracked()


def answers(what: str) -> dict[str, list[float]]:
    """Errors in float64 and in float32 of what a test is about."""
    dtypes = torch.float64, torch.float32
    first = SHAPES["two chunks and a tail"]
    if what in LINEAR:
        orders = variants(named(what))
        return {f"{x.reads} {x.probe}": [against_scan(x, first, dtype) for dtype in dtypes] for x in orders}
    if what == "shapes":
        return {name: [against_scan(named("titans"), x, dtype) for dtype in dtypes] for name, x in SHAPES.items()}
    if what == "resets":
        names = "titans", "gated_delta"
        return {name: [against_scan(named(name), first, dtype, resets=True) for dtype in dtypes] for name in names}
    return {
        name: [against_scan(named(name), (48, *first[1:]), dtype, form="frozen_chunk") for dtype in dtypes]
        for name in ("titans", "gated_delta", "hebbian")
    }


def in_process(code: str, **variables: str) -> str:
    """What Python prints last, with these variables, and with this file as a module that it may import."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def interpreted(call: str) -> object:
    """What a function of this file gives in a process with the interpreter."""
    code = f"import json; from memory import test_chunk_triton as t; print(json.dumps(t.{call}))"
    return json.loads(in_process(code, TRITON_INTERPRET="1"))


@pytest.mark.parametrize("what", [*LINEAR, "shapes", "resets", "frozen"])
def test_the_form_is_scan(what: str) -> None:
    """Reads, memory, momentum and all gradients: to 1e-13, in float32 to 3e-6. S2-M1."""
    errors = interpreted(f"answers({what!r})")
    assert max(exact for exact, _ in errors.values()) < 1e-13, errors
    assert max(single for _, single in errors.values()) < 3e-6, errors


def alike_keys() -> float:
    """The error where keys are alike and writes strong, in float32."""
    rule, shape = named("titans"), (64, 64, 1, 32, 16)
    keys = functional.normalize(given(rule, shape, torch.float64).keys_bthk.detach() + 2.3 / 32**0.5, dim=-1).float()
    gates = {"write_bth": 0.95, "retain_bth": 1 - 1e-3, "momentum_bth": 0.1}
    found = []
    for dtype, form in ((torch.float64, "scan"), (torch.float32, "exact_chunk")):
        full = {name: torch.full((1, 64, 1), value, dtype=torch.float32).to(dtype) for name, value in gates.items()}
        inputs = replace(given(rule, shape, dtype), keys_bthk=keys.to(dtype), gates=Gates(**full)).tracked()
        found.append(results(rule, inputs, form, 64))
    return apart(found[1], found[0])


def test_the_form_is_scan_where_keys_are_alike_and_writes_strong() -> None:
    """Where a product of powers, or an inverse by them, would lose all digits."""
    assert interpreted("alike_keys()") < 1e-5


def looser_reads() -> dict[str, list[float]]:
    """By what torch allows its own products: how far reads and memory are from those of exact products."""
    rule, shape = named("titans"), SHAPES["two chunks and a tail"]
    exact = results(rule, given(rule, shape, torch.float32), "exact_chunk", 16)
    found = {}
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        loose = results(rule, given(rule, shape, torch.float32), "exact_chunk", 16)
        distances = {name: apart({name: loose[name]}, {name: exact[name].double()}) for name in exact}
        gradients = max(x for name, x in distances.items() if name.startswith("d "))
        found[precision] = [distances["read"], distances["matrix_bhkv"], gradients]
    return found


def test_reads_may_be_bfloat16_where_torch_allows_it_and_memory_never_is() -> None:
    """The interpreter makes products of TF32 in float32; what is rounded to bfloat16 it rounds."""
    read, memory, gradients = interpreted("looser_reads()")["medium"]
    assert memory == 0
    assert 2**-12 < read < 2**-6 and 2**-12 < gradients < 2**-5


def operation() -> list[int]:
    """What torch expects of an operation, of the one with momentum and the one without; and what the compiler sees."""
    rule, seen = named("titans"), []
    inputs = given(rule, (11, 4, 2, 5, 7), torch.float64)
    gates, memory = inputs.gates, list(inputs.memory.values())
    for has_momentum in (False, True):
        arguments = (
            *(inputs.queries_bthk, inputs.keys_bthk, inputs.values_bthv, gates.retain_bth),
            *(gates.momentum_bth if has_momentum else None, gates.write_bth, None),
            *(memory[0], memory[1] if has_momentum else None, 4, 2, False, True),
        )
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.meristem.triton_chunk_form.default, arguments, test_utils=checks)

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append([str(node.target) for node in graph.graph.nodes].count("meristem.triton_chunk_form.default"))
        return graph.forward

    def form(memory, keys, values, queries, retain, write, momentum):
        vectors, gates = (keys, values, queries), Gates(retain, write, momentum)
        return run_trusted(rule, memory, vectors, gates, form="exact_chunk", chunk=8)

    arguments = *inputs.arguments()[:4], gates.retain_bth, gates.write_bth, gates.momentum_bth
    read, after = torch.compile(form, backend=backend, fullgraph=True)(*arguments)
    true_read, true_after = form(*arguments)
    assert torch.equal(read, true_read) and torch.equal(after["matrix_bhkv"], true_after["matrix_bhkv"])
    read.sum().backward()
    assert inputs.keys_bthk.grad is not None
    with force_reference():
        torch.compile(form, backend=backend, fullgraph=True)(*arguments)
    return seen


def test_the_compiler_sees_one_operation_which_is_what_torch_expects() -> None:
    """Shapes without values are those with them, nothing that is given is changed, ``force_reference`` turns it off."""
    assert interpreted("operation()") == [1, 0]


def refused_and_kept() -> list[object]:
    """Without gradients nothing is kept and reads are the same; a second derivative is an error."""
    rule = named("titans")
    inputs = given(rule, (20, 16, 1, 8, 8), torch.float32)
    memory, *vectors, gates = inputs.arguments()
    read, _ = run_trusted(rule, memory, tuple(vectors), gates, form="exact_chunk", chunk=16)
    with torch.no_grad():
        again, _ = run_trusted(rule, memory, tuple(vectors), gates, form="exact_chunk", chunk=16)
    (gradient,) = torch.autograd.grad(read.square().sum(), inputs.values_bthv, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return [torch.equal(read.detach(), again), str(error)]
    return [torch.equal(read.detach(), again), ""]


def test_without_gradients_reads_are_the_same_and_a_second_derivative_is_refused() -> None:
    is_same, message = interpreted("refused_and_kept()")
    assert is_same and "no autograd formula was registered" in message


Launch = tuple[Any, dict[str, Any], dict[str, int]]


def launches(width: int, n_time: int, *, has_momentum: bool) -> list[Launch]:
    """Every kernel that a training step on a chunk launches, with its arguments and options: nothing is computed."""
    from meristem.memory.kernels import triton_backward, triton_forward

    made: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, _: object) -> Callable[..., None]:
            names = self.kernel.arg_names
            return lambda *given, **options: made.append((self.kernel, dict(zip(names, given, strict=True)), options))

    rule = named("titans" if has_momentum else "gated_delta")
    inputs = given(rule, (n_time, n_time, 1, width, width), torch.float32)
    gates, memory = inputs.gates, list(inputs.memory.values())
    with pytest.MonkeyPatch.context() as patch:
        for module in (triton_forward, triton_backward):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recorder(getattr(module, name)))
        read, *_ = chunk_form(
            (inputs.queries_bthk, inputs.keys_bthk, inputs.values_bthv),
            # A warm probe has a scale: the most that a kernel is given.
            (gates.retain_bth, gates.momentum_bth if has_momentum else None, gates.write_bth, gates.retain_bth),
            (memory[0], memory[1] if has_momentum else None),
            **{"chunk": n_time, "probed_at": "token", "reads_before": False},
        )
        read.sum().backward()
    return made


def source(kernel: Any, arguments: dict[str, Any]) -> Any:
    """A kernel with types in the place of the tensors that it was launched with, as torch allocates them."""
    from triton.compiler import ASTSource

    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}

    def type_of(argument: Any, path: tuple[int, ...]) -> str:
        if isinstance(argument, Tensor):
            aligned[path] = [["tt.divisibility", 16]]
            return "*fp32"
        constants[path] = argument
        return "constexpr"

    for at, (name, argument) in enumerate(arguments.items()):
        if type(argument) is int and name in ("n_time", "heads"):
            types[name] = "i32"
        elif type(argument) is tuple and any(isinstance(each, Tensor) for each in argument):
            types[name] = tuple(type_of(each, (at, i)) for i, each in enumerate(argument))
        else:
            types[name] = type_of(argument, (at,))
    return ASTSource(kernel, types, constants, aligned)


def compiled_for_a_gpu(width: int, n_time: int) -> dict[str, list[int]]:
    """The kernels of a step, compiled for an H100 that is not there: the most bytes that one spills of each thread's
    registers, and that it takes on the chip."""
    from triton import compile as compile_for
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    knobs.nvidia.dump_ptxas_log = True
    torch.set_float32_matmul_precision("high")
    found: dict[str, list[int]] = {}
    for has_momentum in (False, True):
        for kernel, arguments, options in launches(width, n_time, has_momentum=has_momentum):
            with redirect_stdout(io.StringIO()) as log:
                made = compile_for(source(kernel, arguments), target=GPUTarget("cuda", 90, 32), options=options)
            spilled = [int(n_bytes) for n_bytes in re.findall(r"(\d+) bytes spill stores", log.getvalue())]
            # One that has no momentum in it is compiled once.
            most = found.get(kernel.__name__, [0, 0]) if spilled else found[kernel.__name__]
            found[kernel.__name__] = [max([most[0], *spilled]), max(most[1], made.metadata.shared)]
    return found


KERNELS = {"_weigh", "_invert", "_merge", "_run", "_read", "_send", "_run_back", "_pairs", "_vectors", "_gates"}

MAY_SPILL = {(64, 64): {}, (64, 32): {}, (128, 64): {"_run": 192, "_run_back": 448}}
"""Bytes that a kernel may spill of the registers of a thread, by width of a head and length of a chunk; 0 else."""


@pytest.mark.slow
@pytest.mark.parametrize("width, n_time", MAY_SPILL)
def test_kernels_are_compiled_for_a_gpu_that_is_not_there_and_keep_to_its_registers(
    width: int, n_time: int, tmp_path: Path
) -> None:
    """The interpreter takes Python that the compiler refuses; compiler and assembler need no GPU."""
    call = f"compiled_for_a_gpu({width}, {n_time})"
    code = f"import json; from memory import test_chunk_triton as t; print(json.dumps(t.{call}))"
    made = json.loads(in_process(code, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0"))
    expected = KERNELS - ({"_merge"} if n_time <= 32 else set())
    assert made.keys() == expected
    may_spill = dict.fromkeys(KERNELS, 0) | MAY_SPILL[width, n_time]
    assert {name: spilled for name, (spilled, _) in made.items() if spilled > may_spill[name]} == {}
    assert max(on_chip for _, on_chip in made.values()) < 227 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["titans", "gated_delta", "delta_descent"])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_form_is_scan_on_a_gpu(name: str, width: int) -> None:
    for rule in variants(named(name)):
        assert against_scan(rule, (97, 64, 2, width, width), torch.float32, "cuda", resets=True) < 3e-6
