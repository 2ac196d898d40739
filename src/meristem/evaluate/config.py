"""Settings of evaluation."""

from pydantic import Field

from meristem.config import ConfigSection


class EvalConfig(ConfigSection):
    """When the held-out text is read during a run, how much of it, and what the model generates at the end."""

    every: int | None = Field(default=250, ge=1, description="steps between two evaluations; null: by the clock alone")
    every_s: float | None = Field(default=None, gt=0, description="seconds of training between two evaluations")
    n_windows: int = Field(default=64, ge=1, description="held-out sequences read each time, spread over the text")
    n_windows_end: int = Field(default=256, ge=1, description="held-out sequences read at the end of the run")
    batch_size: int = Field(default=16, ge=1, description="sequences read at once")
    n_samples: int = Field(default=3, ge=0, description="texts written at the end of the run")
    sample_tokens: int = Field(default=200, ge=1, description="tokens of each such text")
    temperature: float = Field(default=0.8, gt=0, description="of these texts; small is careful, large is wild")
    reading_tokens: int = Field(
        default=4096,
        ge=0,
        description="tokens of the longest held-out document that are read at the end of a long enough run: static, "
        "with a memory and with weights that learn; 0 for none",
    )
    learn_rate: bool = Field(
        default=True, description="find the rate of weights that learn while they read, at the end of a run"
    )
