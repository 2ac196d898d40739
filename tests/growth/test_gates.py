"""Gates: what is not measured fails, and each check decides (growth.md 13): K4, K5, G0 to G6."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.events import Event
from meristem.growth import gates
from meristem.growth.gates import Check, GateResult
from meristem.growth.measure import expected, spread
from meristem.growth.observe import HeldOut
from meristem.growth.seed import Origin
from meristem.growth.stage import Life, Paired
from meristem.models.growing import GatesConfig

LIFE = Life("blocks.1#0", "blocks.1", Origin.of("norm", {}, blend="residual", random_seed=0), born=0, since=100)
CONFIG = GatesConfig()
STEP = 1000


def paired(mean: float, n: int = 32) -> Paired:
    found = Paired()
    for index in range(n):
        found = found.add(mean + 1e-4 * (index % 2 * 2 - 1))
    return found


GOOD: dict[str, tuple[Any, Callable[[Any], GateResult]]] = {
    "G0": (
        gates.Sanity(True, True, False, False, params_ratio=1.1, flops_ratio=1.1, adds=0.0, is_finite=True),
        lambda found: gates.sanity(LIFE, found, params_ratio=4.0, flops_ratio=4.0, step=STEP),
    ),
    "G1": (
        gates.Health(
            changes=0.0,
            n_reached=1,
            is_owned=True,
            is_grouped=True,
            is_stored=True,
            is_isolated=True,
            is_certified=True,
        ),
        lambda found: gates.health(LIFE, found, changes_most=0.0, step=STEP, needs_certificate=True),
    ),
    "G2": (
        gates.Stability(gained=paired(0.01), gradient_ratio=0.1),
        lambda found: gates.stability(LIFE, found, CONFIG, step=STEP),
    ),
    "G3": (
        gates.Interface(weight=0.7, size_ratio=1.0, spread_ratio=1.0, needed=("a",), registered=("a", "b")),
        lambda found: gates.interface(LIFE, found, CONFIG, target=0.7, step=STEP),
    ),
    "G4": (
        gates.Impact(3.0, expected=3.0, error=0.01, is_fallback=False, quiet_steps=50, is_resumed=True),
        lambda found: gates.impact(LIFE, found, CONFIG, step=STEP),
    ),
    "G5": (
        gates.Cleared(True, n_left=0, is_disowned=True, is_host_only=True, before="a", after="a", is_locked=False),
        lambda found: gates.cleared(LIFE, found, step=STEP),
    ),
    "G6": (
        gates.Contribution(gained=paired(0.02), params_share=0.1, flops_share=0.1, recovered=0.006),
        lambda found: gates.contribution(LIFE, found, CONFIG, min_age=200, step=STEP),
    ),
}
"""By gate: evidence that passes, and how the gate is asked."""

BAD: dict[str, dict[str, Any]] = {
    "G0": {
        "is_known": False,
        "is_empty": False,
        "is_locked": True,
        "is_blocked": True,
        "params_ratio": 4.1,
        "flops_ratio": 4.1,
        "adds": 1e-9,
        "is_finite": False,
    },
    "G1": {
        "changes": 1e-9,
        "n_reached": 0,
        "is_owned": False,
        "is_grouped": False,
        "is_stored": False,
        "is_isolated": False,
        "is_certified": False,
    },
    "G2": {"gained": paired(0.001), "gradient_ratio": 1e-4},
    "G3": {"weight": 0.69, "size_ratio": 4.1, "spread_ratio": 2.1, "registered": ()},
    "G4": {"held_out": 3.07, "is_fallback": True, "quiet_steps": 49, "is_resumed": False},
    "G5": {
        "is_empty": False,
        "n_left": 1,
        "is_disowned": False,
        "is_host_only": False,
        "after": "b",
        "is_locked": True,
    },
    "G6": {"gained": paired(0.009), "recovered": 0.004},
}
"""What fails, one at a time."""

UNNEEDED = {"needed", "registered", "has_room"}
"""Evidence that is given and not measured."""


@pytest.mark.parametrize("gate", GOOD)
def test_good_evidence_passes(gate: str) -> None:
    evidence, ask = GOOD[gate]
    found = ask(evidence)
    assert found.passed and found.gate == gate and found.code == gate
    assert GateResult.from_json(found.to_json()) == found
    assert GateResult.from_json(found.told().to_json() | {"code": found.code}) == found


@pytest.mark.parametrize(
    ("gate", "name"), [(gate, each.name) for gate, (evidence, _) in GOOD.items() for each in fields(evidence)]
)
def test_what_was_not_measured_fails(gate: str, name: str) -> None:
    """Each number in turn is missing, or is none."""
    if name in UNNEEDED:
        return
    evidence, ask = GOOD[gate]
    absent = [None] if isinstance(getattr(evidence, name), bool | str | Paired) else [None, math.nan]
    for value in absent:
        found = ask(replace(evidence, **{name: value}))
        assert not found.passed and "unmeasured" in [check.status for check in found.checks]
        assert found.code.endswith(":unmeasured")


@pytest.mark.parametrize(("gate", "name"), [(gate, name) for gate, each in BAD.items() for name in each])
def test_each_check_can_fail(gate: str, name: str) -> None:
    evidence, ask = GOOD[gate]
    found = ask(replace(evidence, **{name: BAD[gate][name]}))
    assert [check.status for check in found.checks].count("fail") == 1
    assert found.code.endswith(":fail")


def test_k4_the_interface_gate_names_the_host_layers_that_are_missing() -> None:
    evidence, ask = GOOD["G3"]
    heard: list[Event] = []
    found = ask(replace(evidence, needed=("a", "b"), registered=("a",))).told(heard.append)
    assert not found.passed and found.missing == ("b",)
    assert [(event.name, event.payload.get("missing")) for event in heard if "mesh" in event.name] == [
        ("mesh_coverage_missing", ["b"])
    ]


def test_k5_the_impact_gate_never_passes_a_fallback() -> None:
    """However good it is, and with a critical event; the same evidence of a nominal seed passes."""
    evidence, ask = GOOD["G4"]
    heard: list[Event] = []
    assert not ask(replace(evidence, held_out=1.0, is_fallback=True)).told(heard.append).passed
    assert [event.severity for event in heard][-1] == "critical"
    assert ask(replace(evidence, held_out=1.0)).told().passed


@pytest.mark.parametrize(
    ("recovery", "has_room", "passes"),
    [("required", False, False), ("if_room", False, True), ("if_room", True, False), ("off", True, True)],
)
def test_g6_without_a_recovery_fails_unless_the_settings_say_otherwise(recovery, has_room, passes) -> None:
    config = GatesConfig(recovery=recovery)
    found = replace(GOOD["G6"][0], recovered=None, has_room=has_room)
    assert gates.contribution(LIFE, found, config, min_age=200, step=STEP).passed == passes


def test_g1_asks_a_joint_seed_for_no_isolation() -> None:
    evidence, _ = GOOD["G1"]
    joint = replace(LIFE, way="joint")
    assert gates.health(joint, replace(evidence, is_isolated=None), changes_most=0.0, step=STEP).passed


@pytest.mark.parametrize(("step", "since"), [(299, 100), (1000, 801)])
def test_g2_is_not_before_its_time(step: int, since: int) -> None:
    found = gates.stability(replace(LIFE, since=since), GOOD["G2"][0], CONFIG, step=step)
    assert found.code == "G2.age:fail"


@given(
    st.floats(-1e3, 1e3),
    st.none() | st.floats(-1e3, 1e3),
    st.none() | st.floats(-1e3, 1e3),
)
def test_a_check_passes_between_its_ends(value: float, least: float | None, most: float | None) -> None:
    found = Check.of("it", value, least=least, most=most)
    assert (found.status == "pass") == ((least is None or value >= least) and (most is None or value <= most))


def test_the_line_through_evaluations_goes_on_and_knows_how_far_it_may_be_off() -> None:
    """Exact on a line; wider for scattered points; nothing of two points, nor of those after the graft."""

    def points(noise: float) -> list[HeldOut]:
        return [
            HeldOut(step, 100 * step, 0.0, 5 - 0.3 * math.log(100 * step) + noise * (-1) ** step)
            for step in range(1, 30)
        ]

    line = expected(points(0.0), born=25, tokens=10_000)
    assert line is not None and line[0] == pytest.approx(5 - 0.3 * math.log(10_000)) and line[1] < 1e-6
    scattered = expected(points(0.01), born=25, tokens=10_000)
    assert scattered is not None and 0.01 < scattered[1] < 0.1
    assert expected(points(0.0), born=2, tokens=10_000) is None


def test_spread_is_around_the_line() -> None:
    assert spread([5 - 0.1 * step for step in range(50)]) == pytest.approx(0, abs=1e-9)
    assert spread([5 - 0.1 * step + 0.2 * (-1) ** step for step in range(50)]) == pytest.approx(0.2, rel=0.05)
    assert spread([1.0, 2.0]) is None
