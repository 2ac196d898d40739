"""The real training loop and the real model on fake tensors: everything happens, nothing is computed or allocated."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meristem.data.config import CARRIED
from meristem.data.stream import Batch, Cursor
from meristem.device.resolve import Device
from meristem.memory.state import State, size_bytes
from meristem.models.build import build as build_model
from meristem.nn.precision import float32_ids
from meristem.optim.groups import build as build_optimizer
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.recipes.plan.ledger import Ledger, tensors_in
from meristem.runs.config import Config
from meristem.train.config import TrainConfig
from meristem.train.loop import steps
from meristem.train.progress import Progress
from meristem.train.state import Held


@dataclass(frozen=True)
class Rehearsal:
    """What was run and what the ledger says of it. ``n_batches`` forward and backward passes were made."""

    model: nn.Module
    ledger: Ledger
    batch: int
    n_batches: int
    without_gradient: list[str]


@dataclass(frozen=True)
class Reading:
    """A prompt read in one call and one token after it, with the bytes of the state after each."""

    ledger: Ledger
    state_bytes: int
    state_bytes_after_one_more: int

    def figures(self) -> dict[str, int]:
        """What the report says of a session."""
        work = {
            stage: sum(n for place, n in self.ledger.flops.items() if place[0] == stage)
            for stage in ("prefill", "decode")
        }
        return {
            "state_bytes": self.state_bytes,
            "state_bytes_after_one_more": self.state_bytes_after_one_more,
            "flops_prefill": work["prefill"],
            "flops_per_token": work["decode"],
        }


def build(config: Config, vocabulary: int, device: Device) -> nn.Module:
    """The model alone."""
    with _imagined(device) as ledger:
        return _model(config, vocabulary, device, ledger)


def train(config: Config, vocabulary: int, device: Device, *, batch: int, window: int, n_steps: int) -> Rehearsal:
    """Some steps of the run that ``config`` describes.

    Of accumulated batches two are made, for from the second on they are all alike.
    """
    accumulate = min(config.train.grad_accum_steps, 2)
    stream = _Blank(batch, window, starts=config.data.order not in CARRIED)
    with _imagined(device) as ledger:
        ledger.stage("build")
        model = _model(config, vocabulary, device, ledger)
        optimizer = build_optimizer(model, config.optim)
        without_gradient = _announce_stages(model, optimizer, ledger)
        for _ in steps(
            Held.alone(model, optimizer, Progress(cursor=stream.start())),
            stream,
            lambda share: 1.0,
            config=TrainConfig(steps=n_steps, max_time=None, grad_accum_steps=accumulate),
            device=device,
        ):
            pass
    return Rehearsal(model, ledger, batch, n_steps * accumulate, without_gradient)


def read(config: Config, vocabulary: int, device: Device, *, n_prompt: int) -> Reading:
    """What a session does: a prompt in one call, then one token."""
    with _imagined(device) as ledger, torch.no_grad():
        ledger.stage("build")
        model = _model(config, vocabulary, device, ledger).eval()
        tokens_bt = torch.zeros(1, n_prompt, dtype=torch.int64, device=device.device)
        states: list[State] = []
        with device.autocast():
            ledger.stage("prefill")
            _, state = model(tokens_bt)
            states.append(state)
            ledger.stage("decode")
            _, state = model(tokens_bt[:, :1], state)
            states.append(state)
        before, after = (size_bytes(state) for state in states)
    return Reading(ledger, before, after)


@contextmanager
def _imagined(device: Device) -> Iterator[Ledger]:
    """Fake tensors, followed by a ledger; the process's random state is as before when it ends."""
    # The CUDA allocator hands out blocks of 512 bytes, the CPU's exactly the requested size.
    ledger = Ledger(granule_bytes=512 if device.device.type == "cuda" else 1)
    with torch.random.fork_rng(devices=[]), FakeTensorMode(), ledger:
        yield ledger


def _model(config: Config, vocabulary: int, device: Device, ledger: Ledger) -> nn.Module:
    model = build_model(config.model, config.memory, vocabulary, config.run.seed)
    _move(model, device)
    ledger.claim("parameters", model.parameters())
    ledger.claim("buffers", model.buffers())
    ledger.spans.attach(model)
    return model


def _move(model: nn.Module, device: Device) -> None:
    """What ``model.to(device, dtype)`` does; that swaps tensors in place, which fake ones do not allow."""
    moved: dict[int, nn.Parameter] = {}
    stays = float32_ids(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in moved:
                dtype = torch.float32 if id(parameter) in stays else device.param_dtype
                value = parameter.detach().to(device.device, dtype)
                moved[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(module, name, moved[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            is_cast = buffer.is_floating_point() and id(buffer) not in stays
            dtype = device.param_dtype if is_cast else buffer.dtype
            setattr(module, name, buffer.to(device.device, dtype))


def _announce_stages(model: nn.Module, optimizer: MultiPeriodOptimizer, ledger: Ledger) -> list[str]:
    """Tell the ledger where the loop stands, by hooks: the loop itself knows nothing of it.

    Names the parameters that have no gradient, once a step was made.
    """
    without_gradient: list[str] = []

    def forward_begins(module: nn.Module, args: object) -> None:
        ledger.stage("forward")

    def forward_ends(module: nn.Module, args: object, out: tuple[Tensor, State]) -> None:
        logits_bto, state = out
        ledger.claim("state", tensors_in(state))
        logits_bto.register_hook(backward_begins)
        ledger.stage("loss")

    def backward_begins(gradient_bto: Tensor) -> None:
        ledger.claim_rest("activations", "forward")
        ledger.stage("backward")

    def update_begins(*args: object) -> None:
        named = model.named_parameters()
        without_gradient[:] = [name for name, p in named if p.requires_grad and p.grad is None]
        ledger.claim("gradients", (p.grad for p in model.parameters() if p.grad is not None))
        ledger.stage("optimizer")

    def update_ends(*args: object) -> None:
        ledger.claim("optimizer", tensors_in([*optimizer.state.values(), optimizer.pending]))
        ledger.stage("between steps")

    model.register_forward_pre_hook(forward_begins)
    model.register_forward_hook(forward_ends)
    optimizer.register_step_pre_hook(update_begins)
    optimizer.register_step_post_hook(update_ends)
    return without_gradient


class _Blank:
    """A stream of batches without text, as the loop takes them."""

    def __init__(self, batch: int, window: int, *, starts: bool) -> None:
        self.batch, self.window, self.starts = batch, window, starts

    def start(self) -> Cursor:
        return Cursor(0, "blank", "blank")

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        tokens_bt, targets_bt = (torch.zeros(self.batch, self.window, dtype=torch.int64) for _ in range(2))
        n_tokens = self.batch * self.window
        return Batch(tokens_bt, targets_bt, n_tokens, n_tokens, starts=self.starts), cursor
