"""Supervised next-token loss, for the warm start: the mean over all trained tokens of the global batch."""

import torch

from gspo_megatron.algorithms.contract import LossInputs, LossOutputs
from gspo_megatron.ops.sequence_ratio import sequence_partials
from gspo_megatron.types import SequenceTable


def supervised_loss(inputs: LossInputs) -> LossOutputs:
    """-(1/N) sum_t m_t logp_t with N the step's trained tokens; old log-probs and advantages are not used."""
    loss = -(inputs.logprobs.double() * inputs.loss_mask).sum() / max(inputs.counts.num_tokens, 1)
    bounds = inputs.cu_seqlens[: inputs.num_sequences + 1]  # without the padding segment
    # The log-ratio columns are 0: there is no old policy.
    partials = sequence_partials(inputs.logprobs, inputs.logprobs, inputs.loss_mask, bounds, inputs.entropy)
    clipped = partials.new_zeros(inputs.num_sequences, 2)
    return LossOutputs(loss, SequenceTable(torch.cat([partials, clipped], dim=1)))
