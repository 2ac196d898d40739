"""Models of ours as models of ``transformers``: what a folder of ``meristem export hf`` is loaded by.

Importing this module registers the two classes, so that ``AutoModelForCausalLM.from_pretrained`` knows them. The state
that a model carries is the ``cache`` of ``generate``: it is made of rows, which beam search reorders. Padding is left
out of what is read, wherever it stands, so that a row of a batch reads as it would alone.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

import meristem.growth.topology  # noqa: F401 - registers the changes that a grown model is built by
from meristem.errors import CapabilityError, ShapeError
from meristem.export.hf import TYPE
from meristem.memory.state import State, join_rows, select_rows
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.topology import from_json
from meristem.nn.config import MemoryConfig

AT_ONCE: Final = 512
"""Tokens of one forward while a prompt is read, which bounds what a long one needs."""


class MeristemConfig(PreTrainedConfig):
    """The settings of a model of ours, as ``config.json`` holds them.

    lm, memory: the sections ``model`` and ``memory`` of its configuration. topology: the changes of structure that it
    went through. hidden_size, num_hidden_layers: for programs that read them; ``lm`` decides.
    """

    model_type = TYPE

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 4
    use_cache: bool = True
    tie_word_embeddings: bool = False
    lm: dict | None = None
    memory: dict | None = None
    topology: list | None = None


class StateCache(Cache):
    """What the rows of a batch have read, between two calls.

    state: of the rows that have read something. places: where in it each row of the batch is; None of a row that has
    read padding alone. logits_bo: what was predicted for the next token of each row, ``(batch, vocabulary)``.
    n_positions: columns of the batch so far, those of padding included.
    """

    is_compileable = False
    is_linear = (False,)

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state: State | None = None
        self.places: list[int | None] = []
        self.logits_bo: Tensor | None = None
        self.n_positions = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many columns were read."""
        return self.n_positions

    def get_max_length(self, layer_idx: int = 0) -> int:
        """-1: there is no limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        rows = indices.tolist()
        self.places = [self.places[row] for row in rows]
        if self.state is not None:
            kept = [place for place in self.places if place is not None]
            self.state = select_rows(self.state, kept) if kept else None
            count = iter(range(len(kept)))
            self.places = [None if place is None else next(count) for place in self.places]
        if self.logits_bo is not None:
            self.logits_bo = self.logits_bo[indices.to(self.logits_bo.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make ``repeats`` rows of each."""
        self.batch_select_indices(torch.arange(len(self.places)).repeat_interleave(repeats))

    def crop(self, *_arguments: object, **_named: object) -> None:
        """Raise CapabilityError: a memory cannot be made to forget its last tokens."""
        raise CapabilityError(
            "a memory that was written cannot be cut back to an earlier token, as assisted generation needs it. "
            "Generate without an assistant.",
            operation="crop",
            reason="stateful",
        )


class MeristemForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of ours: token ids in, logits out, and what it has read in the ``cache``."""

    config_class = MeristemConfig
    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, config: MeristemConfig) -> None:
        super().__init__(config)
        settings = ModelConfig.model_validate(config.lm or {}), MemoryConfig.model_validate(config.memory or {})
        self.lm = build(*settings, config.vocab_size, 0, from_json(config.topology or []))
        keep_all_buffers(self.lm)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: ``build`` has drawn the first weights, and a file of ours holds all of them."""

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        return self.lm.get_submodule("embedding")

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where the table of tokens is the head too."""
        return getattr(self.lm, "head", None)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Raise CapabilityError: the settings of the model say how many tokens it has."""
        raise CapabilityError(
            "the vocabulary of this model cannot be changed. Train one with another tokenizer.",
            operation="resize",
            reason="fixed vocabulary",
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **given: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The logits ``(batch, time, vocabulary)`` of every column, and the cache after them.

        attention_mask: ``(batch, time)``, or with the columns before as well; 0 is padding, which is not read. Behind
            the text of a row, padding has the logits of the last token; before it, 0.
        labels: ids as ``input_ids``, -100 for none, from which the mean loss of the next token is computed.
        Raises ShapeError for a mask that does not fit, CapabilityError for what this model cannot do.
        """
        refuse(given)
        if input_ids is None:
            raise CapabilityError(
                "no input_ids were given; this model reads nothing else. Pass input_ids.",
                operation="read",
                reason="no input_ids",
            )
        if cache is not None and not isinstance(cache, StateCache):
            raise CapabilityError(
                f"the cache is a {type(cache).__name__}; this model carries a StateCache. Leave cache out, or pass "
                f"the one that it gave.",
                operation="cache",
                reason=type(cache).__name__,
            )
        held = cache if cache is not None else StateCache()
        is_read_bt = _columns(input_ids, attention_mask, held)
        logits = self._read(input_ids, is_read_bt, held)
        loss = None
        if labels is not None:
            counted = {key: given[key] for key in ("num_items_in_batch",) if key in given}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **counted)
        is_kept = self.config.use_cache if use_cache is None else use_cache
        found = CausalLMOutputWithPast(loss=loss, logits=logits, cache=held if is_kept else None)
        return found if return_dict in (None, True) else found.to_tuple()

    def _read(self, input_ids: Tensor, is_read_bt: Tensor, cache: StateCache) -> Tensor:
        """Logits of all columns; the cache moves on."""
        n_rows, n_time = input_ids.shape
        counts = is_read_bt.sum(1).tolist()
        groups: dict[tuple[int, bool], list[int]] = {}
        for row, count in enumerate(counts):
            if count:
                groups.setdefault((count, cache.places[row] is not None), []).append(row)
        logits: Tensor | None = None
        states: list[State] = []
        rows_read: list[int] = []
        for (count, has_read), rows in groups.items():
            is_read = is_read_bt[rows]
            state = _state_of(cache, rows) if has_read else None
            own, after = _forward(self.lm, input_ids[rows][is_read].view(len(rows), count), state)
            if logits is None:
                logits = own.new_zeros(n_rows, n_time, own.shape[-1])
            if len(rows) == n_rows and count == n_time:
                logits = own
            else:
                here, there = is_read.nonzero(as_tuple=True)
                at = torch.tensor(rows, device=input_ids.device)[here]
                logits = logits.index_put((at, there), own.flatten(0, 1))
            states.append(after)
            rows_read += rows
        if logits is None:
            logits = torch.zeros(n_rows, n_time, self.config.vocab_size, dtype=self.dtype, device=input_ids.device)
        idle = [row for row in range(n_rows) if not counts[row] and cache.places[row] is not None]
        if idle:
            states.append(_state_of(cache, idle))
            rows_read += idle
        logits = _behind(logits, is_read_bt, cache)
        cache.state = join_rows(states) if states else None
        places = {row: place for place, row in enumerate(rows_read)}
        cache.places = [places.get(row) for row in range(n_rows)]
        cache.logits_bo = logits[:, -1].detach()
        cache.n_positions += n_time
        return logits

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_arguments: object, **_named: object
    ) -> None:
        """Begin with a cache of ours, unless one was given or none is wanted."""
        if generation_config.cache_implementation is not None:
            raise CapabilityError(
                f"cache_implementation is '{generation_config.cache_implementation}'; this model carries a memory of "
                f"its own. Leave cache_implementation out.",
                operation="cache",
                reason=str(generation_config.cache_implementation),
            )
        if generation_config.use_cache is not False and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = StateCache()


def keep_all_buffers(model: nn.Module) -> None:
    """Have every buffer saved: ``transformers`` makes a model in shapes only and fills it from the file alone."""
    saved = model.state_dict().keys()
    for path, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if f"{path}.{name}".removeprefix(".") not in saved:
                module.register_buffer(name, buffer)


def refuse(given: dict[str, Any]) -> None:
    """Raise CapabilityError for arguments of other models that say something which this one would not do."""
    harmless = {"num_items_in_batch", "logits_to_keep"}
    wanted = [key for key, value in given.items() if key not in harmless and value is not None and value is not False]
    if given.get("logits_to_keep"):
        wanted.append("logits_to_keep")
    if wanted:
        raise CapabilityError(
            f"{', '.join(sorted(wanted))} given; a model of meristem reads input_ids, attention_mask, cache and labels "
            f"alone. Leave the others out.",
            operation="forward",
            reason=", ".join(sorted(wanted)),
        )


def _columns(input_ids: Tensor, attention_mask: Tensor | None, cache: StateCache) -> Tensor:
    """Which columns are read, ``(batch, time)``; makes the rows of a fresh cache."""
    n_rows, n_time = input_ids.shape
    if not cache.places:
        cache.places = [None] * n_rows
    if len(cache.places) != n_rows:
        raise ShapeError(
            f"the cache holds {len(cache.places)} rows, and input_ids has {n_rows}. Pass the rows read before.",
            found=n_rows,
            expected=len(cache.places),
        )
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    shape = tuple(attention_mask.shape)
    if shape not in ((n_rows, n_time), (n_rows, cache.n_positions + n_time)):
        raise ShapeError(
            f"attention_mask has the shape {shape}; expected {(n_rows, n_time)}, or {cache.n_positions} columns more "
            f"for what was read before. Masks between tokens are not read by this model.",
            found=shape,
            expected=(n_rows, n_time),
        )
    return attention_mask[:, -n_time:] != 0


def _state_of(cache: StateCache, rows: Sequence[int]) -> State:
    """The state of some rows of the batch."""
    places = [place for row in rows if (place := cache.places[row]) is not None]
    assert cache.state is not None  # noqa: S101 - a row has a place in it
    return cache.state if places == list(range(len(cache.places))) else select_rows(cache.state, places)


def _forward(model: nn.Module, tokens_bt: Tensor, state: State | None) -> tuple[Tensor, State]:
    """``model(tokens_bt, state)`` in portions that it takes at once."""
    at_once = min(AT_ONCE, getattr(model, "window", None) or AT_ONCE)
    found = []
    for portion_bt in tokens_bt.split(at_once, dim=1):
        logits_bto, state = model(portion_bt, state)
        found.append(logits_bto)
    assert state is not None  # noqa: S101 - there was a token
    return found[0] if len(found) == 1 else torch.cat(found, dim=1), state


def _behind(logits: Tensor, is_read_bt: Tensor, cache: StateCache) -> Tensor:
    """The logits, in which padding behind the text of a row has those of its last token: ``generate`` reads the last
    column, wherever the text ends."""
    if bool(is_read_bt.all()):
        return logits
    place_t = torch.arange(logits.shape[1], device=is_read_bt.device)
    last_bt = torch.where(is_read_bt, place_t, -1).cummax(1).values
    filled = logits.gather(1, last_bt.clamp_min(0)[..., None].expand_as(logits))
    before = torch.zeros_like(logits[:, 0]) if cache.logits_bo is None else cache.logits_bo.to(logits.dtype)
    return torch.where((last_bt < 0)[..., None], before[:, None], filled)


AutoConfig.register(TYPE, MeristemConfig, exist_ok=True)
AutoModelForCausalLM.register(MeristemConfig, MeristemForCausalLM, exist_ok=True)
