"""A causal language model of ``transformers`` as a model of ours: tokens and state in, logits and state out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from meristem.adapters.base import FrozenWeights, in_shapes
from meristem.adapters.memory import forgotten, reading
from meristem.adapters.remote import located, runs_code
from meristem.errors import CheckpointMismatch
from meristem.extras import imported
from meristem.memory.state import State, rows_apart
from meristem.models.validate import check_tokens
from meristem.nn.documents import Mask, documents_in, read_documents
from meristem.shapes import Logits, Tokens

MOST_READ: Final = 4096
"""Tokens before a call that are read again with it, at most."""

POSITIONS: Final = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""What the settings of a model may call the number of its positions."""


def seen_by(config: Mapping[str, Any]) -> int:
    """How many tokens a host with these settings is given at once."""
    limits = [config[name] for name in POSITIONS if isinstance(config.get(name), int)]
    return min([MOST_READ, *limits])


class HostLM(nn.Module):
    """The host as every model of ours is called.

    State: the last tokens, which are read again with those that follow, as the caches of hosts differ; a call that
    would pass ``window`` first forgets all but the last half of it. ``window`` is the number of positions of the host,
    or ``MOST_READ`` where that is less. Where layers have gained a memory (``adapters.memory``), its state too, which
    knows all that was ever read.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        # Without dropout, which none of our models has: what is measured in training is what is read afterwards.
        self.host = host.eval()
        theirs: Any = host
        self.kind: str = theirs.config.model_type
        self.memories = nn.ModuleDict()
        self.window = seen_by(vars(theirs.config))
        ends = (theirs.get_input_embeddings(), theirs.get_output_embeddings())
        is_end = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
        # What decays, and what a matrix optimizer takes.
        self.matrices = frozenset(
            f"{path}.weight"
            for path, module in self.named_modules()
            if isinstance(module, nn.Linear) and id(module.weight) not in is_end
        )

    def forward(
        self, tokens_bt: Tokens, state: State | None = None, reset_mask_bt: Mask | None = None
    ) -> tuple[Logits, State]:
        """reset_mask_bt: ``(b, t)``, True where a document begins, which is read by itself."""
        check_tokens(tokens_bt, self.window)
        documents = documents_in(tokens_bt, state, reset_mask_bt)
        if documents is None:
            return self._read_on(tokens_bt, state)
        return read_documents(self._read_on, tokens_bt, state, documents)

    @rows_apart
    def _read_on(self, tokens_bt: Tokens, state: State | None) -> tuple[Logits, State]:
        before_bt: Tensor = tokens_bt[:, :0] if state is None else state["tokens_bt"]
        layers: dict[str, State] = {} if state is None else state.get("layer", {})
        room = self.window - tokens_bt.shape[1]
        if before_bt.shape[1] > room:
            n_kept = min(self.window // 2, room)
            before_bt, layers = before_bt[:, before_bt.shape[1] - n_kept :], forgotten(layers, n_kept)
        whole_bt = torch.cat([before_bt, tokens_bt], dim=1)
        with reading(layers) as after:
            logits_bto = self.host(input_ids=whole_bt, use_cache=False).logits[:, before_bt.shape[1] :]
        return logits_bto, {"tokens_bt": whole_bt} | ({"layer": after} if after else {})


def host(_before: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    """The change ``host``: a model of transformers in place of none.

    fields: config, its settings; place, where it came from; and where its weights stay, base as ``FrozenWeights`` says
    it, from which it is loaded. Else its weights are no numbers yet, and are put into it.
    """
    transformers = imported("transformers", "a model of transformers")
    kind = transformers.AutoModelForCausalLM
    settings = dict(fields["config"])
    is_trusted = runs_code(fields["place"], settings)
    if in_shapes() or "base" not in fields:
        if is_trusted:
            config = transformers.AutoConfig.from_pretrained(located(fields["place"]), trust_remote_code=True)
        else:
            config = transformers.AutoConfig.for_model(**settings)
        with imported("transformers.initialization", "a model of transformers").no_init_weights():
            made = kind.from_config(config, dtype=torch.float32, trust_remote_code=is_trusted)
        made.tie_weights()  # what draws no weights ties none
        return HostLM(made)
    base = FrozenWeights.from_json(fields["base"])
    base.weights()  # refuses another base
    return HostLM(loaded(located(base.place), is_trusted=is_trusted))


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without the bars of transformers, which would stand between the lines of a run, while the block lasts."""
    logging = imported("transformers.utils.logging", "a model of transformers")
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def loaded(folder: Path, *, is_trusted: bool) -> nn.Module:
    """A model of transformers with its weights, made in shapes and filled once, in float32."""
    kind = imported("transformers", "a model of transformers").AutoModelForCausalLM
    with no_progress_bars():
        found, told = kind.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=is_trusted, output_loading_info=True
        )
    wrong = sorted({*told["missing_keys"], *told["unexpected_keys"], *map(str, told["mismatched_keys"])})
    if wrong:
        raise CheckpointMismatch(
            f"the weights in {folder} are not those of its config.json: {', '.join(wrong[:4])}"
            f"{' and more' if len(wrong) > 4 else ''}. Use a whole folder.",
            path=str(folder),
            differences=wrong,
        )
    for tensor in (*found.parameters(), *found.buffers()):
        # Mapped from the file they lie otherwise than where they are copied to, and sums may end in other bits.
        tensor.data = tensor.data.clone()
    model: nn.Module = found
    return model
