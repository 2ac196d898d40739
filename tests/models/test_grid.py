"""A rule of each structure in every composition, with and without levels, and every rule alone: nothing leaks."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from meristem.memory.named import rules
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from zoo import KINDS, preset

N_TIME, VOCABULARY = 11, 29
PERIODS = {1: None, 4: (1, 2, 3, 5)}
COMPOSITIONS = ("mag", "mac", "mal", "memory")
GRID = [
    *product(COMPOSITIONS, KINDS, PERIODS),
    *(("memory", rule, 1) for rule in sorted(set(rules.names()) - set(KINDS))),
]


def settings(composition, rule, n_levels):
    model = {"dim": 8, "n_layers": 1, "mlp_dim": 9, "mixer": composition}
    model |= {} if composition == "memory" else {"n_heads": 2}
    model |= {"segment": 4} if composition == "mac" else {"sliding_window": 4} if composition in ("mag", "mal") else {}
    chosen = {"form": preset(f"lmm-{rule}")["memory"].get("form", "auto")}
    levels = {"count": n_levels, "periods": PERIODS[n_levels]}
    return ModelConfig(**model), MemoryConfig(rule=rule, head_dim=4, chunk=3, levels=levels, **chosen)


def fresh(composition, rule, n_levels):
    return build(*settings(composition, rule, n_levels), VOCABULARY, random_seed=3).double()


def grown(*cell):
    """Weights off their first values: a zero must not hide what it multiplies."""
    model, generator = fresh(*cell), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def ids(seed=7, n_time=N_TIME):
    return torch.randint(VOCABULARY, (2, n_time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("composition, rule, n_levels", GRID)
def test_nothing_later_is_known_and_nothing_earlier_lost(composition, rule, n_levels):
    """S1-M12 to M14, S1-M22, S3-M4: causality by perturbation and gradient, and decoding equals reading at once."""
    model, tokens_bt, now = grown(composition, rule, n_levels), ids(), 6
    other_bt = tokens_bt.clone()
    other_bt[:, now] = (tokens_bt[:, now] + 1) % VOCABULARY
    caught = []
    hook = model.embedding.register_forward_hook(
        lambda module, inputs, hidden_btd: caught.append(hidden_btd.detach().requires_grad_()) or caught[-1]
    )
    whole_bto, _ = model(tokens_bt)
    hook.remove()
    others_bto, _ = model(other_bt)
    assert torch.equal(whole_bto[:, :now], others_bto[:, :now])
    assert not torch.allclose(whole_bto[:, now], others_bto[:, now])
    with torch.no_grad():
        parts, state = [], None
        for part_bt in tokens_bt.split([1, 1, 4, 1, 3, 1], dim=1):
            logits_bto, state = model(part_bt, state)
            parts.append(logits_bto)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_bto, rtol=0, atol=1e-9)
    (upstream_btd,) = torch.autograd.grad(whole_bto[:, now].square().sum(), caught[0])
    assert not upstream_btd[:, now + 1 :].any() and upstream_btd[:, now].any()


@pytest.mark.parametrize("composition, rule, n_levels", GRID)
def test_every_parameter_learns_from_the_start(composition, rule, n_levels):
    """Law 7 at the first weights, mixes and reflective reads among them."""
    model = fresh(composition, rule, n_levels)
    # Long enough for the slowest level to finish chunks of what it is written with.
    n_time = N_TIME if n_levels == 1 else 4 * N_TIME
    logits_bto, _ = model(ids(n_time=n_time))
    F.cross_entropy(logits_bto.flatten(0, 1), ids(11, n_time).flatten()).backward()
    idle = [path for path, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert idle == []
