"""Every kind of optimizer against its written update."""

import math

import pytest
import torch
from torch import nn

from meristem.errors import WrongValue
from meristem.linalg import newton_schulz
from meristem.optim.adamuon import AdaMuon
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.kinds import KINDS
from meristem.optim.m3 import M3, EmaM3
from meristem.optim.orthogonal import orthogonal
from optim.levels import Levelled, loss_at, step, train, weights

matrix_kinds = pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.matrices])


def gradients(n_steps, *shape):
    """Of a run of steps, in float64."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n_steps, *shape, generator=generator, dtype=torch.float64).unbind()


def after(make, given, start):
    """Where an optimizer leads from ``start`` by these gradients, and what it then holds."""
    weight = nn.Parameter(start.clone())
    optimizer = make([weight])
    for gradient in given:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def test_orthogonal_is_newton_schulz_of_each():
    """In one stack or alone, tall or wide, and as the memory's own; singular values end within [.65, 1.2]."""
    matrices = [*gradients(3, 5, 7), *gradients(2, 7, 4), torch.zeros(5, 7, dtype=torch.float64)]
    for matrix, rotated in zip(matrices, orthogonal(matrices), strict=True):
        torch.testing.assert_close(rotated, newton_schulz(matrix), rtol=0, atol=1e-12)
        singular = torch.linalg.svdvals(rotated)
        assert not matrix.any() or (0.65 < singular.min() and singular.max() < 1.2)


@pytest.mark.parametrize("is_raw", [False, True])
def test_adamuon_is_the_written_update(is_raw):
    """S3b-S17: momentum, sign, Newton-Schulz, second moment of that (or of the gradient), RMS alignment, decay."""
    given, start = gradients(5, 5, 7), gradients(1, 5, 7)[0]
    weight, momentum, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for gradient in given:
        momentum = 0.9 * momentum + gradient
        rotated = newton_schulz(momentum if is_raw else momentum.sign())
        square = 0.8 * square + 0.2 * (gradient if is_raw else rotated) ** 2
        direction = rotated / (square.sqrt() + 1e-8)
        direction = 0.2 * math.sqrt(5 * 7) * direction / direction.norm()
        weight = weight - 0.01 * (direction + 0.3 * weight)
    settings = {"rate": 0.01, "momentum": 0.9, "beta": 0.8, "weight_decay": 0.3, "is_raw": is_raw}
    found, _ = after(lambda parameters: AdaMuon(parameters, **settings), given, start)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_size_of_an_adamuon_step_is_known(scale):
    """S3b-S17: its root mean square is 0.2 of the rate, however large the gradients."""
    start = torch.zeros(5, 7, dtype=torch.float64)
    for is_raw in (False, True):
        make = lambda parameters, is_raw=is_raw: AdaMuon(parameters, rate=0.01, eps=1e-20, is_raw=is_raw)  # noqa: E731
        found, _ = after(make, [scale * gradients(1, 5, 7)[0]], start)
        assert found.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01)


def test_adamuon_takes_matrices_only():
    """S3b-S17: it refuses what is none; built over a model, that falls to AdamW."""
    with pytest.raises(WrongValue, match=r"found the shapes \[\(7,\)\]. Give the others to AdamW"):
        AdaMuon([nn.Parameter(torch.zeros(7))], rate=0.1)
    model = Levelled(1)
    optimizer = build(model, OptimConfig(name="adamuon"))
    assert optimizer.state.keys() == set()
    step(model, optimizer, 0)
    assert {"exp_avg", "exp_avg_sq", "step"} == optimizer.state[model.scale].keys()
    assert {"momentum", "square"} == optimizer.state[model.layers[0].weight].keys()


def test_muon_is_torchs():
    """Bit for bit: its matrices by ``torch.optim.Muon`` at the size of AdamW's steps, the rest by fused AdamW."""
    mine, its = Levelled(1, 1), Levelled(1, 1)
    part = OptimConfig(name="muon", lr=0.01, momentum=0.9, weight_decay=0.2, grad_clip=None)
    optimizer = build(mine, part)
    matrices = [layer.weight for layer in its.layers]
    rest = [parameter for parameter in its.parameters() if parameter.dim() != 2]
    muon = torch.optim.Muon(matrices, lr=0.01, momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for index in range(5):
        step(mine, optimizer, index)
        loss_at(its, index).backward()
        for other in (muon, adamw):
            other.step()
            other.zero_grad()
    assert all(torch.equal(now, weights(its)[name]) for name, now in weights(mine).items())


def test_sgd_is_torchs():
    """With momentum and with the decay added to the gradient, of matrices only."""
    mine, its = Levelled(1), Levelled(1)
    optimizer = build(mine, OptimConfig(name="sgd", lr=0.01, momentum=0.9, weight_decay=0.2, grad_clip=None))
    matrices = [layer.weight for layer in its.layers]
    rest = [parameter for parameter in its.parameters() if parameter.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": rest}]
    truth = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    for index in range(5):
        step(mine, optimizer, index)
        loss_at(its, index).backward()
        truth.step()
        truth.zero_grad()
    for name, now in weights(mine).items():
        torch.testing.assert_close(now, weights(its)[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (7,), (2, 3, 4)])
def test_m3_is_the_written_update(shape):
    """S3-M2: algorithm 1, per tensor; the slow momentum acts from the step after the one in which it moved."""
    given, start = gradients(11, *shape), gradients(1, *shape)[0]
    weight, fast, slow, square, gathered = start.clone(), *(torch.zeros_like(start) for _ in range(4))
    turn = newton_schulz if len(shape) == 2 else lambda momentum: momentum
    for index, gradient in enumerate(given, start=1):
        fast, square, gathered = fast + 0.9 * gradient, square + 0.999 * gradient**2, gathered + gradient
        direction = (turn(fast) + 0.5 * turn(slow)) / (square.sqrt() + 1e-8)
        weight = weight - 0.01 * direction - 0.01 * 0.3 * weight
        if index % 4 == 0:
            slow, gathered = slow + 0.99 * gathered, torch.zeros_like(gathered)
    found, held = after(lambda parameters: M3(parameters, rate=0.01, every=4, weight_decay=0.3), given, start)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(held["slow"], slow)


def test_the_slow_momentum_moves_at_multiples_only():
    """S3-M2: exactly at f, 2f, ...; with f above the length of the run it stays 0."""
    start, given = torch.zeros(5, 7, dtype=torch.float64), gradients(9, 5, 7)
    slow = [after(lambda p: M3(p, rate=0.01, every=4), given[:n], start)[1]["slow"] for n in range(1, 10)]
    moved = [n for n, (one, other) in enumerate(zip([torch.zeros_like(start), *slow], slow, strict=False), start=1)
             if not torch.equal(one, other)]  # fmt: skip
    assert moved == [4, 8]
    assert not after(lambda p: M3(p, rate=0.01, every=10), given, start)[1]["slow"].any()


def test_m3_without_slow_momentum_and_second_moment_goes_where_muon_goes():
    """S3-M2: α = 0 and no V; Muon's numbers are bfloat16."""
    start, given = torch.zeros(5, 7, dtype=torch.float64), gradients(1, 5, 7)
    mine, _ = after(lambda p: M3(p, rate=1.0, betas=(0.9, 0.0, 0.99), alpha=0.0, eps=1.0), given, start)
    its, _ = after(lambda p: torch.optim.Muon(p, lr=1.0, weight_decay=0.0), given, start)
    assert torch.cosine_similarity(mine.flatten(), its.flatten(), dim=0) > 0.999


def test_one_decaying_momentum_is_sgd_with_momentum():
    """S3-M2: ``S <- .9 S + .1 g`` is torch's SGD with momentum .9 and dampening .9, begun at 0."""
    start, given = gradients(1, 5, 7)[0], gradients(6, 5, 7)
    mine, _ = after(lambda p: EmaM3(p, rate=0.1, periods=(1,), kept=(0.9,), written=(0.1,)), given, start)

    def sgd(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.9)
        optimizer.state[parameters[0]]["momentum_buffer"] = torch.zeros_like(start)
        return optimizer

    torch.testing.assert_close(mine, after(sgd, given, start)[0], rtol=0, atol=1e-12)


def test_decaying_momenta_are_the_written_update():
    """S3-M2: each gathers for its period, then ``S <- η S + θ (buf + g)``; the step is their sum."""
    start, given = gradients(1, 5, 7)[0], gradients(7, 5, 7)
    weight, means, gathered = start.clone(), [torch.zeros_like(start)] * 2, [torch.zeros_like(start)] * 2
    for index, gradient in enumerate(given, start=1):
        for level, (period, kept, written) in enumerate(((1, 0.9, 0.1), (3, 0.95, 0.05))):
            gathered[level] = gathered[level] + gradient
            if index % period == 0:
                means[level] = kept * means[level] + written * gathered[level]
                gathered[level] = torch.zeros_like(start)
        weight = weight - 0.1 * sum(means)
    make = lambda p: EmaM3(p, rate=0.1, periods=(1, 3), kept=(0.9, 0.95), written=(0.1, 0.05))  # noqa: E731
    torch.testing.assert_close(after(make, given, start)[0], weight, rtol=0, atol=1e-12)


@matrix_kinds
def test_matrix_optimizers_leave_embeddings_and_head_to_adamw(kind):
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 5), "mix": nn.Linear(5, 3), "head": nn.Linear(3, 7)})
    model.matrices = {"mix.weight", "head.weight"}
    optimizer = build(model, OptimConfig(name=kind))
    rest, matrices = optimizer.parts
    assert [parameter.shape for group in matrices.param_groups for parameter in group["params"]] == [(3, 5)]
    decays = {id(p): group["weight_decay"] for group in rest.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters() if id(p) in decays} == {
        "embedding.weight": 0.0,
        "mix.bias": 0.0,
        "head.weight": 0.1,
        "head.bias": 0.0,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_ema", [False, True])
def test_every_kind_descends(kind, is_ema):
    """S4-M12: with levels and without, the loss of a small model falls under each kind."""
    if is_ema and kind != "m3":
        is_ema, periods = False, (1, 1)
    else:
        periods = (2, 4)
    model = Levelled(*periods)
    settings = {"m3_ema": True} if is_ema else {}
    optimizer = build(model, OptimConfig(name=kind, lr=0.02, **settings))
    before = sum(loss_at(model, index).item() for index in range(8))
    for _ in range(12):
        train(model, optimizer, range(8))
    assert sum(loss_at(model, index).item() for index in range(8)) < 0.95 * before
