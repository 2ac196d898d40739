"""Plain values as JSON, in the one form that checkpoints, snapshots and the journal share."""

import math
from collections.abc import Mapping

import orjson


def to_json(name: str, value: object) -> bytes:
    """JSON of one value. JSON would turn NaN into null unasked, so that is a ValueError that says where it stands."""
    _refuse_nonfinite(name, value)
    return orjson.dumps(value)


def _refuse_nonfinite(where: str, value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"value '{where}' is {value}, which JSON cannot hold; store null or a string in its place")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_nonfinite(f"{where}.{key}", inner)
    if isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _refuse_nonfinite(f"{where}.{index}", inner)
