"""RL post-training of Mixture-of-Experts language models on Megatron-Core, with GSPO.

The names below are public. They are looked up when they are used, so that the import costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.2.0"
_ALGORITHMS, _INTERFACE = "gspo_megatron.algorithms", "gspo_megatron.algorithms.interface"
_PLACES = {
    "AlgorithmConfig": "gspo_megatron.config",
    "ClipRange": _INTERFACE,
    "GlobalCounts": _INTERFACE,
    "GspoError": "gspo_megatron.errors",
    "GspoTrainer": "gspo_megatron.trainer.gspo_trainer",
    "LossInputs": _INTERFACE,
    "LossOptions": _INTERFACE,
    "LossOutputs": _INTERFACE,
    "RolloutGroup": "gspo_megatron.batch",
    "TrainConfig": "gspo_megatron.config",
    "Turns": "gspo_megatron.batch",
    "dapo_loss": _ALGORITHMS,
    "dpo_loss": _ALGORITHMS,
    "dr_grpo_loss": _ALGORITHMS,
    "grpo_loss": _ALGORITHMS,
    "gspo_loss": _ALGORITHMS,
    "gspo_token_loss": _ALGORITHMS,
    "load_recipe": "gspo_megatron.recipe.load",
    "policy_loss": _ALGORITHMS,
    "ppo_loss": _ALGORITHMS,
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It has {', '.join(__all__)}.")
    return getattr(importlib.import_module(_PLACES[name]), name)
