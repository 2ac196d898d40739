"""Which parameters the optimizer decays, and the optimizer over them."""

from collections.abc import Iterator

import torch
from torch import nn

from meristem.optim.part import OptimPart


def build(model: nn.Module, part: OptimPart) -> torch.optim.AdamW:
    """AdamW over every trainable parameter, in the two groups of ``split``."""
    decayed, plain = split(model)
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": part.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=part.rate,
        betas=(part.beta1, part.beta2),
        eps=part.eps,
        fused=True,
    )


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters that decay and those that do not; each is in exactly one list.

    Only plain matrices decay. Embeddings do not, nor what a module names in ``no_decay``, a set of names of its own
    parameters or children (gates, persistent tokens, initial memories). A parameter shared by two modules decays only
    if both agree.
    """
    kept = {id(parameter) for module in model.modules() for parameter in _kept(module)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.dim() == 2 and id(parameter) not in kept]
    plain = [parameter for parameter in trainable if parameter.dim() != 2 or id(parameter) in kept]
    return decayed, plain


def _kept(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that this module exempts from decay."""
    if isinstance(module, nn.Embedding):
        yield from module.parameters()
    exempt: frozenset[str] = getattr(module, "no_decay", frozenset())
    for name, parameter in module.named_parameters():
        if name in exempt or name.split(".")[0] in exempt:
            yield parameter
