"""Every blueprint at small settings, in a model of ours and in one that knows nothing of us; the laws run over them."""

import torch
from torch import Tensor, nn

import meristem.growth as grow
import zoo

SETTINGS = {
    "low_rank": {"rank": 3},
    "bottleneck": {"hidden": 5},
    "gated_feedforward": {"hidden": 7},
    "memory": {"head_dim": 4, "chunk": 3},
    "attention": {"n_heads": 3, "head_dim": 2, "sliding_window": 5},
    "block": {"n_heads": 1, "head_dim": 6, "sliding_window": None, "hidden": 7},
}
"""What a blueprint needs to be small enough for a width of 12; a new one is built with its defaults."""
SEEDS = {name: (name, SETTINGS.get(name, {})) for name in grow.blueprints.names()} | {
    f"memory-{rule}": ("memory", SETTINGS["memory"] | {"rule": rule})
    for rule in ("gated_delta", "titans_mlp", "trellis")
}
"""Name to a blueprint and its settings: each blueprint, and memories of every structure."""


class Foreign(nn.Module):
    """A causal language model of torch's own parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(zoo.VOCABULARY, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 17, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, zoo.VOCABULARY)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        mask_ts = nn.Transformer.generate_square_subsequent_mask(tokens_bt.shape[1], dtype=self.head.weight.dtype)
        return self.readout(self.body(self.embedding(tokens_bt), mask=mask_ts, is_causal=True))

    def readout(self, hidden_btd: Tensor) -> Tensor:
        return self.head(hidden_btd)


class Says(nn.Module):
    """A model whose largest logit stands above the second by a margin, whatever it is given."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin, self.weight = margin, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def readout(self, hidden_btd: Tensor) -> Tensor:
        row = hidden_btd.new_tensor([0.1, 0.1 + self.margin, -3.0]) + self.weight
        return row.expand(*hidden_btd.shape[:-1], 3)


PLACES = {"preset-default": "blocks.1", "foreign": "body.layers.1"}
"""Hosts, and where a seed stands in them."""


def host(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A host with weights of its own."""
    if name != "foreign":
        return zoo.moved(*zoo.ZOO[name], dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return Foreign().to(dtype)


def logits(model: nn.Module, tokens_bt: Tensor) -> Tensor:
    """What a model says, whether it gives a state beside it or not."""
    found = model(tokens_bt)
    return found[0] if isinstance(found, tuple) else found


def grown(name: str, seed: str, *, is_moved: bool = True, **settings: object) -> tuple[nn.Module, grow.Seed]:
    """A host with one seed, whose weights are off their first values unless that is wanted otherwise."""
    model = grow.attach(host(name), PLACES[name])
    blueprint, own = SEEDS[seed]
    made = grow.graft(model, PLACES[name], blueprint, **own, **settings)
    if is_moved:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model, made


def bits(model: nn.Module) -> dict[str, bytes]:
    """All that a model holds, by name."""
    return {name: x.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, x in model.state_dict().items()}
