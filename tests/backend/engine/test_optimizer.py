"""Learning rates by hand, and Megatron's step with a norm that is known."""

from types import SimpleNamespace

import pytest

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.engine import optimizer as optimizers
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.backend.engine.optimizer import learning_rate, rl_schedule
from gspo_megatron.backend.parallel import topology
from gspo_megatron.config import AlgorithmConfig, Layout, OptimizerConfig
from gspo_megatron.errors import ConfigError
from tests.backend.small import SINGLE, TP2_PP2_EP2, fixed_batches, small_policy
from tools.validation.ranks import spawn


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


def updated(rank: int, world_size: int, layout: Layout) -> tuple[float, bool]:
    """The norm of two updates' gradients, and whether our step leaves the weights that Megatron's leaves."""
    ours, weights = optimizers.step, []
    for step in (ours, lambda optimizer, grad_norm: optimizer.step()):
        optimizers.step = step
        policy = small_policy(layout, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, clip_grad=0.01))
        batches = fixed_batches()
        for _ in range(2):
            norm = policy.update(
                batches, policy_loss(AlgorithmConfig()), global_counts(batches, policy.topology)
            ).grad_norm
        weights.append([p.detach().clone() for model in policy.models for p in model.parameters()])
        topology.destroy_model_parallel()
    optimizers.step = ours
    return norm, all(one.equal(other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize(("layout", "ranks"), [(SINGLE, 1), (TP2_PP2_EP2, 4)])
def test_a_step_is_megatrons_to_the_bit(layout, ranks):
    """The norm is above the limit, so that gradients are clipped."""
    for norm, is_same in spawn(updated, ranks, layout):
        assert norm > 0.01 and is_same
