"""Training with parameters in bf16, under autocast, and in fp16 with a loss scale."""

import math
from dataclasses import replace

import pytest
import torch

from meristem.config import preset_names
from meristem.data.stream import Batch, Cursor
from meristem.device.resolve import Device
from meristem.errors import NonFinite
from meristem.memory.state import flatten
from meristem.models.build import build
from meristem.optim import state as optim_state
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build as build_optimizer
from meristem.optim.half import LossScale
from meristem.optim.kinds import KINDS
from meristem.train.config import GuardConfig, TrainConfig
from meristem.train.guard import Guard, observe
from meristem.train.loop import steps
from meristem.train.progress import Progress
from meristem.train.state import Held
from zoo import VOCABULARY, ZOO, ids, preset, small, small_memory

CPU = torch.device("cpu")
N_STEPS, WINDOW = 20, 9
WAYS = {"parameters": (torch.bfloat16, torch.bfloat16), "autocast": (torch.float32, torch.bfloat16)}
TO_FP16 = Device(CPU, torch.float32, torch.float16)


class Again:
    """A stream that gives one batch for ever, each going on where the last one ended."""

    def __init__(self):
        tokens_bt = ids(2, WINDOW + 1)
        n_tokens = 2 * WINDOW
        self.batch = Batch(tokens_bt[:, :-1], tokens_bt[:, 1:].contiguous(), n_tokens, n_tokens, starts=False)

    def start(self):
        return Cursor(0, "again", "again")

    def next(self, cursor):
        return self.batch, cursor


def tiny(name):
    """A preset of one layer."""
    model = small(preset(name)["model"])
    return build(model.model_copy(update={"n_layers": 1}), small_memory(preset(name)["memory"]), VOCABULARY, 3)


def trained(model, device, kind="adamw", n_steps=N_STEPS, optimizer=None, start=None, **settings):
    optimizer = optimizer or build_optimizer(model, OptimConfig(name=kind, lr=0.01))
    start = start or Progress(cursor=Again().start())
    part = TrainConfig(steps=start.step + n_steps, max_time=None, **settings)
    held = Held.alone(model, optimizer, start)
    return list(steps(held, Again(), lambda _: 1.0, config=part, device=device))


def losses(made):
    return [step.loss_nats for step in made]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", preset_names())
def test_every_preset_trains_in_bfloat16(name, way):
    """GR12: no step is skipped, the loss falls, and the memory that is carried is float32 at the end."""
    parameters, compute = WAYS[way]
    model = tiny(name).to(parameters)
    made = trained(model, Device(CPU, parameters, compute), n_steps=20)
    told = losses(made)
    assert all(map(math.isfinite, told)) and made[-1].progress.n_nonfinite == 0
    assert told[-1] < 0.95 * told[0]
    memory = flatten(made[-1].progress.memory)
    memories = {path: leaf.dtype for path, leaf in memory.items() if ".memory." in path and torch.is_tensor(leaf)}
    assert set(memories.values()) <= {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_moves_bfloat16_parameters_as_it_moves_float32(kind):
    """Moments are float32, parameters stay what they were, and the loss ends at most a tenth above that of float32."""
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("titans-mag").to(dtype)
        before = {name: parameter.dtype for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, OptimConfig(name=kind, lr=0.01))
        made = trained(model, Device(CPU, dtype, torch.bfloat16), optimizer=optimizer)
        assert before == {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert set(map(id, optimizer.state)) <= set(map(id, model.parameters()))
        saved = optim_state.tensors(model, optimizer)
        assert {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()} == {torch.float32}
        ends[dtype] = sum(losses(made)[-3:]) / 3
        assert ends[dtype] < 0.98 * losses(made)[0]
    assert ends[torch.bfloat16] < 1.1 * ends[torch.float32]


def test_old_moments_in_bfloat16_go_on_in_float32():
    model = tiny("attention").bfloat16()
    optimizer = build_optimizer(model, OptimConfig())
    trained(model, Device(CPU, torch.bfloat16, torch.bfloat16), optimizer=optimizer, n_steps=2)
    saved = optim_state.tensors(model, optimizer)
    old = {name: tensor.bfloat16() if tensor.dim() else tensor.clone() for name, tensor in saved.items()}
    old |= {optim_state.PERIODS: saved[optim_state.PERIODS]}
    again = build_optimizer(model, OptimConfig())
    optim_state.restore(model, again, old)
    assert {x.dtype for x in optim_state.tensors(model, again).values() if x.is_floating_point()} == {torch.float32}
    trained(model, Device(CPU, torch.bfloat16, torch.bfloat16), optimizer=again, n_steps=2)


def scaled(name="titans-mag", first=65536.0, n_steady=2000):
    model = tiny(name)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    optimizer.loss_scale = LossScale(CPU, first=first, n_steady=n_steady)
    return model, optimizer


@pytest.mark.parametrize("name", ["titans-mag", "hope", "atlas-mag", "charformer"])
def test_fp16_trains_with_a_loss_scale(name):
    """As the same model does in float32, to a tenth; gradients that the optimizer sees are not scaled."""
    model, optimizer = scaled(name)
    made, plain = trained(model, TO_FP16, optimizer=optimizer), trained(tiny(name), Device(CPU, *[torch.float32] * 2))
    assert losses(made)[-1] == pytest.approx(losses(plain)[-1], rel=0.1)
    assert made[0].grad_norm == pytest.approx(plain[0].grad_norm, rel=0.1)


def test_a_scale_that_is_too_large_is_halved_and_no_fault_of_the_run():
    """Nothing moves meanwhile, neither guard nor loop counts it, and the memory of a finite loss is carried on."""
    model, optimizer = scaled(first=2.0**40)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    made = trained(model, TO_FP16, optimizer=optimizer, n_steps=1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    (stats,) = made[0].stats
    assert stats.is_skipped and stats.is_rescaled and optimizer.loss_scale.scale == 2.0**39
    assert observe(Guard(), GuardConfig(), stats, uniform_nats=None)[0] == Guard()
    assert made[0].progress.memory is not None
    made = trained(model, TO_FP16, optimizer=optimizer, n_steps=40, start=made[0].progress)
    n_skipped = sum(step.stats[0].is_skipped for step in made)
    assert n_skipped > 5 and made[-1].progress.n_nonfinite == 0
    assert optimizer.loss_scale.scale == 2.0 ** (39 - n_skipped)
    assert losses(made)[-1] < losses(made)[0]


def test_a_scale_at_its_floor_leaves_the_fault_to_the_run():
    """Steps that are not finite at a scale of 1 are counted, and end the run as ever."""
    model, optimizer = scaled(first=4.0)
    with torch.no_grad():
        model.norm.gain_d.fill_(math.nan)
    with pytest.raises(NonFinite, match="in 3 steps in a row, up to step 5"):
        trained(model, TO_FP16, optimizer=optimizer, max_nonfinite=3)
    assert optimizer.loss_scale.scale == 1.0


def test_a_steady_scale_is_doubled():
    model, optimizer = scaled(first=8.0, n_steady=3)
    trained(model, TO_FP16, optimizer=optimizer, n_steps=7)
    assert (optimizer.loss_scale.scale, optimizer.loss_scale.n_good) == (32.0, 1)


def test_the_scale_is_saved_with_the_moments():
    """From the middle on a run makes the same steps to the bit; a state without a scale leaves the first one."""
    model, optimizer = scaled(first=2.0**16, n_steady=4)
    half = trained(model, TO_FP16, optimizer=optimizer, n_steps=6)
    saved = {name: tensor.clone() for name, tensor in optim_state.tensors(model, optimizer).items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = losses(trained(model, TO_FP16, optimizer=optimizer, n_steps=6, start=half[-1].progress))
    again, fresh = scaled(first=2.0, n_steady=4)
    again.load_state_dict(weights)
    optim_state.restore(again, fresh, saved)
    assert losses(trained(again, TO_FP16, optimizer=fresh, n_steps=6, start=half[-1].progress)) == whole
    again, fresh = scaled(first=2.0)
    optim_state.restore(again, fresh, {name: x for name, x in saved.items() if "loss_scale" not in name})
    assert fresh.loss_scale.scale == 2.0


def test_slow_levels_gather_what_is_not_scaled():
    """Two periods, fp16 and float32: what waits for the slow level is of one size."""
    pending = []
    for device, scale in ((TO_FP16, LossScale(CPU)), (replace(TO_FP16, dtype=torch.float32), None)):
        model = build(*ZOO["preset-hope"], VOCABULARY, random_seed=3)
        optimizer = build_optimizer(model, OptimConfig(lr=0.01))
        optimizer.loss_scale = scale
        trained(model, device, optimizer=optimizer, n_steps=2)
        pending.append(float(torch.stack([waiting.norm() for waiting in optimizer.pending.values()]).norm()))
    assert len(optimizer.pending) and pending[0] == pytest.approx(pending[1], rel=0.1)
