"""Who a process is, from its environment, and what it may use."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from meristem.device.config import DeviceConfig
from meristem.device.resolve import own_gpu
from meristem.distributed.config import DistributedConfig, require_shardable
from meristem.distributed.world import World, joined, own_device
from meristem.errors import AgreementFailed, CapabilityError, ConflictingKeys, WrongValue
from meristem.models.build import build
from meristem.train.loss import cross_entropy
from zoo import VOCABULARY, ZOO


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_alone_there_is_nothing_to_join(environment):
    with joined(DistributedConfig(), DeviceConfig(), environment) as world:
        assert world == World(0, 1) and world.is_first
        assert not torch.distributed.is_initialized()


def test_half_an_environment_is_refused():
    with pytest.raises(WrongValue, match="WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT not set. Start with torchrun"):
        with joined(DistributedConfig(), DeviceConfig(), {"WORLD_SIZE": "2", "RANK": "0"}):
            pass


@pytest.mark.fault
def test_others_that_do_not_come_are_named_with_the_address(monkeypatch):
    given = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AgreementFailed, match="process 0 of 2 did not meet all others at 127.0.0.1:0 within 1 s"):
        with joined(DistributedConfig(timeout_s=1), DeviceConfig(device="cpu"), given):
            pass


def test_more_processes_than_gpus_are_refused():
    given = {"WORLD_SIZE": "99", "RANK": "98", "LOCAL_RANK": "98", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    with pytest.raises(CapabilityError, match="process 98 of this machine needs a GPU of its own for nccl"):
        with joined(DistributedConfig(backend="nccl"), DeviceConfig(), given):
            pass


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    third = World(2, 4, local_rank=2)
    assert {own_device(third, DeviceConfig(device=name)).device for name in ("auto", "cuda")} == {"cuda:2"}
    assert own_device(third, DeviceConfig(device="cpu")).device == "cpu"
    assert own_device(World(), DeviceConfig(device="cuda:1")).device == "cuda:1"
    with pytest.raises(ConflictingKeys, match="device.device is cuda:1, one GPU, and there are 4 processes"):
        own_device(third, DeviceConfig(device="cuda:1"))
    assert [own_gpu(DeviceConfig(device=name), 2) for name in ("auto", "cuda", "cuda:1", "cpu", "mps")] == [
        *(2, 2, 1),
        *(None, None),
    ]


@pytest.mark.parametrize("name", ZOO)
def test_whatever_a_model_makes_is_where_its_tokens_are(name):
    """Forward and backward on tensors without bytes: nothing is made by default on the host, or on the first GPU.

    Torch has no tensors of a GPU with a number where there is no CUDA; ``meta`` stands for any device but the host.
    """
    model = build(*ZOO[name], VOCABULARY, random_seed=3).to("meta")
    with Places() as places:
        tokens_bt = torch.zeros(2, 9, dtype=torch.int64, device="meta")
        logits_bto, _ = model(tokens_bt)
        cross_entropy(logits_bto, tokens_bt).backward()
    assert places.found == {"meta"}


class Places(TorchFunctionMode):
    """Notes on which devices the results of all calls of torch are."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found |= {str(leaf.device) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("kind", ["muon", "adamuon", "adamuon_raw", "m3", "sgd"])
def test_optimizers_that_need_whole_parameters_are_refused(kind):
    require_shardable(DistributedConfig(), kind)
    require_shardable(DistributedConfig(shard=True), "adamw")
    with pytest.raises(ConflictingKeys, match=f"optim.name is '{kind}' and distributed.shard is true"):
        require_shardable(DistributedConfig(shard=True), kind)
