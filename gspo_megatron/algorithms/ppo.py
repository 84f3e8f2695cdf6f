"""PPO with a critic (Schulman et al., arXiv 1707.06347; as used for language models in arXiv 2203.02155).

J = (1/M) sum_i sum_t m_it min(r_it A_it, clip(r_it, 1 - low, 1 + high) A_it) + entropy_coef H_it

The advantages differ by token: generalised advantage estimation over the critic's values (advantages.gae), where the
reward of a sequence stands at its last token and kl_coef (logp_old - logp_ref) is taken off at every token. The critic
learns the returns by its own loss below. Defaults: clip 0.2 / 0.2, values clipped at 0.2, KL 0.01 in the reward.
"""

import torch

from gspo_megatron.algorithms.interface import LossInputs, LossOptions, LossOutputs
from gspo_megatron.algorithms.surrogate import token_surrogate


def ppo_loss(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """Compute -J of this microbatch; advantages [T]. `options.aggregation` is token_mean."""
    inputs.check()
    return token_surrogate(inputs, options)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    clip: float,
    num_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute PPO's squared error (1/2M) sum_t m_t max((V_t - R_t)^2, (clip(V_t, V_old - c, V_old + c) - R_t)^2).

    Args:
        values: [T] fp32 or fp64, differentiable. old_values, returns: [T], at collection.
        loss_mask: [T]. clip: c > 0; infinity: none. num_tokens: M of the whole step, 1 or more.

    Returns:
        (loss [] fp64, differentiable; clipped [] fp64, tokens whose gradient the bound took).
    """
    values, old_values, returns = values.double(), old_values.double(), returns.double()
    bounded = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    free, held = (values - returns).square(), (bounded - returns).square()
    trained = loss_mask > 0
    loss = torch.where(trained, torch.maximum(free, held), 0.0).sum() / (2 * num_tokens)
    return loss, (trained & (held > free)).double().sum()
