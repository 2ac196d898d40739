"""The decoder under AddressSanitizer and UBSan: random models, odd sizes, buffers exactly as large as they must be."""

import pytest

from meristem.native import build
from meristem.native.library import supported
from native.sanitized import said_by


@pytest.mark.slow
@pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler is here")
@pytest.mark.parametrize("variant", supported())
def test_no_step_leaves_its_buffers_or_the_language(variant, tmp_path):
    """A hundred models, 90 tokens each, in float32 and float64, and draws; some numbers of both are none."""
    assert said_by("decode_driver.cpp", variant, tmp_path, "7", "100") == "9000 steps of 100 models, 2000 draws\n"
