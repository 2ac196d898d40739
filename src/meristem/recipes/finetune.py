"""Training that begins from weights: all of them, matrices of low rank beside them, memories in them, or levels."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

import meristem.adapters.changes  # noqa: F401 - registers the changes by which such models are built
from meristem.adapters.base import FrozenWeights, pinned, tree_of, weights_in
from meristem.adapters.config import How
from meristem.adapters.host import HostLM, loaded, seen_by
from meristem.adapters.levels import levels_of
from meristem.adapters.lora import matched, targets_for
from meristem.adapters.memory import chosen_layers
from meristem.adapters.remote import described, is_folder, located, permitting, runs_code
from meristem.checkpoint.store import Checkpoint, find
from meristem.config import dump_yaml
from meristem.data.config import DataConfig
from meristem.data.given import of_folder
from meristem.data.tokenizer import Tokenizer, tokenizer_from_bytes
from meristem.errors import ConflictingKeys, DataError, WrongValue
from meristem.events import Event, silent
from meristem.extras import require
from meristem.models.build import build
from meristem.models.config import HOST
from meristem.models.load import topology_of
from meristem.models.topology import Change, Topology, changed
from meristem.recipes.pretrain import Result, prepare_job, pretrain
from meristem.runs.config import Config, load_config
from meristem.runs.directory import Run
from meristem.runs.resume import Job
from meristem.sinks.console import Console

FINETUNED: Final = ("host", "lora", "memories")
"""Changes that only a fine-tuning makes."""

KEPT: Final = ("model", "memory", "tokenizer")
"""The sections of the settings of a base that hold for what is trained on it."""


def settled(
    base: str, data: Sequence[str], how: How, overrides: Sequence[str], environment: Mapping[str, str] = os.environ
) -> Config:
    """The settings of a fine-tuning: those of the base, and what is given over them.

    base: as ``finetune.base``; of a run the newest checkpoint is taken. data: sources, as ``data.source``.
    """
    path = pinned(located(base))
    if is_folder(path) or how == "lora":
        require("transformers", f"--how {how} of {base}")
    if how == "lora":
        require("peft", f"--how {how}")
    if is_folder(path):
        tokenizer = of_folder(path)
        tree: dict[str, Any] = {
            "model": {"name": HOST},
            "tokenizer": _kept(tokenizer, path),
            "eval": {"learn_rate": False},
            "data": {"seq_len": min(DataConfig().seq_len, seen_by(described(path)))},
        }
    else:
        saved = _unrested(find(path, silent)).settings()
        tree = {key: saved[key] for key in KEPT if key in saved}
        tree["data"] = {key: value for key, value in saved.get("data", {}).items() if key == "seq_len"}
        tree["eval"] = {"learn_rate": how == "full" and saved.get("eval", {}).get("learn_rate", True)}
    # Absolute, so that what is saved finds it from anywhere; a model of the hub by its name.
    place = base if not os.path.exists(base) else str(path)
    tree["finetune"] = {"base": place, "how": how}
    tree["run"] = {"name": "finetune"}
    if how == "levels":
        tree["model"] = tree["model"] | {"mlp": "levels"}
    if data:
        tree["data"] = tree.get("data", {}) | {"source": "+".join(data)}
    return load_config(str(path / "config.yaml"), overrides, environment, text=dump_yaml(tree)).tree


def _unrested(base: Checkpoint) -> Checkpoint:
    """The same checkpoint. WrongValue where it was fine-tuned in a way that only its own run goes on with."""
    if any(change.name in FINETUNED for change in topology_of(base)):
        raise WrongValue(
            f"{base.path} is a fine-tuned model itself. Go on with its run (`meristem train` takes its config.yaml), "
            f"or export it with `meristem export hf` and name the folder.",
            value=str(base.path),
        )
    return base


def finetune(
    config: Config, *, run_dir: Path | None = None, resume: str = "auto", view: Console | None = None
) -> Result:
    """Train on from ``config.finetune.base``; the arguments are those of ``pretrain``."""
    with permitting(config.finetune.remote_code):
        return pretrain(config, run_dir=run_dir, resume=resume, view=view, make_job=prepare)


@dataclass(frozen=True)
class _Start:
    """What a run that begins has of its base.

    topology: of the model that is trained. checkpoint: whose weights it begins with; None where ``fill`` brings them,
    or where they come with the topology.
    """

    tokenizer: Tokenizer
    topology: Callable[[int], Topology]
    checkpoint: Checkpoint | None = None
    fill: Callable[[torch.nn.Module], None] = lambda model: None


def prepare(run: Run, config: Config, checkpoint: Checkpoint | None) -> Job:
    """The job of a fine-tuning: where it goes on, from its checkpoint alone but for weights that stay."""
    if checkpoint is None:
        is_theirs = is_folder(located(config.finetune.base or ""))
        start = _of_folder(config) if is_theirs else _of_checkpoint(config)
    else:
        topology = topology_of(checkpoint)
        start = _Start(tokenizer_from_bytes(checkpoint.file("tokenizer.json")), lambda vocabulary: topology)
    job = prepare_job(
        run,
        config,
        checkpoint,
        lambda _, vocabulary, topology: start.topology(vocabulary),
        tokenizer=start.tokenizer,
        begins_from=start.checkpoint,
    )
    if checkpoint is None:
        start.fill(job.model)
    _require_window(config, job.model)
    counts = {
        "n_trained": sum(each.numel() for each in job.model.parameters() if each.requires_grad),
        "n_parameters": sum(each.numel() for each in job.model.parameters()),
    }
    how = config.finetune.how
    run.emit(Event("finetune.prepared", {"base": config.finetune.base, "how": how, **counts}))
    run.view.note(f"{how}: {counts['n_trained']:,} of {counts['n_parameters']:,} parameters are trained")
    return job


def _of_checkpoint(config: Config) -> _Start:
    """From a model of ours."""
    part = config.finetune
    base = find(Path(part.base or ""), silent)
    tokenizer, before = tokenizer_from_bytes(base.file("tokenizer.json")), topology_of(base)
    if part.how == "full":
        return _Start(tokenizer, lambda vocabulary: before, base)
    if part.how == "levels":
        return _Start(tokenizer, lambda vocabulary: before, fill=partial(levels_of, base, config.model, tree_of(base)))
    record = FrozenWeights.of(str(part.base), tree_of(base))

    def with_lora(vocabulary: int) -> Topology:
        with torch.device("meta"):
            model = build(config.model, config.memory, vocabulary, 0, before)
        return (*before, _lora(config, record, model))

    return _Start(tokenizer, with_lora)


def _of_folder(config: Config) -> _Start:
    """From a model of transformers."""
    part = config.finetune
    folder = located(part.base or "")
    settings = described(folder)
    is_trusted = runs_code(str(part.base), settings)
    tokenizer = of_folder(folder)
    _require_rows(folder, settings, tokenizer)
    fields: dict[str, Any] = {"config": settings, "place": str(part.base)}
    if part.how == "full":

        def fill(model: torch.nn.Module) -> None:
            weights = loaded(folder, is_trusted=is_trusted).state_dict()
            model.load_state_dict({f"host.{name}": tensor for name, tensor in weights.items()})

        return _Start(tokenizer, lambda vocabulary: (Change("host", fields),), fill=fill)
    record = FrozenWeights.of(str(part.base), weights_in(folder))
    bare = Change("host", fields)
    with torch.device("meta"):
        model = changed(torch.nn.Identity(), (bare,))
    second = _lora(config, record, model) if part.how == "lora" else _memories(config, model)
    log = (Change("host", fields | {"base": record.to_json()}), second)
    return _Start(tokenizer, lambda vocabulary: log)


def _lora(config: Config, base: FrozenWeights, model: torch.nn.Module) -> Change:
    part = config.finetune
    return Change(
        "lora",
        {
            "rank": part.rank,
            "alpha": part.alpha,
            "dropout": part.dropout,
            "targets": matched(model, part.targets or targets_for(model)),
            "random_seed": config.run.seed,
            "base": base.to_json(),
        },
    )


def _memories(config: Config, model: torch.nn.Module) -> Change:
    return Change(
        "memories",
        {
            "layers": chosen_layers(model.get_submodule("host"), config.finetune.layers),
            "memory": config.memory.model_dump(mode="json"),
            "random_seed": config.run.seed,
        },
    )


def _kept(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """The settings of the tokenizer of a folder: those that make such a one, where some do."""
    if tokenizer.kind == "byte" and not tokenizer.special:
        return {"kind": "byte"}
    if tokenizer.kind == "bpe" and tokenizer.loses is None and not tokenizer.special:
        return {"kind": "bpe", "vocab_size": tokenizer.vocab_size}
    return {"kind": "file", "path": str(folder)}


def _require_rows(folder: Path, settings: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with ids for which the embedding has no row."""
    n_rows = settings.get("vocab_size")
    if isinstance(n_rows, int) and tokenizer.vocab_size > n_rows:
        raise DataError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} entries, and the model {n_rows} rows for them. Put "
            f"the tokenizer of this model there.",
            found=tokenizer.vocab_size,
            expected=n_rows,
        )


def _require_window(config: Config, model: torch.nn.Module) -> None:
    most = model.window if isinstance(model, HostLM) else config.data.seq_len
    if config.data.seq_len > most:
        raise ConflictingKeys(
            f"data.seq_len is {config.data.seq_len}, but the host sees at most {most} tokens. Lower data.seq_len.",
            path="data.seq_len",
            value=config.data.seq_len,
        )
