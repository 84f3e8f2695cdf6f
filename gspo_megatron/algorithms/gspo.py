"""GSPO: ratio, clip and optimize whole sequences (arXiv 2507.18071, section 4.1, equations 5 to 7)."""

import torch

from gspo_megatron.algorithms.interface import LossInputs, LossOptions, LossOutputs
from gspo_megatron.algorithms.mismatch import corrected
from gspo_megatron.algorithms.surrogate import LARGEST, regularizer_value, regularizers, token_weights
from gspo_megatron.batch import SequenceTable
from gspo_megatron.ops.sequence_ratio import COLUMNS, gspo_surrogate, sequence_partials


def gspo_loss(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """Compute -J with J = mean_i min(s_i A_i, clip(s_i) A_i), s_i = exp((1/|y_i|) sum_t m_it d_it).

    Args:
        inputs: advantages [S].
        options: the paper's clip range is 3e-4 and 4e-4, its aggregation sequence_mean.
    """
    inputs.check()
    return sequence_surrogate(corrected(inputs, options), options)


def sequence_surrogate(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """Do what GSPO and GSPO-token share: the sums of each sequence, then the loss from them (ops/sequence_ratio.py)."""
    partials = sequence_partials(
        inputs.logprobs,
        inputs.old_logprobs,
        inputs.loss_mask,
        inputs.bounds,
        inputs.entropy,
        inputs.advantages if inputs.has_token_advantages else None,
    )
    # Where no other rank holds tokens of these sequences, they have been counted already.
    lengths = partials[:, 0] if inputs.lengths is None else inputs.lengths
    weights = token_weights(inputs, options, lengths)
    extra, regularizer = regularizers(inputs, options, weights)
    sums = inputs.reduce(torch.cat([partials, extra], dim=1), maximum=LARGEST)
    partials, extra = sums[:, :-2], sums[:, -2:]
    number = inputs.counts.num_sequences  # a sequence without a trained token is no sequence of the mean
    advantages, partials = _weighed(inputs, options, weights * number * lengths, partials)
    loss, _, clipped = gspo_surrogate(
        inputs.logprobs,
        partials,
        advantages,
        inputs.loss_mask,
        inputs.bounds,
        options.clip.low,
        options.clip.high,
        number,
        options.clip.dual,
    )
    table = torch.cat([partials[:, : len(COLUMNS)], extra, clipped], dim=1)
    value = loss.detach() + regularizer_value(table, options, weights)
    return LossOutputs(loss + regularizer, SequenceTable(table), value)


def _weighed(
    inputs: LossInputs, options: LossOptions, factor: torch.Tensor, partials: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages, and the sums that are made of them, times w_i N |y_i| [S]: what an aggregation other than the
    sequence mean gives a sequence beside it."""
    if options.aggregation == "sequence_mean":
        return inputs.given_advantages, partials
    if not inputs.has_token_advantages:
        return inputs.given_advantages.double() * factor, partials
    counts, signed, numbers = partials.split([len(COLUMNS), 2, 2], dim=1)
    return (
        inputs.given_advantages.double() * inputs.by_token(factor),
        torch.cat([counts, signed * factor.unsqueeze(1), numbers], dim=1),
    )
