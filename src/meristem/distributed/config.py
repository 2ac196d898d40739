"""Settings of a run in more than one process."""

from typing import Final, Literal

from pydantic import Field

from meristem.config import ConfigSection
from meristem.errors import ConflictingKeys

SHARDABLE: Final = frozenset({"adamw"})
"""The kinds of optimizer that can move a parameter of which they hold a part."""


class DistributedConfig(ConfigSection):
    """How the processes that ``torchrun`` or ``--nproc`` started work together. In a single process nothing of it acts.

    The batch is that of all processes: each takes its share of the rows of ``data.batch_size``.
    """

    shard: bool = Field(
        default=False,
        description="each process keeps a part of parameters and moments (FSDP2); else all of them (DDP)",
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto", description="what carries tensors; auto: nccl between GPUs, gloo between CPUs"
    )
    timeout_s: float = Field(
        default=300.0, gt=0, description="seconds that a process waits for the others before it gives up"
    )
    max_restarts: int = Field(
        default=3, ge=0, description="how often --nproc starts all processes again after one was lost"
    )


def require_shardable(config: DistributedConfig, kind: str) -> None:
    """Raises ConflictingKeys where the optimizer ``kind`` cannot work on sharded parameters."""
    if config.shard and kind not in SHARDABLE:
        raise ConflictingKeys(
            f"optim.name is '{kind}' and distributed.shard is true. A matrix optimizer orthogonalises whole matrices, "
            f"and torch's fused SGD does not take sharded parameters; on these works {', '.join(sorted(SHARDABLE))}. "
            f"Set distributed.shard=false, or optim.name=adamw.",
            path="distributed.shard",
            value=True,
        )


def require_alone(n_processes: int, how: str) -> None:
    """Raises ConflictingKeys where several processes are to find out which objectives disagree."""
    if n_processes > 1 and how != "mean":
        raise ConflictingKeys(
            f"aggregate.how is '{how}' and there are {n_processes} processes. It takes the gradient of each objective "
            f"for itself, past the engine that sums them over processes. Set aggregate.how=mean, or start one process.",
            path="aggregate.how",
            value=how,
        )
