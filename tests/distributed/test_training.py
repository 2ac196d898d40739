"""Two processes train what one would: their weights, their traffic, their memories (memory.md 9.6)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distributed.processes import Stage
from distributed.scenes import KINDS, N_STEPS, PERIODS, SPOILT

TEXT = "".join(f"{number} times {number} is {number * number}, they say.\n" for number in range(500))

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
"""Largest difference to one process: sums over rows are rounded in another order, and eight AdamW steps carry it on."""

HEADER_BYTES = 8192
"""What a carrier may write in a step besides the tensors: headers of its messages."""

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace(" ", "_"))


@dataclass(frozen=True)
class Trained:
    """What one process and two processes came to."""

    root: Path
    alone: dict[str, Any]
    both: tuple[dict[str, Any], dict[str, Any]]

    def trees(self, kind: str, name: str) -> list[dict[str, Tensor]]:
        """That of the single process, then those of the two."""
        places = (("one", 0), ("two", 0), ("two", 1))
        return [load_file(self.root / folder / f"{kind}.{name}.{rank}.safetensors") for folder, rank in places]


@pytest.fixture(scope="module")
def trained(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("training")
    (root / "text.txt").write_text(TEXT)
    one, two = (stage.play(n_ranks, "train", root / name) for n_ranks, name in ((1, "one"), (2, "two")))
    return Trained(root, one.found(), (two.found(0), two.found(1)))


@each_kind
def test_s2_m2_two_processes_equal_one(trained, kind):
    """After twice the longest period: the two to the bit, and both as one with the joined batch, flushed or not.

    In the kind ``spoilt`` a step is left out that only one of them found to be so.
    """
    for name in ("trained", "flushed", "read"):
        single, first, second = trained.trees(kind.name, name)
        assert all(torch.equal(first[key], second[key]) for key in single)
        for key, value in single.items():
            torch.testing.assert_close(first[key], value, rtol=0, atol=TOLERANCE[kind.dtype])
    assert trained.both[0][kind.name]["fingerprint"] == trained.both[1][kind.name]["fingerprint"]


@each_kind
def test_s2_m2_pulses_and_verdicts_are_equal(trained, kind):
    """Which levels fire, the loss of all, the norm, and what is skipped are the same in both, and as in one."""
    single, first, second = (found[kind.name]["steps"] for found in (trained.alone, *trained.both))
    for step in range(N_STEPS):
        assert first[step]["pulse"] == second[step]["pulse"] == single[step]["pulse"]
        assert first[step]["pulse"] == [step % period == 0 for period in PERIODS]
        mine, its, alone = (told[step]["numbers"] for told in (first, second, single))
        assert mine[0] == its[0] and mine[2] == its[2] == alone[2] == float(kind.is_spoilt and step == SPOILT)
        assert mine[0] == pytest.approx(alone[0], rel=1e-6)
        if not mine[2]:
            assert mine[1] == its[1] == pytest.approx(alone[1], rel=0.2), "slow levels: as if noise were orthogonal"


@each_kind
def test_s2_m2_bytes_follow_the_pulse(trained, kind):
    """In a step where only level 0 fires shared parameters and level 0 are sent, and nothing else but what is counted
    as control; what the kernel saw the process write agrees."""
    found = trained.both[0][kind.name]
    sizes = {f"period {period}": size for period, size in found["sizes"].items()}
    for step in found["steps"]:
        sent = dict(step["traffic"])
        control, parameters = sent.pop("control"), sent.pop("parameters", 0)
        fired = {f"period {period}" for period, fires in zip(PERIODS, step["pulse"], strict=True) if fires}
        assert sent.keys() == fired
        assert all(sent[level] == sizes[level] for level in fired - {"period 1"})
        if kind.engine == "replicated":
            assert sent["period 1"] == sizes["period 1"] and parameters == 0
        else:
            # In parts all of one size, as FSDP cuts them; a memory that is carried on gives none to its beginning.
            assert 0.95 * sizes["period 1"] < sent["period 1"] < 1.05 * sizes["period 1"] < parameters
        assert control < 200
        # A process sends its half of the parameters, and of a sum as much as the sum is large.
        expected = sum(sent.values()) + control + parameters // 2
        assert step["written_bytes"] == 0 or 0 <= step["written_bytes"] - expected < HEADER_BYTES


@each_kind
def test_s2_m2_memory_stays_local(trained, kind):
    """What each process carries is of its own rows: together the memory of one process, and nothing of it is sent."""
    single, first, second = trained.trees(kind.name, "memory")
    rows = [key for key, leaf in single.items() if leaf.dim()]
    assert any("matrix_bhkv" in key for key in rows)
    for key in rows:
        joined = torch.cat([first[key], second[key]])
        torch.testing.assert_close(joined, single[key], rtol=0, atol=10 * TOLERANCE[kind.dtype])
    assert any(not torch.equal(first[key], second[key]) for key in rows)


@each_kind
def test_what_waits_is_pooled_in_the_first(trained, kind):
    """Seven steps of the longest period are over: what a checkpoint saves is what one process would have waiting."""
    single, first, second = trained.trees(kind.name, "waiting")
    assert single.keys() == first.keys() == second.keys() and any(leaf.any() for leaf in single.values())
    for key, value in single.items():
        torch.testing.assert_close(first[key], value, rtol=0, atol=TOLERANCE[kind.dtype])
        assert not second[key].any()


@each_kind
def test_a_whole_model_answers_each_process_for_itself(trained, kind):
    """While parameters are whole, one may read what the other does not: no exchange is part of it."""
    _, first, second = trained.trees(kind.name, "answer")
    assert first["logits"].shape[1] == 5 and second["logits"].shape[1] == 7
    torch.testing.assert_close(first["logits"], second["logits"][:, :5], rtol=0, atol=1e-4)


@pytest.mark.fault
def test_a_seed_learns_in_shadow_in_two_processes_as_in_one(stage: Stage, tmp_path: Path) -> None:
    """Host and seed are the same bits in both, and those of one process but for the rounding of losses, which
    are float32; so are the pairs."""
    (tmp_path / "text.txt").write_text(TEXT)
    one, two = (stage.play(n_ranks, "shadow", tmp_path / name) for n_ranks, name in ((1, "one"), (2, "two")))
    single, first, second = one.found(), two.found(0), two.found(1)
    assert first == second and first["is_isolated"] == single["is_isolated"] == [True]
    torch.testing.assert_close(
        torch.tensor(first["pairs"]), torch.tensor(single["pairs"]), rtol=0, atol=TOLERANCE["float32"]
    )
    assert first["pairs"][0][0] == first["pairs"][0][1] != first["pairs"][-1][1] != first["pairs"][-1][0]
    paths = [
        tmp_path / folder / f"plain.shadow.{rank}.safetensors" for folder, rank in (("one", 0), ("two", 0), ("two", 1))
    ]
    alone, mine, its = map(load_file, paths)
    assert all(torch.equal(mine[name], its[name]) for name in alone)
    for name, weight in alone.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=TOLERANCE["float32"])
