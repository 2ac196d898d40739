"""One server for all tests of this folder."""

from collections.abc import Iterator

import pytest

from distributed.processes import Stage


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.close()
