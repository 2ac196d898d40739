"""A folder that ``transformers`` loads, from a checkpoint: weights, settings, tokenizer, model card."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import orjson
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from meristem.adapters.base import WEIGHTS
from meristem.adapters.host import HostLM, no_progress_bars
from meristem.adapters.lora import merged
from meristem.adapters.remote import CONFIG
from meristem.checkpoint.atomic import PARTIAL, disk_full, write_synced
from meristem.checkpoint.store import Checkpoint, find
from meristem.data.files import read
from meristem.data.tokenizer import Tokenizer, library_file
from meristem.device.random import stream
from meristem.errors import CheckpointMismatch, RunError, WrongValue
from meristem.events import Emit
from meristem.export import plain
from meristem.export.card import card
from meristem.extras import imported
from meristem.models.config import ModelConfig
from meristem.models.load import topology_of
from meristem.models.topology import to_json
from meristem.nn.config import MemoryConfig
from meristem.runs.open import load_opened
from meristem.shapes import Tokens

TOKENIZER: Final = "tokenizer.json"
TOKENIZER_SETTINGS: Final = "tokenizer_config.json"
GENERATION: Final = "generation_config.json"
TYPE: Final = "meristem"
"""``model_type`` of a model of ours that is no plain transformer."""

INSIDE: Final = "lm."
"""What the names of its weights begin with in the file."""

CODE: Final = "modeling_meristem.py"
CLASSES: Final = {"AutoConfig": "MeristemConfig", "AutoModelForCausalLM": "MeristemForCausalLM"}
MODELING: Final = '''"""Lets transformers load this folder, with trust_remote_code=True and meristem installed."""

from meristem.export.hub import MeristemConfig, MeristemForCausalLM

__all__ = ["MeristemConfig", "MeristemForCausalLM"]
'''

OF_BASE: Final = (
    TOKENIZER_SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
)
"""Files beside the weights that a fine-tuned host keeps from its base."""

Form = Literal["auto", "plain", "meristem"]

PAD_NAMES: Final = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]", "<PAD>")
"""Special tokens that are taken to fill rows up, where none is named."""

TOLERANCE: Final = 1e-4
"""By how much logits of another program's transformer may differ from ours, relative to the largest."""

_TRIED: Final = (2, 9)
"""Rows and tokens that a written folder is tried with."""


class Padding(NamedTuple):
    """How ``transformers`` fills up the rows of a batch. side: None for what a base says, else left, where ``generate``
    has it. token: a special token by its text; None for what a base says, or for one of ``PAD_NAMES``, but never for
    the one that ends a text."""

    side: Literal["left", "right"] | None = None
    token: str | None = None


USUAL_PADDING: Final = Padding()


class Exported(NamedTuple):
    """What was written. form: ``plain``, or ``meristem``. differs_by: the largest difference of a logit from ours."""

    path: Path
    form: str
    n_parameters: int
    differs_by: float


def export(source: Path, to: Path, *, form: Form, emit: Emit, padding: Padding = USUAL_PADDING) -> Exported:
    """Write the model of a checkpoint, or of the newest of a run, as a new folder, and load it once to compare.

    form: ``plain`` is the weights of a Llama or a Mistral, which needs no meristem where it is loaded, and is refused,
        as a WrongValue, where the model is none; ``meristem`` is any model of ours; ``auto`` is plain where it can be.
    A model that was fine-tuned is written as what its base is, low-rank matrices added to the weights. Nothing is left
    behind where the folder does not load, or gives other logits.
    """
    imported("transformers", "an export for it")
    require_new(to)
    checkpoint = find(source, emit)
    _require_a_place_for_its_state(checkpoint)
    model, tokenizer = load_opened(checkpoint)
    _require_special(tokenizer, padding.token)
    partial = to.with_name(f".{to.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with merged(model) as tensors:
            weights, dtype = one_dtype(tensors)
            if isinstance(model, HostLM):
                made, config = "plain", write_host(partial, model, weights)
            else:
                config, weights = _of_ours(checkpoint, form, weights)
                made = "meristem" if config["model_type"] == TYPE else "plain"
                write_weights(partial, config | {"dtype": str(dtype).removeprefix("torch.")}, weights)
            n_parameters = sum(each.numel() for name, each in model.named_parameters() if ".lora_" not in name)
            text = card(
                to.name,
                checkpoint.settings(),
                checkpoint.manifest,
                config=config,
                n_parameters=n_parameters,
                is_plain=made == "plain",
            )
            write_words(partial, tokenizer, text)
            if isinstance(model, HostLM):
                bring_words(partial, Path(topology_of(checkpoint)[0].fields["place"]))
            write_padding(partial, tokenizer, padding)
            ids_bt = torch.randint(tokenizer.vocab_size, _TRIED, generator=stream(0, "export.hf"))
            differs_by = _compared(partial, model.to(dtype), ids_bt, to, bound=0.0 if made == "meristem" else TOLERANCE)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(to, made, n_parameters, differs_by)


def _require_a_place_for_its_state(checkpoint: Checkpoint) -> None:
    if any(change.name == "memories" for change in topology_of(checkpoint)):
        raise WrongValue(
            f"{checkpoint.path} is a model of transformers that gained a memory, and no class of transformers has a "
            f"place for its state. Use it with meristem: `meristem serve` takes the same path.",
            value=str(checkpoint.path),
        )


def require_new(to: Path) -> None:
    """Raise RunError where something stands already."""
    if to.exists():
        raise RunError(f"{to} exists already, and an export makes a new folder. Name another with --to.", path=str(to))


def one_dtype(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.dtype]:
    """The same tensors, in bytes of their own, and the one dtype that holds them all exactly."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32
    found = {}
    for name, tensor in tensors.items():
        own = tensor.detach().clone().contiguous()
        found[name] = own.to(dtype) if own.is_floating_point() else own
    return found, dtype


def _of_ours(
    checkpoint: Checkpoint, form: Form, weights: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json``, and the weights under the names that they have with it."""
    settings = checkpoint.settings()
    topology = tuple(change for change in topology_of(checkpoint) if change.name != "lora")
    model = ModelConfig.model_validate(settings.get("model", {}))
    wrong = plain.differences(model, topology)
    if form == "plain" and wrong:
        raise WrongValue(
            f"the model of {checkpoint.path} is no plain transformer: {'; '.join(wrong)}. Export it with --form "
            f"meristem, which loads where meristem is installed.",
            value=form,
            reasons=wrong,
        )
    if form != "meristem" and not wrong:
        n_positions = settings.get("data", {}).get("seq_len", plain.FAR)
        return plain.config_of(model, weights, n_positions), plain.to_plain(weights)
    config = {
        "architectures": ["MeristemForCausalLM"],
        "model_type": TYPE,
        "auto_map": {auto: f"{CODE.removesuffix('.py')}.{name}" for auto, name in CLASSES.items()},
        "vocab_size": weights["embedding.weight"].shape[0],
        "hidden_size": model.dim,
        "num_hidden_layers": model.n_layers,
        "tie_word_embeddings": model.tied,
        "lm": model.model_dump(mode="json"),
        "memory": MemoryConfig.model_validate(settings.get("memory", {})).model_dump(mode="json"),
        "topology": to_json(topology),
    }
    return config, {f"{INSIDE}{name}": tensor for name, tensor in weights.items()}


def write_host(place: Path, model: HostLM, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a model of transformers with these weights as it writes itself; its settings."""
    transformers = imported("transformers", "an export for it")
    clean = transformers.AutoModelForCausalLM.from_config(model.host.config)
    clean.load_state_dict({name: weights[f"host.{name}"] for name in clean.state_dict()})
    with disk_full(place), no_progress_bars():
        clean.save_pretrained(place)
    settings: dict[str, Any] = clean.config.to_dict()
    return settings


def write_weights(place: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write what a model of ours is loaded from, and for one that is no plain transformer the code that does it."""
    with disk_full(place):
        place.mkdir(parents=True)
        save_file(dict(weights), place / WEIGHTS, metadata={"format": "pt"})
        write_synced(place / CONFIG, orjson.dumps(config, option=orjson.OPT_INDENT_2))
        if config["model_type"] == TYPE:
            write_synced(place / CODE, MODELING.encode())


def write_words(place: Path, tokenizer: Tokenizer, text: str) -> None:
    """Write the tokenizer and the model card."""
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **_marks(tokenizer),
    }
    with disk_full(place):
        write_synced(place / TOKENIZER, library_file(tokenizer))
        write_synced(place / TOKENIZER_SETTINGS, orjson.dumps(described, option=orjson.OPT_INDENT_2))
        write_synced(place / "README.md", text.encode())


def _marks(tokenizer: Tokenizer) -> dict[str, object]:
    """What begins and ends a text, and how a chat is laid out, in the words of ``transformers``."""
    name_of = {token_id: name for name, token_id in tokenizer.special.items()}
    marks: dict[str, object] = {}
    if tokenizer.bos_id is not None:
        marks |= {"bos_token": name_of[tokenizer.bos_id], "add_bos_token": True}
    if tokenizer.eos_id is not None:
        marks["eos_token"] = name_of[tokenizer.eos_id]
    return marks | ({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def write_padding(place: Path, tokenizer: Tokenizer, padding: Padding) -> None:
    """Say in the settings of the tokenizer how rows are filled up, and to ``generate`` which token ends a text.

    A tokenizer without special tokens has none to fill rows up with: each of its ids is a text.
    """
    path = place / TOKENIZER_SETTINGS
    described = orjson.loads(read(path))
    described["padding_side"] = padding.side or described.get("padding_side") or "left"
    name = padding.token or described.get("pad_token") or _usual_pad(tokenizer)
    if name is not None:
        described["pad_token"] = name
    with disk_full(place):
        write_synced(path, orjson.dumps(described, option=orjson.OPT_INDENT_2))
        text = str(name["content"] if isinstance(name, dict) else name)
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.special.get(text)}
        generation = {f"{mark}_token_id": token_id for mark, token_id in ids.items() if token_id is not None}
        if generation and not (place / GENERATION).exists():
            write_synced(place / GENERATION, orjson.dumps(generation, option=orjson.OPT_INDENT_2))


def _usual_pad(tokenizer: Tokenizer) -> str | None:
    """The special token that fills rows up where none is named, by what it is called."""
    return next((name for name in PAD_NAMES if name in tokenizer.special), None)


def _require_special(tokenizer: Tokenizer, name: str | None) -> None:
    if name is not None and name not in tokenizer.special:
        has = f"it has {', '.join(map(repr, tokenizer.special))}" if tokenizer.special else "it has none"
        raise WrongValue(
            f"--pad-token is {name!r}, and the tokenizer of this checkpoint has no special token of that name: {has}. "
            f"Name one of these, or leave --pad-token out; tokenizer.special_tokens gives a new run some.",
            value=name,
        )


def bring_words(place: Path, base: Path) -> None:
    """Copy what a base says of its tokenizer and of how it writes, such as its chat template; nothing where it is gone.

    base: the folder that a host came from, or its name on the hub, whose files are not fetched for this.
    """
    for name in OF_BASE:
        if (base / name).is_file():
            write_synced(place / name, read(base / name))


@torch.no_grad()
def _compared(place: Path, model: nn.Module, ids_bt: Tokens, to: Path, *, bound: float) -> float:
    """The largest difference of the logits of a folder from those of the model that it was made of.

    bound: that relative to the largest logit, above which CheckpointMismatch is raised.
    """
    imported("meristem.export.hub", "an export for it")
    library = imported("transformers", "an export for it")
    with no_progress_bars():
        loaded = library.AutoModelForCausalLM.from_pretrained(place).eval()
    ours_bto, theirs_bto = model.eval()(ids_bt, None)[0], loaded(input_ids=ids_bt).logits
    differs_by = float((ours_bto - theirs_bto).abs().max())
    if not differs_by <= bound * float(ours_bto.abs().max()):
        raise CheckpointMismatch(
            f"{to} was not written: loaded by transformers, its logits differ by {differs_by:g} from those of the "
            f"checkpoint. Report this; --form meristem may do meanwhile.",
            path=str(to),
            differs_by=differs_by,
        )
    return differs_by
