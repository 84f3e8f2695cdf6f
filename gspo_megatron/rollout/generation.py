"""From prompts to groups of sampled responses, and the groups of all context-parallel ranks brought together.

Every rank of a replica in generation (a data-parallel and context-parallel rank) holds the replica's groups. Training
wants the groups of all context-parallel ranks together, because those share each sequence: `join_context` brings them
there.
"""

from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import Prompt, RolloutGroup
from gspo_megatron.rollout import random_numbers
from gspo_megatron.rollout.episodes import Episode, Stage
from gspo_megatron.rollout.sampler import Sampler, SampleRequest
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.tasks.environments import Environments


@dataclass(frozen=True)
class Generator:
    """A generator has responses sampled, and hands them to the environments that answer them."""

    sampler: Sampler
    topology: Topology
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    environments: Environments | None = None  # of tasks whose responses are episodes of one or more turns

    def generate(
        self, prompts: list[Prompt], group_size: int, max_tokens: int, params: SamplingParams, seed: int
    ) -> list[RolloutGroup]:
        """Return this replica's share of the groups. A collective over all ranks.

        Args:
            prompts: all of the step's, the same on every rank; a multiple of Topology.replicas.
            max_tokens: of a response; with all of its turns, where an environment answers.
            seed: it fixes the samples whatever the layout.

        Raises:
            RolloutError: an environment or what it says cannot be used. On every rank.
            TrainingError: the model's logits are no distribution. On every rank.
        """
        share = len(prompts) // self.topology.replicas
        place = self.topology.dp_cp_rank
        shared = prompts[place * share : (place + 1) * share]

        environments, tokenizer = self.environments, self.tokenizer

        def text(token_ids: list[int]) -> str:
            return text_of(token_ids, tokenizer, params)

        stage = Stage(self.sampler, self.topology, self.device, environments, tokenizer, text) if environments else None
        episodes: list[Episode] = []
        if stage:
            shared, episodes = stage.opened(shared, group_size)
        requests = [request_of(prompt, group_size, max_tokens, seed) for prompt in shared]
        groups = [
            RolloutGroup(prompt, answers, texts=[text(completion.token_ids) for completion in answers])
            for prompt, answers in zip(shared, self.sampler.sample(requests, params), strict=True)
        ]
        if stage:
            stage.play(groups, episodes, requests, params)
        return groups


def request_of(prompt: Prompt, group_size: int, max_tokens: int, seed: int) -> SampleRequest:
    """Return the request for a group of responses.

    Args:
        seed: of the step or the evaluation.
    """
    seeds = tuple(random_numbers.response_seed(seed, prompt.uid, number) for number in range(group_size))
    return SampleRequest(prompt.token_ids, seeds, max_tokens)


def text_of(token_ids: list[int], tokenizer: PreTrainedTokenizerBase, params: SamplingParams) -> str:
    """Return a response as rewards see it: without special tokens, or up to the text that ended it."""
    if params.stop_strings:
        return params.stop_strings.text(token_ids)
    return cast(str, tokenizer.decode(token_ids, skip_special_tokens=True))  # a list only for a batch


def join_context(groups: list[RolloutGroup], topology: Topology) -> list[RolloutGroup]:
    """Bring the scored groups of all context-parallel ranks together, in the prompts' order. A collective over them.

    They travel as objects: a step's token ids and log-probs are kilobytes to a few megabytes, once a step, against the
    seconds that sampling them took; packing them into tensors would save nothing that can be measured.
    """
    if topology.cp_size == 1:
        return groups
    return [group for part in gather_objects(groups, topology.cp_group) for group in part]
