"""The exact chunk form: a window at the speed of matrix products, with the per-token meaning of ``scan``.

The linear family (memory.md 3.1) is ``M_t = rho_t M_(t-1) + S_t``, ``S_t = mu_t S_(t-1) - theta_t e_t k_t^T``,
``e_t = M_(t-1) p_t - v_t``, where the probe ``p`` is the key, what retention leaves of it, or nothing. Inside a chunk the
residuals ``e`` obey one unit lower triangular system, linear in the memory that enters the chunk. The systems of all
chunks are built and solved at once; what is left to do in order is one affine map of the memory per chunk.

Source: the UT transform of DeltaNet (Yang 2406.06484, section 3) and Gated DeltaNet (2412.06464, section 3.3), with momentum
added: the weight with which a write has reached the memory is the product of the two decays (memory.md 4.2, 4.3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from meristem.memory.gates import Gates
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

    With momentum the axis ``k`` of what passes from chunk to chunk holds memory and momentum one after the other.

    chunk: tokens solved together; the work per token grows with it, the number of steps in order falls with it.
    """
    n_time, value_width = values_bthv.shape[1], values_bthv.shape[-1]
    chunk = min(chunk, n_time)
    key_bhnck, value_bhncv, query_bhnck = (_cut(x, chunk) for x in (keys_bthk, values_bthv, queries_bthk))
    write_bhnc = _cut(gates.write_bth, chunk)
    after = _flow(gates, chunk, n_time)
    before = after.shifted()
    seen = before if rule.reads == "before" else after

    # The residuals of a chunk are response @ (memory that enters it) - recalled; D of memory.md 4.3 is unit triangular.
    recalled_bhncv, response_bhnck = value_bhncv, None
    if rule.bias.slope:
        probe_bhnck = key_bhnck if rule.probe == "cold" else _cut(gates.retain_bth, chunk)[..., None] * key_bhnck
        system_bhncs = before.reach_bhncs * write_bhnc[..., None, :] * (probe_bhnck @ key_bhnck.mT)
        sides_bhnck = torch.cat([value_bhncv, _spread(before.entering, probe_bhnck)], dim=-1)
        solved_bhnck = torch.linalg.solve_triangular(system_bhncs, sides_bhnck, upper=False, unitriangular=True)
        recalled_bhncv, response_bhnck = solved_bhnck[..., :value_width], solved_bhnck[..., value_width:]

    arriving_bhnck = _spread([reached_bhnc * write_bhnc for reached_bhnc in after.arriving], key_bhnck)
    written_bhnkv = arriving_bhnck.mT @ recalled_bhncv
    mixing_bhncs = seen.reach_bhncs * write_bhnc[..., None, :] * (query_bhnck @ key_bhnck.mT)
    query_bhnck = _spread(seen.entering, query_bhnck)
    transition_bhnkk = after.fading(keys_bthk.shape[-1])
    if response_bhnck is not None:
        transition_bhnkk = transition_bhnkk - arriving_bhnck.mT @ response_bhnck
        query_bhnck = query_bhnck - mixing_bhncs @ response_bhnck

    names = ["matrix_bhkv", "matrix_momentum_bhkv"][: len(after.entering)]
    passing_bhkv = torch.cat([memory[name] for name in names], dim=-2)
    entering: list[Tensor] = []
    for transition_bhkk, written_bhkv in zip(transition_bhnkk.unbind(2), written_bhnkv.unbind(2), strict=True):
        entering.append(passing_bhkv)
        passing_bhkv = transition_bhkk @ passing_bhkv + written_bhkv
    read_bhncv = query_bhnck @ torch.stack(entering, dim=2) + mixing_bhncs @ recalled_bhncv
    read_bthv = read_bhncv.movedim(1, 3).flatten(1, 2)[:, :n_time]
    return read_bthv, memory | dict(zip(names, passing_bhkv.split(keys_bthk.shape[-1], dim=-2), strict=True))


@dataclass(frozen=True)
class _Flow:
    """With which weight the past is in the memory, for every token of every chunk (memory.md 4.2).

    entering: for the memory, and the momentum where there is one, that enter the chunk: their weight at each token.
    reach_bhncs: the weight at token c of what token s wrote; lower triangular.
    arriving: the weight of what each token wrote in the memory, and in the momentum, that leave the chunk.
    carried: the weights of the entering values in the leaving ones, row by row.
    """

    entering: list[Tensor]
    reach_bhncs: Tensor
    arriving: list[Tensor]
    carried: list[list[Tensor]]

    def shifted(self) -> "_Flow":
        """The same weights one token earlier: as the memory is before a token is written."""
        first = [1.0, 0.0]
        return _Flow(
            entering=[
                functional.pad(weight_bhnc[..., :-1], (1, 0), value=value)
                for weight_bhnc, value in zip(self.entering, first, strict=False)
            ],
            reach_bhncs=functional.pad(self.reach_bhncs[..., :-1, :], (0, 0, 1, 0)),
            arriving=self.arriving,
            carried=self.carried,
        )

    def fading(self, key_width: int) -> Tensor:
        """What the chunk would do to the entering values if nothing were written."""
        weight_bhnll = torch.stack([torch.stack(row, dim=-1) for row in self.carried], dim=-2)
        identity_kk = torch.eye(key_width, dtype=weight_bhnll.dtype, device=weight_bhnll.device)
        return (weight_bhnll[..., :, None, :, None] * identity_kk[:, None, :]).flatten(-4, -3).flatten(-2, -1)


def _flow(gates: Gates, chunk: int, n_time: int) -> _Flow:
    kept_bhncs, kept_bhnc = _decay(_cut(gates.log_retain(), chunk))
    log_momentum_bth = gates.log_momentum()
    if log_momentum_bth is None:
        return _Flow([kept_bhnc], kept_bhncs, [kept_bhncs[..., -1, :]], [[kept_bhnc[..., -1]]])
    moving_bhncs, moving_bhnc = _decay(_cut(log_momentum_bth, chunk))
    # A padded token must not add the momentum once more: it is emitted into the memory with weight 0.
    emitted_nc = torch.arange(kept_bhnc[0, 0].numel(), device=kept_bhnc.device).view(-1, chunk) < n_time
    emitted_bhncs = kept_bhncs * emitted_nc[:, None, :]
    reach_bhncs = emitted_bhncs @ moving_bhncs
    joined_bhnc = (emitted_bhncs @ moving_bhnc[..., None])[..., 0]
    carried = [
        [kept_bhnc[..., -1], joined_bhnc[..., -1]],
        [torch.zeros_like(moving_bhnc[..., -1]), moving_bhnc[..., -1]],
    ]
    return _Flow([kept_bhnc, joined_bhnc], reach_bhncs, [reach_bhncs[..., -1, :], moving_bhncs[..., -1, :]], carried)


def _decay(log_bhnc: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the factors after s up to c, and from the chunk's start up to c."""
    total_bhnc = log_bhnc.cumsum(dim=-1)
    later_cs = torch.ones(log_bhnc.shape[-1], log_bhnc.shape[-1], dtype=torch.bool, device=log_bhnc.device).triu(1)
    # Masked before exp: above the diagonal the difference is positive and could overflow.
    factor_bhncs = (total_bhnc[..., :, None] - total_bhnc[..., None, :]).masked_fill(later_cs, -torch.inf).exp()
    return factor_bhncs, total_bhnc.exp()


def _spread(weights: list[Tensor], vector_bhnck: Tensor) -> Tensor:
    """One copy of the vectors for every weight, side by side."""
    copies = [weight_bhnc[..., None] * vector_bhnck for weight_bhnc in weights]
    return copies[0] if len(copies) == 1 else torch.cat(copies, dim=-1)


def _cut(x: Tensor, chunk: int) -> Tensor:
    """b t h ... -> b h n c ..., zeros where the last chunk is not full."""
    padded = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunk))
    return padded.unflatten(1, (-1, chunk)).movedim(3, 1).contiguous()
