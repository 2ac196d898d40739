"""Matrices of low rank beside linear layers that stay (LoRA, Hu et al. 2106.09685), by ``peft``.

``W x + alpha / rank * B A x``: A is drawn, B is 0 at first, so that a fresh model is its base to the bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from meristem.adapters.base import FrozenWeights, in_shapes, rest
from meristem.adapters.host import HostLM
from meristem.errors import WrongValue
from meristem.extras import imported
from meristem.models.init import seeded
from meristem.nn.attention import Attention

OURS: Final = ("mixer.qkv", "mixer.out", "attention.qkv", "attention.out", "mlp.gate_up", "mlp.up", "mlp.out")
"""What of a model of ours has such matrices where none are named: attention and feed-forward layers. Memories, whose
projections are read in more ways than one, have none."""

FOREIGN: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), ("query_key_value",)),
    "mpt": ("Wqkv",),
    "phi3": ("qkv_proj",),
}
"""The same by the type of a model of transformers; of all others the queries and values of attention."""

USUAL: Final = ("q_proj", "v_proj")
BASE_LAYER: Final = ".base_layer"
"""What peft calls the layer beside which it puts matrices."""


def targets_for(model: nn.Module) -> tuple[str, ...]:
    """Ends of the names of the layers that get matrices where the settings name none."""
    return FOREIGN.get(model.kind, USUAL) if isinstance(model, HostLM) else OURS


def matched(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The layers with such ends. WrongValue where there are none: nothing would be trained."""
    linear = (nn.Linear, imported("transformers.pytorch_utils", "LoRA").Conv1D)
    layers = [name for name, module in model.named_modules() if isinstance(module, linear)]
    found = [name for name in layers if any(name == end or name.endswith(f".{end}") for end in targets)]
    if not found:
        ends = sorted({".".join(name.split(".")[-2:]) for name in layers})
        raise WrongValue(
            f"no layer of this model ends in {', '.join(targets)}, so nothing would be trained; its linear layers end "
            f"in {', '.join(ends) or 'nothing: it has none'}. Name some of these in finetune.targets.",
            value=list(targets),
        )
    outside = [name for name in found if not isinstance(model, HostLM) and not _is_plain(model, name)]
    if outside:
        raise WrongValue(
            f"{', '.join(outside[:3])} is read by a memory in more ways than as a layer, so that matrices beside it "
            f"would be left out of some. Name layers of attention or feed-forward layers in finetune.targets.",
            value=outside,
        )
    return found


def _is_plain(model: nn.Module, name: str) -> bool:
    """Whether a linear layer of ours is only ever called."""
    owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    return isinstance(owner, Attention) or type(owner).__name__ in ("SwiGLU", "Feedforward")


def lora(model: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    """The change ``lora``: the weights of the base, which stay, and fresh matrices beside the layers of ``targets``.

    fields: rank, alpha, dropout, targets, which are whole names, random_seed, and base, as ``FrozenWeights`` says it.
    """
    base = FrozenWeights.from_json(fields["base"])
    if not in_shapes() and not isinstance(model, HostLM):
        model.load_state_dict(base.weights())
    peft = imported("peft", "LoRA")
    kept = {*(name for name, _ in model.named_parameters(remove_duplicate=False)), *model.state_dict()}
    settings = peft.LoraConfig(
        r=fields["rank"],
        lora_alpha=fields["alpha"],
        lora_dropout=fields["dropout"],
        target_modules=list(fields["targets"]),
        fan_in_fan_out=any(type(model.get_submodule(each)).__name__ == "Conv1D" for each in fields["targets"]),
    )
    with seeded(fields["random_seed"], "adapters.lora"):
        peft.inject_adapter_in_model(settings, model)
    for name, module in model.named_modules():
        if ".lora_dropout." in f"{name}." and isinstance(module, nn.Dropout):
            module.register_forward_pre_hook(_drop_in_training)
    now = {*(name for name, _ in model.named_parameters(remove_duplicate=False)), *model.state_dict()}
    return rest(model, frozenset(name for name in now if name.replace(BASE_LAYER, "") in kept))


def _drop_in_training(module: nn.Module, _inputs: object) -> None:
    """Models of ours are read in one mode: what a gradient is taken of is trained."""
    module.train(torch.is_grad_enabled())


@contextmanager
def merged(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The weights of the base with what the matrices add, under the names of the base.

    The weights of the model are these while the block lasts, and afterwards those of before to the bit.
    """
    layers = {name: each for name, each in model.named_modules() if hasattr(each, "lora_A") and hasattr(each, "merge")}
    before = {name: each.get_base_layer().weight.detach().clone() for name, each in layers.items()}
    try:
        for layer in layers.values():
            layer.merge(safe_merge=True)
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        yield {name.replace(BASE_LAYER, ""): each for name, each in tensors.items() if ".lora_" not in name}
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                if layer.merged:
                    layer.unmerge()
                layer.get_base_layer().weight.copy_(before[name])
