"""The processes of a run as one of them sees them: which it is, how it joins, and what it exchanges with the others.

All must make the same exchanges in the same order, of the same tensors. Alone, nothing is sent.
"""

import contextlib
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from meristem.device.config import DeviceConfig
from meristem.device.resolve import own_gpu
from meristem.distributed.agreement import Agreement, Change, checksum, lost_process
from meristem.distributed.config import DistributedConfig
from meristem.errors import AgreementFailed, CapabilityError, ConflictingKeys, MeristemError, WrongValue

CONTROL: Final = "control"
"""What agreement costs, and no gradient is part of: losses, flags, norms, times."""

PORTION_BYTES: Final = 32 << 20
"""Small tensors are sent together, up to so many bytes at once: each sending has its own delay."""

_GIVEN: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Traffic:
    """Bytes of the tensors that were exchanged, by what they were for.

    Each tensor is counted once, in full, however often the algorithm sends it; with two processes and a sum it is what
    each of them sends.
    """

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()

    def add(self, kind: str, n_bytes: int) -> None:
        """Count an exchange."""
        self._bytes[kind] += n_bytes

    def take(self) -> dict[str, int]:
        """What was counted since the last call, by kind."""
        taken = dict(self._bytes)
        self._bytes.clear()
        return taken


@dataclass(frozen=True)
class World:
    """This process among all of a run. The default is a process alone.

    rank: its number, from 0. local_rank: its number on its machine, and so which GPU is its own. n_local: how many are
        on its machine.
    n_restarts: how often all were started again, because one was lost.
    backend: what carries tensors. store: a small table of keys and values that all processes see.
    timeout_s: how long it waits for the others where they settle what all do, or none.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    n_local: int = 1
    n_restarts: int = 0
    backend: str = "none"
    store: Store | None = field(default=None, repr=False, compare=False)
    timeout_s: float = 300.0
    traffic: Traffic = field(default_factory=Traffic, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether it decides, records and saves for all."""
        return self.rank == 0

    @cached_property
    def agreement(self) -> Agreement:
        """The meetings of these processes, which have numbers: there is one."""
        return Agreement(self.rank, self.size, self.store, timeout_s=self.timeout_s)

    @torch.no_grad()
    def all_reduce(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Put into each tensor its sum over all processes; the bits of the result are the same in all of them."""
        if self.size == 1:
            return
        with lost_process(f"the sum of {kind}", self.rank, self.size):
            for portion in _portions(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in portion])
                self.traffic.add(kind, flat.nbytes)
                dist.all_reduce(flat)
                parts = flat.split([tensor.numel() for tensor in portion])
                for tensor, summed in zip(portion, parts, strict=True):
                    tensor.copy_(summed.view_as(tensor))

    @torch.no_grad()
    def all_gather(self, tensor: Tensor, kind: str) -> list[Tensor]:
        """The tensors of every process, by rank; of one shape and dtype."""
        if self.size == 1:
            return [tensor]
        every = tensor.new_empty(self.size * tensor.numel())
        self.traffic.add(kind, every.nbytes)
        with lost_process(f"the gathering of {kind}", self.rank, self.size):
            dist.all_gather_single(every, tensor.reshape(-1).contiguous())
        return [each.view(tensor.shape) for each in every.split(tensor.numel())]

    def all_gather_bytes(self, own: bytes, kind: str) -> list[bytes]:
        """The bytes of every process, by rank, of any lengths."""
        if self.size == 1:
            return [own]
        lengths = [int(each) for (each,) in self.all_gather_numbers([len(own)])]
        padded = torch.frombuffer(bytearray(own.ljust(max(lengths), b"\0")), dtype=torch.uint8)
        every = self.all_gather(padded, kind)
        return [each[:length].numpy().tobytes() for each, length in zip(every, lengths, strict=True)]

    def all_gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, by rank: a few of the host's, as seconds and wishes. A tensor is not read."""
        if self.size == 1:
            return [[float(number) for number in numbers]]
        own = torch.tensor(numbers, dtype=torch.float64)
        return [each.tolist() for each in self.all_gather(own, CONTROL)]

    def any(self, is_so: bool) -> bool:
        """Whether it is so in one of them."""
        return any(each for (each,) in self.all_gather_numbers([is_so]))

    def broadcast_number(self, number: float) -> float:
        """That of the first process: what differs between them, as a time, and from which all must decide alike."""
        return self.all_gather_numbers([number])[0][0]

    def broadcast(self, what: str, text: str) -> str:
        """The text of the first process; what any other gives is ignored."""
        return text if self.size == 1 else self.agreement.broadcast(what, text)

    def require_same(self, what: Mapping[str, Callable[[], str]]) -> None:
        """Raises AgreementFailed, in every process, unless each of these is the same in all; alone it is not asked."""
        if self.size > 1:
            for name, find in what.items():
                self.agreement.require_same(name, find())

    def require_alike(self, tensors: Iterable[Tensor]) -> None:
        """Raises AgreementFailed, in every process, unless these have the same bits in all; alone it is not asked.

        It costs one pass over them and one small exchange, and so is done again and again.
        """
        if self.size == 1:
            return
        every = [each for (each,) in self.all_gather_numbers([checksum(tensors)])]
        if len(set(every)) > 1:
            raise AgreementFailed(
                f"the {self.size} processes have gone apart: checksums by rank {', '.join(map(repr, every))}. A "
                f"machine of theirs computes wrongly, or one was disturbed. Start all of them again: they go on from "
                f"the last checkpoint, with the same weights.",
                rank=self.rank,
                found=every,
            )

    def clock(self) -> float:
        """Seconds, which only go on: those of the first process, so that a deadline passes in all or in none."""
        return self.broadcast_number(time.monotonic())

    def act(self, what: str, act: Callable[[], str]) -> None:
        """Do something in all processes, or in none; alone, just do it.

        act: gives what came out, which must be the same in all of them.
        Raises AgreementFailed where one of them could not, or came to another end.
        """
        if self.size == 1:
            act()
            return
        # What all did is not undone where one fails: the caller rolls back farther, or ends.
        change = Change(plan=bytes.decode, apply=lambda order: act(), undo=lambda: None)
        outcome = self.agreement.commit(what.encode(), change)
        if not outcome.is_applied:
            raise AgreementFailed(
                f"'{what}' was done by none of the {self.size} processes: {'; '.join(outcome.against)}.",
                rank=self.rank,
                against=outcome.against,
            )


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this process, as whoever started it says; 0 alone."""
    return int(environment.get("RANK", "0"))


def require_not_launched(environment: Mapping[str, str] = os.environ) -> None:
    """Raises WrongValue in a process that was itself started as one of several."""
    if "WORLD_SIZE" in environment:
        raise WrongValue(
            f"--nproc starts processes, and this one was started as {launched_rank(environment) + 1} of "
            f"{environment['WORLD_SIZE']} (RANK, WORLD_SIZE). Leave --nproc out under torchrun, or unset WORLD_SIZE.",
            path="--nproc",
        )


@contextlib.contextmanager
def recorded_errors(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Record an error that ends the block where the agent which started this process looks for it, if one did."""
    try:
        yield
    except MeristemError as error:
        if "TORCHELASTIC_ERROR_FILE" in environment:
            from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

            ErrorHandler().record_exception(error)
        raise


@contextlib.contextmanager
def joined(
    config: DistributedConfig, device: DeviceConfig, environment: Mapping[str, str] = os.environ
) -> Iterator[World]:
    """Be one of the processes that ``torchrun`` started while the block runs; alone where it started one or none.

    The environment says who this is and where the first one can be met: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT. Raises AgreementFailed where the others do not come within the timeout.
    """
    n_restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        yield World(n_restarts=n_restarts, timeout_s=config.timeout_s)
        return
    missing = [name for name in _GIVEN if name not in environment]
    if missing:
        raise WrongValue(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} not set. Start with torchrun or "
            f"`meristem train --nproc N`, which set all of {', '.join(_GIVEN)}; or unset WORLD_SIZE.",
            missing=missing,
        )
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    backend = _backend(config, device, local_rank)
    timeout = timedelta(seconds=config.timeout_s)
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
        store.set_timeout(timeout)
        # The table outlives processes that are started again: what those before them wrote must not be read.
        store = PrefixStore(_rendezvous_id(store, rank, size, config.timeout_s), store)
        # Numbers of the host always go by gloo: reading them from an accelerator would make it wait.
        carriers, gpu = "gloo", None
        if backend == "nccl":
            carriers, gpu = "cpu:gloo,cuda:nccl", torch.device("cuda", local_rank)
        own = PrefixStore("torch", store)
        dist.init_process_group(carriers, store=own, rank=rank, world_size=size, timeout=timeout, device_id=gpu)
    except (dist.DistError, RuntimeError) as cause:
        raise AgreementFailed(
            f"process {environment['RANK']} of {environment['WORLD_SIZE']} did not meet all others at "
            f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']} within {config.timeout_s:g} s: {cause}. See "
            f"whether each was started with the same address, or raise distributed.timeout_s.",
            rank=int(environment["RANK"]),
        ) from cause
    try:
        n_local = int(environment.get("LOCAL_WORLD_SIZE", size))
        yield World(rank, size, local_rank, n_local, n_restarts, backend, store, config.timeout_s)
    finally:
        dist.destroy_process_group()


def _rendezvous_id(store: Store, rank: int, size: int, timeout_s: float) -> str:
    """A name for this rendezvous, the same in all of them, that no earlier one had.

    Each makes up a word that nobody used before, and the first replies with it, so that no old reply is taken for one.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", own)
        store.wait([f"answer/{own}"])
        name = str(store.get(f"answer/{own}").decode())
        store.add(f"met/{name}", 1)
        return name
    deadline = time.monotonic() + timeout_s
    while store.add(f"met/{own}", 0) < size - 1:
        if time.monotonic() > deadline:
            raise dist.DistStoreError("some of them did not say hello")
        for key in (f"hello/{other}" for other in range(1, size)):
            if store.check([key]):
                store.set(f"answer/{store.get(key).decode()}", own)
        time.sleep(0.01)
    return own


def own_device(world: World, config: DeviceConfig) -> DeviceConfig:
    """The device of this process: of several on a machine with GPUs, each takes its own."""
    index = own_gpu(config, world.local_rank)
    if world.size == 1 or index is None:
        return config
    if config.device.startswith("cuda:"):
        raise ConflictingKeys(
            f"device.device is {config.device}, one GPU, and there are {world.size} processes, each of which needs its "
            f"own. Set device.device=cuda.",
            path="device.device",
            value=config.device,
        )
    return config.model_copy(update={"device": f"cuda:{index}"})


def _backend(config: DistributedConfig, device: DeviceConfig, local_rank: int) -> str:
    """The backend, tried as far as can be without the others."""
    backend = config.backend
    if backend == "auto":
        backend = "gloo" if own_gpu(device, local_rank) is None else "nccl"
    if backend == "gloo":
        return backend
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= n_gpus:
        raise CapabilityError(
            f"process {local_rank} of this machine needs a GPU of its own for nccl, and there are {n_gpus}. Start "
            f"{max(n_gpus, 1)} processes, or set device.device=cpu and distributed.backend=gloo.",
            device="cuda",
            reason="too few",
        )
    torch.cuda.set_device(local_rank)
    return backend


def _portions(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, as many as fit into a portion; what is larger goes alone."""
    portion: list[Tensor] = []
    held_bytes = 0
    for tensor in tensors:
        is_alike = not portion or (tensor.dtype, tensor.device) == (portion[0].dtype, portion[0].device)
        if portion and (not is_alike or held_bytes + tensor.nbytes > PORTION_BYTES):
            yield portion
            portion, held_bytes = [], 0
        portion.append(tensor)
        held_bytes += tensor.nbytes
    if portion:
        yield portion
