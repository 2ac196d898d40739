"""Checks the kernels on a GPU and measures them beside public ones; scripts/gpu-check.sh says how it is called.

Each part runs in a process of its own with a time limit; one that is late, fails or lacks a package is named with its
reason, what it had found until then stays, and the others run. All limits together are six minutes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"

PACKAGES = {
    "triton": "triton",
    "fla": "fla-core",
    "titans_pytorch": "titans-pytorch",
    "axial_positional_embedding": "axial-positional-embedding",
    "yaml": "PyYAML",
} | {name: name for name in ("einops", "einx", "tensordict", "pyvers", "pydantic", "jaxtyping")}
"""What the parts import, and what it is installed by: ours, and the public packages that are measured beside it."""

PARTS = {"correctness": 75, "ours": 90, "fla": 45, "titans_pytorch": 45, "training": 70, "decoding": 35}
"""And how many seconds each may take; a kernel of ours is compiled in about one."""

Found = dict[str, Any]

LENGTHS, WIDTHS, DIM = (2048, 8192, 32768), (64, 128), 1024
TINY_LENGTHS, TINY_WIDTHS, TINY_DIM = (20,), (16,), 16

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations per second, as NVIDIA's data sheets have them."""

LIMIT = 3e-6


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--interpreter", action="store_true", help="on the CPU, at tiny sizes; writes no page")
    parser.add_argument("--missing", action="store_true", help="print the packages that are not installed, and end")
    parser.add_argument("--part", choices=PARTS, help="run this one here, and print what it found as JSON")
    given = parser.parse_args()
    if given.missing:
        # Nothing is to be installed where nothing will be measured.
        wanted = PACKAGES if torch.cuda.is_available() else ()
        print(" ".join(PACKAGES[name] for name in wanted if find_spec(name) is None))
        return 0
    if not given.interpreter and not torch.cuda.is_available():
        print("gpu-check: torch sees no NVIDIA GPU; nothing was run, and docs/gpu.md is as it was.", file=sys.stderr)
        return 3
    if given.part:
        for found in globals()[given.part](given.interpreter):
            print(json.dumps(found), flush=True)
        return 0
    patience = 8 if given.interpreter else 1
    found = {part: run(part, patience * limit_s, given.interpreter) for part, limit_s in PARTS.items()}
    text = report(found, given.interpreter)
    print(text)
    if not given.interpreter:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return int("skipped" in found["correctness"] or found["correctness"]["worst"] > LIMIT)


def run(part: str, limit_s: int, is_interpreted: bool) -> Found:
    """What a part found, and why it did not find the rest."""
    command = [sys.executable, __file__, "--part", part, *["--interpreter"] * is_interpreted]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        why = ""
        try:
            if subprocess.run(command, stdout=said, stderr=complained, timeout=limit_s).returncode:
                complained.seek(0)
                why = (complained.read().strip().splitlines() or ["it ended without a word"])[-1][:300]
        except subprocess.TimeoutExpired:
            why = f"it was not ready after {limit_s} s"
        said.seek(0)
        found = [line for line in said if line.startswith("{") and line.endswith("}\n")]
    return (json.loads(found[-1]) if found else {}) | ({"skipped": why} if why else {})


def correctness(is_interpreted: bool) -> Iterator[Found]:
    """The errors of reads, memory and all gradients in float32, against ``scan`` in float64."""
    from meristem.memory import named

    lengths = {"titans": 37, "gated_delta": 37} if is_interpreted else {"titans": 197, "gated_delta": 197}
    widths = TINY_WIDTHS if is_interpreted else (32, 64, 128)
    errors = {}
    for name, n_time in lengths.items():
        for width in widths:
            truth = read_with_gradients(named(name), window(n_time, 2, width, torch.float64, "cpu"), "scan")
            inputs = window(n_time, 2, width, torch.float32, "cpu" if is_interpreted else "cuda")
            found = read_with_gradients(named(name), inputs, "exact_chunk")
            pairs = zip(found, truth, strict=True)
            errors[f"{name} {width}"] = max(float((x.cpu().double() - y).norm() / y.norm()) for x, y in pairs)
            yield {"errors": errors, "worst": max(errors.values())}


def window(n_time: int, heads: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Unit keys and queries, values, and gates inside the limits of stability, the same numbers in every precision."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, n_time, heads, *shape, generator=generator)

    drawn = {name: functional.normalize(draw(width), dim=-1) for name in ("key", "query")}
    drawn |= {"value": draw(width), "retain": (draw() + 4).sigmoid(), "write": (draw() - 2).sigmoid()}
    drawn["momentum"] = draw().sigmoid()
    return {name: x.to(device, dtype).requires_grad_() for name, x in drawn.items()}


def read_with_gradients(rule: Any, inputs: dict[str, Tensor], form: str) -> list[Tensor]:
    """What is read, the last memory, and the gradients of a loss of both."""
    from meristem.memory import Gates, scan
    from meristem.memory.forms.exact_chunk import solved
    from meristem.memory.kernels.select import choose_form

    like = inputs["value"]
    has_momentum = rule.update.has_momentum
    gates = Gates(inputs["retain"], inputs["write"], inputs["momentum"] if has_momentum else None)
    memory = rule.init(1, like.shape[2], like.shape[3], like.shape[3], like=like)
    if form != "scan" and choose_form(inputs["key"], like) != "triton":
        raise RuntimeError("the Triton kernels were not chosen for this device: is triton installed?")
    vectors = inputs["key"], like, inputs["query"]
    if form == "scan":
        read, after = scan(rule, memory, *vectors, gates)
    else:
        # Not by the name of the form, which would take fla's kernels where these may run.
        read, after = solved(rule, memory, vectors, gates, chunk=64)
    last = after[rule.structure.weights[0]]
    leaves = [x for name, x in inputs.items() if has_momentum or name != "momentum"]
    gradients = torch.autograd.grad(read.square().sum() + last.square().sum(), leaves)
    return [read.detach(), last.detach(), *gradients]


def ours(is_interpreted: bool) -> Iterator[Found]:
    """Milliseconds of forward and backward of our form, by rule and precision of reads."""
    from meristem.memory import named

    found: Found = {}
    for precision in ("highest",) if is_interpreted else ("medium", "high", "highest"):
        # Exact reads are measured once: the other rule has the same kernels with less in them.
        for name in ("titans", "gated_delta") if is_interpreted or precision != "highest" else ("titans",):
            rule = named(name)

            def step(inputs: dict[str, Tensor], rule: Any = rule) -> object:
                return read_with_gradients(rule, inputs, "exact_chunk")

            for each in times(f"{name}, reads {precision}", step, is_interpreted, precision):
                yield (found := found | each)


def fla(is_interpreted: bool) -> Iterator[Found]:
    """The same of ``fla``'s gated delta, in bfloat16, as it is trained with."""
    if is_interpreted:
        raise RuntimeError("fla's kernels refuse Triton's interpreter")
    chunk_gated_delta_rule = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def step(inputs: dict[str, Tensor]) -> object:
        query, key, value, write = (inputs[name].bfloat16() for name in ("query", "key", "value", "write"))
        retain = inputs["retain"].log()
        read, _ = chunk_gated_delta_rule(q=query, k=key, v=value, g=retain, beta=write, scale=1.0)
        leaves = [inputs[name] for name in ("query", "key", "value", "retain", "write")]
        return torch.autograd.grad(read.float().square().sum(), leaves)

    yield from times("fla gated delta, bfloat16", step, is_interpreted)


def titans_pytorch(is_interpreted: bool) -> Iterator[Found]:
    """The same of the memory layer of titans-pytorch, its projections included: a linear memory, chunks of 64."""
    from titans_pytorch import MemoryMLP, NeuralMemory

    dim = TINY_DIM if is_interpreted else DIM
    device = "cpu" if is_interpreted else "cuda"
    layers: dict[int, Any] = {}

    def step(inputs: dict[str, Tensor]) -> object:
        n_time, heads, width = inputs["value"].shape[1:]
        if width not in layers:
            model = MemoryMLP(width, depth=1)
            layers[width] = NeuralMemory(dim=dim, chunk_size=64, dim_head=width, heads=heads, model=model).to(device)
        read, _ = layers[width](inputs["value"].flatten(2))
        return torch.autograd.grad(
            read.square().sum(), [inputs["value"], *layers[width].parameters()], allow_unused=True
        )

    yield from times("titans-pytorch layer", step, is_interpreted)


def times(
    name: str, step: Callable[[dict[str, Tensor]], object], is_interpreted: bool, precision: str = "high"
) -> Iterator[Found]:
    """The median milliseconds of a step by length and head width, one row, as many heads as make the width of a model.

    What does not fit in memory is left out of the table.
    """
    torch.set_float32_matmul_precision(precision)
    found: Found = {}
    for width in TINY_WIDTHS if is_interpreted else WIDTHS:
        for n_time in TINY_LENGTHS if is_interpreted else LENGTHS:
            heads = (TINY_DIM if is_interpreted else DIM) // width
            inputs = window(n_time, heads, width, torch.float32, "cpu" if is_interpreted else "cuda")
            try:
                found[f"{name}, {n_time} x {width}"] = median_ms(partial(step, inputs), is_interpreted)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
            yield found


def median_ms(call: Callable[[], object], is_interpreted: bool) -> float:
    """Of ten calls after two, with the device waited for; of one where kernels are interpreted."""
    elapsed = []
    for _ in range(1 if is_interpreted else 12):
        began_s = time.perf_counter()
        call()
        if not is_interpreted:
            torch.cuda.synchronize()
        elapsed.append(1e3 * (time.perf_counter() - began_s))
    return statistics.median(elapsed[2:] or elapsed)


def training(is_interpreted: bool) -> Iterator[Found]:
    """Steps of ``titans-mag-340m`` in bfloat16 on random tokens: tokens per second, and the share of the peak."""
    from meristem.models.build import build
    from meristem.recipes.plan.flops import counted
    from meristem.runs.config import load_config

    config = load_config("titans-mag-micro" if is_interpreted else "titans-mag-340m", (), {}).tree
    n_rows, n_time = (1, 32) if is_interpreted else (8, 2048)
    device, vocabulary = torch.device("cpu" if is_interpreted else "cuda"), config.tokenizer.vocab_size
    model = build(config.model, config.memory, vocabulary, 0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not is_interpreted)
    torch.set_float32_matmul_precision("high")
    tokens_bt = torch.randint(vocabulary, (n_rows, n_time + 1), device=device)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits_bto, _ = model(tokens_bt[:, :-1], None)
        return functional.cross_entropy(logits_bto.flatten(0, 1).float(), tokens_bt[:, 1:].flatten())

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    with torch.no_grad():
        n_operations = 3 * counted(loss)
    step_ms = median_ms(step, is_interpreted)
    rate = 1e3 * n_operations / step_ms
    name = "CPU" if is_interpreted else torch.cuda.get_device_name()
    peak = next((peak for known, peak in PEAKS.items() if known in name), None)
    yield {
        "parameters": sum(x.numel() for x in model.parameters()),
        "tokens_per_s": 1e3 * n_rows * n_time / step_ms,
        "operations_per_s": rate,
        "share_of_peak": rate / peak if peak else None,
    }


def decoding(is_interpreted: bool) -> Iterator[Found]:
    """Tokens per second of models that read token by token, by a recorded step and operation by operation, and the
    largest difference between the two predictions by the largest logit."""
    from meristem.models.build import build
    from meristem.models.recorded import AFTER, Steps
    from meristem.runs.config import load_config

    device, found = torch.device("cpu" if is_interpreted else "cuda"), Found()
    for preset in ("titans-mag-micro",) if is_interpreted else ("default", "titans-mag-340m"):
        config = load_config(preset, (), {}).tree
        model = build(config.model, config.memory, 256, 0).to(device).eval()
        for n_rows in (1, 2) if is_interpreted else (1, 64):
            # Only a module is recorded, not its method.
            ways = {"recorded": (steps := Steps(model)), "plain": Steps(model.forward)}
            tokens_bt = torch.zeros(n_rows, config.model.sliding_window or 1, dtype=torch.int64, device=device)
            with torch.no_grad():
                held = dict.fromkeys(ways, model(tokens_bt)[1])
            found_bo, true_bo = (read_on(ways, held, name, n_rows, AFTER + 2) for name in ways)
            each: Found = {}
            for name in ways:
                call = partial(read_on, ways, held, name, n_rows, 20)
                each[name] = 2e4 * n_rows / median_ms(call, is_interpreted)
            each["difference"] = float((found_bo - true_bo).abs().max() / true_bo.abs().max())
            found[f"{preset}, {n_rows} at once"] = each | {"why": steps.refusal, "is_recorded": steps.is_recorded}
            yield {"rates": found}


def read_on(ways: dict[str, Any], held: dict[str, Any], name: str, n_rows: int, n_time: int) -> Tensor:
    """Read so many tokens in one of the ways, from the state that is held for it; the last predictions."""
    logits_bo = torch.empty(0)
    for _ in range(n_time):
        logits_bo, held[name] = ways[name]([1] * n_rows, held[name])
    return logits_bo


def report(found: dict[str, Found], is_interpreted: bool) -> str:
    """Markdown of what was found, and why the rest was not."""
    device = "the CPU, by Triton's interpreter" if is_interpreted else torch.cuda.get_device_name()
    lines = [f"Measured on {device} with torch {torch.__version__}.", ""]
    lines += [f"- {part}: not all of it, {each['skipped']}" for part, each in found.items() if "skipped" in each]
    if "worst" in found["correctness"]:
        lines += [f"- correctness: the largest error is {found['correctness']['worst']:.1e}, allowed are {LIMIT:.0e}"]
    if "tokens_per_s" in found["training"]:
        each = found["training"]
        share = "" if each["share_of_peak"] is None else f", {each['share_of_peak']:.0%} of the device's bfloat16 rate"
        lines += [f"- training, {each['parameters']:,} parameters: {each['tokens_per_s']:,.0f} tokens/s{share}"]
    for name, each in found["decoding"].get("rates", {}).items():
        said = f"{each['recorded']:,.0f} tokens/s by a recorded step, {each['plain']:,.0f} without"
        why = "" if each["is_recorded"] else f" (not recorded: {each['why'] or 'this device records nothing'})"
        lines += [f"- decoding, {name}: {said}, predictions differ by {each['difference']:.0e}{why}"]
    rows = {k: v for part in ("ours", "fla", "titans_pytorch") for k, v in found[part].items() if k != "skipped"}
    if rows:
        lines += ["", "| forward and backward, tokens x head width | ms |", "|---|---|"]
        lines += [f"| {name} | {ms:.2f} |" for name, ms in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
