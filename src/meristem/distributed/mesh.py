"""Which process this is, and how it meets the others."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from meristem.device.config import DeviceConfig
from meristem.distributed.config import DistributedConfig
from meristem.errors import AgreementFailed, CapabilityError, ConflictingKeys, MeristemError, WrongValue

_GIVEN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run. The default is a process alone, for which every exchange does nothing.

    rank: its number, from 0. local_rank: its number on its machine, and so which GPU is its own. n_local: how many are
        on its machine.
    n_restarts: how often all were started again, because one was lost.
    backend: what carries tensors. store: a small table of keys and values that all processes see.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    n_local: int = 1
    n_restarts: int = 0
    backend: str = "none"
    store: Store | None = field(default=None, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether it decides, records and saves for all."""
        return self.rank == 0


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
def written_down(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Leave an error that ends the block where the agent which started this process looks for it, if one did."""
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
) -> Iterator[Ranks]:
    """Be one of the processes that ``torchrun`` started while the block runs; alone where it started one or none.

    The environment says who this is and where the first one can be met: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT. Raises AgreementFailed where the others do not come within the timeout.
    """
    n_restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(n_restarts=n_restarts)
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
        # The table outlives processes that are started again: what those before them said must not be heard.
        store = PrefixStore(_met(store, rank, size, config.timeout_s), store)
        # Numbers of the host always go by gloo: reading them from an accelerator would make it wait.
        carriers = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
        own = PrefixStore("torch", store)
        dist.init_process_group(carriers, store=own, rank=rank, world_size=size, timeout=timeout)
    except (dist.DistError, RuntimeError) as cause:
        raise AgreementFailed(
            f"process {environment['RANK']} of {environment['WORLD_SIZE']} did not meet all others at "
            f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']} within {config.timeout_s:g} s: {cause}. See "
            f"whether each was started with the same address, or raise distributed.timeout_s.",
            rank=int(environment["RANK"]),
        ) from cause
    try:
        n_local = int(environment.get("LOCAL_WORLD_SIZE", size))
        yield Ranks(rank, size, local_rank, n_local, n_restarts, backend, store)
    finally:
        dist.destroy_process_group()


def _met(store: Store, rank: int, size: int, timeout_s: float) -> str:
    """A name for this meeting, the same in all of them, that no earlier one had.

    Each makes up a word that nobody used before, and the first answers to it, so that no old answer is taken for one.
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


def own_device(ranks: Ranks, config: DeviceConfig) -> DeviceConfig:
    """The device of this process: of several on a machine with GPUs, each takes its own."""
    if ranks.size == 1 or not _wants_gpu(config):
        return config
    if config.device.startswith("cuda:"):
        raise ConflictingKeys(
            f"device.device is {config.device}, one GPU, and there are {ranks.size} processes, each of which needs its "
            f"own. Set device.device=cuda.",
            path="device.device",
            value=config.device,
        )
    return config.model_copy(update={"device": f"cuda:{ranks.local_rank}"})


def _backend(config: DistributedConfig, device: DeviceConfig, local_rank: int) -> str:
    """The backend, tried as far as can be without the others."""
    backend = config.backend
    if backend == "auto":
        backend = "nccl" if _wants_gpu(device) else "gloo"
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


def _wants_gpu(config: DeviceConfig) -> bool:
    return torch.cuda.is_available() and (config.device == "auto" or config.device.startswith("cuda"))
