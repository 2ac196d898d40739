"""The model card of an exported folder: what the model is, what it has read, what was measured, what it cannot do."""

from collections.abc import Mapping
from typing import Any, Final

from meristem import __version__

FRONT: Final = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- meristem
---
"""

LOADED_PLAIN: Final = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```
"""

LOADED_OURS: Final = """```python
import meristem.export.hub  # registers the model; or pass trust_remote_code=True, with meristem installed
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

What the model has read is in the `cache` that it gives: pass it on and the memory goes on. Beam search and padding on
either side give what each row gives alone. An assistant model, `inputs_embeds`, `position_ids`, masks between tokens
and caches of other kinds raise an error.
"""

LIMITS: Final = (
    "The figures are of held-out text from its own source; of other text nothing was measured.",
    "Nothing was done to keep it from writing what is wrong, private or harmful. Read what it writes.",
    "Pass `attention_mask` with a padded batch and `max_new_tokens`. A tokenizer of bytes has no token for padding and "
    "none that ends a text: set `tokenizer.pad_token_id = 0` before rows of several lengths are encoded together.",
    "Weights that learn while it reads (`--learn weights`, `--learn levels`) are not part of the export.",
)


def card(
    name: str, settings: Mapping[str, Any], manifest: Mapping[str, Any], *, n_parameters: int, is_plain: bool
) -> str:
    """The text of ``README.md``.

    name: of the folder. settings, manifest: of the checkpoint, as far as it has them.
    """
    model, data, memory = (settings.get(key, {}) for key in ("model", "data", "memory"))
    kind = model.get("name", "lm")
    what = {
        "model": f"{kind}, {model.get('n_layers', '?')} layers of width {model.get('dim', '?')}",
        "token mixer": model.get("mixer") if kind == "lm" else None,
        "memory rule": memory.get("rule") if kind == "lm" and model.get("mixer") != "attention" else None,
        "parameters": f"{n_parameters:,}",
        "made by": f"meristem {__version__}",
    }
    read = {
        "source": data.get("source"),
        "tokens read": None if manifest.get("tokens") is None else f"{manifest['tokens']:,}",
        "sequence length": data.get("seq_len"),
        "fingerprint of the text": manifest.get("dataset_fingerprint"),
        "fingerprint of the tokenizer": manifest.get("tokenizer_fingerprint"),
        "run": manifest.get("run"),
        "step": manifest.get("step"),
    }
    metrics = {key: f"{value:.4f}" for key, value in manifest.get("metrics", {}).items() if value is not None}
    loaded = (LOADED_PLAIN if is_plain else LOADED_OURS).replace("DIR", name)
    limits = "\n".join(f"- {limit}" for limit in LIMITS[: 3 if is_plain else 4])
    return "\n".join(
        (
            f"{FRONT}\n# {name}\n",
            _table(what),
            "## Use\n",
            loaded,
            "## Data\n",
            _table(read),
            "## Figures\n",
            _table(metrics) if metrics else "None were measured when this checkpoint was saved.\n",
            "## Limits\n",
            limits,
            "",
        )
    )


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(("| | |", "|---|---|", *lines, ""))
