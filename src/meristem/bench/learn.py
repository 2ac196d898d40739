"""Train a small model on a task of recall and score it: what one memory rule can be made to hold, beside another."""

from typing import Final

from torch import nn

from meristem.device.random import key
from meristem.device.resolve import Device
from meristem.errors import NonFinite
from meristem.evaluate.recall import HELD_OUT, RecallScore, Task, recall
from meristem.optim.config import OptimConfig, ScheduleConfig
from meristem.optim.groups import build
from meristem.optim.schedule import ScheduleProgress, rate_factor, set_rates
from meristem.train.loss import cross_entropy

N_HELD_OUT: Final = 256
"""Sequences that a trained model is scored on."""


def learn(
    model: nn.Module, task: Task, *, steps: int, batch: int, rate: float, random_seed: int, device: Device
) -> RecallScore:
    """Train ``model``, in place, on questions of ``task`` that are new at every step; then score it on others.

    AdamW and its schedule are those of a run at their defaults, with ``rate`` the highest learning rate. The random
    seed moves the questions of training alone; those of the score are the same for every model, and no step draws from
    their seed. The model must know every id of the task. A gradient that is not finite ends it with NonFinite.
    """
    model.to(device=device.device, dtype=device.param_dtype)
    optim, schedule = OptimConfig(lr=rate), ScheduleConfig()
    optimizer = build(model, optim)
    for step in range(steps):
        set_rates(optimizer, rate_factor(schedule, ScheduleProgress(share=step / steps, step=step, tokens=0)))
        questions = task.questions(batch, key(random_seed, "recall.learn", step))
        tokens_bt, targets_bt = device.move(questions.tokens_bt, questions.targets_bt)
        with device.autocast():
            logits_bto, _ = model(tokens_bt, None)
        loss = cross_entropy(logits_bto, targets_bt) / questions.n
        loss.backward()
        if optimizer.step(loss.detach()).is_skipped:
            raise NonFinite(f"the gradient of step {step} of {task.name} is not finite. Lower the rate.", step=step)
        optimizer.zero_grad()
    optimizer.flush()
    return recall(model, task.questions(N_HELD_OUT, HELD_OUT), batch=batch, device=device, loss=cross_entropy)
