"""Policy-optimization mathematics on packed log-probs. Never imports Megatron.

One small file an algorithm, and this literal table. What else makes an algorithm: the values that a recipe need not
give (config/algorithm.py), and where its advantages come from (trainer/rl.py).
"""

import math
from functools import partial

from gspo_megatron.algorithms.dapo import dapo_loss
from gspo_megatron.algorithms.dpo import dpo_loss
from gspo_megatron.algorithms.dr_grpo import dr_grpo_loss
from gspo_megatron.algorithms.grpo import grpo_loss
from gspo_megatron.algorithms.gspo import gspo_loss
from gspo_megatron.algorithms.gspo_token import gspo_token_loss
from gspo_megatron.algorithms.interface import ClipRange, Loss, LossOptions
from gspo_megatron.algorithms.ppo import ppo_loss
from gspo_megatron.config import AlgorithmConfig

LOSSES = {
    "ppo": ppo_loss,
    "dpo": dpo_loss,
    "grpo": grpo_loss,
    "dr_grpo": dr_grpo_loss,
    "dapo": dapo_loss,
    "gspo": gspo_loss,
    "gspo_token": gspo_token_loss,
}


def policy_loss(config: AlgorithmConfig, max_response_length: int | None = None) -> Loss:
    """Return the recipe's loss with its options filled in.

    Args:
        max_response_length: the constant of aggregation constant_length (Dr. GRPO's L), which cannot do without.
    """
    config = config.resolved()
    dual = math.inf if config.clip_ratio_dual is None else config.clip_ratio_dual
    options = LossOptions(
        clip=ClipRange(config.clip_ratio_low, config.clip_ratio_high, dual),
        aggregation=config.aggregation,
        constant_length=max_response_length,
        kl_coef=config.kl.coef if config.kl.place == "loss" else 0.0,
        kl_estimator=config.kl.estimator,
        entropy_coef=config.entropy_coef,
        mismatch=config.mismatch.correction,
        mismatch_threshold=config.mismatch.threshold,
        beta=config.preference.beta,
        preference_loss=config.preference.loss,
        length_normalised=config.preference.length_normalised,
    )
    return partial(LOSSES[config.name], options=options)
