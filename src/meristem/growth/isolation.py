"""How a seed learns while its host is left alone, and the proof that it is (growth.md 9).

shadow = ShadowPass(read, slots=("blocks.1",), tell=pairs.append)
for step in steps(held, stream, schedule, config=config, device=device, beside=shadow):
    ...

A trainer calls ``shadow`` when the gradients of a step are complete: pass B reads the same text once more with a seed
live, and puts gradients on the parameters of that seed alone. The trainer hands in how it reads; nothing of it is
imported here.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from meristem.data.stream import Batch
from meristem.device.random import GlobalGenerators, global_generators, restore_random_state, stream
from meristem.device.room import empty_cache, is_out_of_room
from meristem.distributed.shards import is_part
from meristem.errors import CapabilityError, WrongValue
from meristem.events import Emit, Event, silent
from meristem.growth.attach import find_slot, slots_in
from meristem.growth.graft import find_seed, set_blend
from meristem.growth.ownership import Owners
from meristem.growth.seed import Seed
from meristem.growth.stage import Way
from meristem.memory.state import State
from meristem.nn.slot import Tape
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import origin_of, origins

CHECK_EVERY: Final = 400
"""Steps from one check of the isolation to the next. It takes about three steps, and so adds less than a hundredth."""

SAMPLED: Final = 256
"""Entries of a gradient that are compared, at most."""

Gradients: TypeAlias = dict[str, Tensor]
"""By the name of the parameter; without those that the loss does not reach."""


class Progress(Protocol):
    """Where a run stands: how many steps it has made, and into how many pieces a batch is cut."""

    @property
    def step(self) -> int: ...

    @property
    def n_micro_batches(self) -> int: ...


class Training(Protocol):
    """What of a training is read here."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> MultiPeriodOptimizer: ...

    @property
    def progress(self) -> Progress: ...


Take: TypeAlias = Callable[[Tensor], None]
Read: TypeAlias = Callable[[Any, Sequence[Batch], State | None, Take], Tensor]
"""``(state, batches, memory, take) -> loss``: reads a step with the model as it is, gives ``take`` what gradients are
taken of, piece by piece, and returns the mean loss of all targets. Of ours it is ``train.backward.read_again``."""


@dataclass(frozen=True)
class Pair:
    """Losses of one step without and with a seed, on the same text from the same memory, still on the device.

    is_played: whether the second pass began at the seed, and not at the tokens.
    """

    slot: str
    step: int
    without: Tensor
    with_seed: Tensor
    is_played: bool = False

    def difference(self) -> float:
        """``L_B - L_A`` in nats per target: below 0 where the seed helps. The host waits for it."""
        return float(self.with_seed - self.without)


@dataclass(frozen=True)
class Isolation:
    """Whether the gradients of a host are the same bits with and without the passes of its seeds.

    is_isolated: None where nothing was measured: the device does not give the same gradients twice, or no parameter of
        the host learns.
    differing: parameters whose gradients differ. cosines: by slot, between the gradients of the host under the loss
        without and with the seed (``cosine``): 1 where both would move the host alike.
    """

    step: int
    slots: tuple[str, ...]
    is_isolated: bool | None
    differing: tuple[str, ...] = ()
    cosines: Mapping[str, "Cosine"] = field(default_factory=dict)


@dataclass(frozen=True)
class Cosine:
    """The cosine of gradients of the same tensors under two losses.

    value: None where one of them is 0 everywhere, so that there is none. n_tensors: that both losses reach. n_zero:
    of these, where one of the gradients is 0 at all entries that were compared.
    """

    value: float | None
    n_tensors: int
    n_zero: int


@dataclass(frozen=True)
class ShadowPass:
    """What a trainer calls beside its steps: on every n-th of them one pass B for each seed that learns in shadow.

    Pass A is the step itself, with the seeds off. Pass B of a seed begins where A began: same text, same memory, same
    states of torch's generators, so that both losses are a pair. Its gradients are those of the seed's parameters; on
    all other steps these have none. Buffers, generators and the memory of the run are afterwards what A left. A seed
    with a memory of its own begins it anew in every pass. In several processes gradients and losses are summed.

    What lies before a seed is the same in both passes. Where ``watch`` is called before each step, pass B takes what
    modules with slots gave in A, up to that of the seed, and begins there: losses and gradients are the same bits.

    Where a device has no room for a pass, what is left of the passes of that step is left out: event
    ``shadow.skipped``. Whether the host is isolated is checked on every ``check_every``-th step, 0 for never
    (``check_isolation``).

    read: how the trainer reads a step. slots: of the seeds; more than one learn each without the others.
    tell: is given every pair and every check.
    """

    read: Read
    slots: Sequence[str]
    tell: Callable[[Pair | Isolation], None]
    every: int = 8
    check_every: int = CHECK_EVERY
    emit: Emit = silent

    def __post_init__(self) -> None:
        if self.every < 1 or self.check_every < 0:
            raise WrongValue(
                f"a pass every {self.every} steps and a check every {self.check_every} were found; expected 1 or more, "
                f"and 0 or more.",
                value=(self.every, self.check_every),
            )

    def watch(self, state: Training) -> None:
        """Have kept what the next step computes, if a pass is due in it; what was kept before is let go.

        A model with compiled modules is left alone: they would be compiled anew.
        """
        is_due = self.slots and state.progress.step % self.every == 0
        is_compiled = any(module._compiled_call_impl is not None for module in state.model.modules())
        _put_tape(state.model, Tape(state.progress.n_micro_batches) if is_due and not is_compiled else None)

    def __call__(
        self,
        state: Training,
        batches: Sequence[Batch],
        memory: State | None,
        loss: Tensor,
        generators: GlobalGenerators,
    ) -> None:
        """Put gradients on the parameters of the seeds, where a pass is due."""
        step = state.progress.step
        if not self.slots or step % self.every:
            return
        began = state, batches, memory, generators
        tape = find_slot(state.model, self.slots[0]).tape
        _put_tape(state.model, None)
        if tape is not None and not _is_whole(tape, state, generators):
            tape = None
        try:
            if self.check_every and step % self.check_every < self.every:
                self.tell(check_isolation(*began, read=self.read, slots=self.slots, emit=self.emit))
            for slot in self.slots:
                with_seed = shadow_gradients(*began, read=self.read, slot=slot, tape=tape)
                self.tell(Pair(slot, step, _summed(state, loss), with_seed, is_played=tape is not None))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_room(error) or state.optimizer.reduce is not None:
                raise  # the other processes already wait for its gradients
            empty_cache(loss.device)
            payload = {"step": step, "slots": list(self.slots), "cause": str(error)[:200]}
            self.emit(Event("shadow.skipped", payload, "warning"))


def shadow_gradients(
    state: Training,
    batches: Sequence[Batch],
    memory: State | None,
    generators: GlobalGenerators,
    *,
    read: Read,
    slot: str,
    tape: Tape | None = None,
) -> Tensor:
    """Pass B of one seed: its gradients are put on its parameters, and the loss with it is given.

    tape: of pass A, whatever that computed before the seed.
    Raises WrongValue where there is no such seed, or one that is not off, so that the host has been trained with it;
    CapabilityError for a seed whose parameters are sharded.
    """
    seed = find_seed(state.model, slot)
    if seed.is_live:
        raise WrongValue(
            f"the seed of '{slot}' has the blend weight {seed.way.weight:g}, and takes part in the step; expected 0 "
            f"for a seed that learns in shadow. Set it with grow.set_blend(model, '{slot}', 0), or train it jointly.",
            value=seed.way.weight,
        )
    parameters = {name: each for name, each in seed.named_parameters() if each.requires_grad}
    if any(is_part(each) for each in parameters.values()):
        raise CapabilityError(
            f"the seed of '{slot}' is sharded, and the gradients of a pass of its own cannot be. Leave it whole in "
            f"every process while it learns in shadow, or train it jointly.",
            operation="shadow",
            reason="sharded parameters",
        )
    with _begun(generators, state.model), _live(seed), _played(tape, state.model, slot):
        found, loss = _gradients(state, batches, memory, read, parameters)
    own = set(map(id, state.optimizer.levels.get(1, ())))
    fast = [gradient for name, gradient in found.items() if id(parameters[name]) in own]
    if state.optimizer.reduce is not None and fast:
        state.optimizer.reduce(fast, "period 1")
    for name, gradient in found.items():
        parameters[name].grad = gradient
    return _summed(state, loss)


def shadow_work(model: nn.Module, slot: str, loss: Callable[[], Tensor], *, is_played: bool) -> Callable[[], object]:
    """What a pass B of one seed computes, for its operations to be counted: a call makes one, and leaves no trace.

    loss: reads the model as it is, with its graph. is_played: whether the pass begins at the seed.
    """
    seed = find_seed(model, slot)
    parameters = [each for each in seed.parameters() if each.requires_grad]
    generators = global_generators(next(model.parameters()).device)
    tape = Tape() if is_played else None
    if tape is not None:
        with _begun(generators, model):
            _put_tape(model, tape)
            loss()
            _put_tape(model, None)

    def work() -> object:
        with _begun(generators, model), _live(seed), _played(tape, model, slot):
            return torch.autograd.grad(loss(), parameters, allow_unused=True)

    return work


def check_isolation(
    state: Training,
    batches: Sequence[Batch],
    memory: State | None,
    generators: GlobalGenerators,
    *,
    read: Read,
    slots: Sequence[str],
    emit: Emit = silent,
) -> Isolation:
    """Take the gradients of the host twice, with the passes of the seeds in between, and compare the bits.

    The pass of a seed gives the gradients of the host under its loss as well, and so how far the two losses agree.
    Nothing keeps a trace of it: gradients on parameters, buffers and generators are what they were. Where the two
    differ a third time tells whether the device ever repeats itself. The event is ``isolation.checked``, or
    ``isolation.violated`` with the parameters.
    """
    seeds = {slot: find_seed(state.model, slot) for slot in slots}
    in_seeds = {id(each) for seed in seeds.values() for each in seed.parameters()}
    learning = {name: each for name, each in state.model.named_parameters() if each.requires_grad}
    own = {name: each for name, each in learning.items() if id(each) not in in_seeds}

    def again(parameters: Mapping[str, Tensor] = own) -> Gradients:
        with _begun(generators, state.model):
            return _gradients(state, batches, memory, read, parameters)[0]

    first, cosines = again(), {}
    for slot, seed in seeds.items():
        with _live(seed):
            with_seed = again(learning)
        draws = stream(state.progress.step, f"growth.isolation.{slot}")
        cosines[slot] = cosine(first, {name: with_seed[name] for name in own if name in with_seed}, generator=draws)
    second = again()
    differing = _differing(first, second)
    is_isolated = not differing if own else None
    if differing and _differing(second, again()):
        is_isolated, differing = None, ()
    found = Isolation(state.progress.step, tuple(slots), is_isolated, differing, cosines)
    payload = {"step": found.step, "slots": list(slots), "is_isolated": is_isolated, "differing": list(differing[:10])}
    payload["cosines"] = {slot: each.value for slot, each in cosines.items()}
    is_bad = is_isolated is False
    emit(Event("isolation.violated" if is_bad else "isolation.checked", payload, "error" if is_bad else "info"))
    return found


def cosine(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, generator: torch.Generator, most: int = SAMPLED
) -> Cosine:
    """``sum <a, b> / (|a| |b|)`` over the tensors that both have, of at most ``most`` entries of each.

    An entry that was drawn stands for as many as there are for each drawn one, so that the cosine is about that of the
    whole gradients. It does not change where one of them is scaled.
    """
    products, n_zero, names = [], 0, [name for name in first if name in second]
    for name in names:
        a, b = first[name], second[name]
        at = drawn_entries(a.shape, most, generator)
        share = a.numel() / len(at[0]) if at else 1.0
        a, b = (each[tuple(index.to(each.device) for index in at)].double() for each in (a, b))
        products.append(share * torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]).cpu())
        n_zero += int(not products[-1][1] or not products[-1][2])
    together, of_first, of_second = torch.stack(products).sum(0).tolist() if products else (0.0, 0.0, 0.0)
    size = math.sqrt(of_first) * math.sqrt(of_second)
    return Cosine(together / size if size and math.isfinite(size) else None, len(names), n_zero)


def drawn_entries(shape: Sequence[int], most: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Where at most ``most`` entries of a tensor of that shape are, an index for each axis: all of a small tensor in
    their order, else drawn with replacement. It takes memory for those alone, however large the tensor is."""
    n = math.prod(shape)
    flat = torch.arange(n) if n <= most else torch.randint(n, (most,), generator=generator)
    return torch.unravel_index(flat, tuple(shape))


@dataclass(frozen=True)
class HowToLearn:
    """What a way is: the blend weight of the seed while it learns, whether nothing else does, and whether the seed
    learns although it adds nothing."""

    blend_weight: float
    freezes: bool = False
    is_capped: bool = False


WAYS: Final[Mapping[Way, HowToLearn]] = {
    "joint": HowToLearn(1.0),
    "shadow": HowToLearn(0.0),
    "frozen_host": HowToLearn(1.0, freezes=True),
    "capped": HowToLearn(0.0, is_capped=True),
}
"""Every way that a seed can learn in while it is TRAINING."""


def enter(model: nn.Module, slot: str, way: Way, *, teacher: nn.Module | None = None) -> frozenset[str]:
    """Have the seed of a slot learn in a way, in place; the names of the parameters that are frozen for it.

    joint: it is live, and learns with its host. shadow: it is off, and learns by a ``ShadowPass``. frozen_host: it is
    live, and no other parameter learns until ``leave`` is given the names; what an optimizer has gathered for them
    stays, for they have no gradient. capped: it adds nothing and gets no graph of its host, and its gradient is that at
    its slot, of an addition of a tenth of the hidden vector at most: cheap, and blind to what the seed does.

    teacher: what the seed is trained from, where there is one; what it is made of may not learn meanwhile. Raises
    WrongValue for a slot without a seed, and a way that is none; OwnershipRefused where a seed shares a parameter with
    its host or another seed, and where something that learns is the teacher's. The model is untouched then.
    """
    if way not in WAYS:
        raise WrongValue(f"a seed cannot learn '{way}'; ways are {', '.join(WAYS)}.", value=way)
    found, own = WAYS[way], {id(each) for each in find_seed(model, slot).parameters()}
    named = dict(model.named_parameters())
    owners = Owners.of(model)
    if teacher is not None:
        names = {id(each): name for name, each in named.items()}
        its = [names.get(id(each), f"teacher.{name}") for name, each in teacher.named_parameters()]
        owners = owners.with_teacher("teacher", its)
    learning = [name for name, each in named.items() if each.requires_grad and (id(each) in own or not found.freezes)]
    for origin in origins(learning):
        owners = owners.claim(origin, [name for name in learning if origin_of(name) == origin])
    find_seed(model, slot).learn_capped(found.is_capped)
    set_blend(model, slot, found.blend_weight)
    frozen = {name: each for name, each in named.items() if each.requires_grad and name not in set(learning)}
    for each in frozen.values():
        each.requires_grad_(False)
        each.grad = None
    return frozenset(frozen)


def leave(model: nn.Module, frozen: frozenset[str]) -> None:
    """Have the parameters that ``enter`` has frozen learn again; those that are gone by now are left out."""
    for name, each in model.named_parameters():
        if name in frozen:
            each.requires_grad_(True)


def _gradients(
    state: Training, batches: Sequence[Batch], memory: State | None, read: Read, parameters: Mapping[str, Tensor]
) -> tuple[Gradients, Tensor]:
    """Of the loss of a step with respect to these parameters alone, and that loss."""
    found: Gradients = {}

    def take(loss: Tensor) -> None:
        if not parameters:
            return
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                found[name] = found[name] + gradient if name in found else gradient

    return found, read(state, batches, memory, take).detach()


@contextmanager
def _live(seed: Seed) -> Iterator[None]:
    """While it lasts, a seed that is off adds all that it gives."""
    weight, was_live, was_capped = seed.blend_weight.clone(), seed.is_live, seed.is_capped
    seed.blend_weight.fill_(1.0)
    seed.is_live, seed.is_capped = True, False
    try:
        yield
    finally:
        seed.blend_weight.copy_(weight)
        seed.is_live, seed.is_capped = was_live, was_capped


@contextmanager
def _begun(generators: GlobalGenerators, model: nn.Module) -> Iterator[None]:
    """While it lasts, torch's generators go on from there; afterwards they and all buffers are what they were."""
    device = next(model.parameters()).device
    after = global_generators(device)
    held = [
        (module, name, each, None if each is None else each.clone())
        for module in model.modules()
        for name, each in module._buffers.items()
    ]
    versions = [None if each is None else each._version for _, _, each, _ in held]
    restore_random_state({}, generators, device=device)
    try:
        yield
    finally:
        restore_random_state({}, after, device=device)
        for (module, name, each, copy), version in zip(held, versions, strict=True):
            if each is not None and copy is not None and each._version != version:
                each.copy_(copy)
            module._buffers[name] = each


def _put_tape(model: nn.Module, tape: Tape | None) -> None:
    for slot in slots_in(model).values():
        slot.tape = tape


def _is_whole(tape: Tape, state: Training, generators: GlobalGenerators) -> bool:
    """Whether pass A was read in one go, and drew nothing that pass B would have to draw too."""
    now = global_generators(next(state.model.parameters()).device)
    has_drawn = any(not torch.equal(generators[name], drawn) for name, drawn in now.items())
    return tape.n_micro_batches == state.progress.n_micro_batches and not has_drawn


@contextmanager
def _played(tape: Tape | None, model: nn.Module, slot: str) -> Iterator[None]:
    """While it lasts what was noted is given again, up to a slot."""
    if tape is None:
        yield
        return
    _put_tape(model, tape)
    try:
        with tape.played(slot):
            yield
    finally:
        _put_tape(model, None)


def _summed(state: Training, loss: Tensor) -> Tensor:
    """A loss of which each process has its share."""
    if state.optimizer.reduce is None:
        return loss
    total = loss.detach().clone()
    state.optimizer.reduce([total], "control")
    return total


def _differing(first: Gradients, second: Gradients) -> tuple[str, ...]:
    names = sorted(first.keys() | second.keys())
    return tuple(
        name for name in names if name not in first or name not in second or not torch.equal(first[name], second[name])
    )
