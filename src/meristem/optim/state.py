"""What an optimizer has gathered, as one flat tree of named tensors."""

from collections.abc import Mapping

import torch
from torch import nn

from meristem.errors import CheckpointMismatch


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Moments and step counters under ``<parameter>/<tensor>``: by name, so that neither order nor grouping matters."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, torch.Tensor]) -> None:
    """Put saved moments and counters back; they must fit the model exactly, or nothing is changed."""
    parameters = dict(model.named_parameters())
    restored: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for path, value in saved.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters.get(name)
        if parameter is None or (key != "step" and value.shape != parameter.shape):
            expected = "no such parameter" if parameter is None else f"a parameter of {tuple(parameter.shape)}"
            raise CheckpointMismatch(
                f"the saved optimizer holds '{path}' of shape {tuple(value.shape)}; this model has {expected}. "
                "Resume with the configuration that the run was started with.",
                tensor=path,
            )
        restored.setdefault(parameter, {})[key] = value.detach().to(parameter.device, copy=True)
    missing = {name for name, parameter in parameters.items() if parameter.requires_grad and parameter not in restored}
    if restored and missing:
        raise CheckpointMismatch(
            f"the saved optimizer holds nothing for {sorted(missing)[:3]} ({len(missing)} parameters in all). "
            "Resume with the configuration that the run was started with.",
            tensors=sorted(missing),
        )
    optimizer.state.clear()
    optimizer.state.update(restored)
