"""A step of fine-tuning a model of Hugging Face beside the same step as somebody would write it with torch alone."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional

from meristem.bench.measure import Row, Timed, timed
from meristem.data.tokenizer import byte_tokenizer, library_file
from meristem.errors import MissingExtra
from meristem.extras import imported
from meristem.recipes.finetune import prepare, settled
from meristem.recipes.pretrain import training_steps
from meristem.runs.directory import opened
from meristem.runs.resume import Job
from meristem.sinks.console import Console

HOST: Final = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
"""A Llama of 3.3 million parameters."""
SEQ_LEN: Final = 128
BATCH_SIZE: Final = 8
N_STEPS: Final = 5
"""Of one repetition."""


def finetuning(n_repeats: int) -> Iterator[Row]:
    """Time of the processor of a step of ``meristem finetune``, all weights, over that of a plain loop: the same model,
    batches, loss, clipping and optimizer. They are interleaved."""
    name = "step of a fine-tuning over a plain loop"
    try:
        library = imported("transformers", "this figure")
    except MissingExtra as error:
        yield Row(name, None, "x", note=str(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _make_host(library, place / "host")
        text = place / "text.txt"
        text.write_text("".join(f"{n} times {n} is {n * n}, they say.\n" for n in range(20_000)))
        words = [
            f"data.root={place}",
            f"data.seq_len={SEQ_LEN}",
            f"data.batch_size={BATCH_SIZE}",
            "train.max_time=null",
        ]
        words += ["device.device=cpu", "device.dtype=fp32", f"train.steps={(n_repeats + 2) * N_STEPS}"]
        words += ["schedule.shape=constant", "schedule.warmup=0"]
        config = settled(str(place / "host"), [str(text)], "full", words, {})
        with opened(config, place / "run", Console(json=True), is_new=True) as run:
            job = prepare(run, config, None)
            ours = training_steps(job)
            plain = _plain(library, place / "host", job)
            candidates = {"ours": _cpu(lambda: next(ours)), "plain": _cpu(plain)}
            found = _in_turns(candidates, n_repeats)
    ratio = statistics.median(a / b for a, b in zip(found["ours"], found["plain"], strict=True))
    ms = {each: 1e3 * statistics.median(seconds) for each, seconds in found.items()}
    note = f"{ms['ours']:.1f} ms of the processor against {ms['plain']:.1f}, {BATCH_SIZE} x {SEQ_LEN} tokens"
    yield Row(name, ratio, "x", 1.05, "<=", note)


def _in_turns(candidates: Mapping[str, Timed], n_repeats: int) -> dict[str, list[float]]:
    """Seconds of a step in each repetition; one before them warms up."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(n_repeats + 1):
        for name, once in candidates.items():
            seconds = sum(once() for _ in range(N_STEPS)) / N_STEPS
            if repetition:
                found[name].append(seconds)
    return found


def _cpu(step: Callable[[], object]) -> Timed:
    """A candidate whose time of the processor is measured, of all threads."""
    return timed(step, time.process_time)


def _make_host(library: Any, place: Path) -> None:
    torch.manual_seed(0)
    settings = library.AutoConfig.for_model("llama", vocab_size=256, **HOST)
    library.AutoModelForCausalLM.from_config(settings).save_pretrained(place)
    (place / "tokenizer.json").write_bytes(library_file(byte_tokenizer()))


def _plain(library: Any, place: Path, job: Job) -> Callable[[], object]:
    """The step as it is written by hand."""
    optim, stream, cursor = job.config.optim, job.stream, job.state.progress.cursor
    model = library.AutoModelForCausalLM.from_pretrained(place).eval()
    parameters = list(model.parameters())
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)

    def step() -> float:
        nonlocal cursor
        batch, cursor = stream.next(cursor)
        logits_bto = model(input_ids=batch.tokens_bt, use_cache=False).logits
        loss = functional.cross_entropy(logits_bto.flatten(0, 1), batch.targets_bt.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step
