"""Settings of the optimizer: which go together."""

import math

import pytest

from meristem.errors import ConfigError, DeadKey, WrongValue
from meristem.optim.config import READS, OptimConfig
from meristem.optim.kinds import KINDS
from meristem.runs.config import load_config


def test_every_kind_says_what_it_reads():
    assert READS.keys() == KINDS.keys()
    assert frozenset.union(*READS.values()) == OptimConfig.model_fields.keys(), "a key that no kind reads is a defect"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "sgd", "beta1": 0.8},
            r"optim.beta1 is 0.8, but optim.name 'sgd' does not read it; it reads grad_clip, ",
        ),
        ({"momentum": 0.8}, r"optim.momentum is 0.8, but optim.name 'adamw' does not read it"),
        ({"name": "muon", "m3_alpha": 0.1}, r"optim.m3_alpha is 0.1, but optim.name 'muon'"),
        ({"name": "m3", "m3_ema": True, "m3_every": 4}, r"optim.m3_every is 4, but optim.name 'm3' with m3_ema"),
        (
            {"name": "sgd", "eps": 1e-6, "level_betas": {8: (0.5, 0.5)}},
            r"optim.eps is 1e-06, optim.level_betas is \{8: \(0.5, 0.5\)\}, but",
        ),
    ],
)
def test_a_key_that_the_kind_does_not_read_is_refused(settings, message):
    with pytest.raises(DeadKey, match=message):
        OptimConfig(**settings)


def test_levels_out_of_range_are_refused_together():
    with pytest.raises(WrongValue, match=r"level_rates.8 is -1.0; optim.level_betas.64 is \[0.5, 1.0\]. A rate is"):
        OptimConfig(level_rates={8: -1.0, 64: 2.0}, level_betas={64: (0.5, 1.0)})


def test_rates_and_betas_of_levels():
    """Memory.md 6.4: the root of the period, at most 8; betas (.8, .95) from 64 on; a setting wins."""
    part = OptimConfig(level_rates={8: 1.5}, level_betas={512: (0.5, 0.6)})
    assert [part.level_rate(period) for period in (1, 2, 8, 64, 512)] == [1.0, math.sqrt(2), 1.5, 8.0, 8.0]
    assert [part.betas(period) for period in (1, 63, 64, 512)] == [(0.9, 0.95), (0.9, 0.95), (0.8, 0.95), (0.5, 0.6)]


def test_levels_are_set_on_the_command_line():
    """S4-M12: a kind, the rate and betas of a period, all by overrides; a kind that is not there is refused."""
    words = ["optim.name=muon", "optim.level_rates.8=2.5", "optim.level_betas.64=[0.7, 0.9]"]
    part = load_config("lmm", words, {}).tree.optim
    assert (part.name, part.level_rates, part.level_betas) == ("muon", {8: 2.5}, {64: (0.7, 0.9)})
    with pytest.raises(ConfigError, match="optim.name: found 'adam'"):
        load_config("lmm", ["optim.name=adam"], {})
