"""What every loss takes and gives back. Losses are plain functions of packed tensors; they know no Megatron."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gspo_megatron.types import SequenceTable


@dataclass(frozen=True)
class GlobalCounts:
    """Denominators of one optimizer step, counted over all ranks and microbatches before the first forward.

    A microbatch's own mean would weigh its sequences by how the batch happened to be split.
    """

    num_sequences: int  # sequences with at least one trained token
    num_tokens: int  # tokens with mask 1


@dataclass(frozen=True)
class LossInputs:
    """One microbatch: S sequences packed into T tokens (padding segment included in T, not in S)."""

    logprobs: torch.Tensor  # [T] fp32 or fp64, differentiable
    entropy: torch.Tensor  # [T], no gradient
    old_logprobs: torch.Tensor  # [T] fp32
    loss_mask: torch.Tensor  # [T], 0 or 1
    cu_seqlens: torch.Tensor  # [>= S+1] int32
    num_sequences: int  # S
    advantages: torch.Tensor  # [S], or [T] for gspo_token
    counts: GlobalCounts


@dataclass(frozen=True)
class LossOutputs:
    """`loss` is this microbatch's share: summed over microbatches and ranks it is the loss of the step."""

    loss: torch.Tensor  # [] fp64, differentiable
    table: SequenceTable  # [S, columns] fp64, no gradient


@dataclass(frozen=True)
class ClipRange:
    """1 - low and 1 + high bound the ratio."""

    low: float
    high: float


Loss = Callable[[LossInputs], LossOutputs]
