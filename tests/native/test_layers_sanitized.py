"""What stands around the form under AddressSanitizer and UBSan: any sizes, buffers exactly as large as they must be."""

from pathlib import Path

import pytest

from meristem.native import build
from meristem.native.library import supported
from native.sanitized import said_by


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler is here")
@pytest.mark.parametrize("variant", supported())
def test_no_row_leaves_its_buffers_or_the_language(variant: str, tmp_path: Path) -> None:
    """Two hundred calls of each operation and kind of number, forward and backward, on one to three threads."""
    assert said_by("layers_driver.cpp", variant, tmp_path, "7", "200") == "600 calls\n"
