"""What policy losses share: how tokens are weighed, KL estimators, the ratio by token, and the table of results.

Notation: r_t = exp(logp - old), m_t the loss mask, w_i the weight of a trained token of sequence i, N the sequences and
M the tokens of the whole optimizer step. Every loss here is - sum_i sum_t m_t w_i (objective_t - regularizer_t).

Clipping is in ops/token_surrogate.py. Left out: the sequence ratio (gspo.py, ops/sequence_ratio.py).
"""

import torch

from gspo_megatron.algorithms.checks import entry, given
from gspo_megatron.algorithms.interface import LossInputs, LossOptions, LossOutputs
from gspo_megatron.algorithms.mismatch import corrected
from gspo_megatron.batch import SequenceTable
from gspo_megatron.ops.sequence_ratio import COLUMNS
from gspo_megatron.ops.token_surrogate import token_objectives

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


def token_weights(inputs: LossInputs, options: LossOptions, lengths: torch.Tensor) -> torch.Tensor:
    """Compute w_i [S] fp64 of the chosen aggregation, from |y_i| [S] fp64 over all context-parallel ranks."""
    counts = inputs.counts
    weigh = entry(TOKEN_WEIGHTS, options.aggregation, "aggregation")
    if options.aggregation == "constant_length" and options.constant_length is None:
        raise ValueError(
            "constant_length = None (max_response_length of policy_loss): aggregation constant_length divides by it. "
            "Give the longest response that can be."
        )
    return weigh(lengths, counts.num_sequences, counts.num_tokens, options.constant_length)


def token_surrogate(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """Compute -sum_i w_i sum_t m_t min(r_t A_t, clip(r_t) A_t): the ratio of each token, clipped by itself.

    GRPO, Dr. GRPO, DAPO and PPO are this with other advantages, clip ranges and weights w_i.
    """
    inputs = corrected(inputs, options)
    clip = options.clip
    objective, sums = token_objectives(
        inputs.logprobs,
        inputs.old_logprobs,
        inputs.loss_mask,
        inputs.bounds,
        inputs.entropy,
        inputs.given_advantages,
        clip.low,
        clip.high,
        clip.dual,
    )
    # Where no other rank holds tokens of these sequences, they have been counted already.
    weights = token_weights(inputs, options, sums[:, 0] if inputs.lengths is None else inputs.lengths)
    extra, regularizer = regularizers(inputs, options, weights)
    loss = -(weights * objective).sum() + regularizer
    columns = len(COLUMNS)
    table = inputs.reduce(torch.cat([sums[:, :columns], extra, sums[:, columns:]], dim=1), maximum=LARGEST)
    value = -(weights * table[:, -1]).sum() + regularizer_value(table, options, weights)
    return LossOutputs(loss, SequenceTable(table[:, :-1]), value)


def regularizers(inputs: LossInputs, options: LossOptions, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum KL to the reference and rollout mismatch by sequence, and compute the regularizing loss.

    The loss is sum_i w_i sum_t m_t (kl_coef KL_t - entropy_coef H_t).

    Returns:
        (columns ref_kl and mismatch [S, 2] fp64 without gradient, loss [] fp64, differentiable).
    """
    zero = inputs.logprobs.new_zeros(inputs.num_sequences, dtype=torch.float64)
    kl, loss = zero, zero.sum()
    if options.kl_coef or inputs.ref_logprobs is not None:
        reference = given(inputs.ref_logprobs, "ref_logprobs", ", or kl_coef 0 (kl.coef of AlgorithmConfig)").double()
        delta = torch.where(inputs.loss_mask > 0, inputs.logprobs.double() - reference, 0.0)
        kl = inputs.sum_by_sequence(entry(KL_ESTIMATORS, options.kl_estimator, "kl_estimator")(delta))
        if options.kl_coef:
            loss = loss + options.kl_coef * (weights * kl).sum()
    if options.entropy_coef:
        entropy = given(inputs.entropy, "entropy", ", or entropy_coef 0")
        loss = loss - options.entropy_coef * (weights * inputs.sum_by_sequence(entropy)).sum()
    mismatch = zero
    if inputs.rollout_logprobs is not None:
        mismatch = inputs.sum_by_sequence(inputs.old_logprobs.double() - inputs.rollout_logprobs.double())
    return torch.stack([kl.detach(), mismatch], dim=1), loss


def regularizer_value(table: torch.Tensor, options: LossOptions, weights: torch.Tensor) -> torch.Tensor:
    """Compute the value of `regularizers`' loss from a reduced table."""
    entropy, kl = table[:, 5], table[:, 6]
    value = table.new_zeros(())
    # Not 0 * infinity where a term is off.
    if options.kl_coef:
        value = value + options.kl_coef * (weights * kl).sum()
    if options.entropy_coef:
        value = value - options.entropy_coef * (weights * entropy).sum()
    return value
