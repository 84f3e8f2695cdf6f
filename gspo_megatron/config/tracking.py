"""The recipe's `tracking` section says where a run's numbers are shown beside its folder, and what samples it keeps."""

import re
from dataclasses import dataclass

from gspo_megatron.config.constraints import STRICT, require

# What both libraries take: W&B refuses these characters and longer names.
PROJECT = re.compile(r"[^/\\#?%:\x00-\x1f\x7f]{1,128}")


@dataclass(frozen=True)
class TrackingConfig:
    """Trackers of other libraries, and responses written down for people to read. docs/tracking.md tells more.

    metrics.jsonl and TensorBoard are always written.
    """

    __pydantic_config__ = STRICT
    wandb: bool = False
    """Log to Weights & Biases too. Its environment variables hold: WANDB_MODE, WANDB_ENTITY and the others."""
    mlflow: bool = False
    """Log to MLflow too."""
    mlflow_uri: str | None = None
    """MLflow's tracking URI, without a password: config.yaml keeps it. null: that of MLFLOW_TRACKING_URI, or, where it
    is not set, a database in the run folder."""
    project: str = "gspo-megatron"
    """Name of the W&B project and of the MLflow experiment. The run has its folder's name in it."""
    log_samples: int = 2
    """Responses a step, and at each evaluation, that are written to samples.jsonl; 0: none."""

    def __post_init__(self) -> None:
        require(
            PROJECT.fullmatch(self.project) is not None,
            "tracking.project",
            self.project[:140],
            "must be 1 to 128 characters, none of / \\ # ? % : and no control character",
            "Give a name such as gspo-megatron.",
        )
        require(
            self.mlflow_uri is None or (self.mlflow_uri != "" and self.mlflow_uri.isprintable()),
            "tracking.mlflow_uri",
            self.mlflow_uri,
            "must be a URI without control characters",
            "Leave it out for MLFLOW_TRACKING_URI, or a database in the run folder.",
        )
        require(
            self.log_samples >= 0, "tracking.log_samples", self.log_samples, "must be 0 or more", "Give 0 for none."
        )
