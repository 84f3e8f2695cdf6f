"""GSPO: ratio, clip and optimize whole sequences (arXiv 2507.18071, section 4.1, equations 5 to 7)."""

import torch

from gspo_megatron.algorithms.contract import ClipRange, LossInputs, LossOutputs
from gspo_megatron.ops.sequence_ratio import gspo_surrogate, sequence_partials
from gspo_megatron.types import SequenceTable


def gspo_loss(inputs: LossInputs, clip: ClipRange) -> LossOutputs:
    """-J with J = mean_i min(s_i A_i, clip(s_i) A_i), s_i = exp((1/|y_i|) sum_t m_it d_it).

    Args:
        inputs: advantages [S].
        clip: the paper's are 3e-4 and 4e-4.
    """
    return sequence_surrogate(inputs, clip, None)


def sequence_surrogate(inputs: LossInputs, clip: ClipRange, token_advantages: torch.Tensor | None) -> LossOutputs:
    """What GSPO and GSPO-token share: the sums of every sequence, then the loss from them (ops/sequence_ratio.py).

    Args:
        token_advantages: [T] where advantages differ by token, else None.
    """
    bounds = inputs.cu_seqlens[: inputs.num_sequences + 1]  # without the padding segment
    partials = sequence_partials(
        inputs.logprobs, inputs.old_logprobs, inputs.loss_mask, bounds, inputs.entropy, token_advantages
    )
    # A sequence without a trained token is no sequence of the mean; a step without any must not divide by 0.
    loss, _, clipped = gspo_surrogate(
        inputs.logprobs, partials, inputs.advantages, inputs.loss_mask, bounds, clip.low, clip.high,
        max(inputs.counts.num_sequences, 1),
    )  # fmt: skip
    return LossOutputs(loss, SequenceTable(torch.cat([partials[:, :6], clipped], dim=1)))
