"""From the hidden vector of a token to the gates of its memory."""

import math
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meristem.errors import ConflictingKeys
from meristem.memory import Gates, Rule
from meristem.memory.region import most_momentum, within
from meristem.memory.state import full_precision
from meristem.nn.config import MemoryConfig
from meristem.nn.precision import KeepsFloat32
from meristem.shapes import Gate, Hidden


class GateMap(KeepsFloat32):
    """What a rule takes for each token and head, each a smooth bounded map of the hidden vector (memory.md 2.3).

    Weights start at 0, so that every token begins with the same gates: retain by the half-life H of its head,
    ``2^(-1/H)``, whose logit is ``log(H / ln 2)`` to within 1/H, so that a step of it is a factor of the half-life;
    write rate ``write``, never above ``write_limit``; momentum ``momentum``; threshold 1; weight of a pair
    ``sigmoid(2)``. With momentum the write rate carries the factor ``1 - momentum``: a key that recurs is then written
    once, not ``1 / (1 - momentum)`` times, which keeps the rule stable. Where the momentum is orthogonalised its length
    is always about one, and the factor would only make every step smaller. Codes are linear and start random. With a
    rank the map goes through so few numbers.

    Gates stay where the memory cannot run away (``memory.region``): first values beyond that begin at its border.
    """

    float32 = frozenset({"weight_hd", "down_rd", "bias_h", "scale_h", "code"})
    scale_h: Tensor | None

    def __init__(self, width: int, heads: int, rule: Rule, config: MemoryConfig) -> None:
        """heads: places that have gates of their own."""
        super().__init__()
        self.heads, self.rule = heads, rule
        self.is_scaled = rule.update.has_momentum and rule.update.name != "orthogonal_momentum"
        if config.write_rate >= config.write_limit:
            raise ConflictingKeys(
                f"memory.write_rate {config.write_rate} is not below memory.write_limit {config.write_limit}. Lower "
                f"the first, or raise the second."
            )
        self.write_limit = config.write_limit
        first = {"write": [_logit(config.write_rate / config.write_limit)] * heads}
        if rule.has_retain_gate:
            first["retain"] = [-math.log(math.expm1(math.log(2) / each)) for each in config.half_lives(heads)]
        if rule.update.has_momentum:
            first["momentum"] = [_logit(config.momentum)] * heads
        if rule.bias.has_threshold:
            first["threshold"] = [math.log(math.e - 1)] * heads
        if rule.span > 1:
            first["weight"] = [2.0] * heads
        if config.retain_lr != 1 and "retain" in first:
            # Adam's steps have one size: a logit that is so many times a map moves by as much more or less.
            scales = [config.retain_lr if name == "retain" else 1.0 for name in first]
            self.register_buffer("scale_h", torch.tensor(scales).repeat_interleave(heads), persistent=False)
            first["retain"] = [each / config.retain_lr for each in first["retain"]]
        else:
            self.scale_h = None
        self.names = tuple(first)
        self.down_rd = None
        if config.gate_rank is not None:
            self.down_rd = nn.Parameter(torch.randn(config.gate_rank, width) / math.sqrt(width))
        first_weight = torch.zeros(len(first) * heads, config.gate_rank or width)
        # Of two factors one has to be off zero, or neither would ever get a gradient.
        self.weight_hd = nn.Parameter(first_weight if self.down_rd is None else first_weight.normal_(std=0.01))
        self.bias_h = nn.Parameter(torch.tensor(list(chain(*first.values()))))
        self.code = nn.Linear(width, heads * rule.structure.n_codes, bias=False) if rule.structure.n_codes else None

    def forward(self, hidden_btd: Hidden) -> Gates:
        """Gates in float32, whatever the autocast: a retain factor near 1 does not survive bfloat16."""
        with full_precision(hidden_btd.device):
            hidden_btd = hidden_btd.to(self.weight_hd.dtype)
            raw_bth = self.logits(hidden_btd)
            raw: dict[str, Gate] = dict(zip(self.names, raw_bth.chunk(len(self.names), dim=-1), strict=True))
            write_bth = self.write_limit * raw["write"].sigmoid()
            log_retain_bth = functional.logsigmoid(raw["retain"]) if "retain" in raw else torch.zeros_like(write_bth)
            log_momentum_bth = None
            if "momentum" in raw:
                log_momentum_bth = functional.logsigmoid(raw["momentum"])
                write_bth = write_bth * (-raw["momentum"]).sigmoid() if self.is_scaled else write_bth
            kept = within(self.rule, log_retain_bth, write_bth, log_momentum_bth, self.most_momentum())
            others: dict[str, Tensor | None] = {
                "threshold_bth": functional.softplus(raw["threshold"]) if "threshold" in raw else None,
                "weight_bth": raw["weight"].sigmoid() if "weight" in raw else None,
                "code_bthg": None if self.code is None else self.code(hidden_btd).unflatten(-1, (self.heads, -1)),
            }
            return Gates(
                kept.retain,
                kept.write,
                kept.momentum,
                log_retain_bth=kept.log_retain,
                log_momentum_bth=kept.log_momentum,
                **others,
            )

    def logits(self, hidden_btd: Hidden) -> Tensor:
        """What the gates are made of, ``(b, t, gates * heads)``, gate after gate as in ``names``."""
        lowered_btd = hidden_btd if self.down_rd is None else functional.linear(hidden_btd, self.down_rd)
        raw_bth = functional.linear(lowered_btd, self.weight_hd, self.bias_h)
        return raw_bth if self.scale_h is None else raw_bth * self.scale_h

    def map(self) -> tuple[Float[Tensor, "h d"], Float[Tensor, " h"]]:
        """The matrix and the bias of ``logits``, of a map without a rank."""
        if self.scale_h is None:
            return self.weight_hd, self.bias_h
        return self.weight_hd * self.scale_h[:, None], self.bias_h * self.scale_h

    def most_momentum(self) -> Tensor | None:
        """The greatest momentum of each head, one for all tokens: about the root of what it is by itself."""
        if "momentum" not in self.names:
            return None
        index = self.names.index("momentum") * self.heads
        return most_momentum(self.rule, self.bias_h[index : index + self.heads].sigmoid())


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
