"""Training that grows: seeds are put where they are wanted, tried, blended in, and kept or removed (growth.md 17)."""

import json
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from meristem.checkpoint.store import Checkpoint
from meristem.data.stream import Batch, held_out
from meristem.device.random import GlobalGenerators, global_generators, random_state, restore_random_state
from meristem.device.room import room_for
from meristem.distributed.engine import Engine
from meristem.errors import CapabilityError, WrongValue
from meristem.evaluate.likelihood import Likelihood
from meristem.events import Emit, Event
from meristem.growth.attach import attach, slots_in
from meristem.growth.garden import Garden, Order
from meristem.growth.gardener import act_on, tend
from meristem.growth.gates import GateResult
from meristem.growth.graft import advance, cost, seeds_in, set_blend
from meristem.growth.isolation import Isolation, Pair, ShadowPass, check_isolation, enter
from meristem.growth.measure import n_host_parameters, structure_digest
from meristem.growth.observe import HeldOut, Reading, SlotReading
from meristem.growth.plan import Plan
from meristem.growth.policy import (
    Decision,
    Mask,
    Policy,
    breaker_of,
    budget_ms,
    decide,
    open_policy,
    policies,
)
from meristem.growth.proposal import DEEPENINGS
from meristem.growth.report import FILE, GrowthReport, append
from meristem.growth.schedule import BUDGET_SHARE, LOSS_BLIND, N_DEEPENINGS
from meristem.growth.score import slot_scores
from meristem.growth.stage import Stage
from meristem.growth.surgery import carry_state
from meristem.growth.together import made_in_all
from meristem.growth.topology import topology
from meristem.growth.transaction import Receipt, transaction
from meristem.memory.state import State
from meristem.models.build import build
from meristem.models.growing import GrowConfig, GrowPolicyConfig
from meristem.models.topology import Topology, recorded
from meristem.optim.groups import build as build_optimizer
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import SeedSettings
from meristem.optim.schedule import rate_factor
from meristem.optim.surgery import carried
from meristem.recipes.plan.flops import forward_flops
from meristem.recipes.plan.report import PlanReport
from meristem.recipes.pretrain import PASSES, Result, begun, finish, measure, prepare_job, stop, train
from meristem.runs.config import Config
from meristem.runs.directory import Run
from meristem.runs.recovery import Recovery
from meristem.runs.resume import Job
from meristem.runs.structure import engine_of, is_current
from meristem.sinks.console import Console
from meristem.train.backward import read_again
from meristem.train.loop import Step, steps
from meristem.train.loss import cross_entropy
from meristem.train.state import Held, TrainingState
from meristem.worker.breaker import Breaker

MOST_VIOLATIONS: Final = 3
"""How often a host may be found not to be isolated from a seed before that is taken out."""

SCORED_RANK: Final = 4
"""The rank of the additions by which slots are compared."""

CHECKED: Final = 4
"""Passes over the probe batch by which a change of structure is verified: what the model says before and after it, and
two that see whether it is causal."""

ISOLATED: Final = 3
"""Training steps' worth of passes that a check of the isolation makes: twice without the seeds, and once of theirs."""

NOBODY: Final = GrowPolicyConfig(name="never")
"""The policy of the processes that do not decide."""

PROBE_ROWS: Final = 4
"""Held-out sequences that gradients and changes of logits are measured on."""


def grow(
    config: Config,
    *,
    run_dir: Path | None = None,
    resume: str = "auto",
    view: Console | None = None,
    planned: PlanReport | None = None,
    time_scale: float = 1.0,
) -> Result:
    """Train a language model as ``config`` says, and let it grow as ``config.grow`` says.

    The arguments are those of ``pretrain``. Raises WrongValue for a policy or a blueprint that is none, a pattern of
    slots that matches nothing, and caps that leave no room for a single seed; nothing is trained then.
    """
    with begun(
        config, run_dir=run_dir, resume=resume, view=view, planned=planned, make_job=prepare, time_scale=time_scale
    ) as (run, job, recovery):
        # The first process decides for all.
        with open_policy(config.grow.policy if run.world.is_first else NOBODY, emit=run.emit) as policy:
            is_interrupted = train(run, job, recovery, Growth(run, job, recovery, policy))
        return stop(run, job, recovery) if is_interrupted else finish(run, job, recovery)


def prepare(run: Run, config: Config, checkpoint: Checkpoint | None) -> Job:
    """The job of a run that trains, of a model with slots."""
    part = config.grow.policy
    policies.get(part.name)(part.settings)
    if run.world.size > 1 and config.distributed.shard:
        raise CapabilityError(
            f"grow.enabled and distributed.shard are true in {run.world.size} processes: a change of structure needs "
            f"every parameter whole. Set distributed.shard=false, or grow.enabled=false.",
            operation="grow",
            reason="sharded parameters",
        )
    return prepare_job(run, config, checkpoint, with_slots)


def with_slots(config: Config, vocabulary: int, before: Topology) -> Topology:
    """The changes of a model that has a slot in every module that ``grow.slots`` names."""
    part = config.grow
    make = partial(build, config.model, config.memory, vocabulary, config.run.seed)
    with torch.device("meta"):
        model, wanted = make(before), slots_in(attach(make(), part.slots, reads=part.reads))
    # Blocks that came later moved the slots of those above them: a model that has been changed keeps what it has.
    missing = [name for name in wanted if name not in slots_in(model) and not (recorded(model) and slots_in(model))]
    if missing:
        attach(model, missing, reads=part.reads)
    _require_room(model, part)
    return topology(model)


def _require_room(model: nn.Module, part: GrowConfig) -> None:
    """Raise WrongValue unless the smallest seed that the policy may put in stays within the caps.

    Which these are its settings say, as ours name them; of a policy that names none nothing is known, and one that
    makes the whole stack deeper puts in none.
    """
    said = part.policy.settings
    if said.get("operation", "germinate") in DEEPENINGS:
        return
    given = said.get("blueprints") or {said.get("blueprint", "bottleneck"): said.get("settings", {})}
    n_host = sum(each.numel() for each in model.parameters())
    sizes = {
        (cost(name, slot.widths, **settings).n_parameters, name, place)
        for place, slot in slots_in(model).items()
        for name, settings in given.items()
    }
    n_seed, name, place = min(sizes)
    if n_host + n_seed > part.params_ratio * n_host:
        raise WrongValue(
            f"the smallest seed, '{name}' in '{place}', has {n_seed:,} parameters, and grow.params_ratio="
            f"{part.params_ratio:g} leaves {int((part.params_ratio - 1) * n_host):,} beside the {n_host:,} of the "
            f"model. Raise it, or make the seed smaller by grow.policy.settings.",
            value=part.params_ratio,
        )


class Growth:
    """The companion of a training that grows it: orders before a step, a reading of the run after it.

    It holds nothing that a run depends on: that is in ``job.state.garden``. Of several processes the first gives orders
    and judges, and all carry them out.
    """

    def __init__(self, run: Run, job: Job, recovery: Recovery, policy: Policy) -> None:
        self._run, self._job, self._config, self._policy = run, job, job.config.grow, policy
        self._site = RunSite(run, job, recovery)
        self._read = partial(read_again, device=job.device, by=job.config.aggregate)
        self._told: list[Pair | Isolation] = []
        self._shadow: ShadowPass | None = None
        self._wanted: object = None
        if job.state.garden is None:
            self._garden = Garden()

    @property
    def _garden(self) -> Garden:
        garden = self._job.state.garden
        return garden if isinstance(garden, Garden) else Garden()

    @_garden.setter
    def _garden(self, garden: Garden) -> None:
        self._job.state = replace(self._job.state, garden=garden)

    @property
    def flops_per_token(self) -> float:
        return self._site.flops_per_token

    def before(self) -> None:
        """Carry out the orders that wait; a host that is frozen is so after a resume too."""
        garden, self._told = self._garden, []
        for life in garden.lives:
            if life.way == "frozen_host" and life.stage is Stage.TRAINING:
                enter(self._job.model, life.slot, life.way)
        if garden.queue:
            step = self._job.state.progress.step
            site = self._site
            garden = act_on(garden, site, self._config, run_id=site.run_id, step=step, emit=self._emit)
            self._garden = self._of_first(lambda: garden)
            self._run.world.require_same({"what has grown": lambda: structure_digest(site.model)})
        self._site.follow()
        self._watch()

    def _watch(self) -> None:
        """Prepare the passes of the seeds that learn in shadow, or put an end to them."""
        slots = [life.slot for life in self._garden.lives if life.way == "shadow" and life.stage is Stage.TRAINING]
        if slots or self._shadow is not None:
            shadow = ShadowPass(self._read, slots, self._told.append, every=self._config.shadow_every, emit=self._emit)
            shadow.watch(self._job.state)
            self._shadow = shadow if slots else None

    def _of_first(self, make: Callable[[], Garden]) -> Garden:
        """The garden that the first process makes, in all of them, and what it has spent by then."""
        world = self._run.world
        if world.size == 1:
            return make()
        text = world.broadcast("garden", json.dumps(make().to_json()) if world.is_first else "")
        state = self._job.state
        flops = world.broadcast_number(state.progress.flops)
        self._job.state = replace(state, progress=replace(state.progress, flops=flops))
        return Garden.from_json(json.loads(text))

    def beside(
        self,
        state: TrainingState,
        batches: list[Batch],
        memory: State | None,
        loss: Tensor,
        generators: GlobalGenerators,
    ) -> None:
        """Let the seeds on trial learn from a pass of their own."""
        if self._shadow is not None:
            self._shadow(state, batches, memory, loss, generators)

    def _heed(self, garden: Garden, step: int) -> Garden:
        """The garden that knows what the passes of this step told."""
        for told in self._told:
            if isinstance(told, Isolation):
                self._site.spend(ISOLATED * self._site.step_flops)
                is_violated = self._run.world.any(told.is_isolated is False)
                garden = garden.violated(told.slots) if is_violated else garden
                continue
            self._site.spend(self._site.step_flops)
            life = garden.open_in(told.slot)
            difference = told.difference()
            if life is not None and math.isfinite(difference):
                garden = garden.with_life(replace(life, paired=life.paired.add(difference)))
                garden = garden.spent(life.seed, self._site.step_flops)
        bad = [life for life in garden.lives if life.is_open and life.n_violations >= MOST_VIOLATIONS]
        orders = [
            Order("cull", life.slot, life.seed, self._site.run_id, step, "its host was not isolated from it")
            for life in bad
        ]
        return replace(garden, queue=(*garden.queue, *orders))

    def after(self, step: Step) -> None:
        """Take blend weights one step further; at a boundary, read the run and give orders."""
        weights = advance(self._job.model)
        garden, now = self._garden, step.progress
        flops = 3 * self._site.flops_per_token * step.n_targets
        self._garden = garden = self._heed(replace(garden, flops=garden.flops + flops), now.step)
        if now.step % self._config.boundary_every:
            return
        for slot, weight in weights.items():
            self._run.emit(Event("blend.reported", {"step": now.step, "slot": slot, "weight": weight}))
        self._garden = self._of_first(partial(self._tended, garden, step))

    def _tended(self, garden: Garden, step: Step) -> Garden:
        return tend(
            garden,
            self._site.reading(garden, step),
            self._config,
            ask=self._ask,
            slots=self._site.slots(),
            free_parameters=self._site.free_parameters,
            emit=self._emit,
        )

    def _ask(self, reading: Reading, mask: Mask, breaker: Breaker | None) -> Decision:
        part = self._config.policy
        return decide(
            self._policy,
            reading,
            mask,
            budget_ms=budget_ms(part),
            breaker=breaker or breaker_of(part),
            score=self._site.scores,
            emit=self._emit,
        )

    def evaluated(self, found: Likelihood) -> None:
        """Hear what held-out text costs. Where that decides what is grown, the growth has to pay for it."""
        if self._config.policy.name.casefold() not in LOSS_BLIND:
            self._site.spend(self._site.evaluation_flops)
        now, garden = self._job.state.progress, self._garden
        self._garden = garden.evaluated(HeldOut(now.step, now.tokens, garden.flops + garden.probe_flops, found.nats))

    def _emit(self, event: Event) -> None:
        """Record what happens to a seed, and show it; that a policy is in want of the same thing again, once."""
        wanted = event.payload.get("why") if event.name == "policy.no_candidates" else None
        if wanted and wanted == self._wanted:
            return
        self._wanted = wanted or self._wanted
        self._run.emit(event)
        if event.name in TOLD:
            self._run.view.note(TOLD[event.name](event.payload))


def _stage_words(payload: Any) -> str:
    return f"step {payload['step']}: {payload['seed']} is {payload['to']}: {payload['reason']}"


def _gate_words(payload: Any) -> str:
    failed = [check for check in payload["checks"] if check["status"] != "pass"]
    values = ["not measured" if check["value"] is None else f"{check['value']:.4g}" for check in failed]
    words = ", ".join(
        f"{check['name']} {value}, asked {check['threshold']}" for check, value in zip(failed, values, strict=True)
    )
    return f"step {payload['step']}: {payload['seed']} does not pass {payload['gate']}: {words}"


TOLD: Final[dict[str, Callable[[Any], str]]] = {
    "slot.stage_changed": _stage_words,
    "gate.failed": _gate_words,
}
"""Events that a person sees as a line, and how they are said."""


class RunSite:
    """The run as the acts of the gardener see it (``growth.acts.Site``)."""

    def __init__(self, run: Run, job: Job, recovery: Recovery) -> None:
        self._run, self._job, self._recovery = run, job, recovery
        self._flops: dict[str, float] = {}
        self.run_id = run.world.broadcast("run id", str(run.manifest.content["id"]))

    @property
    def model(self) -> nn.Module:
        return self._job.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._job.optimizer

    @property
    def tokens(self) -> int:
        return self._job.state.progress.tokens

    @property
    def quiet_steps(self) -> int:
        """Steps since the guard spoke, or all of them."""
        emergency = self._recovery.safety.emergency
        return emergency.n_quiet if emergency.level else self._job.state.progress.step

    @property
    def losses(self) -> Sequence[float]:
        return self._recovery.safety.guard.losses

    @property
    def flops_per_token(self) -> float:
        """Forward, counted once for each structure, and for each choice of seeds that are switched on."""
        key = repr((self._job.state.topology, [seed.is_live for seed in seeds_in(self.model).values()]))
        if key not in self._flops:
            self._flops[key] = forward_flops(self.model, self._job.device, self._job.config.data.seq_len)
        return self._flops[key]

    def spend(self, flops: float) -> None:
        """Take what was computed beside the training off the budget, where that is one of operations."""
        if self._job.config.train.flops is not None:
            state = self._job.state
            self._job.state = replace(state, progress=state.progress.spent(flops))

    def _spend_probe(self, n_passes: int) -> None:
        """So many forward passes over the probe batch."""
        self.spend(n_passes * self.flops_per_token * self._probe.n_targets)

    @property
    def free_parameters(self) -> int:
        """How many a seed may have for the model to stay within its cap."""
        n_all = sum(each.numel() for each in self.model.parameters())
        return int(self._job.config.grow.params_ratio * n_host_parameters(self.model)) - n_all

    @property
    def step_flops(self) -> float:
        data, train = self._job.config.data, self._job.config.train
        return 3 * self.flops_per_token * data.batch_size * data.seq_len * train.grad_accum_steps

    @property
    def measure_flops(self) -> float:
        return self.flops_per_token * sum(batch.n_targets for batch in self._held_out)

    @property
    def evaluation_flops(self) -> float:
        config = self._job.config
        return self.flops_per_token * config.eval.n_windows * config.data.seq_len

    def slots(self) -> Collection[str]:
        return slots_in(self.model).keys()

    def scores(self, slots: Collection[str]) -> dict[str, float | None]:
        """How much a seed would help in each of these empty slots, from a few held-out sequences."""
        places = slots_in(self.model)
        wide = [name for name in places if name in slots and min(places[name].widths) >= SCORED_RANK]
        found = slot_scores(self.model, [None], lambda model, _: self.loss(model), wide, SCORED_RANK)
        return {name: each.score for name, each in found.items()}

    def reading(self, garden: Garden, step: Step) -> Reading:
        """What is known of the run now."""
        own = {
            BUDGET_SHARE: step.progress.share(self._job.config.train),
            N_DEEPENINGS: float(len(garden.deepened)),
            "isolation_violations": float(sum(life.n_violations for life in garden.lives if life.is_open)),
            "open_breakers": float(garden.breaker is not None and garden.breaker.state(step.progress.step) == "open"),
        }
        now, seeds = self._job.state.progress, seeds_in(self.model)
        slots = []
        for name in self.slots():
            life, embargo = garden.open_in(name), garden.embargoes.get(name)
            slots.append(
                SlotReading(
                    slot=name,
                    stage=life.stage if life else Stage.DORMANT,
                    seed=life.seed if life else None,
                    blueprint=seeds[name].origin.blueprint if name in seeds else None,
                    blend_weight=seeds[name].way.weight if name in seeds else 0.0,
                    age_steps=now.step - life.born if life else 0,
                    embargo_until=embargo.until if embargo else None,
                )
            )
        return Reading(
            run_id=self.run_id,
            step=now.step,
            tokens=now.tokens,
            flops=garden.flops + garden.probe_flops,
            training_loss_nats=step.loss_nats,
            held_out=garden.held_out,
            slots=tuple(slots),
            metrics=own,
            trials=garden.trials,
        )

    @cached_property
    def _held_out(self) -> list[Batch]:
        config = self._job.config
        return [
            *held_out(
                self._job.corpus,
                "val",
                window=config.data.seq_len,
                batch=config.eval.batch_size,
                max_windows=config.grow.gates.pairs,
            )
        ]

    @cached_property
    def _probe(self) -> Batch:
        first = self._held_out[0]
        return first.take_rows(0, min(PROBE_ROWS, len(first.tokens_bt)))

    def _reading(self) -> AbstractContextManager[Any]:
        return self._job.engine.whole()

    def _read(self, model: nn.Module, tokens_bt: Tensor) -> Tensor:
        device = self._job.device
        (moved_bt,) = device.move(tokens_bt)
        with device.autocast():
            logits_bto: Tensor = model(moved_bt, None)[0]
        return logits_bto

    @torch.no_grad()
    def measure(self, model: nn.Module) -> list[float]:
        """Each process reads its share of the batches, in full, so that a number is the same whoever reads it."""
        world, found, readers = self._run.world, [], []
        self.spend(self.measure_flops)
        with room_for("a comparison on held-out text", self._job.device.device), self._reading():
            for number, batch in enumerate(self._held_out):
                reader = number % world.size
                readers += [reader] * len(batch.tokens_bt)
                found += self._costs(model, batch) if reader == world.rank else [0.0] * len(batch.tokens_bt)
        every = world.all_gather_numbers(found)
        return [every[reader][index] for index, reader in enumerate(readers)]

    def _costs(self, model: nn.Module, batch: Batch) -> list[float]:
        """Nats per target of each row."""
        logits_bto = self._read(model, batch.tokens_bt)
        (targets_bt,) = self._job.device.move(batch.targets_bt)
        rows = zip(logits_bto, targets_bt, strict=True)
        return [float(cross_entropy(row[None], targets[None])) / targets.numel() for row, targets in rows]

    def loss(self, model: nn.Module) -> Tensor:
        self._spend_probe(PASSES)
        (targets_bt,) = self._job.device.move(self._probe.targets_bt)
        return cross_entropy(self._read(model, self._probe.tokens_bt), targets_bt) / targets_bt.numel()

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        self._spend_probe(1)
        return self._read(model, self._probe.tokens_bt)

    def evaluate(self) -> float | None:
        job, garden = self._job, self._job.state.garden
        if isinstance(garden, Garden) and garden.held_out and garden.held_out[-1][0] == job.state.progress.step:
            return garden.held_out[-1][3]
        found = measure(self._run, job, job.config.eval.n_windows, task="growth")
        self.spend(self.evaluation_flops)
        return float(found.nats)

    def keep(self) -> bool:
        if self._run.world.any(self._recovery.snapshot("growth") is None):
            self._recovery.save(reason="growth", metrics={})
            self._recovery.wait()
        return True

    def change(self, plan: Plan) -> None:
        self._spend_probe(CHECKED)
        state, world = self._job.state, self._run.world
        make = partial(self._transaction, plan)
        receipt = make(self._run.emit) if world.size == 1 else made_in_all(world.agreement, plan, make, self._run.emit)
        optimizer, part = cast(MultiPeriodOptimizer, receipt.optimizer), self._job.config.grow
        joining = SeedSettings(part.rate_scale, part.seed_warmup, since=optimizer.clock.count)
        optimizer.settings |= dict.fromkeys(optimizer.settings.keys() - state.optimizer.settings.keys(), joining)
        optimizer.joined |= dict.fromkeys(optimizer.joined.keys() - state.optimizer.joined.keys(), joining)
        progress = state.progress
        if progress.memory is not None:
            progress = replace(progress, memory=carry_state(plan, progress.memory))
        self._job.state = replace(
            state,
            model=receipt.model,
            optimizer=optimizer,
            engine=self._engine(receipt.model),
            progress=progress,
            topology=receipt.topology,
        )

    def _transaction(self, plan: Plan, emit: Emit) -> Receipt:
        """The change in this process."""
        state, config = self._job.state, self._job.config
        (probe_bt,) = self._job.device.move(self._probe.tokens_bt)
        with self._job.device.autocast():
            return transaction(
                state.model,
                state.optimizer,
                plan,
                probe_bt,
                rebuild=lambda model: build_optimizer(model, config.optim),
                emit=emit,
            )

    def _engine(self, model: nn.Module) -> Engine:
        return engine_of(model, self._run.world, self._job.config, self._job.device)

    def follow(self) -> None:
        """Have the engine sum the gradients of what learns now."""
        state = self._job.state
        if not is_current(state.engine, state.model):
            self._job.state = replace(state, engine=self._engine(state.model))

    def agreed(self, result: GateResult) -> GateResult:
        text = self._run.world.broadcast("verdict", json.dumps(result.to_json()))
        return GateResult.from_json(json.loads(text))

    def is_isolated(self, slot: str) -> bool | None:
        """In no process a difference, and none that could not measure it."""
        found = self._isolation(slot)
        order = (False, None, True)
        return order[min(int(each) for (each,) in self._run.world.all_gather_numbers([order.index(found)]))]

    def _isolation(self, slot: str) -> bool | None:
        device = self._job.device
        self._spend_probe(ISOLATED * PASSES)
        found = check_isolation(
            self._job.state,
            [self._probe],
            None,
            global_generators(device.device),
            read=partial(read_again, device=device, by=self._job.config.aggregate),
            slots=[slot],
            emit=self._run.emit,
        )
        return found.is_isolated

    def recover(self, slot: str, n_steps: int) -> tuple[float | None, bool]:
        if not self._has_room(n_steps):
            return None, False
        values, tensors = random_state(self._job.device.device)
        self.spend(2 * n_steps * self.step_flops)
        losses = []
        for weight in (0.0, seeds_in(self.model)[slot].way.weight):
            model = self._trained_copy(slot, weight, n_steps)
            losses.append(self.measure(model))
            restore_random_state(values, tensors, self._run.emit, device=self._job.device.device)
        alone, live = (sum(each) / len(each) for each in losses)
        return alone - live, True

    def _trained_copy(self, slot: str, weight: float, n_steps: int) -> nn.Module:
        """A copy of the model with the seed of a slot at a weight, after some steps on the text that comes next."""
        job, state = self._job, self._job.state
        model = deepcopy(state.model)
        names = {name: name for name, each in model.named_parameters() if each.requires_grad}
        optimizer = carried(state.optimizer, old=state.model, model=model, names=names, config=job.config.optim)
        set_blend(model, slot, weight)
        held = Held(TrainingState(model, optimizer, self._engine(model), state.progress))
        schedule = partial(rate_factor, job.config.schedule)
        trained = steps(
            held, job.stream, schedule, config=job.config.train, device=job.device, aggregate=job.config.aggregate
        )
        for _ in islice(trained, n_steps):
            pass
        return model

    def _has_room(self, n_steps: int) -> bool:
        """Whether the run has so many steps before it."""
        now, limits = self._job.state.progress, self._job.config.train
        each = max(now.step, 1)
        left = (
            (now.step, limits.steps, 1.0),
            (now.tokens, limits.tokens, now.tokens / each),
            (now.flops, limits.flops, self.step_flops),
            (now.seconds_used, limits.max_time, now.seconds_used / each),
        )
        return all(limit is None or used + n_steps * of_step <= limit for used, limit, of_step in left)

    def report(self, report: GrowthReport) -> None:
        report = replace(report, run_id=self.run_id).issued(datetime.now(UTC))
        if self._run.world.is_first:
            append(self._run.directory / FILE, report)
        self._run.emit(Event("growth.reported", report.to_json()))
