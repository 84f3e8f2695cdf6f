"""Group-normalised advantages by hand."""

import math

import pytest
import torch

from gspo_megatron.algorithms.advantages import group_advantages


def by_size(rewards: torch.Tensor, size: int, **options) -> torch.Tensor:
    """Advantages where each `size` neighbours are a group."""
    return group_advantages(rewards, torch.arange(rewards.numel()) // size, **options)


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-14) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def test_one_group_by_hand():
    """[1, 0, 0, 0]: mean 1/4; sample variance (9/16 + 3/16) / 3 = 1/4, so std 1/2 (dividing by n: 0.433).

    A = (3/4, -1/4, -1/4, -1/4) / (1/2 + 1e-6).
    """
    std = 0.5 + 1e-6
    close(by_size(torch.tensor([1.0, 0, 0, 0]), 4), [0.75 / std, -0.25 / std, -0.25 / std, -0.25 / std])


def test_groups_are_neighbours_and_do_not_mix():
    """[0, 2] has mean 1 and std sqrt(2); [10, 16] has mean 13 and std 3 sqrt(2). fp32 rewards, fp64 answer."""
    small, large = math.sqrt(2) + 1e-6, 3 * math.sqrt(2) + 1e-6
    expected = [-1 / small, 1 / small, -3 / large, 3 / large]
    close(by_size(torch.tensor([0.0, 2, 10, 16]), 2), expected)


def test_without_the_standard_deviation():
    """Dr. GRPO: [1, 0, 0, 0] - 1/4 and [3, 3, 0, 2] - 2."""
    rewards = torch.tensor([1.0, 0, 0, 0, 3, 3, 0, 2])
    close(by_size(rewards, 4, normalize_by_std=False), [0.75, -0.25, -0.25, -0.25, 1, 1, -2, 0])


def test_epsilon_is_added_to_the_standard_deviation():
    """[0, 2e-6]: mean 1e-6, std sqrt(2) 1e-6, so A = 1 / (sqrt(2) + 1); eps inside the root would give 1e-3 instead."""
    value = 1 / (math.sqrt(2) + 1)
    close(by_size(torch.tensor([0.0, 2e-6], dtype=torch.float64), 2), [-value, value], 1e-9)


@pytest.mark.parametrize("reward", [0.0, 0.1, -0.7, 1e9 / 3])
def test_equal_rewards_give_exactly_zero(reward: float):
    """0.1 + 0.1 + 0.1 over 3 is 0.10000000000000002 in fp64: subtracting the mean alone would leave 1e-11."""
    for dtype in (torch.float32, torch.float64):
        advantages = by_size(torch.full((6,), reward, dtype=dtype), 3)
        assert advantages.tolist() == [0.0] * 6


def test_a_large_common_offset_changes_nothing():
    """2^40 + (0, 1, 3): mean 4/3, deviations (-4, -1, 5) / 3, variance (16 + 1 + 25) / 18 = 7/3."""
    std = math.sqrt(7 / 3) + 1e-6
    rewards = torch.tensor([0.0, 1, 3], dtype=torch.float64) + 2.0**40
    close(by_size(rewards, 3), [-4 / 3 / std, -1 / 3 / std, 5 / 3 / std], 1e-13)


def test_groups_of_unequal_size_in_any_order():
    """Groups 7: (1, 4, 1) with mean 2 and std sqrt(3); 3: (0, 2) with mean 1 and std sqrt(2); 5: one response alone."""
    rewards = torch.tensor([1.0, 0, 9, 4, 2, 1])
    ids = torch.tensor([7, 3, 5, 7, 3, 7])
    three, two = math.sqrt(3) + 1e-6, math.sqrt(2) + 1e-6
    close(group_advantages(rewards, ids), [-1 / three, -1 / two, 0, 2 / three, 1 / two, -1 / three])
    close(group_advantages(rewards, ids, normalize_by_std=False), [-1, -1, 0, 2, 1, -1])


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"rewards have shape \[4\] and group_ids \[3\]"):
        group_advantages(torch.zeros(4), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_reward_that_is_not_finite_is_named(bad: float):
    with pytest.raises(ValueError, match=rf"rewards\[2\] = {bad} must be finite"):
        by_size(torch.tensor([1.0, 2.0, bad, bad]), 2)
