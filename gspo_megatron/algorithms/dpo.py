"""DPO: learn from preferred and rejected responses, without sampling (Rafailov et al., arXiv 2305.18290, equation 7).

L = -(1/P) sum_p log sigmoid(beta h_p),   h_p = sum_t (logp - ref) of the chosen - sum_t (logp - ref) of the rejected

over P pairs, with a frozen reference. `preference_loss: ipo` is (h_p - 1 / (2 beta))^2 instead (IPO, arXiv 2310.12036,
equation 17), which does not push a margin without end. Defaults: beta 0.1.

`length_normalised` divides each of the two sums by its number of tokens |y|. That is what TRL calls ipo, on the word of
IPO's authors (its paper has the sums), and with sigmoid the DPO of Tulu 3 (arXiv 2411.15124, equation 6). beta then is
one for answers of any length, and another number: Tulu 3 has 5.

Left out: label smoothing.
"""

import torch
import torch.nn.functional as F

from gspo_megatron.algorithms.checks import entry, given
from gspo_megatron.algorithms.interface import LossInputs, LossOptions, LossOutputs
from gspo_megatron.algorithms.surrogate import LARGEST
from gspo_megatron.batch import SequenceTable
from gspo_megatron.ops.sequence_ratio import sequence_partials

PREFERENCE_LOSSES = {
    "sigmoid": lambda h, beta: -F.logsigmoid(beta * h),
    "ipo": lambda h, beta: (h - 1 / (2 * beta)).square(),
}


def dpo_loss(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """Compute L of this microbatch, whose sequences 2p and 2p+1 are the chosen and the rejected response of pair p.

    The table's log-ratio columns are those of the policy to the reference, summed, so h_p can be made from it.

    Args:
        inputs: ref_logprobs [T]; advantages and old_logprobs are not used; counts.num_sequences is 2P.

    Raises:
        ValueError: sequences do not come in pairs, or one of them has no trained token.
    """
    inputs.check()
    _check_pairs(inputs)
    reference = given(inputs.ref_logprobs, "ref_logprobs")
    ours = inputs.sum_by_sequence(inputs.logprobs.double() - reference.double())  # [S]
    partials = sequence_partials(inputs.logprobs, reference, inputs.loss_mask, inputs.bounds, inputs.entropy)
    table = inputs.reduce(partials, maximum=LARGEST)
    whole = ours + (table[:, 1] - ours).detach()  # every rank's sum, this rank's gradient
    if options.length_normalised:
        whole = whole / table[:, 0]
    chosen, rejected = whole.view(-1, 2).unbind(1)
    pairs = inputs.counts.num_sequences // 2
    compare = entry(PREFERENCE_LOSSES, options.preference_loss, "preference_loss")
    loss = compare(chosen - rejected, options.beta).sum() / pairs
    rest = table.new_zeros(inputs.num_sequences, len(SequenceTable.COLUMNS) - table.size(1))
    return LossOutputs(loss, SequenceTable(torch.cat([table, rest], dim=1)), loss.detach())


def _check_pairs(inputs: LossInputs) -> None:
    _check_even("num_sequences", inputs.num_sequences)
    empty = (inputs.token_lengths == 0).nonzero()
    if empty.numel():
        raise ValueError(
            f"loss_mask: sequence {int(empty[0])} has no trained token, and a pair needs both responses. Leave it out."
        )
    _check_even("counts.num_sequences", inputs.counts.num_sequences)


def _check_even(name: str, number: int) -> None:
    if number % 2:
        raise ValueError(
            f"{name} = {number}: must be even, since sequences 2p and 2p + 1 are the chosen and the rejected response "
            "of pair p. Give both, one after the other."
        )
