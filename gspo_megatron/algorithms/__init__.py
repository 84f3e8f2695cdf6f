"""Policy-optimization mathematics on packed log-probs. Never imports Megatron.

One small file an algorithm, and this literal table. A loss is a function LossInputs -> LossOutputs.
"""

from functools import partial

from gspo_megatron.algorithms.contract import ClipRange, Loss
from gspo_megatron.algorithms.gspo import gspo_loss
from gspo_megatron.algorithms.gspo_token import gspo_token_loss
from gspo_megatron.config import AlgorithmConfig

LOSSES = {
    "gspo": gspo_loss,
    "gspo_token": gspo_token_loss,
}


def policy_loss(config: AlgorithmConfig) -> Loss:
    """The recipe's loss with its clip range filled in."""
    return partial(LOSSES[config.name], clip=ClipRange(config.clip_ratio_low, config.clip_ratio_high))
