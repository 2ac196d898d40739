"""Named axes: the legend, and the tensor types built from it.

A letter names the same axis in the type, in the suffix of the local and in the einsum string. Batch and time are free
in every signature; that two arguments share an axis is said by repeating its letter. The test run checks these types
(``tests/shape_plugin.py``); the product run does not pay for them.
"""

from typing import Final

from jaxtyping import Float, Int
from torch import Tensor

LEGEND: Final = {
    "b": "batch",
    "t": "time",
    "s": "time looked at",
    "d": "model width",
    "h": "heads",
    "k": "key width",
    "v": "value width",
    "f": "hidden width",
    "c": "within chunk",
    "n": "chunks",
    "l": "levels",
    "g": "slots",
    "r": "low rank",
    "o": "vocabulary",
}

Tokens = Int[Tensor, "b t"]
Targets = Int[Tensor, "b t"]
Hidden = Float[Tensor, "b t d"]
Logits = Float[Tensor, "b t o"]

Keys = Float[Tensor, "b t h k"]
Queries = Float[Tensor, "b t h k"]
Values = Float[Tensor, "b t h v"]
Gate = Float[Tensor, "b t h"]

Key = Float[Tensor, "b h k"]
Query = Float[Tensor, "b h k"]
Value = Float[Tensor, "b h v"]
Rate = Float[Tensor, "b h"]
MatrixMemory = Float[Tensor, "b h k v"]
Code = Float[Tensor, "b t h g"]
RateRows = Float[Tensor, "b h c"]
