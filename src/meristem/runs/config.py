"""The whole tree of settings, and the rules that hold between its parts."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Final, Self

from pydantic import Field, model_validator

from meristem.adapters.config import FinetuneConfig
from meristem.checkpoint import migrate
from meristem.checkpoint.config import CheckpointConfig
from meristem.config import ConfigSection, Loaded, is_preset, load
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.device.config import DeviceConfig
from meristem.distributed.config import DistributedConfig, require_shardable
from meristem.errors import ConflictingKeys, DeadKey
from meristem.evaluate.config import EvalConfig
from meristem.models.config import HOST, LearnConfig, ModelConfig
from meristem.models.growing import GrowConfig
from meristem.models.layers import MEMORY_KEYS, memory_keys, require_pattern
from meristem.nn.config import MemoryConfig
from meristem.optim.config import OptimConfig, ScheduleConfig
from meristem.safety.config import SafetyConfig
from meristem.sinks.config import SinksConfig
from meristem.train.config import AggregateConfig, GuardConfig, ProfileConfig, RollbackConfig, TrainConfig

MEASURED: Final = ("val/bits_per_byte", "val/nats")
"""What an evaluation during training gives, by the names that checkpoints are ranked by."""


class RunConfig(ConfigSection):
    """What a run is called, where it stands, and what its random numbers come from."""

    outside_identity: ClassVar = frozenset({"name", "dir", "deterministic"})

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name of the run")
    dir: Path = Field(default=Path("runs"), description="directory in which runs get their own")
    seed: int = Field(default=0, ge=0, description="from which every random stream of the run derives")
    deterministic: bool = Field(default=False, description="refuse operations whose result may differ between runs")


class Config(ConfigSection):
    """Everything that can be set. Each part stands beside the code that reads it."""

    outside_identity: ClassVar = frozenset({"distributed", "profile", "learn", "eval", "checkpoint", "sinks", "safety"})

    run: RunConfig = RunConfig()
    device: DeviceConfig = DeviceConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    memory: MemoryConfig = MemoryConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    distributed: DistributedConfig = DistributedConfig()
    aggregate: AggregateConfig = AggregateConfig()
    profile: ProfileConfig = ProfileConfig()
    guard: GuardConfig = GuardConfig()
    rollback: RollbackConfig = RollbackConfig()
    grow: GrowConfig = GrowConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    learn: LearnConfig = LearnConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sinks: SinksConfig = SinksConfig()
    safety: SafetyConfig = SafetyConfig()

    @model_validator(mode="after")
    def _model_fits_its_text(self) -> Self:
        if "max_seq_len" in self.model.reads and self.data.seq_len > self.model.max_seq_len:
            raise ConflictingKeys(
                f"data.seq_len is {self.data.seq_len}, but model '{self.model.name}' sees at most model.max_seq_len="
                f"{self.model.max_seq_len} tokens. Lower data.seq_len, or raise model.max_seq_len.",
                path="data.seq_len",
                value=self.data.seq_len,
            )
        return self

    @model_validator(mode="after")
    def _memory_fits_its_model(self) -> Self:
        has_memory = "mixer" in self.model.reads and set(self.model.mixers) != {"attention"}
        if has_memory and self.model.dim % self.memory.head_dim:
            raise ConflictingKeys(
                f"model.dim {self.model.dim} does not divide into memories of memory.head_dim "
                f"{self.memory.head_dim}. Set memory.head_dim to a divisor of the width.",
                path="memory.head_dim",
                value=self.memory.head_dim,
            )
        return self

    @model_validator(mode="after")
    def _memory_is_read(self) -> Self:
        read = MEMORY_KEYS["memory"] if self.finetune.how == "memory" else memory_keys(self.model)
        given = {key for key, field in MemoryConfig.model_fields.items() if getattr(self.memory, key) != field.default}
        dead = sorted(given - read)
        if dead:
            raise DeadKey(
                f"memory.{', memory.'.join(dead)} given, but no layer of this model reads it; they read "
                f"{', '.join(f'memory.{key}' for key in sorted(read)) or 'nothing of memory'}. Remove the key, or "
                f"choose another model.mixer.",
                path=f"memory.{dead[0]}",
                value=getattr(self.memory, dead[0]),
            )
        return self

    @model_validator(mode="after")
    def _layers_follow_their_pattern(self) -> Self:
        if "pattern" in self.model.reads:
            require_pattern(self.model, self.memory, self.optim.name)
        has_speeds = any(layer.m3_every is not None for layer in self.model.layers)
        if has_speeds and (self.optim.name != "m3" or self.optim.m3_ema):
            raise ConflictingKeys(
                f"layers have an m3_every of their own, and optim.name '{self.optim.name}'"
                f"{' with m3_ema' if self.optim.m3_ema else ''} does not read it. Set optim.name=m3, or remove it.",
                path="model.layers",
                value=self.optim.name,
            )
        return self

    @model_validator(mode="after")
    def _optimizer_works_on_parts(self) -> Self:
        require_shardable(self.distributed, self.optim.name)
        if self.distributed.shard and self.model.name == "charformer" and self.data.resets:
            # Its whole stack reads each document apart, and every call of a block gathers that block's parameters.
            raise ConflictingKeys(
                "distributed.shard is true, model.name 'charformer', and documents begin afresh (data.order=documents, "
                "data.documents=reset): each process would go through the blocks once for every document of its rows, "
                "and they would wait for each other for ever. Set distributed.shard=false, or data.order=shuffled and "
                "data.documents=join.",
                path="distributed.shard",
                value=True,
            )
        return self

    @model_validator(mode="after")
    def _base_goes_with_the_rest(self) -> Self:
        reasons = {
            f"model.name is '{HOST}', which is the base of a fine-tuning": self.model.name == HOST,
        }
        if self.finetune.base is not None:
            reasons = {
                "distributed.shard is true, and a base is loaded whole": self.distributed.shard,
                "grow.enabled is true, and the structure of what is fine-tuned stays": self.grow.enabled,
                "finetune.how is 'memory', which is for a model of transformers": self.finetune.how == "memory"
                and self.model.name != HOST,
                "finetune.how is 'levels', which is for a model of ours": self.finetune.how == "levels"
                and self.model.name == HOST,
            }
        found = [reason for reason, is_so in reasons.items() if is_so]
        if found:
            raise ConflictingKeys(
                f"{'; '.join(found)}. finetune.base is {self.finetune.base}. Change these, or begin with `meristem "
                f"finetune`.",
                path="finetune.base",
                value=self.finetune.base,
            )
        return self

    @model_validator(mode="after")
    def _something_is_measured(self) -> Self:
        if not self.data.validation:
            raise ConflictingKeys(
                "data.validation is 0: no text is left to evaluate on, and checkpoints could not be ranked. "
                "Set it to 0.05 or so.",
                path="data.validation",
                value=self.data.validation,
            )
        if self.checkpoint.metric not in MEASURED:
            raise ConflictingKeys(
                f"checkpoint.metric is '{self.checkpoint.metric}', but training measures {' and '.join(MEASURED)}. "
                "Choose one of these.",
                path="checkpoint.metric",
                value=self.checkpoint.metric,
            )
        return self


def load_config(
    preset_or_file: str,
    overrides: Iterable[str] = (),
    environment: Mapping[str, str] = os.environ,
    *,
    text: str | None = None,
) -> Loaded[Config]:
    """The tree of a preset, or of a YAML file, which is recognised by its ending or by a directory in its name.

    overrides: more files too, each over those before it, and all of them under the settings.
    text: what the file says, where it was read already.
    """
    words = list(overrides)
    files = files_among(words)
    first = [] if is_preset(preset_or_file) else [preset_or_file]
    return load(
        Config,
        preset=None if first else preset_or_file,
        file=[Path(file) for file in (*first, *files)],
        text=text,
        environment=environment,
        overrides=[word for word in words if word not in files],
        read=migrate.settings,
    )


def config_of(directory: Path) -> Config:
    """The settings that a run or a checkpoint was saved with; keys that there were not yet have their default."""
    return load_config(str(directory / "config.yaml"), (), {}).tree


def files_among(words: Iterable[str]) -> list[str]:
    """Of the words of a command line after the first, files and settings, those that name files."""
    return [word for word in words if "=" not in word and not is_preset(word)]
