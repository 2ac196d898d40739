"""The catalogue: every rule of the literature that this package knows, as three to ten lines of parts."""

from collections.abc import Callable

from meristem.memory.bias import dot, squared
from meristem.memory.retention import decay
from meristem.memory.rule import Rule
from meristem.memory.structure import matrix
from meristem.memory.update import momentum, plain
from meristem.plugins import Registry


def hebbian() -> Rule:
    """``M <- retain M + write v k^T``: gated linear attention (Katharopoulos 2006.16236; RetNet, GLA, Mamba2)."""
    return Rule(structure=matrix(), bias=dot(), retention=decay(), update=plain())


def delta() -> Rule:
    """``M <- retain M - write (M k - v) k^T``: the delta rule measured at the old memory (Schlag 2102.11174, eq.
    24)."""
    return Rule(structure=matrix(), bias=squared(), retention=decay(), update=plain())


def gated_delta() -> Rule:
    """``M <- retain M - write (retain M k - v) k^T``: decay first, then the delta rule (Gated DeltaNet 2412.06464,
    eq. 10)."""
    return Rule(structure=matrix(), bias=squared(), retention=decay(), update=plain(), probe="warm")


def titans() -> Rule:
    """``S <- momentum S - write (M k - v) k^T; M <- retain M + S``: linear memory (Titans 2501.00663, eqs. 9-14)."""
    return Rule(structure=matrix(), bias=squared(), retention=decay(), update=momentum())


rules: Registry[Callable[[], Rule]] = Registry(
    "memory", {"hebbian": hebbian, "delta": delta, "gated_delta": gated_delta, "titans": titans}
)


def named(name: str) -> Rule:
    """The rule registered under ``name``; an unknown name lists the nearest ones."""
    return rules.get(name)()
