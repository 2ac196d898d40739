"""The exact chunk form: a sequence at the speed of matrix products, with the per-token meaning of ``scan``.

The linear family (memory.md 3.1) is ``M_t = rho_t M_(t-1) + S_t``, ``S_t = mu_t S_(t-1) - theta_t e_t k_t^T``,
``e_t = M_(t-1) p_t - v_t``, where the probe ``p`` is the key, what retention leaves of it, or nothing. In a chunk the
residuals ``e`` obey one unit lower triangular system, linear in the memory that enters the chunk. The systems of all
chunks are built and solved at once; what is left to do in order is one affine map of the memory per chunk.

Source: the UT transform of DeltaNet (Yang 2406.06484, section 3) and Gated DeltaNet (2412.06464, section 3.3), with
momentum added: the weight of a write in the memory is the product of the two decays (memory.md 4.2,
4.3).
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from meristem.device.tf32 import exact_products
from meristem.memory.forms.by_chunk import Inputs
from meristem.memory.forms.decay import Decay, Logs, between, compute_decay, compute_decay_from, cut, decay_backward
from meristem.memory.gates import Gates
from meristem.memory.kernels.chunk_solve import Solved, Weights, solve, solve_back, sooner
from meristem.memory.kernels.fla_delta import fla_delta
from meristem.memory.kernels.fused_form import fused_form
from meristem.memory.kernels.select import choose_form, choose_window
from meristem.memory.rule import Rule
from meristem.memory.state import Memory, full_precision
from meristem.memory.update import momentum_name
from meristem.shapes import Keys, Queries, Values

ProbedAt = Literal["never", "start", "token"]
"""The memory at which a write takes its residual: none, that at the start of its chunk, or that of its token."""


def refusals(rule: Rule) -> list[str]:
    """Why this form cannot run the rule; empty when it can."""
    reasons = {
        "its structure is not one matrix": rule.structure.kind in ("matrix", "vector"),
        "the gradient of its bias is not affine in what is recalled": rule.bias.slope is not None,
        "its retention does more than scale the old memory": rule.retention.is_linear and not rule.retention.is_mapped,
        "its update is not linear in the surprise": rule.update.is_linear,
        "its surprise spans several pairs": rule.span == 1,
    }
    return [reason for reason, is_met in reasons.items() if not is_met]


def exact_chunk(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
    *,
    chunk: int = 64,
) -> tuple[Values, Memory]:
    """Reads and the memory left behind, as ``scan`` gives them, for a rule of the linear family.

    chunk: tokens solved together; the work per token grows with it, the number of steps in order falls with it.
    """
    if keys_bthk.shape[1] == 1:
        return _one_token(rule, memory, (keys_bthk, values_bthv, queries_bthk), gates)
    if choose_window(rule, keys_bthk, values_bthv) == "fla":
        return fla_delta(rule, memory, keys_bthk, values_bthv, queries_bthk, gates, chunk=chunk)
    return solved(rule, memory, (keys_bthk, values_bthv, queries_bthk), gates, chunk=chunk)


def _one_token(rule: Rule, memory: Memory, inputs: Inputs, gates: Gates) -> tuple[Values, Memory]:
    # b t h k with t = 1 is b h 1 k in other words: each head has one row.
    key_bh1k, value_bh1v, query_bh1k = (x.transpose(1, 2) for x in inputs)
    rows = rule.structure.address(key_bh1k), value_bh1v, rule.structure.address(query_bh1k)
    factors = {"retain": gates.retain_bth, "write": gates.write_bth, "momentum": gates.momentum_bth}
    factors_bh11 = {name: x.transpose(1, 2)[..., None] for name, x in factors.items() if x is not None}
    read_bh1v, memory = one_token(rule, memory, rows, factors_bh11)
    return read_bh1v.transpose(1, 2), memory


def one_token(rule: Rule, memory: Memory, rows: Inputs, factors: dict[str, Tensor]) -> tuple[Tensor, Memory]:
    """What ``scan`` does with one token, in a dozen operations: a session that decodes does nothing else.

    rows: address, value and query, ``b h 1 k``. factors: ``write``, ``retain`` where old memory fades, and ``momentum``
    where the rule has it, ``b h 1 1``.
    """
    key_bh1k, value_bh1v, query_bh1k = rows
    name = rule.structure.weights[0]
    old_bhkv = memory[name]
    new_bh1v = value_bh1v
    if rule.slope:
        recalled_bh1v = key_bh1k @ old_bhkv
        if rule.probe == "warm":
            recalled_bh1v = factors["retain"] * recalled_bh1v
        new_bh1v = torch.sub(value_bh1v, recalled_bh1v, alpha=rule.slope)
    rate_bh11 = rule.update.rate(factors["write"][..., 0], key_bh1k)[..., None]
    step_bhkv = key_bh1k.mT * (rate_bh11 * new_bh1v)
    carried: Memory = {}
    if rule.update.has_momentum:
        moving = momentum_name(name)
        step_bhkv = torch.addcmul(step_bhkv, factors["momentum"], memory[moving])
        carried[moving] = step_bhkv
    if rule.has_retain:
        kept_bhkv = torch.addcmul(step_bhkv, factors["retain"], old_bhkv)
    else:
        kept_bhkv = old_bhkv + step_bhkv
    read_bh1v = query_bh1k @ (old_bhkv if rule.reads == "before" else kept_bhkv)
    return read_bh1v, memory | {name: kept_bhkv} | carried


def solved(
    rule: Rule,
    memory: Memory,
    inputs: Inputs,
    gates: Gates,
    *,
    chunk: int,
    is_frozen: bool = False,
) -> tuple[Values, Memory]:
    """The chunk form of a linear rule; is_frozen: with every residual measured at the memory that enters the chunk."""
    keys_bthk, values_bthv, queries_bthk = inputs
    backend = choose_form(keys_bthk, values_bthv, chunk if is_frozen else 1)
    if backend != "reference":
        return fused_form(rule, memory, inputs, gates, chunk=chunk, backend=backend, is_frozen=is_frozen)
    batch, n_time, heads = keys_bthk.shape[:3]
    chunk = min(chunk, n_time)
    address_bthk, wanted_bthk = rule.structure.address(keys_bthk), rule.structure.address(queries_bthk)
    key_width = address_bthk.shape[-1]
    logs = logs_of(rule, gates, cut(rule.update.rate(gates.write_bth, address_bthk), chunk), n_time)
    scale_nhc = cut(gates.retain_bth, chunk) if rule.probe == "warm" and rule.slope else None
    if rule.slope and rule.slope != 1:
        scale_nhc = torch.full_like(logs.write, rule.slope) if scale_nhc is None else rule.slope * scale_nhc
    probed_at: ProbedAt = "never" if not rule.slope else "start" if is_frozen else "token"
    weight = rule.structure.weights[0]
    names = [weight, momentum_name(weight)][: 2 if rule.update.has_momentum else 1]
    read_nhcv, last_hkv = WholeChunks.apply(
        *(cut(x, chunk) for x in (address_bthk, values_bthv, wanted_bthk)),
        *logs,
        scale_nhc,
        torch.cat([memory[name].flatten(0, 1) for name in names], dim=-2),
        probed_at,
        rule.reads == "before",
    )
    read_bnchv = read_nhcv.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4)
    last = last_hkv.unflatten(0, (batch, heads)).split(key_width, dim=-2)
    return read_bnchv.flatten(1, 2)[:, :n_time], memory | dict(zip(names, last, strict=True))


class WholeChunks(torch.autograd.Function):
    """``apply(keys, values, queries, *logs, scale, first, probed_at, reads_before) -> (read, last)``.

    Nothing with a number per pair of tokens is saved for the backward pass but D^-1 of ``chunk_solve``: the
    weights are made again from the gates.

    first_hkv, last_hkv: memory over momentum, along k. probed_at: the memory at which a write takes its residual.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        key_nhck, value_nhcv, query_nhck, *logs, scale_nhc, first_hkv, probed_at, reads_before = inputs
        ctx.probed_at, ctx.reads_before = probed_at, reads_before
        decay = compute_decay_from(Logs(*logs), between)
        weights = _weights(decay, scale_nhc, probed_at, reads_before)
        with exact_products():
            read_nhcv, solved = solve((key_nhck, query_nhck), value_nhcv, weights, first_hkv)
        ctx.save_for_backward(key_nhck, query_nhck, *logs, scale_nhc, *solved)
        return read_nhcv, solved.passing_nhkv[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_read_nhcv: Tensor, d_last_hkv: Tensor) -> tuple[Tensor | None, ...]:
        key_nhck, query_nhck, *logs, scale_nhc, new_nhcv, inverse_nhcs, passing_nhkv = ctx.saved_tensors
        # The engine may call this under the caller's autocast; memories keep their precision backwards as well.
        with full_precision(d_read_nhcv.device), exact_products():
            decay = compute_decay_from(Logs(*logs), between)
            weights = _weights(decay, scale_nhc, ctx.probed_at, ctx.reads_before)
            solved = Solved(new_nhcv, inverse_nhcs, passing_nhkv)
            d_vectors, d_weights, d_first_hkv = solve_back(
                (key_nhck, query_nhck), weights, solved, d_read_nhcv.contiguous(), d_last_hkv
            )
            d_decay, d_scale_nhc = _weights_back(decay, d_weights, scale_nhc, ctx.probed_at, ctx.reads_before)
            del decay, weights, d_weights
            d_logs = decay_backward(Logs(*logs), d_decay)
        return *d_vectors, *d_logs, None, d_scale_nhc, d_first_hkv, None, None


def _weights(decay: Decay, scale_nhc: Tensor | None, probed_at: ProbedAt, reads_before: bool) -> Weights:
    """The weights of ``solve``."""
    probe_nhcl = None
    if probed_at != "never":
        probe_nhcl = decay.entering_before()
        if probed_at == "start":
            probe_nhcl = functional.pad(torch.ones_like(probe_nhcl[..., :1]), (0, probe_nhcl.shape[-1] - 1))
        probe_nhcl = probe_nhcl if scale_nhc is None else probe_nhcl * scale_nhc[..., None]
    return Weights(
        intra_nhcs=decay.intra_nhcs,
        read_nhcl=decay.entering_before() if reads_before else decay.entering_nhcl,
        write_nhcl=decay.write_nhcl,
        carry_nhll=decay.carry_nhll,
        probe_nhcl=probe_nhcl,
        scale_nhc=scale_nhc,
        is_solved=probed_at == "token",
        reads_before=reads_before,
    )


def _weights_back(
    decay: Decay, d_weights: Weights, scale_nhc: Tensor | None, probed_at: ProbedAt, reads_before: bool
) -> tuple[Decay, Tensor | None]:
    """The gradients of the decay and of the scale."""
    d_entering_nhcl = sooner(d_weights.read_nhcl) if reads_before else d_weights.read_nhcl
    d_probe_nhcl, d_scale_nhc = d_weights.probe_nhcl, d_weights.scale_nhc
    if d_probe_nhcl is not None and probed_at == "start":
        d_scale_nhc = None if scale_nhc is None else d_probe_nhcl[..., 0]
    elif d_probe_nhcl is not None:
        if scale_nhc is not None:
            d_scale_nhc = d_scale_nhc + torch.linalg.vecdot(d_probe_nhcl, decay.entering_before())
            d_probe_nhcl = d_probe_nhcl * scale_nhc[..., None]
        d_entering_nhcl = d_entering_nhcl + sooner(d_probe_nhcl)
    return Decay(d_entering_nhcl, d_weights.intra_nhcs, d_weights.write_nhcl, d_weights.carry_nhll), d_scale_nhc


def logs_of(rule: Rule, gates: Gates, write: Tensor, n_time: int) -> Logs:
    """What the decay of all chunks of a sequence is computed from, ``n (b h)`` in front."""
    n_chunks, _, chunk = write.shape
    log_retain_nhc = cut(gates.log_retain(), chunk) if rule.has_retain else torch.zeros_like(write)
    log_momentum_bth = gates.log_momentum() if rule.update.has_momentum else None
    is_token_n11s = None
    if n_time % chunk:
        is_token_ns = torch.arange(n_chunks * chunk, device=write.device).view(n_chunks, chunk) < n_time
        is_token_n11s = is_token_ns[:, None, None, :]
    log_momentum_nhc = None if log_momentum_bth is None else cut(log_momentum_bth, chunk)
    return Logs(log_retain_nhc, log_momentum_nhc, write, is_token_n11s)


def decay_of(rule: Rule, gates: Gates, write: Tensor, n_time: int) -> Decay:
    """The decay of all chunks of a sequence, ``n (b h)`` in front."""
    return compute_decay(*logs_of(rule, gates, write, n_time))
