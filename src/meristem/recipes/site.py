"""The run as those see it who act on what has grown: what they can measure of it, and change in it (growth.md 17)."""

import json
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import islice
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from meristem.data.stream import Batch, held_out
from meristem.device.allocator import peak_bytes
from meristem.device.random import global_generators, random_state, restore_random_state
from meristem.device.room import room_for
from meristem.distributed.engine import Engine
from meristem.events import Emit, Event
from meristem.growth.attach import slots_in
from meristem.growth.certifier import Certifier
from meristem.growth.certify import Certificate
from meristem.growth.garden import Garden
from meristem.growth.gates import GateResult
from meristem.growth.graft import seeds_in, set_blend
from meristem.growth.heuristic import REQUESTED
from meristem.growth.isolation import check_isolation, shadow_work
from meristem.growth.measure import calm, n_host_parameters
from meristem.growth.observe import Reading, SlotReading
from meristem.growth.plan import Plan
from meristem.growth.report import FILE, GrowthReport, append
from meristem.growth.request import pending
from meristem.growth.schedule import BUDGET_SHARE, N_DEEPENINGS
from meristem.growth.score import slot_scores
from meristem.growth.stage import Stage
from meristem.growth.surgery import carry_state
from meristem.growth.together import made_in_all
from meristem.growth.transaction import Receipt, transaction
from meristem.optim.groups import build as build_optimizer
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import SeedSettings
from meristem.optim.schedule import rate_factor
from meristem.optim.surgery import carried
from meristem.recipes.plan.flops import counted, forward_flops
from meristem.recipes.pretrain import PASSES, measure
from meristem.runs.directory import Run
from meristem.runs.recovery import Recovery
from meristem.runs.resume import Job
from meristem.runs.structure import engine_of, is_current
from meristem.train.backward import read_again
from meristem.train.loop import Step, steps
from meristem.train.loss import cross_entropy
from meristem.train.state import Held, TrainingState

SCORED_RANK: Final = 4
"""The rank of the additions by which slots are compared."""

CHECKED: Final = 4
"""Passes over the probe batch by which a change of structure is verified: what the model says before and after it, and
two that see whether it is causal."""

HOST_PASSES: Final = 2
"""How often a check of the isolation reads a step without seeds; with each of them it reads that once."""

PROBE_ROWS: Final = 4
"""Held-out sequences that gradients and changes of logits are measured on."""


class RunSite:
    """The run as the acts of the gardener see it (``growth.acts.Site``)."""

    def __init__(self, run: Run, job: Job, recovery: Recovery) -> None:
        self._run, self._job, self._recovery = run, job, recovery
        self._flops: dict[str, float] = {}
        self._apply_ms: float | None = None  # of the last change that this process made
        self.run_id = run.world.broadcast("run id", str(run.manifest.content["id"]))
        self._closing = ExitStack()

    def close(self) -> None:
        """End the process that certifies, if there is one."""
        self._closing.close()

    @cached_property
    def _certifier(self) -> Certifier:
        return self._closing.enter_context(Certifier(emit=self._run.emit))

    def certify(self, slot: str) -> None:
        if self._run.world.is_first:  # which judges for all
            self._certifier.begin(self.model, slot)

    def certificate(self, slot: str) -> Certificate | None:
        return self._certifier.result(self.model, slot) if self._run.world.is_first else None

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

    def shadow_flops(self, slot: str, *, is_played: bool) -> float:
        """Of the pass of one seed beside a step: forward from where it begins, and back from the loss to the seed, of
        the host without gradients of its parameters. Counted once for each structure."""
        data, n_batches = self._job.config.data, self._job.config.train.grad_accum_steps
        key = repr((self._job.state.topology, slot, is_played))
        if key not in self._flops:
            zeros_bt = torch.zeros(1, data.seq_len, dtype=torch.long)
            work = shadow_work(self.model, slot, lambda: self._read(self.model, zeros_bt).sum(), is_played=is_played)
            with torch.compiler.set_stance("force_eager"):
                self._flops[key] = counted(work) / data.seq_len
        return self._flops[key] * data.batch_size * data.seq_len * n_batches

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
        own: dict[str, float | None] = {
            BUDGET_SHARE: step.progress.share(self._job.config.train),
            N_DEEPENINGS: float(len(garden.deepened)),
            "isolation_violations": float(sum(life.n_violations for life in garden.lives if life.is_open)),
            "open_breakers": float(garden.breaker is not None and garden.breaker.state(step.progress.step) == "open"),
        }
        own |= calm(self.losses, self._recovery.safety.guard.norms)
        own |= {"gradient_conflict": _conflict(step), "memory_share": _memory_share(self._job.device.device)}
        own |= {"step_ms": 1000 * step.seconds, "apply_ms": self._apply_ms}
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
        begun_s = time.perf_counter()
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
        self._apply_ms = 1000 * (time.perf_counter() - begun_s)

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
        self._spend_probe((HOST_PASSES + 1) * PASSES)
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


def _conflict(step: Step) -> float | None:
    """1 less the least cosine of two objectives of a step; None where they were not separated, or share nothing."""
    if step.conflict is None or step.conflict.is_idle:
        return None
    cosines = [each for each in step.conflict.report().cosines.values() if each is not None]
    return 1 - min(cosines) if cosines else None


def _memory_share(device: torch.device) -> float | None:
    """The most of an accelerator's memory that was in use; None on a CPU, whose memory is not the run's alone."""
    if device.type != "cuda":
        return None
    return peak_bytes(device) / torch.cuda.get_device_properties(device).total_memory
