"""Runs other people's code once and keeps what it answers, for ``test_self_reference.py`` (memory.md 4.12).

    python -m pip install --target FOLDER --no-deps nested-learning==0.2.0
    python tests/nn/oracles/generate.py FOLDER

The fixture is written beside this file, with the version in its metadata. Of the package only the file of its
self-modifying memory is taken, without importing the rest. It runs in float64.
"""

import importlib.util
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor

BATCH, TIME, WIDTH = 2, 13, 6
CASES: dict[str, dict[str, object]] = {
    "tokens": {"chunk_size_other": 1, "chunk_size_memory": 1},
    "query": {"chunk_size_other": 1, "chunk_size_memory": 1, "adaptive_q": True},
    "chunks": {"chunk_size_other": 4, "chunk_size_memory": 2},
    "turned": {"chunk_size_other": 3, "chunk_size_memory": 6, "adaptive_q": True},
}
MEMORIES = {"key": "k", "value": "v", "query": "q", "rate": "eta", "retain": "alpha", "memory": "memory"}


def source(folder: Path) -> ModuleType:
    """The file of the self-modifying memory as a module of its own."""
    path = folder / "nested_learning" / "titan" / "self_modifying.py"
    spec = importlib.util.spec_from_file_location("self_modifying", path)
    found = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    sys.modules["self_modifying"] = found
    spec.loader.exec_module(found)
    return found


def answers(theirs: ModuleType, name: str) -> dict[str, Tensor]:
    """First memories, a window, and what one case reads and leaves."""
    config = theirs.SelfModifyingTitansConfig(
        dim=WIDTH, eta_scale=0.3, objective="dot", use_skip=False, local_conv_window=None, **CASES[name]
    )
    torch.manual_seed(len(name))
    model = theirs.SelfModifyingTitans(config).double()
    hidden = torch.randn(BATCH, TIME, WIDTH, dtype=torch.float64)
    state = model.init_fast_state()
    kept = {"hidden_btd": hidden, "query_weight": model.w_q.weight}
    for ours, its in MEMORIES.items():
        first = getattr(state, its)
        kept |= {f"first.{ours}_in": first.w2.clone(), f"first.{ours}_out": first.w1.clone()}
    read, after = model.forward_with_updates(hidden, state)
    for ours, its in MEMORIES.items():
        last = getattr(after, its)
        kept |= {f"after.{ours}_in": last.w2, f"after.{ours}_out": last.w1}
    return {f"{name}.{key}": x.detach().contiguous().clone() for key, x in (kept | {"read_btd": read}).items()}


def main() -> None:
    folder = Path(sys.argv[1])
    versions = {found.metadata["Name"].lower(): found.version for found in distributions(path=[str(folder)])}
    theirs = source(folder)
    tensors = {key: x for name in CASES for key, x in answers(theirs, name).items()}
    metadata = {"library": "nested-learning", "version": versions["nested-learning"], "torch": torch.__version__}
    save_file(tensors, Path(__file__).with_name("nested_learning.safetensors"), metadata)


if __name__ == "__main__":
    main()
