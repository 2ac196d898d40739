"""Counted work equals the closed form of each operation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meristem.memory import Gates, named, run, scan
from meristem.memory.kernels.select import force_reference
from meristem.native.library import core, library
from meristem.recipes.plan.ledger import Ledger


def counted(call):
    """Work of the forward and of the backward pass of ``call``."""
    with FakeTensorMode(), Ledger() as ledger:
        ledger.stage("forward")
        out = call()
        ledger.stage("backward")
        out.sum().backward()
    assert not ledger.unknown
    return ledger.flops["forward", ""], ledger.flops["backward", ""]


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention(is_causal):
    """C5.4: Two products of b h t s k each; five in the backward pass, because the scores are formed again."""
    b, h, t, s, k = 2, 3, 7, 11, 5
    s = t if is_causal else s
    forward, backward = counted(
        lambda: F.scaled_dot_product_attention(
            leaf(b, h, t, k), leaf(b, h, s, k), leaf(b, h, s, k), is_causal=is_causal
        )
    )
    assert forward == 2 * 2 * b * h * t * s * k
    assert backward * 2 == 5 * forward


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_convolution(groups):
    """C5.4: Each output position is an inner product of kernel x inputs per group; the backward pass does it twice."""
    b, t, width, kernel = 2, 13, 6, 4
    forward, backward = counted(
        lambda: F.conv1d(leaf(b, width, t), leaf(width, width // groups, kernel), groups=groups)
    )
    assert forward == 2 * b * (t - kernel + 1) * width * (width // groups) * kernel
    assert backward == 2 * forward


def test_linear():
    """C5.4: 2 x rows x inputs x outputs, and twice that in the backward pass."""
    forward, backward = counted(lambda: F.linear(leaf(2, 5, 7), leaf(11, 7), leaf(11)))
    assert (forward, backward) == (2 * 2 * 5 * 7 * 11, 2 * 2 * 2 * 5 * 7 * 11)


def test_triangular_solve():
    """n^2 per right-hand side; the backward pass solves once more and forms one n x n product."""
    b, n, r = 3, 17, 5
    forward, backward = counted(
        lambda: torch.linalg.solve_triangular(leaf(b, n, n), leaf(b, n, r), upper=False, unitriangular=True)
    )
    assert forward == b * n * n * r
    assert backward == b * n * n * r + 2 * b * n * n * r


@pytest.mark.parametrize(
    "einsum, shapes",
    [("bthk,bthv->bhkv", [(2, 13, 3, 5), (2, 13, 3, 7)]), ("bthk,bhkv->bthv", [(2, 13, 3, 5), (2, 3, 5, 7)])],
)
def test_einsum(einsum, shapes):
    """An einsum is two operations per point of its joint index space."""
    forward, backward = counted(lambda: torch.einsum(einsum, *[leaf(*shape) for shape in shapes]))
    assert (forward, backward) == (2 * 2 * 13 * 3 * 5 * 7, 2 * 2 * 2 * 13 * 3 * 5 * 7)


@pytest.mark.parametrize("call", [lambda v: torch.mv(leaf(7, 5), v), lambda v: torch.addmv(leaf(7), leaf(7, 5), v)])
def test_matrix_vector(call):
    """A matrix times a vector is two operations per entry."""
    assert counted(lambda: call(torch.randn(5)))[0] == 2 * 7 * 5


def test_elementwise_parts_of_a_model_are_known():
    """No everyday operation without a matrix product is reported as unknown, and none counts."""

    def everyday():
        hidden = nn.Embedding(11, 6)(torch.randint(0, 11, (3, 5)))
        hidden = nn.LayerNorm(6)(hidden) + nn.RMSNorm(6)(hidden).roll(1, 1)
        hidden = F.dropout(F.silu(F.pad(hidden, (0, 0, 3, 0)))[:, 3:], 0.1) * torch.sigmoid(hidden).cumsum(1).tril()
        hidden = torch.cat([hidden, hidden.softmax(-1)], 1).masked_fill(torch.zeros(10, 1, dtype=torch.bool), 0.0)
        return F.cross_entropy(hidden.flatten(0, 1), torch.randint(0, 6, (30,))) + F.normalize(hidden, dim=-1).norm()

    assert counted(everyday) == (0, 0)


def test_an_operation_without_a_formula_is_reported():
    """Work that would be missed is named."""
    with FakeTensorMode(), Ledger() as ledger:
        ledger.stage("run")
        torch.linalg.cholesky_ex(torch.eye(5))
    assert list(ledger.unknown) == ["aten.linalg_cholesky_ex.default"]


def chunked(name, b, h, n_chunks, c, d):
    """Forward work of the exact chunk form over full chunks of c tokens, key and value width d."""
    rule = named(name)
    n_gates = 1 + len(rule.init(1, 1, d, d))

    def call():
        keys, values, queries = (leaf(b, n_chunks * c, h, d) for _ in range(3))
        gates = Gates(*(leaf(b, n_chunks * c, h) for _ in range(n_gates)))
        return run(rule, rule.init(b, h, d, d), keys, values, queries, gates, form="exact_chunk", chunk=c)[0]

    return counted(call)[0]


@pytest.mark.parametrize("c, d", [(32, 31), (16, 61), (64, 33)])
def test_exact_chunk_form_with_momentum(c, d):
    """About 6.5 C d + 6 d^2 multiply-adds per token and head (memory.md 4.11)."""
    with force_reference():
        assert chunked("titans", 1, 1, 2, c, d) == pytest.approx(2 * 2 * c * (6.5 * c * d + 6 * d * d), rel=0.25)


@pytest.mark.skipif(library() is None, reason=f"there is no native core: {core().said}")
@pytest.mark.parametrize(
    "name, per_level, triangles", [("titans", 6, 4), ("delta", 3, 4), ("gated_delta", 3, 4), ("hebbian", 2, 2)]
)
def test_the_native_core_works_on_triangles(name, per_level, triangles):
    """Half of each product of tokens with tokens, nothing to invert: 2 C d + 6 d^2 with momentum; backwards twice that,
    for the products of keys are kept."""
    rule, (b, h, n, c, d) = named(name), (2, 3, 5, 16, 7)
    n_gates = 1 + len(rule.init(1, 1, d, d))

    def call():
        keys, values, queries = (leaf(b, n * c, h, d) for _ in range(3))
        gates = Gates(*(leaf(b, n * c, h) for _ in range(n_gates)))
        return run(rule, rule.init(b, h, d, d), keys, values, queries, gates, form="exact_chunk", chunk=c)[0]

    per_token = per_level * d * d + triangles * c / 2 * d
    assert counted(call) == (2 * b * h * n * c * per_token, 2 * 2 * b * h * n * c * per_token)


@pytest.mark.parametrize("name", ["hebbian", "delta", "gated_delta", "titans"])
def test_exact_chunk_form_grows_with_heads_rows_and_chunks(name):
    """Every chunk of every head of every row is the same work, linear in the length of the text."""
    assert chunked(name, 2, 3, 5, 8, 7) == 2 * 3 * 5 * chunked(name, 1, 1, 1, 8, 7)


def test_scan():
    """Per token one recall for the surprise, one outer product for the write, and one recall for the query."""
    b, t, h, k, v = 2, 11, 3, 5, 7
    rule = named("titans")

    def call():
        gates = Gates(*(leaf(b, t, h) for _ in range(3)))
        return scan(rule, rule.init(b, h, k, v), leaf(b, t, h, k), leaf(b, t, h, v), leaf(b, t, h, k), gates)[0]

    assert counted(call)[0] == b * t * h * 3 * 2 * k * v
