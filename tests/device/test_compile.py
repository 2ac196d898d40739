"""Compiling changes the speed of the blocks and nothing else."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.backends import registry

from meristem.device.compile import compile_blocks
from meristem.device.config import DeviceConfig
from meristem.errors import CapabilityError
from meristem.events import silent

CPU = torch.device("cpu")


class Block(nn.Module):
    """A class of its own: torch does not trace a bare nn.Sequential that is compiled itself."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def forward(self, hidden_bd):
        return self.mix(hidden_bd).tanh()


class Stack(nn.Module):
    def __init__(self, n_blocks):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(n_blocks))

    def forward(self, hidden_bd):
        for block in self.blocks:
            hidden_bd = block(hidden_bd)
        return hidden_bd


def use_backend(monkeypatch, backend):
    """In place of torch's own, which takes minutes on a busy machine."""
    usual = registry.lookup_backend
    monkeypatch.setattr(registry, "lookup_backend", lambda name: backend if name == "inductor" else usual(name))


def test_off_by_default():
    """Nothing is compiled unless asked for, and then nothing is said."""
    events = []
    compile_blocks(nn.Linear(2, 3), DeviceConfig(), CPU, events.append)
    assert events == []


@pytest.mark.parametrize("model", [nn.Linear(2, 3), Stack(0)])
def test_model_without_blocks_is_an_error(model):
    """What has no blocks cannot be compiled by blocks; the message says which key to change."""
    with pytest.raises(CapabilityError, match="lists no blocks to compile. Set device.compile to false"):
        compile_blocks(model, DeviceConfig(compile=True), CPU, silent)


def test_missing_compiler_is_an_error(monkeypatch):
    """Without a C++ compiler the error comes now, not in the middle of the first step."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(CapabilityError, match="needs a C\\+\\+ compiler"):
        compile_blocks(Stack(1), DeviceConfig(compile=True), CPU, silent)


@pytest.mark.compiled
def test_compiled_blocks_agree(monkeypatch):
    """Equal blocks are traced once, give the same outputs and gradients, and keep their parameter names."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    use_backend(monkeypatch, backend)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    torch.manual_seed(0)
    plain, compiled = Stack(3), Stack(3)
    compiled.load_state_dict(plain.state_dict())
    events = []
    compile_blocks(compiled, DeviceConfig(compile=True), CPU, events.append)
    assert events[0].payload["compiled_blocks"] == 3
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    hidden_bd = torch.randn(5, 3, requires_grad=True)
    for model in (plain, compiled):
        model(hidden_bd).square().sum().backward()
    torch.testing.assert_close(compiled(hidden_bd), plain(hidden_bd))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad)
    assert len(graphs) == 1


@pytest.mark.compiled
def test_ka3_what_the_compiler_fails_at_runs_as_it_is_and_is_counted(monkeypatch):
    """Outputs and gradients are those of the plain model; after three failures the compiler is left alone."""
    tried, events = [], []

    def backend(graph, _inputs):
        tried.append(graph)
        raise RuntimeError("no such instruction\nand much more")

    use_backend(monkeypatch, backend)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    plain, compiled = Stack(2), Stack(2)
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled, DeviceConfig(compile=True), CPU, events.append)
    for n_rows in range(2, 8):
        torch.compiler.reset()  # each time as if the structure had changed
        hidden_bd = torch.randn(n_rows, 3)
        torch.testing.assert_close(compiled(hidden_bd), plain(hidden_bd), rtol=0, atol=0)
    compiled(hidden_bd).sum().backward()
    plain(hidden_bd).sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(compiled.get_parameter(name).grad, parameter.grad)
    told = [event.payload for event in events if event.name == "compile.fallback"]
    assert len(tried) == len(told) == 3
    assert [each["is_last"] for each in told] == [False, False, True]
    assert told[0]["reason"] == "RuntimeError: no such instruction"
