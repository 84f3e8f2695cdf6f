"""Dr. GRPO: GRPO without its two biases (Understanding R1-Zero-Like Training, arXiv 2503.20783, section 3.2).

J = (1 / (N L)) sum_i sum_t m_it min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i)

The advantage A_i = r_i - group mean is not divided by the group's standard deviation, which favoured questions that are
nearly solved or nearly hopeless; and the sum over tokens is divided by the constant L = rollout.max_response_length
instead of |y_i|, which favoured long wrong answers. Defaults: clip 0.2 / 0.2, no KL term.
"""

from gspo_megatron.algorithms.interface import LossInputs, LossOptions, LossOutputs
from gspo_megatron.algorithms.surrogate import token_surrogate


def dr_grpo_loss(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """Compute -J of this microbatch; advantages [S]. `options.aggregation` is constant_length."""
    inputs.check()
    return token_surrogate(inputs, options)
