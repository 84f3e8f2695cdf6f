"""Rewards of sampled responses, by each task's own scorer.

The first rank of a replica in generation scores, so that a scorer that is slow or not deterministic runs once.
"""

import math
from collections.abc import Callable

import torch

from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import Response, RolloutGroup, Score
from gspo_megatron.errors import GspoError, RolloutError
from gspo_megatron.process import progress
from gspo_megatron.rollout.first_rank import on_first_rank
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.tasks.task import Told


def score(
    groups: list[RolloutGroup],
    mixture: TaskMixture,
    topology: Topology,
    device: torch.device,
    told: Told = lambda done: None,
) -> None:
    """Fill in `scores` by each task's own scorer. A collective over all ranks.

    Args:
        told: called on the ranks that score, with the number of responses that have a score.

    Raises:
        RolloutError: a scorer failed or gave no number; on every rank alike, with the first such response.
    """

    def work(keep: Callable[[], None]) -> list[Score]:
        def tell(done: int) -> None:
            told(done)
            keep()

        return _scores(groups, mixture, tell)

    scores = on_first_rank(topology, device, work)
    place = 0
    for group in groups:
        group.scores = scores[place : place + len(group.completions)]
        place += len(group.completions)


def _scores(groups: list[RolloutGroup], mixture: TaskMixture, told: Told) -> list[Score]:
    """Whatever a scorer raises is a RolloutError, and names the response where one is to blame."""
    responses = [_response(group, index) for group in groups for index in range(len(group.texts))]

    def tell(done: int) -> None:
        progress.detail(f"response {done} of {len(responses)}")
        told(done)

    try:
        scores = mixture.score_all(responses, tell)
    except GspoError as error:
        raise RolloutError(str(error)) from error
    except Exception as error:
        raise RolloutError(
            f"the scorer raised {type(error).__name__}: {error}. Take the task out of the recipe, or correct it."
        ) from error
    for response, score in zip(responses, scores, strict=True):
        if score.reward is not None and not math.isfinite(score.reward):
            raise RolloutError(
                f"{response.where}: the reward is {score.reward} and must be finite. Take the task out of the recipe."
            )
    return scores


def _response(group: RolloutGroup, index: int) -> Response:
    item, text = group.prompt.item, group.texts[index]
    where = f"response {index} to prompt {group.prompt.uid} ({item.task}), {text[:80]!r}"
    completion = group.completions[index]
    return Response(item, text, completion.token_ids, where, completion.outcome)
