"""Delta and gated delta through the kernels of ``fla-core`` (flash-linear-attention), for CUDA machines.

Both are one recurrence with decay g and step beta, ``M <- e^g M - beta (e^g M k - v) k^T``: gated delta as it stands.
Delta measures at the old memory, ``M <- e^g M - write (M k - v) k^T``, which is the same with ``beta = write / retain``
and ``retain v`` for v (memory.md 3.1). This is the one place that divides by retain; the floor of its logarithm keeps
the quotient finite.

Source: Gated DeltaNet (2412.06464), eq. 10.
"""

from typing import Any

from meristem.extras import imported
from meristem.memory.gates import Gates
from meristem.memory.rule import Rule
from meristem.memory.state import Memory
from meristem.shapes import Keys, Queries, Values


def fla_delta(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
    *,
    chunk: int = 64,
) -> tuple[Values, Memory]:
    """Reads and the memory left behind, as ``scan`` gives them but for the rounding of TF32.

    chunk: not used; the kernels have a chunk of their own.
    """
    advice = "It needs an NVIDIA GPU; without one, call memory.run, which takes what is there."
    kernels = imported("fla.ops.gated_delta_rule", "this form, by fla-core,", advice)
    given = recurrence(rule, memory, keys_bthk, values_bthv, queries_bthk, gates)
    read_bthv, matrix_bhkv = kernels.chunk_gated_delta_rule(**given)
    return read_bthv, memory | {"matrix_bhkv": matrix_bhkv}


def recurrence(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
) -> dict[str, Any]:
    """The arguments of ``chunk_gated_delta_rule``, and of every function of ``fla`` that means the same."""
    log_retain_bth, step_bth = gates.log_retain(), gates.write_bth
    if rule.probe == "cold":
        step_bth = step_bth * (-log_retain_bth).exp()
        values_bthv = values_bthv * log_retain_bth.exp()[..., None]
    return {
        "q": queries_bthk,
        "k": keys_bthk,
        "v": values_bthv,
        "g": log_retain_bth,
        "beta": step_bth,
        "scale": 1.0,
        "initial_state": memory["matrix_bhkv"],
        "output_final_state": True,
    }
