"""From prompts to groups of sampled responses, and the groups of all context-parallel ranks brought together.

Every rank of a replica in generation (a data-parallel and context-parallel rank) holds the replica's groups. Training
wants the groups of all context-parallel ranks together, because those share each sequence: `join_context` brings them
there.
"""

from typing import cast

from transformers import PreTrainedTokenizerBase

from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import Prompt, RolloutGroup
from gspo_megatron.rollout.episodes import Episode, Stage
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampling import SamplingParams, uniforms
from gspo_megatron.tasks.environments import Environments


def generate(
    engine: MegatronEngine,
    prompts: list[Prompt],
    group_size: int,
    params: SamplingParams,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    environments: Environments | None = None,
) -> list[RolloutGroup]:
    """Sample this replica's share of `prompts` (all of the step's, the same on every rank; a multiple of
    Topology.replicas). `seed` fixes the samples whatever the layout. Where a task has an environment, its responses
    are episodes of one or more turns."""
    topology = engine.topology
    share = len(prompts) // topology.replicas
    mine = slice(topology.dp_cp_rank * share, (topology.dp_cp_rank + 1) * share)
    rows = slice(mine.start * group_size, mine.stop * group_size)
    uniform = uniforms(len(prompts) * group_size, params.max_tokens, seed)[rows]
    shared = prompts[mine]

    def text(token_ids: list[int]) -> str:
        return text_of(token_ids, tokenizer, params)

    stage = Stage(engine, environments, tokenizer, text) if environments else None
    episodes: list[Episode] = []
    if stage:
        shared, episodes = stage.opened(shared, group_size)
    completions = engine.generate(shared, group_size, params, uniform)
    groups = [
        RolloutGroup(prompt, answers, texts=[text(completion.token_ids) for completion in answers])
        for prompt, answers in zip(shared, completions, strict=True)
    ]
    if stage:
        stage.play(groups, episodes, params, uniform)
    return groups


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
