"""Supervised next-token loss, for the warm start: the mean over all trained tokens of the global batch."""

import torch

from gspo_megatron.algorithms.interface import LossInputs, LossOutputs
from gspo_megatron.algorithms.surrogate import LARGEST
from gspo_megatron.batch import SequenceTable
from gspo_megatron.ops.sequence_ratio import sequence_partials


def supervised_loss(inputs: LossInputs) -> LossOutputs:
    """Compute -(1/N) sum_t m_t logp_t, N the step's trained tokens; old log-probs and advantages are not used."""
    inputs.check()
    sums = inputs.sum_by_sequence(inputs.logprobs)
    number = inputs.counts.num_tokens
    # The log-ratio columns are 0: there is no old policy.
    partials = sequence_partials(inputs.logprobs, inputs.logprobs, inputs.loss_mask, inputs.bounds, inputs.entropy)
    table = inputs.reduce(torch.cat([partials, sums.detach().unsqueeze(1)], dim=1), maximum=LARGEST)
    rest = table.new_zeros(inputs.num_sequences, len(SequenceTable.COLUMNS) - partials.size(1))
    return LossOutputs(
        -sums.sum() / number, SequenceTable(torch.cat([table[:, :-1], rest], dim=1)), -table[:, -1].sum() / number
    )
