"""These records cross a boundary between two rooms of the house. Nothing here computes.

Shape letters used everywhere: S sequences of a packed batch, T tokens of a packed batch, G responses of a
group, V vocabulary, H hidden size. Per-token tensors are indexed by the TARGET token: logprobs[t] is
log p(tokens[t] | tokens before t in the same sequence); the first token of a sequence has mask 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from gspo_megatron.routing.rollout_routes import SequenceRoutes
from gspo_megatron.routing.routes import Routes

Message = dict[str, str]  # role and content
FinishReason = Literal["stop", "length"]
Fillable = Literal["old_logprobs", "ref_logprobs", "rollout_logprobs", "values", "returns"]  # of a PackedBatch


@dataclass(frozen=True)
class TaskItem:
    """A task item is one question of one task, with what its scorer needs."""

    task: str  # key of the recipe's `tasks` table
    question: str  # as people read it; of a conversation, its texts
    answer: str  # a gold answer, "" where there is none; the scorer may accept others
    entry: dict  # the task's own record, handed back to its scorer: the generator's, or the row's columns
    has_answer: bool = True
    messages: tuple[Message, ...] = ()  # the conversation that the prompt is; (): the question alone, as the user's
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # for the chat template
    epoch: int = 0  # how often the task had given all its rows before this one; 0 where it has no end

    @property
    def conversation(self) -> tuple[Message, ...]:
        """Return the messages of the prompt."""
        return self.messages or ({"role": "user", "content": self.question},)


@dataclass(frozen=True)
class Outcome:
    """An outcome is what came of an episode in an environment."""

    turns: int  # responses of the model
    messages: tuple[Message, ...]  # all behind the prompt, the model's and the environment's
    reward: float | None = None  # get_reward(), or the sum of the turns' rewards; None: the environment gives none
    turn_rewards: tuple[float, ...] = ()  # one a turn, where step() gives them
    error: str | None = None  # what went wrong


@dataclass(frozen=True)
class Response:
    """A response is what a model wrote to an item, as a scorer gets it."""

    item: TaskItem
    text: str
    token_ids: list[int]
    where: str = ""  # for messages: which response to which prompt
    outcome: Outcome | None = None  # of an episode


@dataclass(frozen=True)
class Score:
    """A score is what a task thinks of a response."""

    reward: float | None  # any finite number; None: there is none, and the response is left out
    parts: dict[str, float] = field(default_factory=dict)  # by the names of reward functions, before weights
    error: str | None = None  # what went wrong, where `reward` is the recipe's on_error


@dataclass(frozen=True)
class Prompt:
    """A prompt is a tokenized question. `uid` is its position in the prompt stream, unique within a run and a split."""

    uid: int
    item: TaskItem
    token_ids: list[int]  # already through the chat template, ends where the response begins


@dataclass(frozen=True)
class Completion:
    """A completion is one sampled response; the token that ended it, when one did, is its last token."""

    token_ids: list[int]
    logprobs: list[float] | None  # log p under the sampling policy at the rollout temperature, one a token
    truncated: bool  # cut at max_response_length: neither a stop token nor a stop string ended it
    routes: SequenceRoutes | None = None  # of prompt and response, this stage's layers; where the engine records them
    loss_mask: list[int] | None = None  # 0 or 1 a token: what others wrote (a tool) is 0; None: all are trained
    outcome: Outcome | None = None  # of an episode

    @property
    def finish_reason(self) -> FinishReason:
        """Return why it ended, in the word that inference engines have for it."""
        return "length" if self.truncated else "stop"


@dataclass
class RolloutGroup:
    """A group is G responses to one prompt with their scores (`group_size` of the recipe)."""

    prompt: Prompt
    completions: list[Completion]
    scores: list[Score] = field(default_factory=list)  # the task's own, before any penalty
    texts: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        prompt_ids: list[int],
        responses: list[list[int]],
        rewards: Sequence[float | None],
        logprobs: Sequence[list[float]] | None = None,
        loss_masks: Sequence[list[int]] | None = None,
        truncated: Sequence[bool] | None = None,
        task: str = "task",
        uid: int = -1,
    ) -> "RolloutGroup":
        """Return a group of what another system has.

        Args:
            prompt_ids: tokens up to where the responses begin.
            responses: their tokens, the one that ended a response with it.
            rewards: one each; None leaves a response out.
            logprobs: that the sampling engine gave, one a token, at the recipe's temperature.
            loss_masks: 0 at tokens that somebody else wrote, else 1.
            truncated: cut at the limit.
            task: for metrics.
            uid: a number of 0 or more that no other group of the step has; -1: its place in the step.

        Raises:
            ValueError: lists that differ in length.
        """
        given = {"rewards": rewards, "logprobs": logprobs, "loss_masks": loss_masks, "truncated": truncated}
        for name, values in given.items():
            if values is not None and len(values) != len(responses):
                raise ValueError(f"{name} has {len(values)} entries for {len(responses)} responses: give one each.")
        completions = [
            Completion(
                ids,
                logprobs[i] if logprobs else None,
                bool(truncated[i]) if truncated else False,
                loss_mask=loss_masks[i] if loss_masks else None,
            )
            for i, ids in enumerate(responses)
        ]
        prompt = Prompt(uid, TaskItem(task, "", "", {}), prompt_ids)
        return cls(prompt, completions, [Score(reward) for reward in rewards], [""] * len(responses))

    @property
    def rewards(self) -> list[float]:
        """Return the rewards, 0 for a response that has none."""
        return [score.reward or 0.0 for score in self.scores]

    @property
    def is_kept(self) -> list[bool]:
        """Tell of each response whether it has a reward; those without are neither trained on nor compared with."""
        return [score.reward is not None for score in self.scores]

    @property
    def has_signal(self) -> bool:
        """Tell whether the task's rewards differ: an answer was better than another."""
        return len({score.reward for score in self.scores if score.reward is not None}) > 1


@dataclass
class TrainSequence:
    """A training sequence is one prompt + response as the packer takes it."""

    token_ids: list[int]  # prompt then response
    prompt_length: int  # the first prompt_length tokens have loss mask 0
    advantage: float = 0.0  # where it is known before packing; in RL an estimator fills it in afterwards
    reward: float = 0.0
    group_id: int = -1
    truncated: bool = False
    rollout_logprobs: list[float] | None = None  # one a response token
    loss_mask: list[int] | None = None  # 0 or 1 a response token (turns of others are 0); None: 1 at all of them
    routes: SequenceRoutes | None = None  # that the rollout took

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


@dataclass
class PackedBatch:
    """A packed batch is one microbatch, sequence after sequence (Megatron's THD layout).

    Padding of a sequence (to a multiple of 2 CP under context parallelism, to one length in a padded batch) lies at its
    end, inside its bounds, with mask 0. Padding needed for sequence parallelism is one more segment, added by the
    packer and not counted in S (`num_sequences`); a microbatch may be that segment alone (S = 0).
    """

    tokens: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, restart at 0 in every sequence
    cu_seqlens: torch.Tensor  # [S+1] int32, or [S+2] with the padding segment
    num_sequences: int  # S
    loss_mask: torch.Tensor  # [T] fp32, 1 on trained response tokens
    advantages: torch.Tensor  # [S] fp32, or [T] with one a token
    old_logprobs: torch.Tensor | None = None  # [T] fp32, filled by the training engine
    ref_logprobs: torch.Tensor | None = None  # [T] fp32, of the frozen reference
    values: torch.Tensor | None = None  # [T] fp32, the critic's at collection (PPO)
    returns: torch.Tensor | None = None  # [T] fp32, what the critic learns (PPO)
    old_routes: Routes | None = None  # of the pass that computed old_logprobs; this rank's layers and tokens
    rollout_logprobs: torch.Tensor | None = None  # [T] fp32
    rollout_routes: torch.Tensor | None = None  # [L, T, k] int16 by rollout_layers; UNKNOWN at padding and last tokens
    rollout_layers: tuple[int, ...] = ()  # this stage's MoE layers
    rewards: torch.Tensor | None = None  # [S] fp32
    group_id: torch.Tensor | None = None  # [S] int64
    truncated: torch.Tensor | None = None  # [S] bool
    source_index: list[int] | None = None  # S places in the list that was packed

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.numel())

    @property
    def max_seqlen(self) -> int:
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    @property
    def sources(self) -> list[int]:
        """Return source_index. Raise RuntimeError where nobody packed this batch."""
        if self.source_index is None:
            raise RuntimeError("a batch has no source_index: the packer gives it (data/packing.py)")
        return self.source_index

    def filled(self, name: Fillable) -> torch.Tensor:
        """Return what a pass fills in, [T]. Raise RuntimeError where none has done so on this rank."""
        values = getattr(self, name)
        if values is None:
            raise RuntimeError(f"a batch has no {name} yet: the pass that fills them in has not come by on this rank")
        return values

    def to(self, device: torch.device) -> "PackedBatch":
        """Return a copy with every tensor on `device`."""
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.__dict__.items()
        }
        return PackedBatch(**moved)


@dataclass(frozen=True)
class Minibatch:
    """A minibatch is what one optimizer step learns from, on this data-parallel replica."""

    responses: list[int]  # numbers of the replica's responses, in the order in which they were given to the packer
    batches: list[PackedBatch]

    def numbered(self) -> list[tuple[PackedBatch, list[int]]]:
        """Return each batch with the numbers of its S responses."""
        return [(batch, [self.responses[i] for i in batch.sources]) for batch in self.batches]


@dataclass(frozen=True)
class SequenceTable:
    """The table has per-sequence results of one optimizer step's forward, in fp64, one row a sequence.

    10 numbers a sequence, never a log-prob vector.
    """

    values: torch.Tensor  # [S, len(COLUMNS)] fp64

    COLUMNS = (
        "num_tokens",  # |y_i|
        "sum_log_ratio",  # sum_t m d
        "sum_sq_log_ratio",  # sum_t m d^2
        "sum_k3",  # sum_t m (exp(d) - 1 - d)
        "max_abs_log_ratio",
        "sum_entropy",  # sum_t m H_t
        "sum_ref_kl",  # sum_t m KL_t to the reference, by the recipe's estimator; 0 without a reference
        "sum_mismatch",  # sum_t m (old - rollout); 0 where the batch has no rollout log-probs
        "clipped_low_tokens",  # tokens whose gradient the clip removed, ratio below 1 - eps_low
        "clipped_high_tokens",  # the same, ratio above 1 + eps_high
    )

    def column(self, name: str) -> torch.Tensor:
        """Return one of COLUMNS, [S] fp64."""
        return self.values[:, self.COLUMNS.index(name)]


@dataclass(frozen=True)
class SequenceStats:
    """These are what the last pipeline stage publishes of one optimizer step, the same on all stages of its replica."""

    step: int
    minibatch: int
    loss: float  # this replica's share; the step's loss is the sum over data-parallel ranks
    table: SequenceTable  # rows in the order of the batches given to update()


@dataclass(frozen=True)
class UpdateResult:
    """An update is one optimizer step, as it is known on every pipeline stage."""

    stats: SequenceStats  # of this data-parallel replica
    grad_norm: float  # before clipping, over all ranks
    learning_rate: float
    stepped: bool  # False: nothing changed, because the gradient was exactly 0 or not finite
    not_finite: str | None = None  # what of it was not, in words, the same on every rank
