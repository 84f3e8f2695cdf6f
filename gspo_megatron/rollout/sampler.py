"""What samples responses, and what brings it the policy's weights: two protocols. MegatronEngine is both of them on the
training model itself (megatron_engine.py).

A request has tokens and seeds alone, which is all that an engine outside of this process can be given. Left out:
requests that are answered one by one as they finish, and requests that are taken back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gspo_megatron.batch import Completion
from gspo_megatron.rollout.random_numbers import SEEDS
from gspo_megatron.rollout.sampling import SamplingParams


@dataclass(frozen=True)
class SampleRequest:
    """A request is a prompt in tokens, and for each response wanted the seed that fixes it."""

    token_ids: list[int]  # one or more
    seeds: tuple[int, ...]  # one a response, 0 to 2^63 - 1
    max_tokens: int  # of each response, 1 or more

    def __post_init__(self) -> None:
        """Raise ValueError for what no engine could answer."""
        if not self.token_ids:
            raise ValueError("token_ids is empty: give a prompt of one token or more.")
        if not self.seeds:
            raise ValueError("seeds is empty: give one for each response that is wanted.")
        if wrong := [seed for seed in self.seeds if not 0 <= seed < SEEDS]:
            raise ValueError(f"seeds has {wrong[0]}: give numbers from 0 to 2^63 - 1.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: give 1 or more.")


class Sampler(Protocol):
    """A sampler answers requests with the weights that it has at that time."""

    @property
    def version(self) -> int:
        """Return how many batches of RL those weights have learned from."""

    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[list[Completion]]:
        """Sample the responses to each request. A collective over all ranks.

        What a response is depends on the weights, its prompt, its seed, its max_tokens and `params`, and not on the
        other requests or the layout.

        Args:
            requests: this replica's, the same on all of its ranks. Every replica gives as many requests, one or more;
                how many responses and tokens each of them wants may differ.

        Returns:
            One list a request, one completion a seed, with log-probs and `versions`; the same on every rank of the
            replica but for `routes`, which are of the rank's own layers.

        Raises:
            TrainingError: a model's logits are no distribution; on every rank of every replica.
        """


class WeightSync(Protocol):
    """It brings the policy's weights to who samples."""

    def sync(self, version: int) -> dict[str, float]:
        """Bring the weights as they are now, before anything is sampled with them. A collective over all ranks.

        It comes before every evaluation and every step's rollouts. Weights may change within a version (no step of the
        warm start counts), and may be those that were brought last.

        Args:
            version: how many batches of RL they have learned from, which is the sampler's version from here on.

        Returns:
            Metrics for the row of the step.
        """
