"""Training that grows: seeds are put where they are wanted, tried, blended in, and kept or removed (growth.md 17)."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from meristem.checkpoint.side_file import SideFile
from meristem.checkpoint.store import Checkpoint
from meristem.data.stream import Batch
from meristem.device.random import GlobalGenerators
from meristem.errors import CapabilityError, WrongValue
from meristem.evaluate.likelihood import Likelihood
from meristem.events import Event
from meristem.growth.attach import attach, slots_in
from meristem.growth.features import Normaliser
from meristem.growth.garden import Garden, Order
from meristem.growth.gardener import act_on, tend
from meristem.growth.graft import advance, cost, find_seed
from meristem.growth.isolation import Isolation, Pair, ShadowPass, enter
from meristem.growth.measure import blend_report, structure_digest
from meristem.growth.observe import HeldOut, Reading
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
from meristem.growth.proposal import DEEPENINGS
from meristem.growth.schedule import LOSS_BLIND
from meristem.growth.stage import Stage
from meristem.growth.topology import topology
from meristem.memory.state import State
from meristem.models.build import build
from meristem.models.growing import GrowConfig, GrowPolicyConfig
from meristem.models.topology import Topology, recorded
from meristem.recipes.plan.report import PlanReport
from meristem.recipes.pretrain import Result, begun, finish, prepare_job, stop, train
from meristem.recipes.site import HOST_PASSES, RunSite
from meristem.runs.config import Config
from meristem.runs.directory import Run
from meristem.runs.recovery import Recovery
from meristem.runs.resume import Job
from meristem.sinks.console import Console
from meristem.train.backward import read_again
from meristem.train.loop import Step
from meristem.train.state import TrainingState
from meristem.worker.breaker import Breaker

MOST_VIOLATIONS: Final = 3
"""How often a host may be found not to be isolated from a seed before that is taken out."""

NOBODY: Final = GrowPolicyConfig(name="never")
"""The policy of the processes that do not decide."""


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
            with Growth(run, job, recovery, policy) as growth:
                is_interrupted = train(run, job, recovery, growth)
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

    @property
    def flops_per_token(self) -> float:
        return self._site.flops_per_token

    def before(self) -> None:
        """Carry out the orders that wait; a way of training that a model does not say is so after a resume too."""
        garden, self._told = self._garden, []
        for life in garden.lives:
            if life.way in ("frozen_host", "capped") and life.stage is Stage.TRAINING:
                enter(self._job.model, life.slot, life.way)
            elif life.way == "capped" and life.stage is Stage.GERMINATED:  # it was rolled back to here
                find_seed(self._job.model, life.slot).learn_capped(False)
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
                self._site.spend((HOST_PASSES + len(told.slots)) * self._site.step_flops)
                is_violated = self._run.world.any(told.is_isolated is False)
                garden = garden.violated(told.slots) if is_violated else garden
                continue
            flops = self._site.shadow_flops(told.slot, is_played=told.is_played)
            self._site.spend(flops)
            life = garden.open_in(told.slot)
            if life is None:
                continue
            garden, difference = garden.spent(life.seed, flops), told.difference()
            if math.isfinite(difference):
                garden = garden.with_life(replace(life, paired=life.paired.add(difference)))
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
        self._garden = self._of_first(partial(self._tended, garden, step))
        if self._kept and self._observes:
            is_strict, normaliser = self._observes.is_strict, self._garden.normaliser.to_json()
            self._kept = self._kept.flush(normaliser, now=now.step, is_strict=is_strict, emit=self._run.emit)

    def _tended(self, garden: Garden, step: Step) -> Garden:
        return tend(
            garden,
            self._site.reading(garden, step),
            self._config,
            ask=self._ask,
            slots=self._site.slots(),
            free_parameters=self._site.free_parameters,
            observes=self._observes,
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
