"""Random streams do not touch each other, and states come back."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from meristem.checkpoint.tensors import write_tensors
from meristem.device.random import key, random_state, restore_random_state, stream

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="|"), min_size=1, max_size=12)


@given(random_seed=st.integers(0, 2**63), name=NAMES, indices=st.lists(st.integers(0, 2**31), max_size=3))
def test_key_is_a_pure_function(random_seed, name, indices):
    """The same purpose has the same key, which fits a signed 64-bit number; one more index has another."""
    assert key(random_seed, name, *indices) == key(random_seed, name, *indices)
    assert 0 <= key(random_seed, name, *indices) < 2**63
    assert key(random_seed, name, *indices) != key(random_seed, name, *indices, 0)
    assert key(random_seed, name, *indices) != key(random_seed + 1, name, *indices)


def test_init_independent_of_data():
    """A5.1: Draws of one stream are the same whether or how much others draw, and streams of two names differ."""
    alone = torch.rand(7, generator=stream(3, "init"))
    data, init = stream(3, "data"), stream(3, "init")
    drawn = torch.rand(11, generator=data)
    assert torch.equal(alone, torch.rand(7, generator=init))
    assert not torch.equal(alone, drawn[:7])
    assert not torch.equal(alone, torch.rand(7, generator=stream(3, "init", 1)))


def test_streams_never_change():
    """The first draws of a stream are part of every old run; this test fails when they move."""
    assert key(7, "init") == 6125457217576830588
    assert torch.randint(1000, (5,), generator=stream(7, "data", 3)).tolist() == [341, 750, 184, 42, 697]


def test_global_generator_is_untouched():
    """A stream neither reads nor moves the global generator."""
    before = torch.get_rng_state()
    torch.rand(5, generator=stream(1, "init"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("error")
@settings(max_examples=25)
@given(n_drawn=st.integers(0, 9), random_seed=st.integers(0, 2**32 - 1))
def test_states_come_back(tmp_path_factory, n_drawn, random_seed):
    """Through files and back, every generator goes on with the same draws, a half-used Gaussian pair included."""
    kept = random_state()
    path = tmp_path_factory.mktemp("state") / "random.safetensors"
    try:
        random.seed(random_seed)
        np.random.seed(random_seed)
        torch.manual_seed(random_seed)
        for _ in range(n_drawn):
            draw()
        values, tensors = random_state()
        write_tensors(path, tensors)
        text = json.dumps(values)
        first = [draw() for _ in range(3)]
        restore_random_state(json.loads(text), load_file(path))
        assert [draw() for _ in range(3)] == first
    finally:
        restore_random_state(*kept)


def draw():
    """One draw of each kind from each generator."""
    return (
        random.gauss(0, 1),
        random.random(),
        float(np.random.normal()),
        int(np.random.randint(1 << 30)),
        torch.randn(3).tolist(),
        torch.randint(1 << 30, (2,)).tolist(),
    )


def test_state_of_an_absent_accelerator_is_said(monkeypatch):
    """A run that moves from a GPU to a CPU goes on, and the event names what could not be put back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    values, tensors = random_state()
    events = []
    restore_random_state(values, {**tensors, "cuda:0": tensors["cpu"], "mps": tensors["cpu"]}, events.append)
    assert [(e.name, e.payload["left_out"]) for e in events] == [("degraded", ["cuda:0", "mps"])]


def test_the_generator_of_another_gpu_is_left_alone(monkeypatch):
    """Of four GPUs a process keeps and puts back the state of its own, whichever had it when it was saved."""
    states = {torch.device("cuda", index): torch.tensor([index], dtype=torch.uint8) for index in range(4)}
    touched = []

    def read(device="cuda"):
        touched.append(device)
        return states[device]

    def put(state, device="cuda"):
        touched.append(device)
        states[device] = state

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_rng_state", read)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    first, third = torch.device("cuda", 0), torch.device("cuda", 2)
    values, tensors = random_state(first)
    assert tensors.keys() == {"cpu", "cuda"} and touched == [first]
    restore_random_state(values, tensors, device=third)
    by_number = {"cpu": tensors["cpu"], "cuda:0": torch.tensor([7]), "cuda:1": torch.tensor([8])}
    restore_random_state(values, by_number, device=third)
    assert touched == [first, third, third]
    assert [int(state) for state in states.values()] == [0, 1, 7, 3]
