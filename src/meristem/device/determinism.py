"""The switch that makes a run the same every time, or stops it where that cannot be."""

import os

import torch

from meristem.errors import CapabilityError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def be_deterministic() -> None:
    """From here on every operation gives the same bits each time; one that cannot raises and names itself.

    Must be called before the accelerator starts, since cuBLAS reads its setting then.
    """
    if torch.cuda.is_initialized() and os.environ.get(_CUBLAS) not in (":4096:8", ":16:8"):
        raise CapabilityError(
            f"CUDA has started without {_CUBLAS}, so its products may differ from run to run. "
            f"Switch run.deterministic on before any CUDA work, or start with {_CUBLAS}=:4096:8.",
            device="cuda",
            reason="started too early",
        )
    os.environ.setdefault(_CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    if torch.cuda.is_available():
        # One attention on every call: the choice among several depends on shapes and versions. The CPU has one anyway,
        # and these switches would turn it off there too.
        _use_plain_attention()


def _use_plain_attention() -> None:
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)
