"""Training sequences, packed batches of them, and what comes of an optimizer step.

Shape letters used everywhere: S sequences of a packed batch, T tokens of a packed batch, G responses of a
group, V vocabulary, H hidden size. Per-token tensors are indexed by the TARGET token: logprobs[t] is
log p(tokens[t] | tokens before t in the same sequence); the first token of a sequence has mask 0.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from gspo_megatron.routing.rollout_routes import SequenceRoutes
from gspo_megatron.routing.routes import Routes

Fillable = Literal["old_logprobs", "ref_logprobs", "rollout_logprobs", "values", "returns"]  # of a PackedBatch


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
