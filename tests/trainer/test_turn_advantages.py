"""Each turn of an episode has an advantage of its own (algorithm.advantage_level: turn), by hand, token by token."""

import dataclasses
import math

import pytest
import torch

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.algorithms.interface import GlobalCounts, LossInputs
from gspo_megatron.batch import Completion, Minibatch, Prompt, RolloutGroup, Score, TaskItem, Turns
from gspo_megatron.config import AlgorithmConfig, Layout, RolloutConfig, TrainConfig
from gspo_megatron.data.packing import pack
from gspo_megatron.data.sequences import train_sequences
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe.lint import warnings
from gspo_megatron.trainer.advantages.estimator import GroupAdvantages

# One turn; two, with two tokens of the environment between them; three, of which the second begins right behind the
# first. Rewards of step(): 1.0 | 0.5, none | none, 1.0, -0.5; of the episodes: 1.0, 2.0 (1.5 of get_reward()) and 0.5.
ONE = Completion([9] * 2, [-1.0] * 2, False, turns=Turns((0,), (1.0,)))
TWO = Completion([9] * 6, [-1.0] * 6, False, loss_mask=[1, 1, 0, 0, 1, 1], turns=Turns((0, 4), (0.5, 0.0)))
THREE = Completion([9] * 5, [-1.0] * 5, False, loss_mask=[1, 1, 1, 0, 1], turns=Turns((0, 1, 4), (0.0, 1.0, -0.5)))
PLAIN = Completion([9] * 3, [-1.0] * 3, False)
ROOT_HALF = math.sqrt(0.5)


def group(rewards: list[float | None], completions=(ONE, TWO, THREE), uid: int = 7, **score) -> RolloutGroup:
    prompt = Prompt(uid, TaskItem("t", "q", "a", {}), [5, 6, 7])
    return RolloutGroup(prompt, list(completions), [Score(r, **score) for r in rewards], [""] * len(rewards))


def config(**options):
    algorithm = AlgorithmConfig(**{"name": "gspo_token", "advantage_level": "turn"} | options)
    return TrainConfig(algorithm=algorithm, rollout=RolloutConfig(max_response_length=8)).resolved(Layout())


def filled(groups: list[RolloutGroup], seed: int = 1, **options) -> tuple[list[list[float]], list[float], Minibatch]:
    """The advantages of each response's tokens, the means that `fill` returns, and the minibatch: two microbatches,
    whose sequences are filled up to a multiple of 4 tokens, and whose ends to one of 8."""
    made = config(**options)
    sequences = train_sequences(groups, made.algorithm.mask_truncated_completions)
    minibatch = Minibatch(list(range(len(sequences))), pack(sequences, 48, 8, 2, sequence_multiple=4))
    means = GroupAdvantages(made, policy=None).fill(groups, [minibatch], seed)
    found: dict[int, list[float]] = {}
    for batch, numbers in minibatch.numbered():
        assert batch.advantages.shape == (batch.num_tokens,) and batch.advantages.dtype == torch.float32
        assert not batch.advantages[batch.loss_mask == 0].any()
        for number, first in zip(numbers, batch.cu_seqlens.tolist(), strict=False):
            length = len(sequences[number].token_ids)
            found[number] = batch.advantages[first + 3 : first + length].tolist()
    return [found[number] for number in range(len(sequences))], means.tolist(), minibatch


def test_every_token_by_hand():
    """What came from the first turns on is 1.0, 2.0 and 0.5: mean 7/6, deviations (-1, 5, -4) / 6, sample variance
    42/72, so (-1, 5, -4) / 6 / sqrt(7/12). From the second turns on: 2.0 - 0.5 and 0.5 - 0.0: +-0.5 of a mean of 1.0,
    sample deviation sqrt(1/2). The third turn is alone, 0."""
    tokens, means, _ = filled([group([1.0, 2.0, 0.5])])
    a, b, c = (n / 6 / (math.sqrt(7 / 12) + 1e-6) for n in (-1, 5, -4))
    d = 0.5 / (ROOT_HALF + 1e-6)
    expected = [[a, a], [b, b, 0, 0, d, d], [c, -d, -d, 0, 0]]
    assert [pytest.approx(one, abs=1e-7) for one in expected] == tokens
    assert means == pytest.approx([a, (b + d) / 2, (c - 2 * d) / 4], abs=1e-12)


def test_without_the_deviation_they_are_differences():
    tokens, _, _ = filled([group([1.0, 2.0, 0.5])], name="dr_grpo")
    assert [pytest.approx(row, abs=1e-7) for row in
            ([-1 / 6] * 2, [5 / 6, 5 / 6, 0, 0, 0.5, 0.5], [-4 / 6, -0.5, -0.5, 0, 0])] == tokens  # fmt: skip


def test_penalties_are_part_of_what_every_turn_brought():
    """A limit of 8 and a buffer of 4: the 6 tokens of the second response cost 0.5, so what its turns brought is 1.5
    and 1.0, and the 5 of the third 0.25: 0.25 and 0.25. First turns: mean 11/12; second ones +-0.375."""
    tokens, _, _ = filled([group([1.0, 2.0, 0.5])], name="dr_grpo", overlong_buffer=4)
    first = [1.0 - 11 / 12, 1.5 - 11 / 12, 0.25 - 11 / 12]
    assert [row[0] for row in tokens] == pytest.approx(first, abs=1e-7)
    assert tokens[1][4] == pytest.approx(0.375, abs=1e-7) and tokens[2][1:3] == pytest.approx([-0.375] * 2, abs=1e-7)


def test_a_response_without_a_reward_is_compared_with_none():
    """Then the second turn of the other is alone too. First turns: +-0.25 of 0.75, over sqrt(1/8)."""
    tokens, means, _ = filled([group([1.0, None, 0.5])])
    a = 0.25 / (math.sqrt(1 / 8) + 1e-6)
    assert tokens[0] == pytest.approx([a, a]) and tokens[1] == [0.0] * 6
    assert tokens[2] == pytest.approx([-a, 0, 0, 0, 0], abs=1e-7) and means[1] == 0.0


def test_a_failed_response_has_what_the_recipe_gives_it_in_all_turns():
    """on_error -1 in place of the rewards of its turns: 1.0, 2.0, -1.0 and 1.5, -1.0 (not -1.0 - 0.0, -1.0 - 1.0)."""
    groups = [group([1.0, 2.0, -1.0])]
    groups[0].scores[2] = Score(-1.0, error="raised X")
    groups[0].completions[2] = dataclasses.replace(THREE, turns=Turns((0, 1, 4), (3.0, 1.0, 0.0)))
    tokens, _, _ = filled(groups, name="dr_grpo")
    assert tokens[2] == pytest.approx([-1 - 2 / 3, -1.25, -1.25, 0, 0], abs=1e-7)


def test_a_cut_response_is_compared_and_not_trained():
    cut = dataclasses.replace(TWO, truncated=True)
    tokens, _, _ = filled([group([1.0, 2.0, 0.5], (ONE, cut, THREE))], mask_truncated_completions=True)
    whole, _, _ = filled([group([1.0, 2.0, 0.5])])
    assert tokens == [whole[0], [0.0] * 6, whole[2]]


def test_responses_of_one_turn_have_their_sequences_advantage_exactly():
    """As they have in a mixture with episodes; the episodes beside them change nothing."""
    plain = group([0.1, 0.7, 0.2], (PLAIN,) * 3, uid=3)
    tokens, means, _ = filled([plain, group([1.0, 2.0, 0.5])])
    by_sequence = GroupAdvantages(config(advantage_level="sequence"), policy=None).fill([plain], [], 1)
    assert [row[0] for row in tokens[:3]] == by_sequence.float().tolist()
    assert all(row == [row[0]] * 3 for row in tokens[:3]) and means[:3] == pytest.approx(by_sequence.tolist())


def test_groups_of_equal_rewards_have_no_signal_whatever_their_turns_brought():
    """Where dynamic sampling looks for groups with signal; elsewhere their turns are compared."""
    tokens, _, _ = filled([group([1.0, 1.0, 1.0])], name="dapo", overlong_penalty=0.0)
    assert not any(value for row in tokens for value in row)
    tokens, _, _ = filled([group([1.0, 1.0, 1.0])], name="dr_grpo")
    assert tokens[1] == pytest.approx([0, 0, 0, 0, -0.25, -0.25], abs=1e-7)  # 1 - 0.5 against 1 - 0


def test_the_control_shuffles_turns_of_one_number():
    found = [filled([group([1.0, 2.0, 0.5], uid=uid)], name="dr_grpo", shuffle_advantages=True)[0] for uid in range(20)]
    for rows in found:
        assert sorted(row[0] for row in rows) == pytest.approx([-4 / 6, -1 / 6, 5 / 6], abs=1e-7)
        assert {rows[1][4], rows[2][1]} == {0.5, -0.5} and rows[2][4] == 0.0
    assert len({tuple(row[0] for row in rows) for rows in found}) > 1


def test_the_loss_and_its_gradient_by_the_plain_formula():
    """GSPO-token, in fp64: s_i = exp of the mean log-ratio over the model's tokens of all turns; of a token min(s A,
    clip(s) A) / |y_i| / N, and its gradient is s A / |y_i| / N where the clip does not take it. It takes some."""
    _, _, minibatch = filled([group([1.0, 2.0, 0.5])])
    counts, total, taken = GlobalCounts(3, 10), 0.0, 0
    loss = policy_loss(config().algorithm)
    draw = torch.Generator().manual_seed(3)
    for batch in minibatch.batches:
        old = -torch.rand(batch.num_tokens, generator=draw, dtype=torch.float64)
        new = (old + 1e-3 * torch.randn(batch.num_tokens, generator=draw, dtype=torch.float64)).requires_grad_()
        mask, wanted, gradient = batch.loss_mask.double(), 0.0, torch.zeros_like(old)
        inputs = LossInputs(
            logprobs=new,
            entropy=torch.zeros_like(old),
            old_logprobs=old,
            loss_mask=batch.loss_mask,
            cu_seqlens=batch.cu_seqlens,
            num_sequences=batch.num_sequences,
            advantages=batch.advantages,
            counts=counts,
        )
        out = loss(inputs)
        out.loss.backward()
        for a, b in zip(
            batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1 : batch.num_sequences + 1], strict=False
        ):
            size = float(mask[a:b].sum())
            s = math.exp(float((mask * (new.detach() - old))[a:b].sum()) / size)
            for t in (t for t in range(a, b) if mask[t]):
                advantage = float(batch.advantages[t])
                clipped = min(max(s, 1 - 3e-4), 1 + 4e-4) * advantage
                wanted -= min(s * advantage, clipped) / size / 3
                is_taken = clipped < s * advantage
                taken += is_taken
                gradient[t] = 0.0 if is_taken else -s * advantage / size / 3
        assert float(out.loss) == pytest.approx(wanted, abs=1e-9)
        assert torch.allclose(new.grad, gradient, atol=1e-9)
        total += wanted
    assert total != 0 and 0 < taken < 10


@pytest.mark.parametrize("name", ["gspo", "ppo", "dpo"])
def test_a_loss_that_takes_no_advantage_a_token_is_refused(name):
    with pytest.raises(ConfigError, match=rf"^algorithm.advantage_level = 'turn': .* the loss of {name} .* gspo_token"):
        AlgorithmConfig(name=name, advantage_level="turn")


def test_a_recipe_without_episodes_is_warned_of():
    assert any("advantage_level = 'turn'" in text and "same as 'sequence'" in text for text in warnings(config()))
    files = dataclasses.replace(config(), rollout=RolloutConfig(engine="files", path="x"))
    assert not any("advantage_level" in text for text in warnings(files))
