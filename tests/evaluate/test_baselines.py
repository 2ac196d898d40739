"""Compressors as a scale."""

import random

import pytest

from meristem.evaluate.baselines import baselines


def text(n_bytes: int, random_seed: int) -> bytes:
    draw = random.Random(random_seed)
    words = [bytes(draw.choices(b"etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(300)]
    return b" ".join(draw.choices(words, k=n_bytes))[:n_bytes]


def figures(training: bytes, held_out: bytes) -> dict[str, float]:
    return {baseline.name: baseline.bits_per_byte for baseline in baselines(training, held_out)}


def test_noise_costs_eight_bits():
    """What cannot be compressed costs its size, give or take the frame of the format, with every compressor."""
    noise = random.Random(0).randbytes(30_001)
    assert all(7.98 < found < 8.2 for found in figures(random.Random(1).randbytes(10_007), noise).values())


def test_training_text_helps_only_the_primed_one():
    held_out = text(9_001, 0)
    strange, same = figures(random.Random(1).randbytes(9_001), held_out), figures(held_out, held_out)
    primed = "xz given the training text"
    assert same[primed] < 0.05 * strange[primed]
    assert {name: found for name, found in same.items() if name != primed} == pytest.approx(
        {name: found for name, found in strange.items() if name != primed}
    )


def test_of_one_text_compressors_are_asked_once():
    held_out = text(9_001, 0)
    assert baselines(b"before", held_out) is baselines(b"before", bytes(held_out))
