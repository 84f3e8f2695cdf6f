"""The recipe's limits say what may go wrong before a run stops: field names, defaults, and what they must satisfy."""

from dataclasses import dataclass

from gspo_megatron.config.constraints import STRICT, at_most, positive, require


@dataclass(frozen=True)
class FaultsConfig:
    """When a run takes something for broken. docs/faults.md tells what happens then."""

    __pydantic_config__ = STRICT
    heartbeat_timeout: float = 60.0
    """Seconds without a sign of life from a rank's process until the run ends and names it. 0: no watchdog."""
    collective_timeout: float = 540.0
    """Seconds that a rank may wait in one collective until the run ends and names the ranks that do not take part.
    Longer than any rank works alone, and below the 10 minutes after which a collective fails by itself."""
    max_skipped_updates: int = 3
    """Updates in a row that may be skipped because a loss or gradient is not finite; one more stops the run."""
    max_ratio: float = 100.0
    """A larger importance ratio of any response is warned about."""
    min_entropy: float = 0.02
    """A smaller mean entropy of the next token, in nats, is warned about once. 0: never."""
    max_truncated: float = 0.95
    """A larger share of responses cut at rollout.max_response_length is warned about once. 1: never."""
    max_dead_experts: float = 0.1
    """A larger share of experts (of all layers) without a token in a whole step is warned about once. 1: never."""
    max_expert_load: float = 0.99
    """Of the tokens that one expert of a layer may get at most, a larger share is warned about once. 1: never."""
    reward_timeout: float = 30.0
    """Seconds for the reward of one response; it is 0 where the scorer takes longer."""
    reward_memory_gb: float = 4.0
    """Address space of the process that runs the scorers, and of each that evaluates a response."""

    def __post_init__(self) -> None:
        positive("faults", self, "collective_timeout", "max_ratio", "reward_timeout", "reward_memory_gb")
        # Beyond, the system refuses the limit itself, and that would look like a scorer that fails.
        at_most("faults", self, reward_timeout=86400, reward_memory_gb=1 << 20)
        for name in ("heartbeat_timeout", "max_skipped_updates"):
            value = getattr(self, name)
            require(value >= 0, f"faults.{name}", value, "must be 0 or more", "Give 0 for none.")
        require(
            self.min_entropy >= 0, "faults.min_entropy", self.min_entropy, "must be 0 or more", "Give 0 for no warning."
        )
        for name in ("max_truncated", "max_dead_experts", "max_expert_load"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"faults.{name}", value, "must be a share from 0 to 1", "Give 1 for no warning.")
        require(
            self.collective_timeout < 600,
            "faults.collective_timeout",
            self.collective_timeout,
            "must be below 600, when a collective fails by itself and no rank is named",
            "Give 540.",
        )
        require(
            self.reward_memory_gb >= 1,
            "faults.reward_memory_gb",
            self.reward_memory_gb,
            "must be at least 1: Python and the tasks need about half of that",
            "Give 4.",
        )
