"""What tests of operations of the native core share."""

from torch import Tensor


def apart(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """How far each result is from the truth, over the truth's length; what is nought has to be."""
    assert found.keys() == truth.keys()
    return {
        name: float((x.double() - truth[name].double()).norm() / truth[name].double().norm().clamp_min(1e-30))
        for name, x in found.items()
    }
