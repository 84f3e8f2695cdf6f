"""What every loss takes and gives back. Losses are plain functions of packed tensors; they know no Megatron.

Under context parallelism each rank calls the loss with vectors of the whole microbatch: `loss_mask` is 0 where another
rank owns the token, gradients flow to this rank's tokens alone, and `reduce` adds per-sequence sums over the ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from gspo_megatron.batch import SequenceTable
from gspo_megatron.ops.sequence_ratio_reference import sequence_ids


@dataclass(frozen=True)
class GlobalCounts:
    """Denominators of one optimizer step, counted over all ranks and microbatches before the first forward.

    A microbatch's own mean would weigh its sequences by how the batch happened to be split.
    """

    num_sequences: int  # sequences with at least one trained token
    num_tokens: int  # tokens with mask 1


@dataclass(frozen=True)
class ClipRange:
    """1 - low and 1 + high bound the ratio."""

    low: float
    high: float
    dual: float = math.inf  # where the advantage is negative, a ratio above this is bounded too (dual clip)


@dataclass(frozen=True)
class LossOptions:
    """What a recipe can choose for every policy loss; the defaults add nothing to the plain objective."""

    clip: ClipRange
    aggregation: str = "sequence_mean"  # a key of surrogate.TOKEN_WEIGHTS
    constant_length: int = 1  # L of aggregation constant_length
    kl_coef: float = 0.0  # of the KL term in the loss
    kl_estimator: str = "k3"  # a key of surrogate.KL_ESTIMATORS
    entropy_coef: float = 0.0
    mismatch: str = "none"  # a key of mismatch.CORRECTIONS
    mismatch_threshold: float = 2.0
    beta: float = 0.1  # DPO's
    preference_loss: str = "sigmoid"  # DPO's; or ipo


def given(tensor: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return what a loss cannot do without. Raises ValueError where the microbatch does not have it."""
    if tensor is None:
        raise ValueError(f"the microbatch has no {name}, which this loss needs")
    return tensor


def alone(table: torch.Tensor, maximum: int | None = None) -> torch.Tensor:
    """Reduce where there is no context parallelism: nothing is to be added."""
    return table


@dataclass(frozen=True)
class LossInputs:
    """One microbatch: S sequences packed into T tokens (padding segment included in T, not in S)."""

    logprobs: torch.Tensor  # [T] fp32 or fp64, differentiable
    entropy: torch.Tensor  # [T], differentiable
    old_logprobs: torch.Tensor  # [T] fp32
    loss_mask: torch.Tensor  # [T], 0 or 1; 0 where another context-parallel rank owns the token
    cu_seqlens: torch.Tensor  # [>= S+1] int32
    num_sequences: int  # S
    advantages: torch.Tensor  # [S], or [T] with one a token
    counts: GlobalCounts
    lengths: torch.Tensor | None = None  # [S] fp64, |y_i| over all context-parallel ranks; None: counted from the mask
    ref_logprobs: torch.Tensor | None = None  # [T] fp32, of the frozen reference
    rollout_logprobs: torch.Tensor | None = None  # [T] fp32, as sampled
    # (table [S, k] fp64, column whose maximum is taken instead of its sum) -> [S, k] over context-parallel ranks
    reduce: Callable[..., torch.Tensor] = field(default=alone)

    @property
    def bounds(self) -> torch.Tensor:
        """Return bounds of the sequences, [S+1] int32, without the padding segment."""
        return self.cu_seqlens[: self.num_sequences + 1]

    @cached_property
    def sequence_ids(self) -> torch.Tensor:
        """Return the sequence of each token, [T] int64; padding has S."""
        return sequence_ids(self.bounds, self.loss_mask.numel())

    @property
    def token_lengths(self) -> torch.Tensor:
        """Return lengths |y_i|, [S] fp64."""
        return self.sum_by_sequence(torch.ones_like(self.loss_mask)) if self.lengths is None else self.lengths

    def sum_by_sequence(self, values: torch.Tensor) -> torch.Tensor:
        """Sum m_t x_t in fp64 over this rank's tokens, [T] -> [S]; differentiable. A masked NaN counts as 0."""
        kept = torch.where(self.loss_mask > 0, values.double(), 0.0)
        return kept.new_zeros(self.num_sequences + 1).index_add(0, self.sequence_ids, kept)[: self.num_sequences]

    def by_token(self, values: torch.Tensor) -> torch.Tensor:
        """Give each token its sequence's number, [S] -> [T]; padding gets 0."""
        return torch.cat([values, values.new_zeros(1)])[self.sequence_ids]

    @property
    def token_advantages(self) -> torch.Tensor:
        """Return advantages by token, [T]."""
        return self.advantages if self.has_token_advantages else self.by_token(self.advantages)

    @property
    def has_token_advantages(self) -> bool:
        """Advantages differ by token ([S] where S = T)."""
        return self.advantages.numel() != self.num_sequences


@dataclass(frozen=True)
class LossOutputs:
    """`loss` is this microbatch's share: summed over microbatches and ranks it is the loss of the step."""

    loss: torch.Tensor  # [] fp64, differentiable; under context parallelism its value means nothing, its gradient does
    table: SequenceTable  # [S, columns] fp64, no gradient, over all context-parallel ranks
    value: torch.Tensor  # [] fp64, no gradient: the share's value over all context-parallel ranks


Loss = Callable[[LossInputs], LossOutputs]
