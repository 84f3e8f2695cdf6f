"""Rewards of sampled responses, by each task's own scorer.

The first rank of a replica in generation scores, so that a scorer that is slow or not deterministic runs once.
"""

import math
import time

import torch
import torch.distributed as dist

from gspo_megatron.backend.parallel.collective_errors import raise_if_any
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import Response, RolloutGroup, Score
from gspo_megatron.errors import GspoError, RolloutError
from gspo_megatron.process import progress
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.tasks.task import Told

SECONDS_APART = 30.0  # between two meetings while rewards are computed


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
    error = None
    scores: list[Score] = []
    ranks = dist.get_process_group_ranks(topology.model_parallel_group)
    meetings = _Meetings(device)

    def tell(done: int) -> None:
        told(done)
        meetings.keep()

    if topology.is_first_of_replica:
        try:
            scores = _scores(groups, mixture, tell)
        except RolloutError as problem:
            error = problem
    meetings.end()
    # Those that do not score would wait in the broadcast, and other replicas in the next collective.
    raise_if_any(error, device)
    if len(ranks) > 1:
        handed = [scores]
        dist.broadcast_object_list(handed, src=ranks[0], group=topology.model_parallel_group, device=device)
        scores = handed[0]
    place = 0
    for group in groups:
        group.scores = scores[place : place + len(group.completions)]
        place += len(group.completions)


class _Meetings:
    """All ranks meet now and then while some of them score: nobody waits in one collective for as long as rewards may
    take (faults.collective_timeout)."""

    def __init__(self, device: torch.device):
        self._device, self._next = device, time.monotonic() + SECONDS_APART

    def keep(self) -> None:
        """Meet the others where it is time."""
        if time.monotonic() >= self._next:
            self._meet(is_done=False)

    def end(self) -> None:
        """Meet the others until everyone is done."""
        while not self._meet(is_done=True):
            pass

    def _meet(self, is_done: bool) -> bool:
        """Returns whether all are done."""
        flag = torch.tensor([int(is_done)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        self._next = time.monotonic() + SECONDS_APART
        return bool(flag)


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
    return Response(item, text, group.completions[index].token_ids, where)
