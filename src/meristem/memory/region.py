"""Gates within which a memory cannot run away, whatever their sequence and the unit keys and bounded values.

The gate layer keeps its gates here (``within``); well inside, they are what they were. With ``s = OVERSHOOT``, ``e =
FADE``, ``L`` the curvature of the loss and ``m`` a constant of each head (``most_momentum``), for every token::

    retain   <= exp(-e write)                                        every rule whose old memory fades
    momentum <= m retain                                             momentum
    write    <= s (1 - m) (1 + retain - 2 momentum / m) / L          rules that correct what they recall; m = 0 without
                                                                     momentum

**Why.** Each row ``x`` of M follows its own recurrence, ``x' = r x - w (k.x - v) k`` without momentum. Across k it
shrinks by r. Along k, ``(r - w) (k.x) + w v``: with ``w <= s (1 + r)`` a convex mean gives ``((r - w) a + w v)^2 <= |r
- w| a^2 + C w v^2``, ``C = max(1, s / (1 - s))``. As ``r <= exp(-e w)`` it follows that ``|x'|^2 <= exp(-e w) |x|^2 + C
w v^2``, so that ``|x|^2 <= (1 + e) C v^2 / e`` once holds for ever. Several pairs in one write (a span) are the same
along the singular directions of their keys, L times as steep.

With momentum, ``S' = mu S - w (k.x - v) k``, ``x' = r x + S'``, let ``z = x + m / (1 - m) S``: where x comes to rest if
momentum stays at m. ``l = mu / m``, ``b = w / (1 - m)``, ``K = k k^T``::

    z' = (r - l - b K) x + l z + b v k,    x' = (r - (1 - m) l - (1 - m) b K) x + (1 - m) l z + (1 - m) b v k

Both are means of x and z with weights that sum to at most ``exp(-e w)``; the region says just that. So the larger of
``|x|^2`` and ``|z|^2`` stays below ``(1 + e) C v^2 / (e (1 - m))``. This norm is one for all gates, which is what a
switched system needs: below ``write < 2 (1 + momentum)`` (memory.md 2.3) each setting is stable alone, and yet a write
at momentum 0 that is followed by coasting at m multiplies x by ``1 - w / (1 - m)``, -9 at ``w = 1``, ``m = 0.9``.

A write that does not read the memory (``hebbian``, ``omega``) needs the first two lines alone: ``|x| <= (1 + e) |v|
/ (e (1 - m))``.

**Rules that are not linear.** Slots of length one (``lattice``) and weights on the simplex (``memora``) are bounded by
what they are; the logarithms of the latter spread by at most the gradient over e. ``moneta`` reads ``A / sqrt(|A|_4^4 +
1e-12)``, at most ``707 n^(1/4)`` for n numbers, so that its gradient is bounded, and A by it over e. A step of
``atlas`` is no longer than ``1.21 w sqrt(rank)``: ``|M| <= 1.21 sqrt(rank) / e``, and S stays finite as its momentum is
at most 63/64. In ``trellis`` the slope of SiLU leaves what is above 0 to the delta rule and bounds what it adds below:
a slot is at most ``(1.1 |c| + 0.15) / e`` long for a code c. ``ftrl`` reads what is left of A
above a threshold, ``A - D`` with ``|D| <= 0.05 sqrt(k v)``: the delta rule with values ``v + D k``. A plain sum of what
it writes grows as ``sqrt(t)`` at most, and does with the keys below; it has no retain gate, but fades by ``e write``
alone.

**Networks with a LayerNorm** (``titans_mlp``, ``yaad``) have a gradient up to 316 times as large where a key makes the
rows before the LayerNorm nearly equal, and the gradient of each layer grows with the other. So no surprise of theirs is
longer than ``c = LONGEST`` over all weights: the write rate in effect is ``w min(1, c / |g|)`` (``rule.limited``), a
norm clip of each token's gradient, which every form takes alike. In 60 steps of training by ``lmm-titans_mlp`` and
``yaad`` none was above 850. Each write is then one that does not read the memory, of length c, whatever the network.
With ``z`` as above, ``mu = l m r`` and ``0 <= l <= 1``::

    z' = r ((1 - l) x + l z) - w g / (1 - m),    x' = r ((1 - (1 - m) l) x + (1 - m) l z) - w g

so that the larger of ``|x|`` and ``|z|``, over all weights, shrinks by ``exp(-e w)`` and grows by at most ``w c / (1 -
m)``: it stays below ``(1 + e) c / (e (1 - m))``. ``yaad`` is pulled to x_ref, which is x of at most 16 writes before:
``x' = (r - 0.01) x + 0.01 x_ref - w g``. From one x_ref to the next its length shrinks by at least ``0.99^16 = 0.85``
of what 16 fades would take, and grows by at most c times the sum of their rates. So ``|x_ref| <= 1.2 c / e``, and x is
at most 16 c longer; where a chunk of C tokens is one write, 16 C c.

**Chunks whose surprises are taken at their start** multiply a residual along one key by ``1 - C w``, which may be below
-1 in the region. In the rules that declare such a form and are not bounded by what they are, the limit c holds, with
the bound above, ``span`` times as large for a span. A linear rule is bounded in its exact form and in ``scan``; in
``frozen_chunk``, ``refined`` and ``tnt`` no bound of it is known (``frozen_chunk.overshoot`` tells how far it is off).

**What the fade is for.** At retain 1 not even the delta rule is bounded: with each key at a right angle to x, write 1
and v = 1, ``x' = x + k`` and ``|x| = sqrt(t)``. (For finitely many keys it is bounded: Aharoni, Duchet & Wajnryb 1984,
Successive projections on hyperplanes.) By ``e`` a head that writes at rate w has a half-life of at most ``45,426 / w``
tokens; one that does not write may keep all.

**The average of a delta memory** does not replace this. ``M' = mu M + (1 - mu) P'`` is Titans at constant gates only if
the surprise in ``P' = r P - w / (1 - mu) (M k - v) k^T`` is measured at M; then ``mu = 1`` for n tokens moves P by n
steps, and it is not bounded. Measured at P it is bounded as P is, and another rule.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from meristem.memory.rule import Rule

FADE = 2.0**-16
"""How fast a write of rate 1 decays the old memory at least."""

OVERSHOOT = 0.9
"""How much of twice the rate that corrects a residual at once may be written."""

MOMENTA = 1 / 64, 63 / 64
"""Least and greatest m. Above, nothing could be written; below, 1 - m changes no more."""

SILU_SLOPE = 1.1
"""The greatest slope of SiLU."""

SHARPNESS = 64
"""Limits are soft, so that a gate at its limit still learns: half of it is 10^-20 off, the limit itself 1 %."""

SOFT = 40.0
"""Above it softplus is its argument, to the last digit of float64."""

TINY, LOG_NOTHING = 1e-30, -1e4


def curvature(rule: Rule) -> float | None:
    """L: the greatest curvature of a token's loss along any direction, for unit keys and pairs that count at most once.

    None where the write rate needs no limit below 1 (the rate is proximal, the write does not read the memory, or the
    memory is normalised), or none is known: networks, and features without a greatest length.
    """
    if rule.bias.name != "squared" or rule.features.square is None:
        return None
    if rule.structure.kind == "two_slots":
        return SILU_SLOPE
    is_given = rule.structure.kind == "matrix" and rule.update.name in ("plain", "leader", "momentum")
    return rule.span * rule.features.square if is_given else None


def most_momentum(rule: Rule, usual: Tensor) -> Tensor:
    """m of a head whose momentum is mostly ``usual``: about its root, which leaves most room for the write rate.

    Where momentum does not go on into the memory as it is, it only has to stay below 1.
    """
    least, most = MOMENTA
    return least + (most - least) * usual.sqrt() if is_coasting(rule) else torch.full_like(usual, most)


class Bounded(NamedTuple):
    """Gates inside the region; of retain and momentum the logarithms as well."""

    retain: Tensor
    write: Tensor
    momentum: Tensor | None
    log_retain: Tensor
    log_momentum: Tensor | None


def within(rule: Rule, log_retain: Tensor, write: Tensor, log_momentum: Tensor | None, most: Tensor | None) -> Bounded:
    """Gates of any shape inside the region, in few operations: a session that decodes does this at every token.

    most: m, for a rule with momentum.
    """
    momentum, steep = None, curvature(rule)
    if rule.has_retain:
        least = FADE * write
        log_retain = -(torch.hypot(log_retain, least) if rule.has_retain_gate else least)
    retain = log_retain.exp()
    if log_momentum is not None and most is not None:
        log_most = most.log() + log_retain if is_coasting(rule) else most.log()
        # A retain of 0 has no logarithm to compare with.
        log_momentum = log_momentum - _excess(log_momentum - log_most.clamp_min(LOG_NOTHING))
        momentum = log_momentum.exp()
    if steep is not None:
        if momentum is None or most is None:
            limit = OVERSHOOT / steep * (1 + retain)
        else:
            room = OVERSHOOT / steep * (1 - most)
            limit = torch.addcmul(torch.addcmul(room, room, retain), room / most, momentum, value=-2)
        # Rounding may leave a hair below 0 where momentum is at its own limit.
        share = write / limit.clamp_min(TINY)
        write = write / _excess(share.clamp_min(TINY).log()).exp()
    return Bounded(retain, write, momentum, log_retain, log_momentum)


def is_coasting(rule: Rule) -> bool:
    """The momentum goes on into the memory as it is."""
    return rule.update.name == "momentum"


def _excess(log_share: Tensor) -> Tensor:
    """The logarithm by which a value has to shrink that is so many times its limit: smooth, and never too little."""
    return functional.softplus(log_share, SHARPNESS, threshold=SOFT)
