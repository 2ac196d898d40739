"""The exact chunk form: a window at the speed of matrix products, with the per-token meaning of ``scan``.

The linear family (memory.md 3.1) is ``M_t = rho_t M_(t-1) + S_t``, ``S_t = mu_t S_(t-1) - theta_t e_t k_t^T``,
``e_t = M_(t-1) p_t - v_t``, where the probe ``p`` is the key, what retention leaves of it, or nothing. In a chunk the
residuals ``e`` obey one unit lower triangular system, linear in the memory that enters the chunk. The systems of all
chunks are built and solved at once; what is left to do in order is one affine map of the memory per chunk.

Source: the UT transform of DeltaNet (Yang 2406.06484, section 3) and Gated DeltaNet (2412.06464, section 3.3), with
momentum added: the weight with which a write has reached the memory is the product of the two decays (memory.md 4.2,
4.3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from meristem.memory.gates import Gates
from meristem.memory.kernels.chunk_solve import Between, ChunkSolve
from meristem.memory.rule import Rule
from meristem.memory.value import Memory
from meristem.shapes import Keys, Queries, Values


def refusals(rule: Rule) -> list[str]:
    """Why this form cannot run the rule; empty when it can."""
    reasons = {
        "its structure is not one matrix": rule.structure.is_matrix,
        "the gradient of its bias is not affine in what is recalled": rule.bias.slope is not None,
        "its retention does more than scale the old memory": rule.retention.is_linear,
        "its update is not linear in the surprise": rule.update.is_linear,
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
    batch, n_time, heads, key_width = keys_bthk.shape
    chunk = min(chunk, n_time)
    write_nhc = _cut(gates.write_bth, chunk)
    flow = _flow(gates, write_nhc, n_time)
    sight_nhcl, outer_nhcs = flow.before() if rule.reads == "before" else (flow.entering_nhcl, flow.reach_nhcs)
    inner_nhcs = probe_nhcl = None
    if rule.bias.slope:
        probe_nhcl, inner_nhcs = flow.before()
        if rule.probe == "warm":
            retain_nhc1 = _cut(gates.retain_bth, chunk)[..., None]
            probe_nhcl, inner_nhcs = retain_nhc1 * probe_nhcl, retain_nhc1 * inner_nhcs
    names = ["matrix_bhkv", "matrix_momentum_bhkv"][: sight_nhcl.shape[-1]]
    read_nhcv, last_hkv = ChunkSolve.apply(
        _cut(keys_bthk, chunk),
        _cut(values_bthv, chunk),
        _cut(queries_bthk, chunk),
        inner_nhcs,
        outer_nhcs,
        probe_nhcl,
        sight_nhcl,
        flow.arriving_nhcl,
        flow.carried_nhll,
        torch.cat([memory[name].flatten(0, 1) for name in names], dim=-2),
    )
    read_bnchv = read_nhcv.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4)
    last = last_hkv.unflatten(0, (batch, heads)).split(key_width, dim=-2)
    return read_bnchv.flatten(1, 2)[:, :n_time], memory | dict(zip(names, last, strict=True))


@dataclass(frozen=True)
class _Flow:
    """With which weight the past is in the memory, for every token of every chunk (memory.md 4.2).

    entering_nhcl: of the memory, and the momentum where there is one, that enter the chunk: their weight at each token.
    reach_nhcs: of what token s wrote, at token c, write rate included; lower triangular.
    arriving_nhcl: of what each token wrote, in the memory and the momentum that leave the chunk, write rate included.
    carried_nhll: of the entering values in the leaving ones.
    """

    entering_nhcl: Tensor
    reach_nhcs: Tensor
    arriving_nhcl: Tensor
    carried_nhll: Tensor

    def before(self) -> tuple[Tensor, Tensor]:
        """``entering`` and ``reach`` one token earlier: as the memory is before a token is written."""
        first_l = torch.zeros_like(self.entering_nhcl[..., :1, :])
        first_l[..., 0] = 1.0
        entering_nhcl = torch.cat([first_l, self.entering_nhcl[..., :-1, :]], dim=-2)
        return entering_nhcl, functional.pad(self.reach_nhcs[..., :-1, :], (0, 0, 1, 0))


def _flow(gates: Gates, write_nhc: Tensor, n_time: int) -> _Flow:
    n_chunks, _, chunk = write_nhc.shape
    kept_nhcs, kept_nhc = _decay(_cut(gates.log_retain(), chunk))
    log_momentum_bth = gates.log_momentum()
    if log_momentum_bth is None:
        reach_nhcs = kept_nhcs * write_nhc[..., None, :]
        return _Flow(kept_nhc[..., None], reach_nhcs, reach_nhcs[..., -1, :, None], kept_nhc[..., -1:, None])
    moving_nhcs, moving_nhc = _decay(_cut(log_momentum_bth, chunk))
    emitted_nhcs = kept_nhcs
    if n_time % chunk:
        # A padded token must not add the momentum once more: it is emitted into the memory with weight 0.
        is_token_nc = torch.arange(n_chunks * chunk, device=kept_nhc.device).view(n_chunks, chunk) < n_time
        emitted_nhcs = kept_nhcs * is_token_nc[:, None, None, :]
    joined_nhc = (emitted_nhcs * moving_nhc[..., None, :]).sum(dim=-1)
    written_nhcs = moving_nhcs * write_nhc[..., None, :]
    reach_nhcs = emitted_nhcs @ written_nhcs
    last_nh = moving_nhc[..., -1]
    carried_nhll = torch.stack(
        [kept_nhc[..., -1], joined_nhc[..., -1], torch.zeros_like(last_nh), last_nh], dim=-1
    ).unflatten(-1, (2, 2))
    return _Flow(
        entering_nhcl=torch.stack([kept_nhc, joined_nhc], dim=-1),
        reach_nhcs=reach_nhcs,
        arriving_nhcl=torch.stack([reach_nhcs[..., -1, :], written_nhcs[..., -1, :]], dim=-1),
        carried_nhll=carried_nhll,
    )


def _decay(log_nhc: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the factors after s up to c, and from the chunk's start up to c."""
    total_nhc = log_nhc.cumsum(dim=-1)
    return Between.apply(total_nhc), total_nhc.exp()


def _cut(x: Tensor, chunk: int) -> Tensor:
    """b t h ... -> n (b h) c ..., zeros where the last chunk is not full."""
    padded = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunk)) if x.shape[1] % chunk else x
    return padded.unflatten(1, (-1, chunk)).movedim(3, 1).movedim(2, 0).flatten(1, 2).contiguous()
