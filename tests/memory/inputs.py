"""Random windows for memory tests, with sizes that are distinct primes where the structure allows."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from meristem.memory import Gates, Rule
from meristem.memory.value import Memory

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
    rule: Rule, n_time: int, *, batch: int = BATCH, dtype: torch.dtype = torch.float64, random_seed: int = 0
) -> Window:
    """Unit keys, gates inside the limits of stability, a memory that already holds something."""
    generator = torch.Generator().manual_seed(random_seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def gate(bias: float) -> Tensor:
        return (draw(batch, n_time, HEADS) + bias).sigmoid()

    momentum_bth = gate(0.0) if rule.update.has_momentum else None
    write_bth = gate(-1.0) if momentum_bth is None else gate(-1.0) * (1 - momentum_bth)
    empty = rule.init(batch, HEADS, KEY_WIDTH, VALUE_WIDTH, like=torch.empty(0, dtype=dtype))
    return Window(
        memory={name: 0.3 * draw(*tensor.shape) for name, tensor in empty.items()},
        keys_bthk=functional.normalize(draw(batch, n_time, HEADS, KEY_WIDTH), dim=-1),
        values_bthv=draw(batch, n_time, HEADS, VALUE_WIDTH),
        queries_bthk=functional.normalize(draw(batch, n_time, HEADS, KEY_WIDTH), dim=-1),
        gates=Gates(retain_bth=gate(2.0), write_bth=write_bth, momentum_bth=momentum_bth),
    )


def variants(rule: Rule) -> list[Rule]:
    """The rule with every order of reading and probing."""
    return [replace(rule, reads=reads, probe=probe) for reads in ("after", "before") for probe in ("cold", "warm")]
