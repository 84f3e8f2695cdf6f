"""Supervised next-token loss, for the warm start: the mean over all trained tokens of the global batch."""

import torch

from gspo_megatron.algorithms import surrogate
from gspo_megatron.algorithms.contract import LossInputs, LossOutputs


def supervised_loss(inputs: LossInputs) -> LossOutputs:
    """-(1/N) sum_t m_t logp_t with N the step's trained tokens; old log-probs and advantages are not used."""
    ids = surrogate.sequence_ids(inputs.cu_seqlens, inputs.num_sequences, inputs.logprobs.numel())
    loss = -(inputs.logprobs.double() * inputs.loss_mask).sum() / max(inputs.counts.num_tokens, 1)
    nothing = torch.zeros_like(inputs.loss_mask)
    return LossOutputs(loss, surrogate.sequence_table(inputs, nothing.double(), ids, nothing, nothing))
