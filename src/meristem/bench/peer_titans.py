"""Public packages, measured in their own environment: run by its Python, not by ours.

    python peer_titans.py titans CHUNK DEPTH THREADS
    python peer_titans.py gated_delta WIDTH IS_COMPILED THREADS

makes one training step, prints ``ready PEAK_BYTES``, and then, for every line on stdin, the seconds of one such
step. It imports nothing of meristem.
"""

import sys
import time
from collections.abc import Callable

import torch


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that one call held at once beyond what lived before it, as torch's own profiler saw them."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held, most = 0, 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


def titans(chunk: int, depth: int) -> Callable[[], object]:
    """A training step of titans-pytorch's memory layer: 512 tokens, 4 heads of 64, a memory of ``depth`` layers."""
    from titans_pytorch import MemoryMLP, NeuralMemory

    memory = MemoryMLP(64, depth=depth, expansion_factor=4.0)
    layer = NeuralMemory(dim=256, chunk_size=chunk, dim_head=64, heads=4, model=memory)
    hidden_btd = torch.randn(1, 512, 256, requires_grad=True)

    def step() -> None:
        layer.zero_grad()
        read_btd, _ = layer(hidden_btd)
        read_btd.sum().backward()

    return step


def gated_delta(width: int, is_compiled: int) -> Callable[[], object]:
    """Forward and backward of the plain-torch chunk form of transformers: 1,024 tokens, heads of 64, chunks of 64."""
    from torch.nn import functional
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    run = torch.compile(torch_chunk_gated_delta_rule) if is_compiled else torch_chunk_gated_delta_rule
    shape = 1, 1024, width // 64, 64
    query_bthk, key_bthk = (functional.normalize(torch.randn(shape), dim=-1).requires_grad_() for _ in range(2))
    value_bthv = torch.randn(shape, requires_grad=True)
    log_retain_bth = functional.logsigmoid(torch.randn(shape[:3]) + 4).requires_grad_()
    write_bth = (torch.randn(shape[:3]) - 2).sigmoid().requires_grad_()
    leaves = query_bthk, key_bthk, value_bthv, log_retain_bth, write_bth

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        read_bthv, _ = run(*leaves, chunk_size=64)
        read_bthv.sum().backward()

    return step


def main(name: str, first: int, second: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = {"titans": titans, "gated_delta": gated_delta}[name](first, second)
    step()
    sys.stdout.write(f"ready {peak_bytes(step)}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        sys.stdout.write(f"{time.perf_counter() - began}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:]))
