"""Rewarded groups become training sequences, which are divided into minibatches."""

import numpy as np

from gspo_megatron.batch import Completion, RolloutGroup, TrainSequence


def train_sequences(groups: list[RolloutGroup], mask_truncated: bool = False) -> list[TrainSequence]:
    """Make one sequence a response, group after group. Advantages come later (trainer/advantages/).

    A response without a reward has the mask 0 throughout, so that no denominator counts it.

    Args:
        mask_truncated: so has one that was cut at the limit (algorithm.mask_truncated_completions).
    """
    return [
        TrainSequence(
            token_ids=group.prompt.token_ids + completion.token_ids,
            prompt_length=len(group.prompt.token_ids),
            reward=reward,
            group_id=group.prompt.uid,
            truncated=completion.truncated,
            rollout_logprobs=completion.logprobs,
            loss_mask=_mask(completion, kept and not (mask_truncated and completion.truncated)),
            routes=completion.routes,
        )
        for group in groups
        for completion, reward, kept in zip(group.completions, group.rewards, group.is_kept, strict=True)
    ]


def _mask(completion: Completion, is_trained: bool) -> list[int] | None:
    return completion.loss_mask if is_trained else [0] * len(completion.token_ids)


def minibatch_indices(groups: list[RolloutGroup], count: int, seed: tuple[int, int]) -> list[list[int]]:
    """Return numbers of this replica's responses in each of `count` minibatches, the same share of every group in each.

    Responses of a group are shuffled by (seed, its prompt's uid) and dealt out in turn, so who is in which minibatch
    does not depend on how many replicas there are.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    start = 0
    for group in groups:
        order = np.random.default_rng((*seed, group.prompt.uid)).permutation(len(group.completions))
        for place, index in enumerate(order, start):
            parts[place % count].append(start + int(index))
        start += len(order)
    return parts
