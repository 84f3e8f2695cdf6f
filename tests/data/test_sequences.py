"""Responses become training sequences: which of them are trained."""

from gspo_megatron.batch import Completion, Prompt, RolloutGroup, Score, TaskItem
from gspo_megatron.data.sequences import train_sequences

PROMPT = Prompt(0, TaskItem("t", "q", "a", {}), [5, 6])


def group() -> RolloutGroup:
    """Of 2, 3 and 4 tokens; the second was cut at the limit, the third has no reward."""
    answers = [Completion([9] * n, [-1.0] * n, truncated=n == 3) for n in (2, 3, 4)]
    return RolloutGroup(PROMPT, answers, [Score(1.0), Score(0.5), Score(None)], [""] * 3)


def test_a_response_without_a_reward_is_not_trained_and_a_cut_one_is():
    assert [sequence.loss_mask for sequence in train_sequences([group()])] == [None, None, [0] * 4]


def test_cut_responses_are_left_out_where_the_recipe_says_so():
    """Their rewards stay, for the others are compared with them."""
    sequences = train_sequences([group()], mask_truncated=True)
    assert [sequence.loss_mask for sequence in sequences] == [None, [0] * 3, [0] * 4]
    assert [sequence.reward for sequence in sequences] == [1.0, 0.5, 0.0]
