"""Every choice of the recipe's algorithm section that a loss needs reaches it."""

import dataclasses

import pytest

from gspo_megatron.algorithms import LOSSES, policy_loss
from gspo_megatron.algorithms.interface import ClipRange, LossOptions
from gspo_megatron.config import AlgorithmConfig, KlConfig, MismatchConfig, PreferenceConfig
from gspo_megatron.config.algorithm import ALGORITHMS

CHOSEN = AlgorithmConfig(
    name="grpo",
    clip_ratio_low=0.11,
    clip_ratio_high=0.12,
    clip_ratio_dual=3.5,
    aggregation="constant_length",
    entropy_coef=0.013,
    kl=KlConfig(0.14, "k2", "loss"),
    mismatch=MismatchConfig("token_masked", 1.5),
    preference=PreferenceConfig(beta=0.16, loss="ipo", length_normalised=True),
)
WANTED = LossOptions(
    ClipRange(0.11, 0.12, 3.5), "constant_length", 17, 0.14, "k2", 0.013, "token_masked", 1.5, 0.16, "ipo", True
)


def test_each_choice_becomes_an_option():
    """All fields differ from their defaults, so one that is dropped on the way shows."""
    options = policy_loss(CHOSEN, max_response_length=17).keywords["options"]
    assert options == WANTED
    plain = LossOptions(ClipRange(0.2, 0.2))
    for field in dataclasses.fields(LossOptions):
        assert getattr(WANTED, field.name) != getattr(plain, field.name), field.name


def test_a_penalty_in_the_reward_is_not_in_the_loss_too():
    moved = dataclasses.replace(CHOSEN, kl=KlConfig(0.14, "k2", "reward"))
    assert policy_loss(moved).keywords["options"].kl_coef == 0.0


@pytest.mark.parametrize(("place", "estimator"), [("loss", "k3"), ("reward", "k1")])
def test_the_estimator_follows_the_place(place, estimator):
    """k1 in the loss would have a gradient of mean 0."""
    for name in ALGORITHMS:
        assert AlgorithmConfig(name=name, kl=KlConfig(coef=0.1, place=place)).resolved().kl.estimator == estimator


def test_one_table_knows_the_same_names_as_the_other():
    assert set(LOSSES) == set(ALGORITHMS)
