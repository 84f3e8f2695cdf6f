"""GSPO: ratio, clip and optimize whole sequences (arXiv 2507.18071, section 4.1, equations 5 to 7)."""

import torch

from gspo_megatron.algorithms import surrogate
from gspo_megatron.algorithms.contract import ClipRange, LossInputs, LossOutputs


def gspo_loss(inputs: LossInputs, clip: ClipRange) -> LossOutputs:
    """-J with J = mean_i min(s_i A_i, clip(s_i) A_i), s_i = exp((1/|y_i|) sum_t m_it d_it).

    Args:
        inputs: advantages [S].
        clip: the paper's are 3e-4 and 4e-4.
    """
    size = inputs.num_sequences
    ids = surrogate.sequence_ids(inputs.cu_seqlens, size, inputs.logprobs.numel())
    log_ratio = surrogate.masked_log_ratio(inputs)  # [T] fp64
    lengths = surrogate.sequence_sum(inputs.loss_mask, ids, size)  # [S]
    counted = lengths > 0
    ratio = (surrogate.sequence_sum(log_ratio, ids, size) / lengths.clamp(min=1)).exp()  # [S]
    advantages = inputs.advantages.double()
    objective = surrogate.clipped_surrogate(ratio, advantages, clip)
    # A sequence without a trained token is no sequence of the mean.
    loss = -torch.where(counted, objective, 0.0).sum() / max(inputs.counts.num_sequences, 1)

    low, high = surrogate.clipped_sides(ratio.detach(), advantages, clip)
    pad = low.new_zeros(1)
    low_tokens, high_tokens = torch.cat([low, pad])[ids], torch.cat([high, pad])[ids]
    return LossOutputs(loss, surrogate.sequence_table(inputs, log_ratio.detach(), ids, low_tokens, high_tokens))
