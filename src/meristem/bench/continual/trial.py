"""One arm from one host: it learns the second text, and both are measured."""

import hashlib
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from typing import Final

import torch
from torch import Tensor, nn

import meristem.growth as grow
from meristem.bench.continual.host import Texts, grow_beside, reader, slotted
from meristem.bench.continual.settings import ArmConfig, ContinualConfig, HostConfig
from meristem.bench.trial import Outcome
from meristem.data.corpus import Corpus
from meristem.data.stream import Batch, Stream, held_out
from meristem.device.describe import hardware
from meristem.errors import NonFinite
from meristem.evaluate.likelihood import Likelihood, Reader, likelihood
from meristem.memory.state import State
from meristem.nn.auxiliary import auxiliary
from meristem.optim.config import ScheduleConfig
from meristem.optim.schedule import ScheduleProgress, rate_factor
from meristem.train.loss import cross_entropy

CLIP: Final = 1.0
"""Largest norm of a gradient."""


@dataclass(frozen=True)
class Trial:
    """An arm of a host from one random seed. size: the value of its sized setting. fingerprint: of all that decides
    its outcome."""

    host: str
    arm: str
    size: int | None
    random_seed: int
    rate: float
    n_tokens: int
    fingerprint: str

    @property
    def name(self) -> str:
        """As ``ours, block, seed 0 at 0.003``."""
        return f"{self.host}, {self.arm}, seed {self.random_seed} at {self.rate:g}"


@dataclass(frozen=True)
class Trained:
    """A host after the first text, and what was measured of it. digest: of its logits on held-out text of the first."""

    model: nn.Module
    first: Likelihood
    second: Likelihood
    digest: str


def trained_host(tree: ContinualConfig, host: HostConfig, texts: Texts, model: nn.Module, random_seed: int) -> Trained:
    """Train a host with first weights on the first text, in place."""
    model = model.to(texts.device.device)
    batches = _batches(texts, texts.first, random_seed)
    learn(model, host, batches, texts, rate=host.rate, n_tokens=tree.first_tokens)
    first, digest = measured(model, host, texts, texts.first, tree.n_windows)
    return Trained(model, first, measured(model, host, texts, texts.second, tree.n_windows)[0], digest)


def run(tree: ContinualConfig, trial: Trial, texts: Texts, held: Trained) -> Outcome:
    """Let a copy of the host learn the second text as the arm says, and measure it with its seeds on and off.

    ``on/TEXT`` and ``off/TEXT``: bits per byte of held-out text; ``before/TEXT`` those of the host. ``is_same``: 1
    where every logit of the first text is, with the seeds off, the same bits as before. Without seeds there is no off.
    """
    host, model = tree.hosts[trial.host], deepcopy(held.model)
    arm = host.arms[trial.arm]
    grow_beside(model, slotted(model, arm, trial.size), random_seed=trial.random_seed)
    began, found = time.perf_counter(), hardware()
    chip = found["cpu"] if texts.device.device.type == "cpu" or not found["gpus"] else found["gpus"][0]["name"]
    try:
        batches = _mixed(texts, arm, trial.random_seed)
        learn(model, host, batches, texts, rate=trial.rate, n_tokens=trial.n_tokens)
    except NonFinite as cause:
        return Outcome(trial.name, trial.fingerprint, {}, (), chip, str(cause))
    figures = {"seconds": time.perf_counter() - began, "before/first": held.first.bits_per_byte}
    figures["before/second"] = held.second.bits_per_byte
    figures["on/first"] = measured(model, host, texts, texts.first, tree.n_windows)[0].bits_per_byte
    figures["on/second"] = measured(model, host, texts, texts.second, tree.n_windows)[0].bits_per_byte
    if arm.seeds:
        for slot in grow.seeds_in(model):
            grow.set_blend(model, slot, 0)
        off, digest = measured(model, host, texts, texts.first, tree.n_windows)
        figures |= {"off/first": off.bits_per_byte, "is_same": float(digest == held.digest)}
    return Outcome(trial.name, trial.fingerprint, figures, (), chip)


def learn(
    model: nn.Module, host: HostConfig, batches: Iterator[Batch], texts: Texts, *, rate: float, n_tokens: int
) -> None:
    """A plain loop of torch over what learns in a model: AdamW, warm-up and cosine to a tenth, no decay of weights.

    Raises NonFinite where a gradient is not finite.
    """
    model.train()
    read, schedule = reader(model, host), ScheduleConfig()
    learning = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    n_steps = max(1, n_tokens // (texts.config.data.seq_len * texts.config.data.batch_size))
    for step in range(n_steps):
        batch = next(batches)
        factor = rate_factor(schedule, ScheduleProgress(share=step / n_steps, step=step, tokens=0))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        tokens_bt, targets_bt = texts.device.move(batch.tokens_bt, batch.targets_bt)
        logits_bto, state = read(tokens_bt, None)
        loss, own = cross_entropy(logits_bto, targets_bt) / batch.n_targets, auxiliary(state)
        (loss if own is None else loss + own).backward()
        if not nn.utils.clip_grad_norm_(learning, CLIP).isfinite():
            raise NonFinite(f"the gradient of step {step} is not finite. Lower the rate, {rate:g}.", step=step)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def measured(
    model: nn.Module, host: HostConfig, texts: Texts, corpus: Corpus, n_windows: int
) -> tuple[Likelihood, str]:
    """The likelihood of held-out text, and the SHA-256 of all its logits."""
    model.eval()
    read, digest = reader(model, host), hashlib.sha256()

    def hashed(tokens_bt: Tensor, state: State | None) -> tuple[Tensor, State]:
        logits_bto, after = read(tokens_bt, state)
        digest.update(logits_bto.cpu().contiguous().numpy().tobytes())
        return logits_bto, after

    data = texts.config.data
    chosen = held_out(corpus, "val", window=data.seq_len, batch=data.batch_size, max_windows=n_windows)
    reading: Reader = hashed
    found = likelihood(reading, chosen, device=texts.device, loss=cross_entropy)
    return found, digest.hexdigest()


def _mixed(texts: Texts, arm: ArmConfig, random_seed: int) -> Iterator[Batch]:
    """Batches of the second text, with one of the first at every so many where it is replayed."""
    second, first = (_batches(texts, corpus, random_seed) for corpus in (texts.second, texts.first))
    for number in count(1):
        yield next(first if arm.replay_every and number % arm.replay_every == 0 else second)


def _batches(texts: Texts, corpus: Corpus, random_seed: int) -> Iterator[Batch]:
    """Without end, in an order of the random seed."""
    data = texts.config.data
    stream = Stream(corpus, "train", window=data.seq_len, batch=data.batch_size, random_seed=random_seed)
    cursor = stream.start()
    while True:
        batch, cursor = stream.next(cursor)
        yield batch
