"""All processes do it, or none: whatever one of them does meanwhile (growth.md 25)."""

import threading
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed.processes import Stage
from meristem.distributed.agreement import Agreement, Change, Outcome
from meristem.errors import AgreementFailed


def outcomes(stage: Stage, folder: Any, misses: str) -> tuple[list[int], list[list[dict[str, Any]]]]:
    """The codes of two processes that were given three orders, and what those that are left found of each."""
    played = stage.play(2, "agree", folder, misses=misses)
    return played.codes, [played.found(rank)["outcomes"] for rank, code in enumerate(played.codes) if not code]


def test_ka7_all_apply_and_come_out_alike(stage, tmp_path):
    """Order and plan of the first; the same hash in both after each."""
    codes, (first, second) = outcomes(stage, tmp_path, "")
    assert codes == [0, 0] and first == second
    assert [(each["order"], each["held"]) for each in first] == [
        ("first", [0, 1]),
        ("second", [0, 1, 2]),
        ("third", [0, 1, 2, 3]),
    ]


@pytest.mark.fault
@pytest.mark.parametrize(
    "misses, why",
    [
        ("answer", "process 1 did not answer within 2 s"),
        ("will", "process 1 refused: ValueError: no room for this"),
        ("plan", "process 1 has other plan, process 0 has plan of second"),
    ],
)
def test_ka7_a_dropped_answer_means_nobody_applies(stage, tmp_path, misses, why):
    """Late, unwilling or of another plan: both say why, nobody applied, and the next order goes through."""
    codes, (first, second) = outcomes(stage, tmp_path, misses)
    assert codes == [0, 0] and first == second
    assert first[1] == {"order": "second", "against": [why], "held": [0, 1]}
    assert first[2] == {"order": "third", "against": [], "held": [0, 1, 2]}


def test_ka7_other_results_are_undone_everywhere(stage, tmp_path):
    codes, (first, second) = outcomes(stage, tmp_path, "result")
    assert codes == [0, 0] and first == second and len(first) == 2
    assert "did not come out alike, and what they did was undone: process 1 has other" in first[1]["error"]
    assert first[1]["held"] == [0, 1]


@pytest.mark.fault
def test_ka7_killed_before_its_answer(stage, tmp_path):
    """The one that is left learns who is missing, and is as it was."""
    codes, (first,) = outcomes(stage, tmp_path, "life before")
    assert codes == [0, -9]
    assert first[1] == {"order": "second", "against": ["process 1 did not answer within 2 s"], "held": [0, 1]}


@pytest.mark.fault
def test_ka7_killed_while_it_applies(stage, tmp_path):
    """The one that is left has applied, learns that the other did not come through, and takes it back."""
    codes, (first,) = outcomes(stage, tmp_path, "life within")
    assert codes == [0, -9]
    assert "was undone: process 1 did not answer within 2 s" in first[1]["error"]
    assert first[1]["held"] == [0, 1]


@pytest.mark.fault
def test_ka7_the_one_that_decides_is_killed(stage, tmp_path):
    played = stage.play(2, "decider", tmp_path)
    assert played.codes == [-9, 0]
    assert played.found(1)["applied"] == 0 and "Start all of them again" in played.found(1)["error"]


@pytest.mark.fault
def test_killed_in_the_middle_of_a_step(stage, tmp_path):
    """The other one says so at once, and waits for no timeout."""
    (tmp_path / "text.txt").write_text("so says the text. " * 300)
    played = stage.play(2, "killed", tmp_path / "run")
    assert played.codes == [0, -9]
    found = played.found()
    assert found["step"] == 2 and found["seconds"] < 10
    assert "the sum of gradients over 2 processes broke in process 0" in found["error"]
    assert "they go on from the last checkpoint" in found["error"]


@pytest.mark.fault
def test_meetings(stage, tmp_path):
    """Values that must be the same, numbers of all, sums, one that comes late; and the store does not grow."""
    found = stage.play(2, "meet", tmp_path).found()
    assert found["gathered"] == [[0.0, 0.5], [1.0, 0.5]]
    assert found["sums"] == [[3.0, 3.0, 3.0], [2.0, 2.0], 4.0]
    assert found["traffic"] == {"control": 32, "period 8": 12 + 16 + 4}
    assert "do not agree on 'settings': process 1 has 1, process 0 has 0" in found["errors"][0]
    assert "do not agree on 'late': process 1 did not answer within 2 s" in found["errors"][1]
    assert found["n_keys"] < 15, "fifty barriers leave no keys behind"


def test_alone_everything_is_agreed():
    agreement, done = Agreement(0, 1, timeout_s=1), []
    agreement.barrier("start")
    outcome = agreement.commit(b"order", Change(lambda order: "plan", lambda order: done.append(order) or "", list))
    assert outcome == Outcome(True, b"order") and done == [b"order"]
    assert not agreement.commit(b"order", Change(lambda order: 1 / 0, lambda order: "", list)).is_applied


MOODS = ("willing", "willing", "refuses", "plans otherwise", "fails", "comes out otherwise")


@given(st.lists(st.lists(st.sampled_from(MOODS), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_ka7_all_or_none_whatever_the_moods(rounds):
    """Several orders: what lasts in one process lasts in all, and it is what all were willing to do, up to the first
    that was tried and failed: there they end."""
    tried = [n for n, moods in enumerate(rounds) if not {"refuses", "plans otherwise"} & set(moods)]
    failed = [n for n in tried if set(rounds[n]) != {"willing"}]
    assert live(rounds, timeout_s=20) == [[n for n in tried if not failed or n < failed[0]]] * 3


@pytest.mark.fault
@pytest.mark.parametrize("absent", range(3))
def test_ka7_nobody_applies_what_one_is_absent_from(absent):
    moods = ["absent" if rank == absent else "willing" for rank in range(3)]
    assert live([["willing"] * 3, moods, ["willing"] * 3], timeout_s=1.0) == [[0]] * 3


def live(rounds: list[list[str]], timeout_s: float) -> list[list[int]]:
    """The orders that last in each of three processes, here threads around one store."""
    store, held = dist.HashStore(), [[], [], []]
    lives = [
        threading.Thread(target=_live, args=(Agreement(rank, 3, store, timeout_s=timeout_s), rank, rounds, held[rank]))
        for rank in range(3)
    ]
    for thread in lives:
        thread.start()
    for thread in lives:
        thread.join()
    return held


def _live(agreement: Agreement, rank: int, rounds: list[list[str]], held: list[int]) -> None:
    for number, moods in enumerate(rounds):
        mood = moods[rank]
        if mood == "absent":
            return
        try:
            agreement.commit(str(number).encode(), _change(rank, mood, held))
        except AgreementFailed:
            return


def _change(rank: int, mood: str, held: list[int]) -> Change:
    def plan(order: bytes) -> str:
        if mood == "refuses":
            raise ValueError("not now")
        return f"plan {rank}" if mood == "plans otherwise" else "plan"

    def apply(order: bytes) -> str:
        held.append(int(order))
        if mood == "fails":
            raise RuntimeError("half done")
        return f"result {rank}" if mood == "comes out otherwise" else "result"

    return Change(plan, apply, held.pop)
