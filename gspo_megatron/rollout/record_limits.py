"""What a record of rollouts must fit: the recipe that reads it, its model and its tokenizer."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gspo_megatron.config import ResolvedConfig
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.rollout.records import GroupRecord, ResponseRecord
from gspo_megatron.tasks.data_files import BadRow, shortened

NO_TURNS = "a loss_mask with 0 between tokens of the model and no turns, which algorithm.advantage_level = turn needs"


@dataclass(frozen=True)
class Limits:
    """Values that the groups of a run's files are held to."""

    tasks: Collection[str]
    group_size: int
    temperature: float
    max_response_length: int
    vocab_size: int
    longest: int  # tokens of prompt and response
    why_longest: str  # the fields that say so, with their values
    tokenizer: str  # data/tokenizer.py: vocabulary_hash
    wants_logprobs: tuple[str, str] | None = None  # the setting that cannot do without, and what to give it else
    wants_turns: bool = False  # algorithm.advantage_level

    @classmethod
    def of(cls, config: ResolvedConfig, shape: Architecture, tokenizer: str) -> "Limits":
        """Return those of a recipe.

        Args:
            shape: of the model, with its vocabulary.
            tokenizer: the hash of its vocabulary.
        """
        positions, room = shape.max_position_embeddings, config.max_tokens_per_microbatch
        context = config.parallel.context_parallel_size or 1
        multiple = 2 * context if context > 1 else 1  # as sequences are padded (Topology.sequence_multiple)
        longest = min(positions, room)
        rollout = config.rollout
        return cls(
            tasks=config.tasks.keys(),
            group_size=rollout.group_size,
            temperature=rollout.temperature,
            max_response_length=rollout.max_response_length,
            vocab_size=shape.vocab_size,
            longest=longest - longest % multiple,
            why_longest=f"max_position_embeddings of the model is {positions}, max_tokens_per_microbatch {room}",
            tokenizer=tokenizer,
            wants_logprobs=wants_logprobs(config),
            wants_turns=config.algorithm.advantage_level == "turn",
        )

    def check(self, group: GroupRecord) -> None:
        """Raise BadRow for a group that cannot be trained on."""
        tasks, sampled = ", ".join(sorted(self.tasks)), group.sampling.temperature
        if group.task not in self.tasks:
            raise BadRow(f"task = {shortened(group.task)} is none of the recipe's, {tasks}", "Name it in tasks.")
        if group.tokenizer != self.tokenizer:
            raise BadRow(
                f"tokenizer = {shortened(group.tokenizer)} is another vocabulary than the model's, {self.tokenizer}",
                "Sample with the tokenizer of the run, or start from the model that sampled.",
            )
        if sampled != self.temperature:
            raise BadRow(
                f"sampling.temperature = {sampled:g} is not rollout.temperature = {self.temperature:g}, which divides "
                "the logits in old and new log-probs",
                f"Give rollout.temperature {sampled:g}.",
            )
        if len(group.responses) != self.group_size:
            raise BadRow(
                f"{len(group.responses)} responses, and rollout.group_size is {self.group_size}",
                "Give groups of one size, and rollout.group_size that size.",
            )
        self._check_vocabulary(group.prompt_ids, "prompt_ids")
        for number, response in enumerate(group.responses):
            self._check_response(response, f"responses[{number}]", len(group.prompt_ids))

    def _check_response(self, response: ResponseRecord, where: str, prompt: int) -> None:
        length = len(response.token_ids)
        if length > self.max_response_length:
            raise BadRow(
                f"{where} has {length} tokens, and rollout.max_response_length is {self.max_response_length}",
                f"Give rollout.max_response_length {length} or more.",
            )
        if prompt + length > self.longest:
            raise BadRow(
                f"prompt_ids and {where} have {prompt + length} tokens, and {self.longest} fit ({self.why_longest})",
                "Leave the group out, or raise what limits it.",
            )
        self._check_vocabulary(response.token_ids, f"{where}.token_ids")
        if self.wants_logprobs and response.logprobs is None:
            setting, remedy = self.wants_logprobs
            raise BadRow(f"{where} has no logprobs, which {setting} needs", remedy)
        if response.turns is not None and any(response.turns.rewards) and not response.is_scored:
            raise BadRow(
                f"{where} has rewards of its turns and no reward, which would contain them",
                "Give the response's reward, or turns whose rewards are 0, and the task scores it.",
            )
        if self.wants_turns and response.turns is None and has_gap(response.loss_mask):
            raise BadRow(f"{where} has {NO_TURNS}", "Give turns, or algorithm.advantage_level sequence.")

    def _check_vocabulary(self, token_ids: list[int], where: str) -> None:
        if max(token_ids) >= self.vocab_size:
            place = next(place for place, token in enumerate(token_ids) if token >= self.vocab_size)
            raise BadRow(
                f"{where}[{place}] = {token_ids[place]} must be below {self.vocab_size}, the model's vocabulary",
                "Sample with the model that the run starts from.",
            )


def has_gap(loss_mask: Sequence[float] | None) -> bool:
    """Tell whether somebody else wrote between two tokens of the model, so that it has had several turns."""
    trained = [place for place, mask in enumerate(() if loss_mask is None else loss_mask) if mask]
    return bool(trained) and trained[-1] - trained[0] >= len(trained)


def wants_logprobs(config: ResolvedConfig) -> tuple[str, str] | None:
    """Return the setting that cannot do without the sampling engine's log-probs, and what to give it else."""
    old, correction = config.algorithm.old_logprobs, config.algorithm.mismatch.correction
    if old == "rollout":
        return "algorithm.old_logprobs = rollout", "Give algorithm.old_logprobs recomputed."
    if correction != "none":
        return f"algorithm.mismatch.correction = {correction}", "Give algorithm.mismatch.correction none."
    return None
