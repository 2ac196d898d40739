"""What stands in the place of a library in another process, and hangs or dies."""

import os
import time
from typing import Any


def changes_in(payload: dict[str, Any]) -> list[Any]:
    if payload["place"].endswith("hangs"):
        time.sleep(60)
    return [0, []]


def row_in(payload: dict[str, Any]) -> dict[str, Any]:
    origin = {"blueprint": "norm", "version": 1, "settings": {}}
    weights = {"path": "x", "sha256": "y", "size_bytes": 1, "fitting": None}
    name = payload["name"]
    return {"name": name, "version": 1, "origin": origin, "trust": "safe", "created": 0.0, "handling": None} | {
        "weights": weights
    }


def copy_in(payload: dict[str, Any]) -> str:
    if payload["row"]["name"] == "dies":
        os._exit(3)
    time.sleep(60)
    return ""
