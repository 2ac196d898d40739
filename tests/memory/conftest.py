"""The laws of the forms hold with the native core and without it."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from memory.inputs import named
from meristem.memory.kernels.fused_form import FORMS
from meristem.memory.kernels.select import force_reference
from meristem.native.library import library


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"name", "form"} <= set(metafunc.fixturenames) and metafunc.module.__name__.endswith("test_forms"):
        ways = ["native", "plain"] if library() is not None else ["plain"]
        metafunc.parametrize("_core", ways, indirect=True)


@pytest.fixture(autouse=True)
def _core(request: pytest.FixtureRequest) -> Iterator[None]:
    with force_reference() if getattr(request, "param", "native") == "plain" else nullcontext():
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What never meets the core is tested once."""
    twice = [item for item in items if _is_doubled(item)]
    if twice:
        config.hook.pytest_deselected(items=twice)
        items[:] = [item for item in items if item not in twice]


def _is_doubled(item: pytest.Item) -> bool:
    given = getattr(getattr(item, "callspec", None), "params", {})
    if given.get("_core") != "native":
        return False
    return given["form"] not in FORMS or not named(given["name"]).is_linear
