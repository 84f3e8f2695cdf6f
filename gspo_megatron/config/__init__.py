"""A recipe's dataclasses are here, one file a section. They import nothing of the package but its errors."""

from gspo_megatron.config.algorithm import AlgorithmConfig, ResolvedAlgorithm
from gspo_megatron.config.checkpoint import CheckpointConfig
from gspo_megatron.config.critic import CriticConfig
from gspo_megatron.config.data import DataConfig
from gspo_megatron.config.faults import FaultsConfig
from gspo_megatron.config.kl import KlConfig, ResolvedKl
from gspo_megatron.config.mismatch import MismatchConfig
from gspo_megatron.config.model import ModelConfig
from gspo_megatron.config.optimizer import OptimizerConfig
from gspo_megatron.config.parallel import Layout, ParallelConfig
from gspo_megatron.config.preference import PreferenceConfig
from gspo_megatron.config.rollout import RolloutConfig
from gspo_megatron.config.routing import RoutingConfig
from gspo_megatron.config.task import AnswerConfig, RewardConfig, TaskConfig
from gspo_megatron.config.tracking import TrackingConfig
from gspo_megatron.config.train import ResolvedConfig, TrainConfig
from gspo_megatron.config.warm_start import WarmStartConfig

__all__ = [
    "Layout",
    "ResolvedAlgorithm",
    "ResolvedConfig",
    "ResolvedKl",
    "AlgorithmConfig",
    "AnswerConfig",
    "CheckpointConfig",
    "CriticConfig",
    "DataConfig",
    "FaultsConfig",
    "KlConfig",
    "MismatchConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PreferenceConfig",
    "RewardConfig",
    "RolloutConfig",
    "RoutingConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "WarmStartConfig",
]
