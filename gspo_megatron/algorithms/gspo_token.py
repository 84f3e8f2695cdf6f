"""GSPO-token: the sequence's ratio, the token's gradient (arXiv 2507.18071, section 4.3, equations 13 and 14)."""

import torch

from gspo_megatron.algorithms import surrogate
from gspo_megatron.algorithms.contract import ClipRange, LossInputs, LossOutputs


def gspo_token_loss(inputs: LossInputs, clip: ClipRange) -> LossOutputs:
    """-J with J = mean_i (1/|y_i|) sum_t m_it min(s_it A_it, clip(s_it) A_it), s_it = sg[s_i] pi(y_it) / sg[pi(y_it)].

    Equal to gspo_loss in value, gradient and clip decisions when all tokens of a sequence share one advantage.

    Args:
        inputs: advantages [S], or [T] with one a token ([S] where S = T).
        clip: the paper's are 3e-4 and 4e-4.
    """
    size = inputs.num_sequences
    ids = surrogate.sequence_ids(inputs.cu_seqlens, size, inputs.logprobs.numel())
    log_ratio = surrogate.masked_log_ratio(inputs)  # [T] fp64
    lengths = surrogate.sequence_sum(inputs.loss_mask, ids, size)
    mean = surrogate.sequence_sum(log_ratio.detach(), ids, size) / lengths.clamp(min=1)  # [S]
    zero = mean.new_zeros(1)
    logprobs = inputs.logprobs.double()
    # In this order: (logp - sg(logp)) is exactly 0, so s_i survives; any other order rounds it away.
    ratio = ((logprobs - logprobs.detach()) + torch.cat([mean, zero])[ids]).exp()  # [T]
    advantages = inputs.advantages.double()
    if advantages.numel() == size:
        advantages = torch.cat([advantages, zero])[ids]
    objective = surrogate.clipped_surrogate(ratio, advantages, clip)
    objective = torch.where(inputs.loss_mask > 0, objective, 0.0)
    per_sequence = surrogate.sequence_sum(objective, ids, size) / lengths.clamp(min=1)
    loss = -per_sequence.sum() / max(inputs.counts.num_sequences, 1)

    low, high = surrogate.clipped_sides(ratio.detach(), advantages, clip)
    return LossOutputs(loss, surrogate.sequence_table(inputs, log_ratio.detach(), ids, low, high))
