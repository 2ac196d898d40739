"""Random windows for memory tests, with sizes that are distinct primes where the structure allows."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from meristem.memory import Gates, Rule
from meristem.memory import named as catalogue
from meristem.memory.check import conflicts
from meristem.memory.state import Memory

BATCH, HEADS, KEY_WIDTH, VALUE_WIDTH = 2, 3, 5, 7


@dataclass(frozen=True)
class Window:
    """One window of a rule: everything a form takes."""

    memory: Memory
    keys_bthk: Tensor
    values_bthv: Tensor
    queries_bthk: Tensor
    gates: Gates

    def arguments(self) -> tuple[Memory, Tensor, Tensor, Tensor, Gates]:
        return self.memory, self.keys_bthk, self.values_bthv, self.queries_bthk, self.gates

    def cut(self, start: int, stop: int, memory: Memory | None = None) -> "Window":
        """The tokens from ``start`` to ``stop``, read by ``memory``."""
        gates = Gates(**{name: None if x is None else x[:, start:stop] for name, x in vars(self.gates).items()})
        return Window(
            memory=self.memory if memory is None else memory,
            keys_bthk=self.keys_bthk[:, start:stop],
            values_bthv=self.values_bthv[:, start:stop],
            queries_bthk=self.queries_bthk[:, start:stop],
            gates=gates,
        )

    def leaves(self) -> dict[str, Tensor]:
        gates = {name: x for name, x in vars(self.gates).items() if x is not None}
        rest = {"keys": self.keys_bthk, "values": self.values_bthv, "queries": self.queries_bthk}
        return self.memory | gates | rest

    def tracked(self) -> "Window":
        """The same values as fresh leaves that gather gradients."""
        fresh = {name: x.detach().clone().requires_grad_() for name, x in self.leaves().items()}
        return Window(
            memory={name: fresh[name] for name in self.memory},
            keys_bthk=fresh["keys"],
            values_bthv=fresh["values"],
            queries_bthk=fresh["queries"],
            gates=Gates(**{name: fresh.get(name) for name in vars(self.gates)}),
        )


def window(
    rule: Rule,
    n_time: int,
    *,
    batch: int = BATCH,
    heads: int = HEADS,
    widths: tuple[int, int] = (KEY_WIDTH, VALUE_WIDTH),
    dtype: torch.dtype = torch.float64,
    random_seed: int = 0,
) -> Window:
    """Unit keys, gates inside the limits of stability, a memory that already holds something."""
    key_width, value_width = widths
    generator = torch.Generator().manual_seed(random_seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def gate(bias: float) -> Tensor:
        return (draw(batch, n_time, heads) + bias).sigmoid()

    momentum_bth = gate(0.0) if rule.update.has_momentum else None
    write_bth = gate(-1.0) if momentum_bth is None else gate(-1.0) * (1 - momentum_bth)
    n_codes = rule.structure.n_codes
    key_width = value_width if rule.structure.kind == "slots" else key_width
    gates = Gates(
        retain_bth=gate(2.0),
        write_bth=write_bth,
        momentum_bth=momentum_bth,
        threshold_bth=gate(0.0) * 2 if rule.bias.has_threshold else None,
        weight_bth=gate(1.0) if rule.span > 1 else None,
        code_bthg=0.5 * draw(batch, n_time, heads, n_codes) if n_codes else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(random_seed)
        empty = rule.init(batch, heads, key_width, value_width, like=torch.empty(0, dtype=dtype))
    memory = {name: _held(rule, name, value, draw) for name, value in empty.items()}
    return Window(
        memory=memory,
        keys_bthk=functional.normalize(draw(batch, n_time, heads, key_width), dim=-1),
        values_bthv=draw(batch, n_time, heads, value_width),
        queries_bthk=functional.normalize(draw(batch, n_time, heads, key_width), dim=-1),
        gates=gates,
    )


def _held(rule: Rule, name: str, empty: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """What a memory may hold after a while, different in every row of the batch."""
    if name in rule.structure.weights:
        return rule.retention.settle(empty + 0.2 * draw(*empty.shape))
    if name == "anchor_age_b":
        return empty
    return empty + 0.3 * draw(*empty.shape) if "weights" not in name else draw(*empty.shape).sigmoid()


def named(text: str) -> Rule:
    """The rule of that name, for values as they are given: what its layer hands on where it mixes them first."""
    return replace(catalogue(text), values="given")


def variants(rule: Rule) -> list[Rule]:
    """The rule with every order of reading and probing that its parts allow."""
    orders = [(reads, probe) for reads in ("after", "before") for probe in ("cold", "warm")]
    ordered = [replace(rule, reads=reads, probe=probe) for reads, probe in orders]
    return [variant for variant in ordered if not conflicts(variant)]
