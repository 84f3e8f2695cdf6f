"""What every loss takes and gives back. Losses are plain functions of packed tensors; they know no Megatron.

Under context parallelism each rank calls the loss with vectors of the whole microbatch: `loss_mask` is 0 where another
rank owns the token, gradients flow to this rank's tokens alone, and `reduce` adds per-sequence sums over the ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from gspo_megatron.algorithms import checks
from gspo_megatron.batch import SequenceTable
from gspo_megatron.ops.sequence_ratio_reference import sequence_ids

PADDED = "[B, L], B sequences padded to L tokens; sequences packed end to end are LossInputs(...)"
PACKED = "[T], sequences packed end to end; sequences padded to one length [B, L] are LossInputs.padded(...)"
LOG_PROBS = ("logprobs", "entropy", "old_logprobs", "ref_logprobs", "rollout_logprobs")  # fields with one a token


@dataclass(frozen=True)
class GlobalCounts:
    """Denominators of one optimizer step, counted over all ranks and microbatches before the first forward.

    A microbatch's own mean would weigh its sequences by how the batch happened to be split. Raises ValueError for
    what cannot be divided by.
    """

    num_sequences: int  # sequences with at least one trained token; 1 or more
    num_tokens: int  # tokens with mask 1; as many as sequences, or more

    def __post_init__(self) -> None:
        if not self.num_sequences >= 1:
            raise ValueError(
                f"num_sequences = {self.num_sequences}: must be 1 or more, since losses are divided by it. Leave out a "
                "step without a trained token."
            )
        if not self.num_tokens >= self.num_sequences:
            raise ValueError(
                f"num_tokens = {self.num_tokens}: must be at least num_sequences = {self.num_sequences}, which have a "
                "trained token each. Count both over the whole optimizer step."
            )


@dataclass(frozen=True)
class ClipRange:
    """1 - low and 1 + high bound the ratio. Raises ValueError for what are no bounds."""

    low: float
    high: float
    dual: float = math.inf  # where the advantage is negative, a ratio above this is bounded too (dual clip)

    def __post_init__(self) -> None:
        if not (0 <= self.low < 1 and self.high >= 0 and self.dual > 1 + self.high):
            raise ValueError(
                f"ClipRange(low={self.low}, high={self.high}, dual={self.dual}): low must be at least 0 and below 1, "
                "high at least 0, dual above 1 + high. The GSPO paper has 3e-4 and 4e-4, GRPO 0.2 and 0.2."
            )


@dataclass(frozen=True)
class LossOptions:
    """What a recipe can choose for every policy loss; the defaults add nothing to the plain objective."""

    clip: ClipRange
    aggregation: str = "sequence_mean"  # a key of surrogate.TOKEN_WEIGHTS
    constant_length: int | None = None  # L of aggregation constant_length, which cannot do without
    kl_coef: float = 0.0  # of the KL term in the loss
    kl_estimator: str = "k3"  # a key of surrogate.KL_ESTIMATORS
    entropy_coef: float = 0.0
    mismatch: str = "none"  # a key of mismatch.CORRECTIONS
    mismatch_threshold: float = 2.0
    beta: float = 0.1  # DPO's
    preference_loss: str = "sigmoid"  # DPO's; or ipo
    length_normalised: bool = False  # DPO compares means of log-ratios over tokens, not sums


def alone(table: torch.Tensor, maximum: int | None = None) -> torch.Tensor:
    """Reduce where there is no context parallelism: nothing is to be added."""
    return table


@dataclass(frozen=True)
class LossInputs:
    """One microbatch: S sequences packed into T tokens (padding segment included in T, not in S).

    Padded tensors [B, L] become that by `padded`. Every loss calls `check` first, which names what does not fit.
    """

    logprobs: torch.Tensor  # [T] fp32 or fp64, differentiable; bf16 and fp16 are taken, with a warning
    entropy: torch.Tensor | None  # [T], differentiable; None: unknown
    old_logprobs: torch.Tensor  # [T] fp32
    loss_mask: torch.Tensor  # [T], 0 or 1; 0 where another context-parallel rank owns the token
    cu_seqlens: torch.Tensor  # [>= S+1] int32
    num_sequences: int  # S
    advantages: torch.Tensor | None  # [S], or [T] with one a token, fp32 or fp64; None: DPO has none
    counts: GlobalCounts
    lengths: torch.Tensor | None = None  # [S] fp64, |y_i| over all context-parallel ranks; None: counted from the mask
    ref_logprobs: torch.Tensor | None = None  # [T] fp32, of the frozen reference
    rollout_logprobs: torch.Tensor | None = None  # [T] fp32, as sampled
    # (table [S, k] fp64, column whose maximum is taken instead of its sum) -> [S, k] over context-parallel ranks
    reduce: Callable[..., torch.Tensor] = field(default=alone)

    @classmethod
    def padded(
        cls,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor | None,
        loss_mask: torch.Tensor,
        advantages: torch.Tensor | None,
        *,
        entropy: torch.Tensor | None = None,
        ref_logprobs: torch.Tensor | None = None,
        rollout_logprobs: torch.Tensor | None = None,
        counts: GlobalCounts | None = None,
    ) -> "LossInputs":
        """Return B sequences padded to L tokens, on any side, as one microbatch of T = B L tokens.

        Only gradients to logprobs and entropy flow. What stands where the mask is 0 is not looked at, NaN included.

        Args:
            logprobs: [B, L] fp32 or fp64, of the tokens themselves (not of the tokens before them). All others with one
                number a token have this shape.
            old_logprobs: None: logprobs as they are, so that the ratio is 1.
            loss_mask: [B, L] of any type, 1 at trained tokens and 0 elsewhere.
            advantages: [B], or [B, L], fp32 or fp64. None: for DPO alone.
            counts: of the whole optimizer step; None: this batch is all of it.

        Raises:
            TypeError, ValueError: a tensor does not fit, no token is trained, or counts are less than the mask's.
        """
        checks.check_logprobs(logprobs, 2, PADDED)
        others = {"old_logprobs": old_logprobs, "entropy": entropy, "ref_logprobs": ref_logprobs}
        checks.check_log_probs(others | {"rollout_logprobs": rollout_logprobs}, logprobs)
        rows, length = logprobs.shape
        checks.check_advantages(advantages, rows, logprobs)
        mask = checks.trained(loss_mask, logprobs)
        return cls(
            logprobs=logprobs.reshape(-1),
            entropy=None if entropy is None else entropy.reshape(-1),
            old_logprobs=(logprobs if old_logprobs is None else old_logprobs).detach().reshape(-1),
            loss_mask=mask.reshape(-1),
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=logprobs.device) * length,
            num_sequences=rows,
            advantages=_fixed(advantages),
            counts=_counts_of(mask, counts),
            ref_logprobs=_fixed(ref_logprobs),
            rollout_logprobs=_fixed(rollout_logprobs),
        )

    def check(self) -> None:
        """Check types, shapes and devices, in the names of the fields, and warn of log-probs in half precision.

        Raises:
            TypeError, ValueError: a field does not fit.
        """
        checks.check_logprobs(self.logprobs, 1, PACKED)
        checks.check_type("old_logprobs", self.old_logprobs, checks.FLOATS)
        log_probs = {name: getattr(self, name) for name in LOG_PROBS}
        checks.check_log_probs(log_probs, self.logprobs)
        checks.check_packing(self.loss_mask, self.cu_seqlens, self.num_sequences, self.logprobs)
        checks.check_advantages(self.advantages, self.num_sequences, self.logprobs)
        checks.warn_of_halves(log_probs)

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
        return self.given_advantages if self.has_token_advantages else self.by_token(self.given_advantages)

    @property
    def has_token_advantages(self) -> bool:
        """Advantages differ by token ([S] where S = T)."""
        return self.given_advantages.numel() != self.num_sequences

    @property
    def given_advantages(self) -> torch.Tensor:
        """Return advantages. Raises ValueError where there are none."""
        return checks.given(self.advantages, "advantages")


def _fixed(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.detach().reshape(-1)


def _counts_of(trained: torch.Tensor, counts: GlobalCounts | None) -> GlobalCounts:
    """Return `counts`, or those of a whole step with this mask [B, L] bool. Raises ValueError for less than it has."""
    sequences, tokens = int(trained.any(1).sum()), int(trained.sum())
    if counts is None:
        if tokens == 0:
            raise ValueError(
                "loss_mask: has no trained token, and the loss would be divided by 0. Leave the batch out, or give "
                "counts of the whole optimizer step, which has some."
            )
        return GlobalCounts(sequences, tokens)
    if not isinstance(counts, GlobalCounts):
        raise TypeError(f"counts is a {type(counts).__name__}: must be GlobalCounts(sequences, tokens).")
    if counts.num_sequences < sequences or counts.num_tokens < tokens:
        raise ValueError(
            f"counts = {counts}: must be of the whole optimizer step, and loss_mask alone has {sequences} sequences "
            f"with a trained token and {tokens} trained tokens. Add up those of all its batches."
        )
    return counts


@dataclass(frozen=True)
class LossOutputs:
    """`loss` is this microbatch's share: summed over microbatches and ranks it is the loss of the step."""

    loss: torch.Tensor  # [] fp64, differentiable; under context parallelism its value means nothing, its gradient does
    table: SequenceTable  # [S, columns] fp64, no gradient, over all context-parallel ranks
    value: torch.Tensor  # [] fp64, no gradient: the share's value over all context-parallel ranks


Loss = Callable[[LossInputs], LossOutputs]
