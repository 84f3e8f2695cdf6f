"""What policy losses share: how tokens are weighed, KL estimators, clipping by token, and the table of results.

Notation: r_t = exp(logp - old), m_t the loss mask, w_i the weight of a trained token of sequence i, N the sequences and
M the tokens of the whole optimizer step. Every loss here is - sum_i sum_t m_t w_i (objective_t - regularizer_t).

Left out: the sequence ratio (gspo.py, ops/sequence_ratio.py).
"""

import torch

from gspo_megatron.algorithms.contract import ClipRange, LossInputs, LossOptions, LossOutputs
from gspo_megatron.algorithms.mismatch import corrected
from gspo_megatron.ops.sequence_ratio import sequence_partials
from gspo_megatron.types import SequenceTable

LARGEST = 4  # the column of a table that is combined by its maximum: max_abs_log_ratio

# w_i from (|y_i| [S] fp64, N, M, L). All denominators are those of the whole step.
TOKEN_WEIGHTS = {
    "sequence_mean": lambda length, n, m, limit: 1.0 / (n * length.clamp(min=1)),  # each sequence counts the same
    "token_mean": lambda length, n, m, limit: torch.full_like(length, 1.0 / m),  # each token counts the same
    "constant_length": lambda length, n, m, limit: torch.full_like(length, 1.0 / (n * limit)),  # Dr. GRPO
    "length_proportional": lambda length, n, m, limit: torch.full_like(length, 1.0 / n),  # a sequence counts |y_i|
}

# Of KL(pi || ref) from one sample, delta = logp - ref (Schulman, "Approximating KL divergence", 2020). As a loss only
# k2's gradient is that of the KL on policy; k3's is close to it, and k1's has mean 0 (use k1 in the reward).
KL_ESTIMATORS = {
    "k1": lambda delta: delta,
    "k2": lambda delta: delta.square() / 2,
    "k3": lambda delta: torch.expm1(-delta) + delta,
}


def token_weights(inputs: LossInputs, options: LossOptions) -> torch.Tensor:
    """w_i [S] fp64 of the chosen aggregation."""
    counts = inputs.counts
    weigh = TOKEN_WEIGHTS[options.aggregation]
    return weigh(inputs.token_lengths, max(counts.num_sequences, 1), max(counts.num_tokens, 1), options.constant_length)


def clipped_objective(log_ratio: torch.Tensor, advantage: torch.Tensor, clip: ClipRange) -> tuple[torch.Tensor, ...]:
    """min(r A, clip(r, 1 - low, 1 + high) A); where A < 0 not below dual A (dual clip, arXiv 1912.09729, equation 5).

    Args:
        log_ratio: [T] fp64, differentiable; r = exp(log_ratio).
        advantage: [T] fp64.

    Returns:
        (objective [T], low, high [T] bool: what lost its gradient to the lower bound, and to an upper one).
    """
    ratio = log_ratio.detach().exp()
    up, down = advantage > 0, advantage < 0
    low = (ratio < 1 - clip.low) & down
    high = (ratio > 1 + clip.high) & up | (ratio > clip.dual) & down
    # full_like: torch.where of two plain numbers would round the bound to fp32.
    bound = torch.where(up, torch.full_like(ratio, 1 + clip.high), clip.dual).masked_fill(low, 1 - clip.low)
    # A ratio may be infinite where it is clipped or has no weight: neither it nor its gradient may be formed there.
    flat = low | high | (advantage == 0)
    free = torch.where(flat, 0.0, log_ratio).exp() * advantage
    return torch.where(flat, torch.where(low | high, bound, 0.0) * advantage, free), low, high


def token_surrogate(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """-sum_i w_i sum_t m_t min(r_t A_t, clip(r_t) A_t): the ratio of each token, clipped by itself.

    GRPO, Dr. GRPO, DAPO and PPO are this with other advantages, clip ranges and weights w_i.
    """
    inputs = corrected(inputs, options)
    weights = token_weights(inputs, options)
    trained = inputs.loss_mask > 0
    # What stands at a masked token may be anything, and exp of it times 0 would not be 0.
    log_ratio = torch.where(trained, inputs.logprobs.double() - inputs.old_logprobs.double(), 0.0)
    objective, low, high = clipped_objective(log_ratio, inputs.token_advantages.double(), options.clip)
    by_sequence = inputs.sum_by_sequence(objective)  # [S]
    extra, regularizer = regularizers(inputs, options, weights)
    loss = -(weights * by_sequence).sum() + regularizer
    partials = _partials(inputs)
    clipped = [inputs.sum_by_sequence(low), inputs.sum_by_sequence(high), by_sequence.detach()]
    table = inputs.reduce(torch.cat([partials, extra, torch.stack(clipped, dim=1)], dim=1), maximum=LARGEST)
    value = -(weights * table[:, -1]).sum() + regularizer_value(table, options, weights)
    return LossOutputs(loss, SequenceTable(table[:, :-1]), value)


def regularizers(inputs: LossInputs, options: LossOptions, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums by sequence of the KL to the reference and of the rollout mismatch, and the regularizing loss.

    The loss is sum_i w_i sum_t m_t (kl_coef KL_t - entropy_coef H_t).

    Returns:
        (columns ref_kl and mismatch [S, 2] fp64 without gradient, loss [] fp64, differentiable).
    """
    zero = inputs.logprobs.new_zeros(inputs.num_sequences, dtype=torch.float64)
    kl, loss = zero, zero.sum()
    if inputs.ref_logprobs is not None:
        delta = torch.where(inputs.loss_mask > 0, inputs.logprobs.double() - inputs.ref_logprobs.double(), 0.0)
        kl = inputs.sum_by_sequence(KL_ESTIMATORS[options.kl_estimator](delta))
        if options.kl_coef:
            loss = loss + options.kl_coef * (weights * kl).sum()
    if options.entropy_coef:
        loss = loss - options.entropy_coef * (weights * inputs.sum_by_sequence(inputs.entropy)).sum()
    mismatch = zero
    if inputs.rollout_logprobs is not None:
        mismatch = inputs.sum_by_sequence(inputs.old_logprobs.double() - inputs.rollout_logprobs.double())
    return torch.stack([kl.detach(), mismatch], dim=1), loss


def regularizer_value(table: torch.Tensor, options: LossOptions, weights: torch.Tensor) -> torch.Tensor:
    """The value of `regularizers`' loss from a reduced table."""
    entropy, kl = table[:, 5], table[:, 6]
    value = table.new_zeros(())
    # Not 0 * infinity where a term is off.
    if options.kl_coef:
        value = value + options.kl_coef * (weights * kl).sum()
    if options.entropy_coef:
        value = value - options.entropy_coef * (weights * entropy).sum()
    return value


def _partials(inputs: LossInputs) -> torch.Tensor:
    return sequence_partials(inputs.logprobs, inputs.old_logprobs, inputs.loss_mask, inputs.bounds, inputs.entropy)
