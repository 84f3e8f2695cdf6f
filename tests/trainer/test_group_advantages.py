"""Advantages of groups, with the recipe's penalties, by hand: dynamic sampling trains on no group without signal."""

import math

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.batch import Completion, Prompt, RolloutGroup, Score, TaskItem
from gspo_megatron.config import AlgorithmConfig, Layout, RolloutConfig, TrainConfig
from gspo_megatron.data.sequences import train_sequences
from gspo_megatron.metrics.rollout import group_metrics
from gspo_megatron.trainer.advantages.estimator import GroupAdvantages
from gspo_megatron.trainer.gspo_trainer import step_seed

LENGTHS = [10, 12, 17, 18]
CPU = torch.device("cpu")


def group(uid: int, rewards: list[float | None]) -> RolloutGroup:
    prompt = Prompt(uid, TaskItem("t", "q", "a", {}), [5, 6, 7])
    answers = [Completion([9] * length, [-1.0] * length, False) for length in LENGTHS]
    return RolloutGroup(prompt, answers, [Score(reward) for reward in rewards], [""] * 4)


def advantages(groups: list[RolloutGroup], **options) -> list[float]:
    algorithm = AlgorithmConfig(name="dapo", overlong_buffer=4, **options)
    config = TrainConfig(algorithm=algorithm, rollout=RolloutConfig(max_response_length=20)).resolved(Layout())
    return GroupAdvantages(config, policy=None).fill(groups, [], seed=1).tolist()


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("by_std", [True, False])
def test_a_group_without_signal_learns_nothing_from_its_lengths(reward, by_std):
    """A limit of 20 and a buffer of 4: 17 tokens cost 0.25 and 18 cost 0.5, which alone would give [0.783, 0.783,
    -0.261, -1.306]. Section 3.2 of the paper trains on no such group."""
    assert advantages([group(0, [reward] * 4)], normalize_advantage_by_std=by_std) == [0.0] * 4


def test_a_group_with_signal_keeps_its_penalties():
    """[1, 0, 0 - 0.25, 0 - 0.5]: mean 1/16; deviations (15, -1, -5, -9) / 16; sample variance (225 + 1 + 25 + 81) / 256
    / 3 = 83 / 192."""
    std = math.sqrt(83 / 192) + 1e-6
    found = advantages([group(0, [0.0] * 4), group(1, [1.0, 0.0, 0.0, 0.0])])
    assert found[:4] == [0.0] * 4
    assert found[4:] == pytest.approx([n / 16 / std for n in (15, -1, -5, -9)], abs=1e-12)


def test_without_dynamic_sampling_penalties_tell_the_responses_apart():
    """[0, 0, -0.25, -0.5]: mean -3/16; deviations (3, 3, -1, -5) / 16; sample variance (9 + 9 + 1 + 25) / 256 / 3 = 11
    / 192."""
    std = math.sqrt(11 / 192) + 1e-6
    found = advantages([group(0, [0.0] * 4)], resampling_rounds=0)
    assert found == pytest.approx([n / 16 / std for n in (3, 3, -1, -5)], abs=1e-12)


def test_a_response_without_a_reward_is_neither_compared_nor_trained():
    """Without the third response, [1, 0, 0]: mean 1/3; deviations (2, -1, -1) / 3; sample variance (4 + 1 + 1) / 9 / 2
    = 1/3. Its own advantage is 0 and its mask is 0 throughout, so it is in no denominator."""
    std = math.sqrt(1 / 3) + 1e-6
    groups = [group(0, [1.0, 0.0, None, 0.0]), group(1, [None] * 4)]
    found = advantages(groups, resampling_rounds=0, overlong_penalty=0.0)
    assert found == pytest.approx([2 / 3 / std, -1 / 3 / std, 0.0, -1 / 3 / std, *[0.0] * 4], abs=1e-12)
    masks = [sequence.loss_mask for sequence in train_sequences(groups)]
    assert masks == [None, None, [0] * 17, None, *([0] * length for length in LENGTHS)]
    assert [one.has_signal for one in groups] == [True, False]


def test_a_shuffle_leaves_responses_without_a_reward_where_they_are():
    found = [
        advantages([group(uid, [1.0, 0.0, None, 0.0])], shuffle_advantages=True, resampling_rounds=0)
        for uid in range(20)
    ]
    assert all(values[2] == 0.0 and sum(value > 0.5 for value in values) == 1 for values in found)
    assert len({tuple(values) for values in found}) > 1


def test_the_largest_seed_can_shuffle():
    """The step's seed is that of a run with the largest seed (2^31 - 1) at step 100; torch takes no seed above 2^64."""
    algorithm = AlgorithmConfig(name="grpo", shuffle_advantages=True)
    config = TrainConfig(algorithm=algorithm, seed=2**31 - 1).resolved(Layout())
    values = GroupAdvantages(config, policy=None).fill([group(0, [1.0, 0, 0, 0])], [], seed=step_seed(config, 100))
    std = 0.5 + 1e-6
    assert sorted(values.tolist()) == pytest.approx([-0.25 / std] * 3 + [0.75 / std])


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    dist.init_process_group("gloo", f"file://{tmp_path_factory.mktemp('store')}/file", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_metrics_tell_equal_rewards_from_no_advantage(one_rank):
    """Two of three groups have equal rewards, and one of the two has advantages all the same; the third has none though
    its rewards differ."""
    groups = [group(0, [0.0] * 4), group(1, [1.0] * 4), group(2, [1.0, 0.0, 0.0, 0.0])]
    values = torch.tensor([0.0] * 4 + [0.5, 0.5, 0.0, -1.0] + [0.0] * 4, dtype=torch.float64)
    found = group_metrics(groups, values, ["t"], one_rank, CPU)
    assert found["reward/equal_groups"] == pytest.approx(2 / 3)
    assert found["advantage/zero_groups"] == pytest.approx(2 / 3)
    found = group_metrics(groups[:2], values[:8], ["t"], one_rank, CPU)
    assert (found["reward/equal_groups"], found["advantage/zero_groups"]) == (1.0, 0.5)
