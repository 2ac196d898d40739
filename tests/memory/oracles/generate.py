"""Runs other people's code once and keeps what it answers, for ``test_oracles.py`` (memory.md 4.12).

    python -m pip install --target FOLDER --no-deps fla-core==0.6.0 transformers==5.23.0
    python -m pip install --target FOLDER titans-pytorch==0.5.5 einops
    python tests/memory/oracles/generate.py FOLDER

The fixtures are written beside this file, with the versions in their metadata. Of fla-core and transformers only the
plain torch functions are taken, from their files and without importing the packages. These functions cast to float32;
here every such cast is made one to float64, so that the answers can be compared to the last digits.
"""

import ast
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

BATCH, TIME, HEADS, KEY_WIDTH, VALUE_WIDTH = 1, 13, 3, 5, 7
Tensors = dict[str, Tensor]


def function(folders: list[Path], file: str, name: str, *others: str) -> Callable[..., tuple[Tensor, ...]]:
    """The function of that name in a file of an unpacked package, in float64; others: functions that it calls."""
    path = next(folder / file for folder in folders if (folder / file).exists())
    text = path.read_text().replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in (name, *others)]
    for node in tree.body:
        node.decorator_list = []  # type: ignore[attr-defined]
    space: dict[str, object] = {"torch": torch, "F": functional}
    exec(compile(tree, str(path), "exec"), space)
    return space[name]  # type: ignore[return-value]


def drawn() -> Tensors:
    """Unit keys and queries, gates inside the limits of stability, a memory and a momentum that hold something."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    def gate(bias: float) -> Tensor:
        return (draw(BATCH, TIME, HEADS) + bias).sigmoid()

    momentum_bth = gate(0.0)
    return {
        "keys_bthk": functional.normalize(draw(BATCH, TIME, HEADS, KEY_WIDTH), dim=-1),
        "values_bthv": draw(BATCH, TIME, HEADS, VALUE_WIDTH),
        "queries_bthk": functional.normalize(draw(BATCH, TIME, HEADS, KEY_WIDTH), dim=-1),
        "retain_bth": gate(2.0),
        "write_bth": gate(-1.0) * (1 - momentum_bth),
        "momentum_bth": momentum_bth,
        "matrix_bhkv": draw(BATCH, HEADS, KEY_WIDTH, VALUE_WIDTH),
        "matrix_momentum_bhkv": 0.3 * draw(BATCH, HEADS, KEY_WIDTH, VALUE_WIDTH),
    }


def of_fla(folders: list[Path]) -> Tensors:
    """Answers of the plain references in ``fla/ops``."""
    given = drawn()
    keys, values, queries, retain, write, momentum, matrix, moving = given.values()
    answers: Tensors = {}

    def keep(name: str, read: Tensor, after: Tensor, momentum_after: Tensor | None = None) -> None:
        answers[f"{name}.read_bthv"], answers[f"{name}.matrix_bhkv"] = read, after
        if momentum_after is not None:
            answers[f"{name}.matrix_momentum_bhkv"] = momentum_after

    gated = function(folders, "fla/ops/gated_delta_rule/naive.py", "naive_recurrent_gated_delta_rule")
    rest = {"g": retain.log(), "scale": 1.0, "initial_state": matrix, "output_final_state": True}
    keep("gated_delta", *gated(queries, keys, values, beta=write, **rest))
    # Cold is warm in other letters: the rate over retain, the values times retain.
    keep("delta", *gated(queries, keys, values * retain[..., None], beta=write / retain, **rest))

    kept_whole = function(folders, "fla/ops/delta_rule/naive.py", "delta_rule_recurrence")
    scaled = KEY_WIDTH**0.5 * queries
    read, after = kept_whole(*(x.movedim(1, 2) for x in (scaled, keys, values, write)), initial_state=matrix)
    keep("delta_without_decay", read.movedim(1, 2), after)

    moved = function(folders, "fla/ops/momentum_delta_rule/naive.py", "recurrent_momentum_delta_rule_ref")
    for name, probe in (("titans", keys), ("momentum_delta", retain[..., None] * keys)):
        gates = {"log_alpha": retain.log(), "log_mu": momentum.log(), "beta": torch.ones_like(write), "eta": write}
        state = {"initial_S": matrix, "initial_M": -moving, "scale": 1.0, "output_final_state": True}
        read, (after, momentum_after) = moved(queries, keys, values, p=probe, **gates, **state)
        keep(name, read, after, -momentum_after)

    linear = function(folders, "fla/ops/simple_gla/naive.py", "naive_recurrent_simple_gla")
    written = write[..., None] * values
    keep("hebbian", *linear(queries, keys, written, retain.log(), scale=1.0, initial_state=matrix))

    combine = function(folders, "fla/ops/titans/naive.py", "combine_params", "cal_n", "cal_f", "cal_G")
    gates_bht1 = [x.movedim(1, 2)[..., None] for x in (write, 1 - retain, momentum)]
    names = ("kept_bhc", "kept_bh", "joined_bhc", "joined_bh", "arriving_bhs", "reach_bhcs", "moving_bh", "moved_bhs")
    answers |= {f"titans_chunk.{name}": x for name, x in zip(names, combine(*gates_bht1, TIME), strict=True)}
    shared = {f"given.{name}": x for name, x in given.items()}
    return shared | answers | of_ttt(folders, given)


def of_ttt(folders: list[Path], given: Tensors) -> Tensors:
    """TTT-Linear on chunks of 4 tokens, each of one write rate; its targets are value less key."""
    linear = function(folders, "fla/ops/ttt/naive.py", "ttt_linear")
    width, n_time, chunk = KEY_WIDTH, 12, 4
    keys, queries, values = (
        given[name][:, :n_time, :, :width] for name in ("keys_bthk", "queries_bthk", "values_bthv")
    )
    write = given["write_bth"][:, :n_time:chunk].repeat_interleave(chunk, dim=1)
    generator = torch.Generator().manual_seed(1)
    gain, shift = torch.randn(2, HEADS, width, generator=generator, dtype=torch.float64)
    gain, matrix = 1 + 0.2 * gain, given["matrix_bhkv"][..., :width]
    rows = (x.movedim(1, 2).clone() for x in (queries, keys, values))
    read, after, after_shift = linear(
        *rows, gain, shift, write.movedim(1, 2)[..., None].clone(), 1.0, 1e-6, chunk, matrix, None, True
    )
    results = {"write_bth": write, "gain_hv": gain, "shift_hv": shift, "read_bthv": read.movedim(1, 2)}
    return {f"ttt.{name}": x for name, x in (results | {"matrix_bhkv": after, "added_bh1v": after_shift}).items()}


def of_transformers(folders: list[Path]) -> Tensors:
    """Answers of the recurrence of Qwen3-Next, which divides queries by the root of their width."""
    file = "transformers/models/qwen3_next/modeling_qwen3_next.py"
    gated = function(folders, file, "torch_recurrent_gated_delta_rule")
    given = drawn()
    keys, values, queries, retain, write, _, matrix, _ = given.values()
    scaled = KEY_WIDTH**0.5 * queries
    read, after = gated(scaled, keys, values, retain.log(), write, initial_state=matrix, output_final_state=True)
    return {"gated_delta.read_bthv": read, "gated_delta.matrix_bhkv": after}


def of_titans() -> Tensors:
    """Whole forward passes of a ``NeuralMemory`` whose gates are per token and whose surprises are per 4 tokens.

    Its loss is the mean over the width: a write rate of ours is ``2 / width`` of its step. With a norm its gain is
    learned beside the weights; surprises then are taken at the first weights only, and reads with the first gain.
    """
    from titans_pytorch import NeuralMemory
    from titans_pytorch.memory_models import MemoryMLP

    width, answers = 6, {}
    for name, depth, is_normed in (
        ("depth1", 1, False),
        ("depth2", 2, False),
        ("depth3", 3, False),
        ("normed", 2, True),
    ):
        torch.manual_seed(depth)
        model = MemoryMLP(width, depth=depth, expansion_factor=2.0)
        frozen = None if is_normed else 4
        memory = NeuralMemory(
            width, 1, batch_size=frozen, model=model, mem_model_norm_add_residual=is_normed, init_decay_bias=-2.0
        ).double()
        torch.nn.init.normal_(memory.to_decay_factor[0].weight, std=0.5)
        hidden = torch.randn(BATCH, TIME, width, dtype=torch.float64)
        with torch.no_grad():
            read, state = memory(hidden)
            seen = memory.store_norm(hidden)
            kept = {
                "keys_bthk": memory.to_keys(seen)[:, :, None],
                "values_bthv": memory.to_values(seen)[:, :, None],
                "queries_bthk": memory.to_queries(memory.retrieve_norm(hidden))[:, :, None],
                "retain_bth": 1 - memory.to_decay_factor(seen).sigmoid().view(BATCH, TIME, 1),
                "write_bth": 2 / width * memory.adaptive_step_transform(memory.to_adaptive_step(seen))[..., None],
                "momentum_bth": memory.to_momentum(seen).sigmoid().view(BATCH, TIME, 1),
            }
            if is_normed:
                gainless = {key: 0 * x if "gamma" in key else x for key, x in state.updates.items()}
                read = memory.retrieve_memories(hidden, gainless)
        first, (after, moved) = memory.init_weights(BATCH), state.states
        layers = [key for key in first.keys() if "weights" in key]
        for index, key in enumerate(layers):
            kept |= {f"first{index}": first[key], f"after{index}": after[key], f"momentum{index}": moved[key][0]}
        answers |= {f"{name}.{key}": x.detach() for key, x in (kept | {"read_bthv": read[:, :, None]}).items()}
    return answers


def main() -> None:
    folders = [Path(folder) for folder in sys.argv[1:]]
    sys.path.extend(map(str, folders))
    versions = {found.metadata["Name"].lower(): found.version for found in distributions(path=sys.argv[1:])}
    made = {"fla-core": of_fla(folders), "transformers": of_transformers(folders), "titans-pytorch": of_titans()}
    for name, tensors in made.items():
        whole = {key: x.contiguous().clone() for key, x in tensors.items()}
        metadata = {"library": name, "version": versions[name], "torch": torch.__version__}
        save_file(whole, Path(__file__).with_name(f"{name.replace('-', '_')}.safetensors"), metadata)


if __name__ == "__main__":
    main()
