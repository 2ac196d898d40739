"""Kernels mean what the plain tensor code means, run only where they can, and can be turned off."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from memory.inputs import named
from meristem.errors import MissingExtra
from meristem.memory import Gates, Rule, run, scan
from meristem.memory.kernels import select
from meristem.memory.kernels.chunk_solve import Weights, solve, solve_back
from meristem.memory.kernels.fla_delta import fla_delta, recurrence
from meristem.memory.kernels.select import force_reference
from meristem.memory.named import rules
from meristem.memory.state import Memory

CASES = {
    "hebbian": {"n_levels": 1, "looks": False, "solves": False},
    "delta": {"n_levels": 1, "looks": True, "solves": True},
    "titans": {"n_levels": 2, "looks": True, "solves": True},
    "titans at a frozen memory": {"n_levels": 2, "looks": True, "solves": False},
}
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and find_spec("triton")), reason="needs a CUDA device and triton"
)

Results = dict[str, Tensor]


Chunks = tuple[Tensor, Tensor, Tensor, Weights, Tensor]
"""Keys, values, queries, weights, and the first memory over its momentum."""


def chunks(case: str, dtype: torch.dtype, device: str = "cpu") -> Chunks:
    """Inputs of ``solve``: an odd number of chunks, unit keys, more values than one program takes.

    Those of delta are square and lie transposed, which nobody may notice.
    """
    n, h, c, k, v = (5, 3, 16, 16, 16) if case == "delta" else (5, 3, 32, 16, 64)
    n_levels, probed_at, solves = CASES[case].values()
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    def placed(x: Tensor) -> Tensor:
        return (x.mT.contiguous().mT if case == "delta" else x).to(device, dtype)

    vectors = functional.normalize(draw(n, h, c, k), dim=-1), draw(n, h, c, v), draw(n, h, c, k)
    weights = Weights(
        intra_nhcs=placed(draw(n, h, c, c).sigmoid().tril()),
        read_nhcl=placed(draw(n, h, c, n_levels)),
        write_nhcl=placed(0.5 * draw(n, h, c, n_levels)),
        carry_nhll=placed(0.5 * draw(n, h, n_levels, n_levels)),
        probe_nhcl=placed(draw(n, h, c, n_levels).sigmoid()) if probed_at else None,
        is_solved=bool(solves),
    )
    key_nhck, value_nhcv, query_nhck = map(placed, vectors)
    return key_nhck, value_nhcv, query_nhck, weights, placed(draw(h, n_levels * k, v))


def solved(inputs: Chunks) -> Results:
    """Reads, last memory, and the gradient of a loss that weighs every number of both differently."""
    key_nhck, value_nhcv, query_nhck, weights, first_hkv = inputs
    read, made = solve((key_nhck, query_nhck), value_nhcv, weights, first_hkv)
    last = made.passing_nhkv[-1]
    d_vectors, d_weights, d_first = solve_back((key_nhck, query_nhck), weights, made, weighing(read), weighing(last))
    d_chunks = dict(zip(("d key", "d value", "d query"), d_vectors, strict=True)) | {"d first": d_first}
    d_given = {f"d {name}": x for name, x in vars(d_weights).items() if isinstance(x, Tensor)}
    return {"read": read, "last": last} | d_chunks | d_given


def weighing(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)


def gradients(results: list[Tensor], leaves: dict[str, Tensor]) -> Results:
    loss = sum((x * weighing(x)).sum() for x in results)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {f"d {name}": gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def errors(found: Results, truth: Results) -> dict[str, float]:
    """The largest error of each result, in units of its largest number."""
    assert found.keys() == truth.keys()
    return {
        name: float((x.detach().cpu().double() - truth[name].double()).abs().max() / truth[name].abs().max())
        for name, x in found.items()
    }


def tokens(rule: Rule, n_time: int, dtype: torch.dtype = torch.float64) -> tuple[Memory, Tensor, Tensor, Tensor, Gates]:
    """A window whose widths the kernel takes: unit keys, gates inside the limits of stability."""
    batch, heads, key_width, value_width = 2, 3, 16, 32
    generator = torch.Generator().manual_seed(1)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    def gate(middle: float) -> Tensor:
        return (draw(batch, n_time, heads) + middle).sigmoid().to(dtype).requires_grad_()

    empty = rule.init(batch, heads, key_width, value_width, like=torch.empty(0, dtype=torch.float64))
    gates = Gates(
        retain_bth=gate(2.0), write_bth=gate(-2.0), momentum_bth=gate(0.0) if rule.update.has_momentum else None
    )
    memory = {name: (0.3 * draw(*x.shape)).to(dtype).requires_grad_() for name, x in empty.items()}
    keys, queries = (functional.normalize(draw(batch, n_time, heads, key_width), dim=-1).to(dtype) for _ in range(2))
    values = draw(batch, n_time, heads, value_width).to(dtype)
    return memory, keys.requires_grad_(), values.requires_grad_(), queries.requires_grad_(), gates


def in_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with these variables, and with this file as a module that it may import."""
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join([tests, *filter(None, sys.path)])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_plain_loop_agree_with_differences(case: str) -> None:
    key_nhck, value_nhcv, query_nhck, weights, first_hkv = inputs = chunks(case, torch.float64)
    given = {name: x for name, x in vars(weights).items() if isinstance(x, Tensor)}
    given |= {"key": key_nhck, "value": value_nhcv, "query": query_nhck, "first": first_hkv}
    found = solved(inputs)
    generator = torch.Generator().manual_seed(2)

    def loss() -> Tensor:
        read, made = solve((key_nhck, query_nhck), value_nhcv, weights, first_hkv)
        return sum((x * weighing(x)).sum() for x in (read, made.passing_nhkv[-1]))

    for name, x in given.items():
        direction, before = torch.randn(x.shape, generator=generator, dtype=x.dtype), x.clone()
        direction = direction.tril() if name == "intra_nhcs" else direction
        above, below = (loss() for step in (1e-6, -1e-6) if x.copy_(before + step * direction) is x)
        x.copy_(before)
        torch.testing.assert_close((found[f"d {name}"] * direction).sum(), (above - below) / 2e-6, rtol=1e-6, atol=0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(find_spec("fla") is None, reason="fla-core is not installed: pip install 'meristem[kernels]'")
@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_fla_on_a_gpu_agrees_with_scan_but_for_tf32(name: str) -> None:
    """S2-M1."""
    rule = named(name)
    memory, keys, values, queries, gates = tokens(rule, 150, torch.float32)
    true_read, true_memory = scan(rule, memory, keys, values, queries, gates)
    there = {gate: x.cuda() for gate, x in vars(gates).items() if x is not None}
    placed = {weight: x.cuda() for weight, x in memory.items()}
    read, after = fla_delta(rule, placed, keys.cuda(), values.cuda(), queries.cuda(), Gates(**there))
    found = errors({"read": read} | after, {"read": true_read} | true_memory)
    assert max(found.values()) < 5e-3


@pytest.fixture
def with_everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if all packages were installed, the interpreter not asked for, and TF32 allowed."""
    monkeypatch.setattr(select, "_is_installed", lambda package: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(precision)


def on(
    device: str, key_width: int = 32, value_width: int = 200, dtype: torch.dtype = torch.float32, n_time: int = 9
) -> list[Tensor]:
    with FakeTensorMode():
        return [torch.empty(2, n_time, 3, width, device=device, dtype=dtype) for width in (key_width, value_width)]


@pytest.mark.parametrize(
    "given, frozen, reason",
    [
        ({}, 1, None),
        ({"key_width": 7}, 128, None),
        ({"device": "cpu"}, 1, "the device is cpu"),
        ({"dtype": torch.float64}, 1, "the memory is torch.float64"),
        ({"key_width": 129}, 1, "a key is 129 wide, the most is 128"),
        ({"n_time": 0}, 1, "there is nothing to read"),
        ({}, 129, "a chunk has 129 tokens, the most is 128"),
    ],
)
@pytest.mark.usefixtures("with_everything")
def test_triton_runs_where_it_can(given: dict[str, object], frozen: int, reason: str | None) -> None:
    inputs = on(**{"device": "cuda", **given})
    assert select.triton_refusals(*inputs, frozen) == ([reason] if reason else [])
    if given.get("device") != "cpu":
        assert select.choose_form(*inputs, frozen) == ("reference" if reason else "triton")


@pytest.mark.usefixtures("with_everything")
def test_interpreter_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select.choose_form(*on("cpu")) != "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select.choose_form(*on("cpu")) == "triton"
    assert select.choose_form(*on("cpu", dtype=torch.float64)) == "triton"


@pytest.mark.parametrize("name", rules.names())
@pytest.mark.usefixtures("with_everything")
def test_fla_runs_delta_and_gated_delta_only(name: str) -> None:
    keys, _, values = spread_out("cuda")
    expected = "fla" if name in ("delta", "gated_delta") else "reference"
    assert select.choose_window(named(name), keys, values) == expected


@pytest.mark.usefixtures("with_everything")
def test_fla_runs_where_it_can() -> None:
    rule, (keys, wide, values) = named("gated_delta"), spread_out("cuda")
    assert select.fla_refusals(rule, keys, values) == []
    assert select.fla_refusals(rule, wide, values) == ["a key is 257 wide, the most is 256"]
    assert select.fla_refusals(replace(rule, reads="before"), keys, values) == ["the rule reads before it writes"]
    assert select.fla_refusals(rule, *spread_out("cpu")[::2]) == ["the device is cpu"]
    torch.set_float32_matmul_precision("highest")
    (reason,) = select.fla_refusals(rule, keys, values)
    assert reason.startswith("torch keeps products of float32 exact")
    assert select.choose_window(rule, keys, values) == "reference"


def spread_out(device: str) -> list[Tensor]:
    """Keys, keys too wide, and values of a window."""
    with FakeTensorMode():
        return [torch.empty(2, 9, 3, width, device=device) for width in (64, 257, 32)]


@pytest.mark.usefixtures("with_everything")
def test_force_reference_turns_all_kernels_off() -> None:
    """S2-M1: and leaves them as they were."""
    keys, _, values = spread_out("cuda")

    def chosen() -> tuple[str, str]:
        return select.choose_form(*on("cuda")), select.choose_window(named("delta"), keys, values)

    assert chosen() == ("triton", "fla")
    with force_reference():
        assert chosen() == ("reference", "reference")
        with force_reference():
            pass
        assert chosen() == ("reference", "reference")
    assert chosen() == ("triton", "fla")


@pytest.mark.usefixtures("with_everything")
def test_nothing_is_chosen_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, _, values = spread_out("cuda")
    monkeypatch.setattr(select, "_is_installed", lambda package: package == "fla")
    assert select.triton_refusals(*on("cuda")) == ["triton is not installed"]
    assert select.fla_refusals(named("delta"), keys, values) == ["fla-core is not installed"]


@pytest.mark.parametrize("package", ["meristem.memory.kernels.chunk_triton", "fla"])
def test_a_window_on_the_cpu_imports_no_kernel(package: str) -> None:
    """Triton itself is imported by torch where it is there."""
    code = f"""
import sys
from memory.test_kernels import named, run, tokens
run(named("titans"), *tokens(named("titans"), 40), form="exact_chunk", chunk=16)[0].sum().backward()
print(sorted(name for name in sys.modules if name == "{package}" or name.startswith("{package}.")))
"""
    done = in_process(code, TRITON_INTERPRET="0")
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def gated_delta_by_hand(**given: Tensor) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet (2412.06464, eq. 10), ``S <- S a (I - b k k^T) + b v k^T``, as the paper writes it; reads ``S q``.

    ``fla`` and we store the transpose of S.
    """
    stored = given["initial_state"].mT
    reads = []
    for t in range(given["k"].shape[1]):
        query, key, value = (given[name][:, t] for name in "qkv")
        kept, step = given["g"][:, t].exp()[..., None, None], given["beta"][:, t][..., None, None]
        erased = torch.eye(key.shape[-1], dtype=key.dtype) - step * key[..., :, None] * key[..., None, :]
        stored = stored @ (kept * erased) + step * value[..., :, None] * key[..., None, :]
        reads.append(given["scale"] * (stored @ query[..., None])[..., 0])
    return torch.stack(reads, dim=1), stored.mT


@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_arguments_for_fla_mean_what_scan_means(name: str) -> None:
    """S2-M1: outputs and gradients, through the paper's own recurrence."""
    rule = named(name)
    memory, keys, values, queries, gates = inputs = tokens(rule, 23)
    leaves = {"keys": keys, "values": values, "retain": gates.retain_bth, "write": gates.write_bth} | memory
    read, matrix = gated_delta_by_hand(**recurrence(rule, *inputs))
    true_read, after = scan(rule, *inputs)
    torch.testing.assert_close(read, true_read, rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix, after["matrix_bhkv"], rtol=0, atol=1e-10)
    torch.testing.assert_close(
        gradients([read, matrix], leaves), gradients([true_read, after["matrix_bhkv"]], leaves), rtol=0, atol=1e-10
    )


def test_arguments_for_fla_are_finite_where_nothing_is_kept() -> None:
    rule = named("delta")
    memory, keys, values, queries, gates = tokens(rule, 5, torch.float32)
    gates = replace(gates, retain_bth=torch.zeros_like(gates.retain_bth))
    read, _ = gated_delta_by_hand(**recurrence(rule, memory, keys, values, queries, gates))
    torch.testing.assert_close(read, scan(rule, memory, keys, values, queries, gates)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_arguments_for_fla_are_those_of_its_own_reference(name: str) -> None:
    if not (find_spec("fla") and find_spec("triton") and find_spec("einops")):
        pytest.skip("fla-core, which needs triton, is not installed: pip install 'meristem[kernels]'")
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    inputs = tokens(named(name), 23, torch.float32)
    read, matrix = naive_recurrent_gated_delta_rule(**recurrence(named(name), *inputs))
    true_read, after = scan(named(name), *inputs)
    torch.testing.assert_close(read, true_read, rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix, after["matrix_bhkv"], rtol=0, atol=1e-5)


def test_a_missing_fla_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fla", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"needs fla, which is not installed.*pip install 'meristem\[kernels\]'"):
        fla_delta(named("delta"), *tokens(named("delta"), 3))


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["hebbian", "titans"])
def test_form_compiles_whole_with_a_static_chunk(name: str) -> None:
    """S2-M1: one graph for whole chunks, for choosing a kernel breaks none."""
    rule, inputs = named(name), tokens(named(name), 32)

    def read(*given: object) -> tuple[Tensor, Memory]:
        return run(rule, *given, form="exact_chunk", chunk=16)

    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), read(*inputs), rtol=0, atol=1e-12)
