"""All lives of a run, its locked slots, its penalties and what is still to be done, as one value (growth.md 6, 17).

A garden is saved with the run and rolled back with it: what a model holds and what is known of it are of one moment.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from meristem.growth.features import Normaliser
from meristem.growth.gates import GateResult
from meristem.growth.observe import HeldOut, Trial
from meristem.growth.risk import Latch
from meristem.growth.stage import Life, Stage, Way
from meristem.worker.breaker import Breaker

BACKOFF_MOST: Final = 16
"""A slot is locked at most so many times as long as at first."""

PENALTY: Final = 2.0
"""What a blueprint gets for a seed that was culled; it halves with every evaluation."""

BLOCKED: Final = 3.0
"""The penalty from which on a blueprint is not used: two culls with little between them."""

MOST_RESULTS: Final = 512
"""Gate results that are kept, the newest."""

ENDED: Final = frozenset({Stage.DORMANT, Stage.FOSSILIZED, Stage.TERMINATED})
"""Stages in which nothing more is done about a life that has begun."""


@dataclass(frozen=True)
class Embargo:
    """A slot that is locked: until which step, and how often seeds of it were culled."""

    until: int
    n_culls: int


@dataclass(frozen=True)
class Order:
    """A checked intent that waits for the next boundary.

    operation: of ``gardener.TARGETS``, or a deepening, which has no slot and no seed.
    seed: the number of the seed, also of one that is still to come.
    blueprint, settings, blend, way, random_seed, needs: of a germination. step: the boundary at which it was given.
    """

    operation: str
    slot: str
    seed: str
    run_id: str
    step: int
    why: str
    blueprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    blend: str = "residual"
    way: Way = "shadow"
    random_seed: int = 0
    needs: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` makes the same of them."""
        return vars(self) | {"settings": dict(self.settings), "needs": list(self.needs)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave."""
        return cls(**{**saved, "needs": tuple(saved.get("needs", ()))})


@dataclass(frozen=True)
class Garden:
    """What growth knows of a run at one moment.

    lives: every seed of the run, in the order of their birth, those that have ended too. embargoes: by slot.
    penalties: by blueprint. latch: whether the run is conservative. queue: orders for the next boundary. held_out:
    evaluations, the newest last. results: what the gates said, the newest last. flops: of all training so far.
    figures: by seed, what was measured of it at some stage and is needed at a later one. breaker: whether the policy is
    still asked; None before it was for the first time. deepened: steps at which the whole stack was made deeper.
    normaliser: of what a policy observes. is_stopped: no structure is changed any more, since something was not as it
    has to be.
    """

    lives: tuple[Life, ...] = ()
    embargoes: Mapping[str, Embargo] = field(default_factory=dict)
    penalties: Mapping[str, float] = field(default_factory=dict)
    latch: Latch = Latch()
    queue: tuple[Order, ...] = ()
    held_out: tuple[HeldOut, ...] = ()
    results: tuple[GateResult, ...] = ()
    flops: float = 0.0
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    breaker: Breaker | None = None
    deepened: tuple[int, ...] = ()
    normaliser: Normaliser = Normaliser()
    is_stopped: bool = False

    @property
    def probe_flops(self) -> float:
        """What was spent for growth alone."""
        return sum(each.get("flops_spent", 0.0) for each in self.figures.values())

    def open_in(self, slot: str) -> Life | None:
        """The life that is in a slot or was there last and has not ended; a slot has one at most."""
        return next((life for life in self.unfinished if life.slot == slot), None)

    @property
    def unfinished(self) -> tuple[Life, ...]:
        """Lives about which something is still to be done."""
        return tuple(life for life in self.lives if not (life.stage in ENDED and life.history))

    def with_life(self, life: Life) -> Self:
        """The garden in which the life is as given; a new one comes last."""
        if all(each.seed != life.seed for each in self.lives):
            return replace(self, lives=(*self.lives, life))
        return replace(self, lives=tuple(life if each.seed == life.seed else each for each in self.lives))

    def next_seed(self, slot: str) -> str:
        """The number of the next seed of this run, as ``blocks.1#3``."""
        return f"{slot}#{len(self.lives)}"

    def judged(self, result: GateResult) -> Self:
        """The garden that knows what a gate said."""
        return replace(self, results=(*self.results, result)[-MOST_RESULTS:])

    def violated(self, slots: Collection[str]) -> Self:
        """The garden after a host was not isolated from the seeds in these slots: nothing more is put in."""
        lives = [
            replace(life, n_violations=life.n_violations + (life.is_open and life.slot in slots)) for life in self.lives
        ]
        return replace(self, lives=tuple(lives), is_stopped=True)

    def noted(self, seed: str, **figures: Any) -> Self:
        """The garden that keeps some figures of a seed."""
        return replace(self, figures={**self.figures, seed: {**self.figures.get(seed, {}), **figures}})

    def spent(self, seed: str, flops: float) -> Self:
        """The garden that knows what was spent on a seed beside the steps of the run: passes of its own, comparisons
        on held-out text, recoveries."""
        return self.noted(seed, flops_spent=self.figures.get(seed, {}).get("flops_spent", 0.0) + flops)

    def culled(self, slot: str, blueprint: str, *, step: int, embargo_steps: int) -> Self:
        """The garden after a seed was culled: its slot is locked, twice as long as the last time, its blueprint
        has a penalty."""
        n_culls = 1 + (self.embargoes[slot].n_culls if slot in self.embargoes else 0)
        until = step + embargo_steps * min(2 ** (n_culls - 1), BACKOFF_MOST)
        penalty = self.penalties.get(blueprint, 0.0) + PENALTY
        return replace(
            self,
            embargoes={**self.embargoes, slot: Embargo(until, n_culls)},
            penalties={**self.penalties, blueprint: penalty},
        )

    def evaluated(self, found: HeldOut) -> Self:
        """The garden after an evaluation: penalties have halved."""
        penalties = {name: value / 2 for name, value in self.penalties.items()}
        return replace(self, held_out=(*self.held_out, found), penalties=penalties)

    def is_locked(self, slot: str, step: int) -> bool:
        """Whether the slot may not be used yet."""
        return slot in self.embargoes and step < self.embargoes[slot].until

    @property
    def blocked(self) -> frozenset[str]:
        """Blueprints that are not used for now."""
        return frozenset(name for name, value in self.penalties.items() if value >= BLOCKED)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """What became of every seed, as policies see it."""
        found = []
        for life in self.lives:
            figures = self.figures.get(life.seed, {})
            gained = figures.get("gained") or figures.get("tried")
            ends = [each.step for each in life.history if each.after is Stage.CULLED]
            found.append(
                Trial(
                    slot=life.slot,
                    blueprint=life.origin.blueprint,
                    born=life.born,
                    ended=ends[0] if ends else None,
                    is_kept=life.stage is Stage.FOSSILIZED,
                    gain_nats=gained["mean"] if gained else None,
                    flops_ratio=figures.get("flops_share"),
                )
            )
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` makes the same of them."""
        return {
            "lives": [life.to_json() for life in self.lives],
            "embargoes": {slot: vars(each) for slot, each in self.embargoes.items()},
            "penalties": dict(self.penalties),
            "latch": self.latch.to_json(),
            "queue": [order.to_json() for order in self.queue],
            "held_out": [list(each) for each in self.held_out],
            "results": [each.to_json() for each in self.results],
            "flops": self.flops,
            "figures": {seed: dict(each) for seed, each in self.figures.items()},
            "breaker": self.breaker and self.breaker.to_json(),
            "deepened": list(self.deepened),
            "normaliser": self.normaliser.to_json(),
            "is_stopped": self.is_stopped,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave; what is absent is as in a garden that begins."""
        return cls(
            lives=tuple(Life.from_json(each) for each in saved.get("lives", ())),
            embargoes={slot: Embargo(**each) for slot, each in saved.get("embargoes", {}).items()},
            penalties=dict(saved.get("penalties", {})),
            latch=Latch.from_json(saved["latch"]) if "latch" in saved else Latch(),
            queue=tuple(Order.from_json(each) for each in saved.get("queue", ())),
            held_out=tuple(HeldOut(*each) for each in saved.get("held_out", ())),
            results=tuple(GateResult.from_json(each) for each in saved.get("results", ())),
            flops=saved.get("flops", 0.0),
            figures={seed: dict(each) for seed, each in saved.get("figures", {}).items()},
            breaker=Breaker.from_json(saved["breaker"]) if saved.get("breaker") else None,
            deepened=tuple(saved.get("deepened", ())),
            normaliser=Normaliser.from_json(saved["normaliser"]) if "normaliser" in saved else Normaliser(),
            is_stopped=saved.get("is_stopped", False),
        )
