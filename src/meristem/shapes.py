"""Named axes: the legend, and the tensor types built from it.

A letter names the same axis in the type, in the suffix of the local and in the einsum string. Batch and time are free
in every signature; that two arguments share an axis is said by repeating its letter. The test run checks these types
(``tests/shape_plugin.py``); the product run does not pay for them.

Since everything that computes comes past here, this is also where a torch that is too old is refused.
"""

from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.torch_version import TorchVersion

from meristem.errors import CapabilityError

OLDEST_TORCH: Final = "2.13"
"""The one torch that the code is written for: nothing checks a version, or for what a version has, a second time."""

if TorchVersion(torch.__version__) < OLDEST_TORCH:
    raise CapabilityError(
        f"torch {torch.__version__} is installed, and meristem needs {OLDEST_TORCH} or newer. "
        f"pip install --upgrade 'torch>={OLDEST_TORCH}'",
        operation="import",
        found=str(torch.__version__),
        expected=OLDEST_TORCH,
    )

LEGEND: Final = {
    "b": "batch",
    "t": "time",
    "s": "time of keys",
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
Mixed = Float[Tensor, "b t f"]
"""What heads give, side by side: as wide as a hidden vector, but where the residual stream was widened since."""

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
