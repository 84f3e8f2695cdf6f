"""GSPO-token: the sequence's ratio, the token's gradient (arXiv 2507.18071, section 4.3, equations 13 and 14).

s_it = sg[s_i] pi(y_it) / sg[pi(y_it)] has the value s_i and the gradient s_i d logp_it, and that is how it is computed:
no logp - sg(logp) is ever formed, so none of s_i can be rounded away by it.
"""

from gspo_megatron.algorithms.gspo import sequence_surrogate
from gspo_megatron.algorithms.interface import LossInputs, LossOptions, LossOutputs
from gspo_megatron.algorithms.mismatch import corrected


def gspo_token_loss(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """Compute -J, J = mean_i 1/|y_i| sum_t m_it min(s_it A_it, clip(s_it) A_it), s_it = sg[s_i] pi(y_it)/sg[pi(y_it)].

    Equal to gspo_loss in value, gradient and clip decisions when all tokens of a sequence share one advantage.

    Args:
        inputs: advantages [S], or [T] with one a token ([S] where S = T).
        options: the paper's clip range is 3e-4 and 4e-4.
    """
    inputs.check()
    return sequence_surrogate(corrected(inputs, options), options)
