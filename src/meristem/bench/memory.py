"""The chunk form against the scan, and the memory layer against the public package."""

import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from meristem.bench.measure import Row, Timed, medians, timed
from meristem.bench.peer_titans import peak_bytes
from meristem.device.limits import n_cpus
from meristem.memory import Gates, named
from meristem.memory.forms import run_trusted
from meristem.memory.kernels.select import force_reference
from meristem.native.library import core, library
from meristem.nn.config import MemoryConfig
from meristem.nn.memory import MemoryLayer
from meristem.recipes.plan.flops import counted

PEER = Path(__file__).with_name("peer_titans.py")
PEER_PYTHON = "MERISTEM_BENCH_PYTHON"
N_TIME = 512


def forms(n_repeats: int) -> Iterator[Row]:
    """Forward and backward of the exact chunk form against the scan: 1,024 tokens, 4 heads of 64."""
    for name in ("delta", "titans"):
        chunked, scanned = (_window_step(name, form) for form in ("exact_chunk", "scan"))
        seconds = medians({"chunk": timed(chunked), "scan": timed(scanned)}, n_repeats=n_repeats, n_warm=1)
        note = f"chunk form {seconds['chunk'] * 1e3:.1f} ms, scan {seconds['scan'] * 1e3:.0f} ms"
        yield Row(f"{name}: exact chunk form over scan", seconds["scan"] / seconds["chunk"], "x", 10, note=note)


def native(n_repeats: int) -> Iterator[Row]:
    """The chunk form in the native core against tensor code and against products of matrices, in one run on one thread.

    Forward and backward, titans, 4 heads, chunks of 64: one long row, and several short and narrow ones.
    """
    if library() is None:
        yield Row("the chunk form in the native core", None, "x", note=f"skipped: {core().said}")
        return
    threads = torch.get_num_threads()
    try:
        for batch, n_time, width, target in ((1, 512, 64, 2.5), (8, 256, 32, 3.0)):
            torch.set_num_threads(1)
            step = _window_step("titans", "exact_chunk", batch=batch, n_time=n_time, width=width)
            plain, matrix = _plainly(step), torch.rand(512, 512)
            candidates = {
                "native": timed(step, time.process_time),
                "plain": timed(plain, time.process_time),
                "product": timed(partial(torch.mm, matrix, matrix), time.process_time),
            }
            seconds = medians(candidates, n_repeats=4 * n_repeats)
            sizes = f"batch {batch}, T {n_time}, width {width}"
            note = f"native {seconds['native'] * 1e3:.1f} ms, tensor code {seconds['plain'] * 1e3:.1f} ms of CPU time"
            ratio = seconds["plain"] / seconds["native"]
            yield Row(f"chunk form, native over tensor code, {sizes}", ratio, "x", target, note=note)
            rates = {"native": counted(step), "product": 2 * len(matrix) ** 3}
            share, rate = (rates[name] / seconds[name] / 1e9 for name in ("native", "product"))
            note = f"{share:.0f} of {rate:.0f} GFLOP/s of a product of 512 x 512"
            yield Row(f"chunk form, native, share of the matrix rate, {sizes}", share / rate, "", 0.5, note=note)
            yield from _on_two_threads(step, sizes, n_repeats)
    finally:
        torch.set_num_threads(threads)


def _plainly(step: Callable[[], object]) -> Callable[[], object]:
    def plain() -> None:
        with force_reference():
            step()

    return plain


def _on_two_threads(step: Callable[[], object], sizes: str, n_repeats: int) -> Iterator[Row]:
    """Of the wall, best of many: what else the machine does disturbs two threads more than one."""
    if n_cpus() < 2:
        return
    best_s = {1: math.inf, 2: math.inf}
    for _ in range(10 * n_repeats):
        for n_threads in best_s:
            torch.set_num_threads(n_threads)
            best_s[n_threads] = min(best_s[n_threads], timed(step)())
    yield Row(f"chunk form, native, two threads over one, {sizes}", best_s[1] / best_s[2], "x", 1.7)


def _window_step(
    name: str,
    form: str,
    heads: int = 4,
    *,
    batch: int = 1,
    n_time: int = 1024,
    width: int = 64,
    is_compiled: bool = False,
) -> Callable[[], object]:
    rule = named(name)
    generator = torch.Generator().manual_seed(0)
    sizes = batch, n_time, heads

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    keys_bthk, queries_bthk = (functional.normalize(draw(*sizes, width), dim=-1) for _ in range(2))
    values_bthv, memory = draw(*sizes, width), rule.init(batch, heads, width, width)
    retain_bth, write_bth, momentum_bth = (draw(*sizes).add(bias).sigmoid() for bias in (4.0, -2.0, 0.0))
    gates = Gates(retain_bth, write_bth, momentum_bth if rule.update.has_momentum else None)
    leaves = [keys_bthk, values_bthv, queries_bthk, *(gate for gate in vars(gates).values() if gate is not None)]
    for leaf in leaves:
        leaf.requires_grad_()

    window = keys_bthk, values_bthv, queries_bthk
    chosen = partial(run_trusted, rule, form=form, chunk=64)
    go = torch.compile(chosen) if is_compiled else chosen

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        read_bthv, _ = go(memory, window, gates)
        read_bthv.sum().backward()

    return step


def layer(n_repeats: int) -> Iterator[Row]:
    """A training step of the memory layer, projections included: 512 tokens, 4 heads of 64, one row."""
    ours, compiled = _layer_step(), _layer_step(is_compiled=True)
    half, half_compiled = _layer_step(is_bf16=True), _layer_step(is_compiled=True, is_bf16=True)
    candidates = {
        "ours": timed(ours),
        "compiled": timed(compiled),
        "bf16": timed(half),
        "bf16 compiled": timed(half_compiled),
    }
    with ExitStack() as peers:
        python = peer_python()
        if python is None:
            yield Row(
                "titans layer against titans-pytorch",
                None,
                "x",
                note=f"skipped: no environment with titans-pytorch; make one with scripts/bench-env.sh, or name its "
                f"Python in {PEER_PYTHON}",
            )
        else:
            peer = {chunk: peers.enter_context(_peer(python, "titans", chunk, 1)) for chunk in (64, 1)}
            candidates |= {f"peer chunk {chunk}": once for chunk, (once, _) in peer.items()}
        seconds = medians(candidates, n_repeats=n_repeats)
    for name, value in seconds.items():
        yield Row(f"titans layer, {name}", N_TIME / value, "tokens/s")
    if python is not None:
        base, slow = seconds["peer chunk 64"], seconds["peer chunk 1"]
        for name in ("ours", "bf16", "compiled", "bf16 compiled"):
            yield Row(f"titans layer, {name}, over peer at chunk 64", base / seconds[name], "x")
        yield Row("titans layer, ours, over peer at chunk 1", slow / seconds["ours"], "x", 30)
        ours_bytes = peak_bytes(ours)
        note = f"{ours_bytes / 2**20:.1f} MiB against {peer[64][1] / 2**20:.1f} MiB"
        yield Row("titans layer, peak bytes over those of peer", ours_bytes / peer[64][1], "x", 0.5, "<=", note)


def projections(n_repeats: int) -> Iterator[Row]:
    """A training step of the titans layer over that of its projections alone: what memory costs beside products that
    any layer has. And over the public package. One thread, its own time, float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for batch, n_time, width, target in ((1, 512, 256, 1.9), (8, 256, 128, 2.3)):
            step, alone = _layer_and_projections(batch, n_time, width)
            candidates = {
                "layer": timed(step, time.process_time),
                "tensor code": timed(_plainly(step), time.process_time),
                "projections": timed(alone, time.process_time),
            }
            seconds = medians(candidates, n_repeats=4 * n_repeats)
            sizes = f"batch {batch}, T {n_time}, width {width}"
            note = ", ".join(f"{name} {each * 1e3:.1f} ms" for name, each in seconds.items())
            ratio = seconds["layer"] / seconds["projections"]
            yield Row(f"titans layer over its projections, {sizes}", ratio, "x", target, "<=", note)
        python = peer_python()
        if python is None:
            yield Row("titans layer over peer", None, "x", note=f"skipped: no environment for it ({PEER_PYTHON})")
            return
        with _peer(python, "titans", 64, 1) as (once, _):
            seconds = medians({"ours": timed(_layer_step()), "peer": once}, n_repeats=4 * n_repeats)
        yield Row("titans layer over peer at chunk 64, one thread", seconds["peer"] / seconds["ours"], "x", 1.6)
    finally:
        torch.set_num_threads(threads)


def _layer_and_projections(batch: int, n_time: int, width: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A step of a layer with four heads, and the same of its matrices alone."""
    torch.manual_seed(0)
    module = MemoryLayer(width, MemoryConfig(rule="titans", head_dim=width // 4, chunk=64))
    hidden_btd = torch.randn(batch, n_time, width, requires_grad=True)
    matrices = module.recall.qkv, module.gate, module.recall.gates.logits, module.out
    sent = [torch.randn_like(matrix(hidden_btd)) for matrix in matrices]

    def step() -> None:
        module.zero_grad()
        module(hidden_btd)[0].backward(sent[-1])

    def alone() -> None:
        module.zero_grad()
        torch.autograd.backward([matrix(hidden_btd) for matrix in matrices], sent)

    return step, alone


def deep(n_repeats: int) -> Iterator[Row]:
    """A training step of the layer with a network of two layers as memory, against the same of the public package."""
    eager, compiled = (
        _layer_step(rule="titans_mlp", form="frozen_chunk", is_compiled=is_it) for is_it in (False, True)
    )
    python = peer_python()
    if python is None:
        yield Row("titans_mlp layer against titans-pytorch", None, "x", note="skipped: no environment for it")
        return
    with _peer(python, "titans", 64, 2) as (once, peer_bytes):
        seconds = medians({"eager": timed(eager), "compiled": timed(compiled), "peer": once}, n_repeats=n_repeats)
    for name, value in seconds.items():
        yield Row(f"titans_mlp layer, {name}", N_TIME / value, "tokens/s")
    for name, target in (("eager", 2), ("compiled", 3)):
        yield Row(f"titans_mlp layer, {name}, over peer at chunk 64", seconds["peer"] / seconds[name], "x", target)
    ours_bytes = peak_bytes(eager)
    note = f"{ours_bytes / 2**20:.1f} MiB against {peer_bytes / 2**20:.1f} MiB"
    yield Row("titans_mlp layer, peak bytes over those of peer", ours_bytes / peer_bytes, "x", 0.7, "<=", note)


def gated(n_repeats: int) -> Iterator[Row]:
    """Forward and backward of gated delta over 1,024 tokens, against the plain-torch form of transformers."""
    python = peer_python()
    if python is None:
        yield Row("gated delta against transformers", None, "x", note="skipped: no environment for it")
        return
    for width in (64, 128, 256):
        with ExitStack() as peers:
            candidates = {"ours": timed(_window_step("gated_delta", "exact_chunk", width // 64))}
            candidates["compiled"] = timed(_window_step("gated_delta", "exact_chunk", width // 64, is_compiled=True))
            for name, is_compiled in (("peer", 0), ("peer compiled", 1)):
                candidates[name] = peers.enter_context(_peer(python, "gated_delta", width, is_compiled))[0]
            seconds = medians(candidates, n_repeats=n_repeats)
        note = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items())
        best = min(seconds["peer"], seconds["peer compiled"])
        yield Row(f"gated delta over transformers, width {width}", best / seconds["compiled"], "x", 1.2, note=note)


def token(n_repeats: int) -> Iterator[Row]:
    """One token through a titans layer of width 128, its memory written: on one thread, as a session decodes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, is_compiled, target in (("plain", False, 150), ("compiled", True, 60)):
            module = MemoryLayer(128, MemoryConfig(rule="titans")).eval()
            if is_compiled:
                module.compile()
            seconds = medians({name: timed(_token_step(module))}, n_repeats=100 * n_repeats, n_warm=20)[name]
            yield Row(f"one token of a titans layer, {name}", seconds * 1e6, "us", target, "<=")
    finally:
        torch.set_num_threads(threads)


def _token_step(module: MemoryLayer) -> Callable[[], object]:
    hidden_btd = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        held = [module(hidden_btd)[1]]

    def step() -> None:
        with torch.no_grad():
            _, held[0] = module(hidden_btd, held[0])

    return step


def _layer_step(
    *, is_compiled: bool = False, is_bf16: bool = False, rule: str = "titans", form: str = "auto"
) -> Callable[[], object]:
    torch.manual_seed(0)
    module = MemoryLayer(256, MemoryConfig(rule=rule, form=form, head_dim=64, chunk=64))
    if is_compiled:
        module.compile()
    hidden_btd = torch.randn(1, N_TIME, 256, requires_grad=True)

    def step() -> None:
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            mixed_btd, _ = module(hidden_btd)
        mixed_btd.float().sum().backward()

    return step


def peer_python() -> Path | None:
    """The Python of the benchmark's own environment, or None."""
    path = Path(os.environ.get(PEER_PYTHON, ".bench-venv/bin/python"))
    if not path.exists():
        return None
    found = subprocess.run([path, "-c", "import titans_pytorch"], capture_output=True, check=False)
    return path if found.returncode == 0 else None


@contextmanager
def _peer(python: Path, *words: str | int) -> Iterator[tuple[Timed, int]]:
    """One step of a peer per call, in its own process; and the peak bytes of such a step."""
    command = [str(word) for word in (python, PEER, *words, torch.get_num_threads())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a process started with pipes has none")
        answers, asked = process.stdout, process.stdin

        def answer() -> str:
            line = answers.readline()
            if not line:
                raise RuntimeError(f"{' '.join(command)} ended with exit code {process.wait()}; run it to see why")
            return line

        def once() -> float:
            asked.write("step\n")
            asked.flush()
            return float(answer())

        yield once, int(answer().split()[1])
        asked.close()
