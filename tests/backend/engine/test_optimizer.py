"""Learning rates by hand."""

from types import SimpleNamespace

import pytest

from gspo_megatron.backend.engine.optimizer import learning_rate, rl_schedule
from gspo_megatron.config import OptimizerConfig
from gspo_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("constant", [0.4, 0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.4, 0.8, 0.65, 0.5, 0.35, 0.2]),
        ("cosine", [0.4, 0.8, 0.5 + 0.3 * 2**-0.5, 0.5, 0.5 - 0.3 * 2**-0.5, 0.2]),
    ],
)
def test_rates_of_six_steps(style, expected):
    """Two steps of warm-up to 0.8, then four down to 0.2: a quarter of 0.6 each, or 0.2 + 0.3 (1 + cos(pi k / 4))."""
    optimizer = SimpleNamespace(param_groups=[{}])
    config = OptimizerConfig(lr=0.8, min_lr=0.2, warmup_steps=2, lr_decay_style=style)
    schedule = rl_schedule(optimizer, config, steps=6)
    rates = []
    for _ in range(6):
        rates.append(learning_rate(optimizer))
        schedule.step(increment=1)
    assert rates == pytest.approx(expected, abs=1e-12)


def test_a_rate_cannot_fall_to_a_higher_one():
    with pytest.raises(ConfigError, match=r"optimizer.min_lr = 0.1: must be between 0 and optimizer.lr = 0.01"):
        OptimizerConfig(lr=0.01, min_lr=0.1)
