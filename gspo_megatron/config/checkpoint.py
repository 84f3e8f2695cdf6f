"""The recipe's `checkpoint` section says when a run writes what it needs to go on, and what it keeps of that."""

from dataclasses import dataclass

from gspo_megatron.config.constraints import STRICT, positive, require


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run writes what it needs to go on, and what it keeps of that. One is always written at the end."""

    __pydantic_config__ = STRICT
    interval: int = 25
    """Steps between checkpoints, in the warm start too; 0: only at the end."""
    keep_last: int = 2
    """The newest so many are kept."""
    keep_every: int = 0
    """Those of every so many steps are kept as well; 0: none."""
    keep_best: bool = True
    """The one with the highest eval/accuracy is kept as well, of those written at a step with an evaluation."""
    asynchronous: bool = True
    """Training goes on while a thread of each rank writes; that takes a copy of what the rank writes in host memory."""

    def __post_init__(self) -> None:
        for name in ("interval", "keep_every"):
            value = getattr(self, name)
            require(value >= 0, f"checkpoint.{name}", value, "must be 0 or more", "Give 0 for none.")
        positive("checkpoint", self, "keep_last")
