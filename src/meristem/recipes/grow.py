"""Training that grows: seeds are put where they are wanted, tried, blended in, and kept or removed (growth.md 17)."""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self, cast

import torch
from torch import Tensor, nn

from meristem.checkpoint.side_file import SideFile
from meristem.checkpoint.store import Checkpoint
from meristem.data.stream import Batch, held_out
from meristem.device.random import GlobalGenerators, global_generators, random_state, restore_random_state
from meristem.device.room import room_for
from meristem.distributed.engine import alone
from meristem.errors import CapabilityError, WrongValue
from meristem.evaluate.likelihood import Likelihood
from meristem.events import Event
from meristem.growth.attach import attach, slots_in
from meristem.growth.certifier import Certifier
from meristem.growth.certify import Certificate
from meristem.growth.features import Normaliser
from meristem.growth.garden import Garden, Order
from meristem.growth.gardener import act_on, tend
from meristem.growth.graft import advance, cost, seeds_in, set_blend
from meristem.growth.heuristic import REQUESTED
from meristem.growth.isolation import Isolation, Pair, ShadowPass, check_isolation, enter
from meristem.growth.measure import blend_report, n_host_parameters
from meristem.growth.observe import HeldOut, Reading, SlotReading
from meristem.growth.plan import Plan
from meristem.growth.policy import (
    Decision,
    Mask,
    Policy,
    breaker_of,
    budget_ms,
    decide,
    observes_of,
    open_policy,
    policies,
)
from meristem.growth.report import FILE, GrowthReport, append
from meristem.growth.request import pending
from meristem.growth.schedule import BUDGET_SHARE
from meristem.growth.score import slot_scores
from meristem.growth.stage import Stage
from meristem.growth.surgery import carry_state
from meristem.growth.topology import topology
from meristem.growth.transaction import transaction
from meristem.memory.state import State
from meristem.models.build import build
from meristem.models.growing import GrowConfig
from meristem.models.topology import Topology
from meristem.optim.groups import build as build_optimizer
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import SeedSettings
from meristem.optim.schedule import rate_factor
from meristem.optim.surgery import carried
from meristem.recipes.plan.flops import counted
from meristem.recipes.plan.report import PlanReport
from meristem.recipes.pretrain import Result, begun, finish, measure, prepare_job, stop, train
from meristem.runs.config import Config
from meristem.runs.directory import Run
from meristem.runs.recovery import Recovery
from meristem.runs.resume import Job
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
        with open_policy(config.grow.policy, emit=run.emit) as policy:
            with Growth(run, job, recovery, policy) as growth:
                is_interrupted = train(run, job, recovery, growth)
        return stop(run, job, recovery) if is_interrupted else finish(run, job, recovery)


def prepare(run: Run, config: Config, checkpoint: Checkpoint | None) -> Job:
    """The job of a run that trains, of a model with slots."""
    part = config.grow.policy
    policies.get(part.name)(part.settings)
    if run.world.size > 1:
        raise CapabilityError(
            f"grow.enabled is true in {run.world.size} processes, and a seed that is switched off has no gradients for "
            f"them to sum. Train in one process, or set grow.enabled=false.",
            operation="grow",
            reason="several processes",
        )
    return prepare_job(run, config, checkpoint, with_slots)


def with_slots(config: Config, vocabulary: int, before: Topology) -> Topology:
    """The changes of a model that has a slot in every module that ``grow.slots`` names."""
    part = config.grow
    make = partial(build, config.model, config.memory, vocabulary, config.run.seed)
    with torch.device("meta"):
        model, wanted = make(before), slots_in(attach(make(), part.slots, reads=part.reads))
    missing = [name for name in wanted if name not in slots_in(model)]
    if missing:
        attach(model, missing, reads=part.reads)
    _require_room(model, part)
    return topology(model)


def _require_room(model: nn.Module, part: GrowConfig) -> None:
    """Raise WrongValue unless the smallest seed that the policy may put in stays within the caps.

    Which these are its settings say, as ours name them; of a policy that names none nothing is known.
    """
    said = part.policy.settings
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

    It holds nothing that a run depends on: that is in ``job.state.garden``.
    """

    def __init__(self, run: Run, job: Job, recovery: Recovery, policy: Policy) -> None:
        self._run, self._job, self._config, self._policy = run, job, job.config.grow, policy
        self._site = RunSite(run, job, recovery)
        self._read = partial(read_again, device=job.device, by=job.config.aggregate)
        self._told: list[Pair | Isolation] = []
        self._wanted: object = None
        part = self._config.policy
        self._observes, self._kept = observes_of(policy), None
        if part.normaliser and self._observes:
            self._kept = SideFile(Path(part.normaliser), "normaliser_flush_failed", part.normaliser_every)
        if job.state.garden is None:
            before = self._kept and self._kept.read()
            self._garden = Garden(normaliser=Normaliser.from_json(before)) if before else Garden()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._site.close()

    @property
    def _garden(self) -> Garden:
        garden = self._job.state.garden
        return garden if isinstance(garden, Garden) else Garden()

    @_garden.setter
    def _garden(self, garden: Garden) -> None:
        self._job.state = replace(self._job.state, garden=garden)

    def before(self) -> None:
        """Carry out the orders that wait; a host that is frozen is so after a resume too."""
        garden, self._told = self._garden, []
        for life in garden.lives:
            if life.way == "frozen_host" and life.stage is Stage.TRAINING:
                enter(self._job.model, life.slot, life.way)
        if garden.queue:
            step = self._job.state.progress.step
            self._garden = act_on(
                garden, self._site, self._config, run_id=self._site.run_id, step=step, emit=self._emit
            )

    def beside(
        self,
        state: TrainingState,
        batches: list[Batch],
        memory: State | None,
        loss: Tensor,
        generators: GlobalGenerators,
    ) -> None:
        """Let the seeds on trial learn from a pass of their own."""
        lives = [life for life in self._garden.lives if life.way == "shadow" and life.stage is Stage.TRAINING]
        if lives:
            shadow = ShadowPass(
                self._read,
                [life.slot for life in lives],
                self._told.append,
                every=self._config.shadow_every,
                emit=self._emit,
            )
            shadow(state, batches, memory, loss, generators)

    def _heed(self, garden: Garden, step: int) -> Garden:
        """The garden that knows what the passes of this step told."""
        for told in self._told:
            if isinstance(told, Isolation):
                garden = garden.violated(told.slots) if told.is_isolated is False else garden
                continue
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
            report = blend_report(self._job.model, slot, self._site.logits)
            told = {"step": now.step, "slot": slot, "weight": weight}
            self._run.emit(Event("blend.reported", told | (vars(report) if report else {})))
        reading = self._site.reading(garden, step)
        self._garden = tend(
            garden,
            reading,
            self._config,
            ask=self._ask,
            slots=self._site.slots(),
            free_parameters=self._site.free_parameters,
            observes=self._observes,
            emit=self._emit,
        )
        if self._kept and self._observes:
            is_strict, normaliser = self._observes.is_strict, self._garden.normaliser.to_json()
            self._kept = self._kept.flush(normaliser, now=now.step, is_strict=is_strict, emit=self._run.emit)

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
        """Hear what held-out text costs."""
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
        self._closing = ExitStack()

    def close(self) -> None:
        """End the process that certifies, if there is one."""
        self._closing.close()

    @cached_property
    def _certifier(self) -> Certifier:
        return self._closing.enter_context(Certifier(emit=self._run.emit))

    def certify(self, slot: str) -> None:
        self._certifier.begin(self.model, slot)

    def certificate(self, slot: str) -> Certificate | None:
        return self._certifier.result(self.model, slot)

    @property
    def run_id(self) -> str:
        return str(self._run.manifest.content["id"])

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
            tokens_bt = self._probe.tokens_bt[:1]
            with torch.no_grad():
                self._flops[key] = counted(partial(self._read, self.model, tokens_bt)) / tokens_bt.numel()
        return self._flops[key]

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
            "isolation_violations": float(sum(life.n_violations for life in garden.lives if life.is_open)),
            "open_breakers": float(garden.breaker is not None and garden.breaker.state(step.progress.step) == "open"),
        }
        now, seeds = self._job.state.progress, seeds_in(self.model)
        own[REQUESTED] = float(len(pending(self._run.directory, garden, now.step, emit=self._run.emit)))
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
        found = []
        with room_for("a comparison on held-out text", self._job.device.device), self._reading():
            for batch in self._held_out:
                logits_bto = self._read(model, batch.tokens_bt)
                (targets_bt,) = self._job.device.move(batch.targets_bt)
                for row, targets in zip(logits_bto, targets_bt, strict=True):
                    found.append(float(cross_entropy(row[None], targets[None])) / targets.numel())
        return found

    def loss(self, model: nn.Module) -> Tensor:
        (targets_bt,) = self._job.device.move(self._probe.targets_bt)
        return cross_entropy(self._read(model, self._probe.tokens_bt), targets_bt) / targets_bt.numel()

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        return self._read(model, self._probe.tokens_bt)

    def evaluate(self) -> float | None:
        job, garden = self._job, self._job.state.garden
        if isinstance(garden, Garden) and garden.held_out and garden.held_out[-1][0] == job.state.progress.step:
            return garden.held_out[-1][3]
        found = measure(self._run, job, job.config.eval.n_windows, task="growth")
        return float(found.nats)

    def keep(self) -> bool:
        if self._recovery.snapshot("growth") is None:
            self._recovery.save(reason="growth", metrics={})
            self._recovery.wait()
        return True

    def change(self, plan: Plan) -> None:
        state, config = self._job.state, self._job.config
        (probe_bt,) = self._job.device.move(self._probe.tokens_bt)
        with self._job.device.autocast():
            receipt = transaction(
                state.model,
                state.optimizer,
                plan,
                probe_bt,
                rebuild=lambda model: build_optimizer(model, config.optim),
                emit=self._run.emit,
            )
        optimizer, part = cast(MultiPeriodOptimizer, receipt.optimizer), config.grow
        joining = SeedSettings(part.rate_scale, part.seed_warmup, since=optimizer.clock.count)
        optimizer.settings |= dict.fromkeys(optimizer.settings.keys() - state.optimizer.settings.keys(), joining)
        progress = state.progress
        if progress.memory is not None:
            progress = replace(progress, memory=carry_state(plan, progress.memory))
        changed = replace(state, model=receipt.model, optimizer=optimizer, engine=alone(receipt.model))
        self._job.state = replace(changed, topology=receipt.topology, progress=progress)

    def is_isolated(self, slot: str) -> bool | None:
        device = self._job.device
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
        held = Held(TrainingState(model, optimizer, alone(model), state.progress))
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
            (now.seconds_used, limits.max_time, now.seconds_used / each),
        )
        return all(limit is None or used + n_steps * of_step <= limit for used, limit, of_step in left)

    def report(self, report: GrowthReport) -> None:
        report = replace(report, run_id=self.run_id).issued(datetime.now(UTC))
        append(self._run.directory / FILE, report)
        self._run.emit(Event("growth.reported", report.to_json()))
