"""Groups that some ranks hand over are shared out among the data-parallel replicas.

Every rank sees all groups, and so computes the same shares: whole groups, the longest first, each to the replica with
the fewest tokens. Who is in which minibatch is decided before that, so it is the same in every layout. A replica that
has nothing in a minibatch gets a filler: a response without a reward, which no denominator counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch.distributed as dist

from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.batch import RolloutGroup, Score, TrainSequence
from gspo_megatron.config import ResolvedConfig
from gspo_megatron.data.sequences import minibatch_indices
from gspo_megatron.errors import RolloutError
from gspo_megatron.rollout.record_limits import NO_TURNS, has_gap, wants_logprobs

FILLER = 1 << 60  # uids from here on are fillers'


@dataclass(frozen=True)
class Shared:
    """A replica's share of a batch."""

    own: list[RolloutGroup]
    fillers: list[RolloutGroup]
    parts: list[list[int]]  # numbers of responses, own first, of each minibatch
    tasks: set[str]  # of all groups

    @property
    def groups(self) -> list[RolloutGroup]:
        return [*self.own, *self.fillers]


def share(groups: Sequence[RolloutGroup], policy: Policy, step: int) -> Shared:
    """Share out what the ranks hand over. A collective over all ranks.

    Raises:
        RolloutError: there is no group, every rank has the same ones, or one cannot be learned from. On every rank.
    """
    config, topology = policy.config, policy.topology
    everyone = gather_objects(list(groups))
    _check_ranks(everyone)
    every = [_numbered(group, place) for place, group in enumerate(group for part in everyone for group in part)]
    for place, group in enumerate(every):
        _check(group, place, config)
        for completion in group.completions:
            _check_tokens([*group.prompt.token_ids, *completion.token_ids], policy, f"groups[{place}]")
    count = config.algorithm.num_minibatches
    minibatches = minibatch_indices(every, count, (config.seed, step))  # by numbers over all replicas
    replica = _replicas(every, topology.dp_size)
    mine = [place for place in range(len(every)) if replica[place] == topology.dp_rank]
    sizes = [len(group.completions) for group in every]
    starts = list(accumulate(sizes, initial=0))
    numbers = [number for place in mine for number in range(starts[place], starts[place] + sizes[place])]
    here = {number: local for local, number in enumerate(numbers)}
    parts = [[here[number] for number in part if number in here] for part in minibatches]
    shortest = min(every, key=lambda group: min(_tokens(group)))
    fillers: list[RolloutGroup] = []
    for number, part in enumerate(parts):
        if not part:
            part.append(len(numbers) + len(fillers))
            fillers.append(_filler(shortest, number))
    return Shared([every[place] for place in mine], fillers, parts, {group.prompt.item.task for group in every})


def log_probs(policy: Policy, sequences: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
    """Return log-probs of the responses that all ranks hand over. A collective over all ranks."""
    every = [
        TrainSequence(prompt + answer, len(prompt))
        for part in gather_objects(list(sequences))
        for prompt, answer in part
    ]
    for place, sequence in enumerate(every):
        _check_tokens(sequence.token_ids, policy, f"sequences[{place}]")
    if not every:
        return []
    topology = policy.topology
    # Every replica needs one; the first stands in where there are fewer.
    numbers = list(range(topology.dp_rank, len(every), topology.dp_size)) or [0]
    batches = policy.microbatches([every[number] for number in numbers])
    found: dict[int, list[float]] = {}
    for batch, values in zip(batches, policy.log_probs(batches), strict=True):
        if values is None:
            continue
        if topology.cp_size > 1:
            dist.all_reduce(values, group=topology.cp_group)  # each rank has those of its own tokens, and 0 elsewhere
        bounds = batch.cu_seqlens.tolist()
        for place, source in enumerate(batch.sources):
            sequence = every[numbers[source]]
            first = bounds[place] + sequence.prompt_length
            found[numbers[source]] = values[first : first + sequence.response_length].tolist()
    known = {number: values for part in gather_objects(found) for number, values in part.items()}
    return [known[number] for number in range(len(every))]


def _check_ranks(everyone: list[list[RolloutGroup]]) -> None:
    if not any(everyone):
        raise RolloutError("groups: no rank handed over a group. Hand them over on rank 0, or each rank its own.")
    first = [_identity(group) for group in everyone[0]]
    if len(everyone) > 1 and first and all([_identity(group) for group in part] == first for part in everyone[1:]):
        raise RolloutError(
            f"groups: every rank handed over the same {len(first)} groups, each of which would be trained on "
            f"{len(everyone)} times. Hand them over on rank 0 alone ([] elsewhere), or each rank its own."
        )


def _identity(group: RolloutGroup) -> tuple:
    return group.prompt.uid, group.prompt.token_ids, [completion.token_ids for completion in group.completions]


def _numbered(group: RolloutGroup, place: int) -> RolloutGroup:
    if group.prompt.uid >= 0:
        return group
    return replace(group, prompt=replace(group.prompt, uid=place))


def _check(group: RolloutGroup, place: int, config: ResolvedConfig) -> None:
    where = f"groups[{place}] (uid {group.prompt.uid})"
    if not group.completions or len(group.scores) != len(group.completions):
        raise RolloutError(
            f"{where}: {len(group.completions)} responses and {len(group.scores)} scores, must be as many, and at "
            "least 1. Score each response; Score(None) leaves one out."
        )
    if wants_logprobs(config) and any(completion.logprobs is None for completion in group.completions):
        raise RolloutError(
            f"{where}: has no log-probs, and algorithm.old_logprobs {config.algorithm.old_logprobs} with "
            f"algorithm.mismatch.correction {config.algorithm.mismatch.correction} needs the sampling engine's. Hand "
            "them over, or give old_logprobs recomputed and correction none."
        )
    for number, completion in enumerate(group.completions):
        turns, has_turns = completion.turns, config.algorithm.advantage_level == "turn"
        if turns is None and has_turns and has_gap(completion.loss_mask):
            raise RolloutError(f"{where}: response {number} has {NO_TURNS}. Hand them over (RolloutGroup.of(turns=)).")
        if turns is not None and (fault := turns.fault(len(completion.token_ids))):
            raise RolloutError(f"{where}: turns of response {number}: {fault}. Check the rollout engine.")


def _check_tokens(token_ids: list[int], policy: Policy, where: str) -> None:
    """Refuse what the model would read as something else: it has no row, or no position, for it."""
    rows, positions = policy.shape.vocab_size, policy.models[0].max_sequence_length
    wrong = next((token for token in token_ids if not 0 <= token < rows), None)
    if wrong is not None:
        raise RolloutError(f"{where}: token {wrong} is not in the vocabulary of {rows}. Use the model's tokenizer.")
    if len(token_ids) > positions:
        raise RolloutError(
            f"{where}: prompt and response have {len(token_ids)} tokens, and the model has {positions} positions. "
            "Leave it out, or cut it."
        )


def _replicas(groups: Sequence[RolloutGroup], count: int) -> list[int]:
    """The replica of each group."""
    load, found = [0] * count, [0] * len(groups)
    for place in sorted(range(len(groups)), key=lambda place: (-sum(_tokens(groups[place])), place)):
        found[place] = load.index(min(load))
        load[found[place]] += sum(_tokens(groups[place]))
    return found


def _tokens(group: RolloutGroup) -> list[int]:
    return [len(group.prompt.token_ids) + len(completion.token_ids) for completion in group.completions]


def _filler(group: RolloutGroup, number: int) -> RolloutGroup:
    tokens = _tokens(group)
    return RolloutGroup(
        replace(group.prompt, uid=FILLER + number), [group.completions[tokens.index(min(tokens))]], [Score(None)], [""]
    )
