"""GRPO: a ratio for each token, advantages normalised within the group (DeepSeekMath, arXiv 2402.03300, equation 3).

J = (1/N) sum_i (1/|y_i|) sum_t m_it [ min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i) - kl_coef KL_it ]

with r_it = pi(y_it) / pi_old(y_it), A_i = (r_i - group mean) / (group std + 1e-6) and KL_it the k3 estimate of
KL(pi || ref), equation 4. Defaults: clip 0.2 / 0.2, kl_coef 0.04 (section 4.2).
"""

from gspo_megatron.algorithms.interface import LossInputs, LossOptions, LossOutputs
from gspo_megatron.algorithms.surrogate import token_surrogate


def grpo_loss(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """Compute -J of this microbatch; advantages [S]. `options.aggregation` is sequence_mean: sequences count alike."""
    inputs.check()
    return token_surrogate(inputs, options)
