"""More heads for the attention of a block (growth.md 11.2, 11.3)."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from meristem.errors import WrongValue
from meristem.growth.attach import find_slot
from meristem.growth.blend import Channel
from meristem.growth.graft import cost, remove
from meristem.growth.plan import Applied, Carry, Plan, draft
from meristem.growth.seed import Seed
from meristem.growth.surgery.host import BLOCKS, is_apart, refused, require_lm, require_place, resize, with_moments
from meristem.models.init import seeded
from meristem.models.lm import LM
from meristem.models.topology import Change, changes, record
from meristem.nn.attention import Attention
from meristem.optim.surgery import appended

ADD: Final = "add_heads"


def plan_add_heads(model: nn.Module, block: int, n_heads: int, *, random_seed: int = 0) -> Plan:
    """So many heads more for the attention that a block has as its mixer; the model computes what it did.

    They have the key width, the window and the positions of the old ones. What makes their queries, keys and values is
    drawn; what they give is projected by zeros. Readers go on with ``carry_state``, and see zeros for what they read
    before.

    Raises WrongValue for a block that is not there, or less than one head; CapabilityError for a mixer that is no
    attention, one with persistent tokens, and where seeds stand at it.
    """
    lm = require_lm(model, ADD)
    require_place(block, len(lm.blocks), "block")
    if n_heads < 1:
        raise WrongValue(f"{n_heads} heads were found; expected at least 1.", value=n_heads)
    mixer: Any = lm.blocks[block].mixer
    reason = _why_not(mixer)
    if reason:
        raise refused(ADD, reason)
    head_dim = mixer.out.in_features // mixer.heads
    width, span = mixer.qkv.in_features, mixer.span
    fields = {"block": block, "n_heads": n_heads, "random_seed": random_seed}
    settings = {"n_heads": n_heads, "head_dim": head_dim, "sliding_window": span, "rope": mixer.rope}
    return draft(
        model,
        ADD,
        fields,
        lambda m: _add(m, fields),
        preserves="rounding",
        flops_per_token=cost("attention", width, is_normed=False, **settings).flops_per_token,
        writes=frozenset(),
    )


def _why_not(mixer: nn.Module) -> str:
    """Why attention cannot get more heads, or nothing."""
    if not isinstance(mixer, Attention):
        return f"the mixer of that block is a {type(mixer).__name__}, and heads are added to attention alone"
    if mixer.persistent_gd is not None:
        return "fresh heads would see its persistent tokens"
    if mixer.qkv.bias is not None:
        return "its projections have biases"
    return ""


def _add(model: nn.Module, fields: Mapping[str, Any]) -> Applied:
    """Room for more heads; its weights are drawn, and zeros where they write."""
    lm, more = require_lm(model, ADD), fields["n_heads"]
    name = f"{BLOCKS}.{fields['block']}.mixer"
    mixer: Any = lm.get_submodule(name)
    old = mixer.out.in_features
    fresh = more * (old // mixer.heads)
    resized = {"qkv.weight": (_rows(old, fresh), None), "out.weight": (None, appended(old, old + fresh))}
    with seeded(fields["random_seed"], "growth.heads", fields["block"], mixer.heads):
        resize(mixer, "qkv.weight", resized["qkv.weight"], std=1 / math.sqrt(mixer.qkv.in_features))
    resize(mixer, "out.weight", resized["out.weight"])
    mixer.heads += more
    carries = {f"{name}.{own}": Carry(f"{name}.{own}", places) for own, places in resized.items()}
    return Applied(record(lm, Change(ADD, dict(fields))), carries)


def _rows(old: int, fresh: int) -> Tensor:
    """Where the rows of queries, keys and values were, once there are more of each."""
    first = appended(old, old + fresh)
    return torch.cat([torch.where(first < 0, first, first + n * old) for n in range(3)])


def can_join_heads(model: nn.Module, slot: str, seed: Seed) -> bool:
    """Whether a seed is more heads of the attention that it stands beside."""
    host: Any = model.get_submodule(slot)
    layer = seed.layer
    if not isinstance(model, LM) or model.join is not None or not slot.startswith(f"{BLOCKS}.") or _why_not(host):
        return False
    if not isinstance(layer, Attention):
        return False
    is_alike = (host.span, host.rope, host.out.in_features // host.heads) == (
        layer.span,
        layer.rope,
        layer.out.in_features // layer.heads,
    )
    return is_alike and slot.endswith(".mixer") and is_apart(find_slot(model, slot))


def joined_heads(slot: str, *, is_plain: bool) -> Callable[[nn.Module], Applied]:
    """Heads of a seed become heads of its host; is_plain: nothing multiplies what they give."""

    @torch.no_grad()
    def apply(model: nn.Module) -> Applied:
        seed = remove(model, slot)
        layer: Any = seed.layer
        block = int(slot.split(".")[1])
        found = _add(model, {"block": block, "n_heads": layer.heads, "random_seed": 0})
        host: Any = model.get_submodule(slot)
        fresh = layer.out.in_features
        old = host.out.in_features - fresh
        scale_d = seed.blend_weight.to(layer.out.weight)
        if isinstance(seed.blend, Channel):
            scale_d = scale_d * seed.blend.logit_d.sigmoid()
        host.out.weight[:, old:] = scale_d.reshape(-1, 1) * layer.out.weight
        host.qkv.weight[(_rows(old, fresh) < 0).nonzero().flatten().to(host.qkv.weight.device)] = layer.qkv.weight
        carries = {name: with_moments(slot, name, carry, is_plain=is_plain) for name, carry in found.carries.items()}
        return Applied(found.model, carries)

    return apply


changes.register(ADD, lambda model, fields: _add(model, fields).model)
