"""What the arithmetic runs on, and in which numbers."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from meristem.config import ConfigSection


class DeviceConfig(ConfigSection):
    """Device and dtypes. ``auto`` takes what is best here and says so; what is named must be there."""

    outside_identity: ClassVar = frozenset({"device", "compile", "threads"})

    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")
    param_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="dtype in which parameters are stored; first memories, gates and an optimizer's moments stay fp32",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="dtype of matrix products; fp16 brings a loss scale, and is what auto takes on older cards"
    )
    tf32: bool = Field(
        False, description="CUDA: let products of float32 be TF32, but for the solves of memories, which stay exact"
    )
    compile: bool = Field(
        False, description="compile the blocks of the model; the first step then takes minutes on a CPU"
    )
    threads: int | None = Field(None, ge=1, description="threads of CPU operations; null leaves the choice to torch")

    @model_validator(mode="after")
    def _compute_is_no_finer(self) -> Self:
        if self.param_dtype == "bf16" and self.dtype in ("fp32", "fp16"):
            raise ValueError(
                f"parameters stored in bf16 cannot be computed with in {self.dtype}; set compute to bf16 or auto, "
                f"or parameters to fp32"
            )
        return self
