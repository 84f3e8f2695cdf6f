"""These records cross a boundary between two rooms of the house. Nothing here computes."""

from gspo_megatron.batch.groups import Completion, FinishReason, RolloutGroup, Turns
from gspo_megatron.batch.items import Message, Outcome, Prompt, Response, Score, TaskItem
from gspo_megatron.batch.training import (
    Fillable,
    Minibatch,
    PackedBatch,
    SequenceStats,
    SequenceTable,
    TrainSequence,
    UpdateResult,
)

__all__ = [
    "Completion",
    "Fillable",
    "FinishReason",
    "Message",
    "Minibatch",
    "Outcome",
    "PackedBatch",
    "Prompt",
    "Response",
    "RolloutGroup",
    "Score",
    "SequenceStats",
    "SequenceTable",
    "TaskItem",
    "TrainSequence",
    "Turns",
    "UpdateResult",
]
