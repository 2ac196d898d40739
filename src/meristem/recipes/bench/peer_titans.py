"""The public package ``titans-pytorch``, measured in its own environment: run by its Python, not by ours.

    python peer_titans.py CHUNK THREADS

builds its memory layer (4 heads of 64, linear memory), prints ``ready PEAK_BYTES``, and then answers every line on
stdin with the seconds of one training step over 512 tokens. It imports nothing of meristem.
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


def main(chunk: int, threads: int) -> None:
    from titans_pytorch import MemoryMLP, NeuralMemory

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = NeuralMemory(dim=256, chunk_size=chunk, dim_head=64, heads=4, model=MemoryMLP(64, depth=1))
    hidden_btd = torch.randn(1, 512, 256, requires_grad=True)

    def step() -> None:
        layer.zero_grad()
        read_btd, _ = layer(hidden_btd)
        read_btd.sum().backward()

    step()
    sys.stdout.write(f"ready {peak_bytes(step)}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        sys.stdout.write(f"{time.perf_counter() - began}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(chunk=int(sys.argv[1]), threads=int(sys.argv[2]))
