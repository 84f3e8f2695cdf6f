"""The whole recipe has one dataclass a section, each of which validates itself before a process group or a model
exists.

A recipe is a YAML file with the same nesting as `TrainConfig`; command-line overrides (`--optimizer.lr 1e-4`)
come on top. Each dataclass checks its own fields in __post_init__; what needs two sections, the model's shape or the
world size is checked in `recipe/check.py`. Field names are Megatron-Core's where it has one.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from gspo_megatron.config.algorithm import GROUP_NORMALISED, AlgorithmConfig, ResolvedAlgorithm
from gspo_megatron.config.checkpoint import CheckpointConfig
from gspo_megatron.config.constraints import STRICT, at_most, check_numbers, positive, require
from gspo_megatron.config.data import DataConfig
from gspo_megatron.config.faults import FaultsConfig
from gspo_megatron.config.model import ModelConfig
from gspo_megatron.config.names import check_path, check_run_name
from gspo_megatron.config.optimizer import OptimizerConfig
from gspo_megatron.config.parallel import Layout, ParallelConfig
from gspo_megatron.config.rollout import RolloutConfig
from gspo_megatron.config.routing import RoutingConfig
from gspo_megatron.config.task import TASK_NAME, TaskConfig
from gspo_megatron.config.tracking import TrackingConfig
from gspo_megatron.config.warm_start import WarmStartConfig

DEFAULT_STEPS = 100


@dataclass(frozen=True)
class TrainConfig:
    """One training run: supervised warm start, then reinforcement learning on fresh prompts, or DPO on pairs."""

    __pydantic_config__ = STRICT
    name: str = "moe_gspo"
    """The run folder is output_dir/name. At most 100 letters, digits, ".", "_", "-". Where it exists: see resume."""
    output_dir: Path = Path("runs")
    """Where run folders are made."""
    resume: Literal["auto", "never", "change"] = "auto"
    """auto: of the folders of this name, go on in the one of the same recipe that got furthest, is unfinished and is
    trained by nobody else (steps, intervals, layout and device may differ); a finished run is left as it is. Otherwise,
    and with never: a new folder, with a number added where the name is taken. change: as auto, but where no run is of
    this very recipe, the one that got furthest goes on with its values where they may change (docs/resuming.md);
    where none can, nothing starts."""
    seed: int = 1
    """Of the initial weights, the prompts and the sampling; 0 or more. Layouts differ by rounding."""
    steps: int = DEFAULT_STEPS
    """RL steps: rollouts, rewards, then num_minibatches optimizer steps. dpo: optimizer steps."""
    num_epochs: int | None = None
    """In place of steps: as many as it takes to see each row of the recipe's one task of data so often. What dynamic
    sampling draws comes on top."""

    save_hf: bool = False
    """Write the final policy as a Hugging Face folder too: hf/ in the run folder, with its tokenizer."""
    eval_interval: int = 25
    """Steps between evaluations on held-out prompts (dpo: pairs); they also run before and after."""
    max_tokens_per_microbatch: int = 8192
    """Packing limit of one microbatch on one data-parallel rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA with NCCL where there is a GPU, else CPU with Gloo."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tasks: dict[str, TaskConfig] = field(default_factory=lambda: {"spell_backward": TaskConfig()})
    """Tasks by name: data and rewards of yours, or a generator of reasoning-gym."""
    data: DataConfig = field(default_factory=DataConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_run_name("name", self.name)
        preference = self.algorithm.preference
        for name, path in {
            "output_dir": self.output_dir,
            "model.hf_config": self.model.hf_config,
            "model.load_hf": self.model.load_hf,
            "algorithm.preference.path": preference.path,
            "algorithm.preference.eval_path": preference.eval_path,
            "rollout.path": self.rollout.path,
        }.items():
            check_path(name, path)
        check_numbers(self)
        positive("", self, "eval_interval", "max_tokens_per_microbatch")
        require(
            self.seed >= 0,
            "seed",
            self.seed,
            "must be 0 or more, because libraries that are seeded with it take nothing else",
            "Give 1.",
        )
        _check_epochs(self)
        require(self.steps >= 0, "steps", self.steps, "must be 0 or more", "Give 0 to run the warm start alone.")
        require(
            len(self.tasks) > 0, "tasks", self.tasks, "must name at least one task", "For example spell_backward: {}."
        )
        for name, task in self.tasks.items():
            at_most(f"tasks.{name}", task, weight=1_000_000)
            require(
                task.data is None or TASK_NAME.fullmatch(name) is not None,
                "tasks",
                name[:100],
                "must be at most 100 letters (a-z), digits, '_' and '-', for its metrics are named by it",
                "Give a name such as gsm8k.",
            )
            for part in ("data", "eval_data"):
                check_path(f"tasks.{name}.{part}", getattr(task, part))
        require(
            self.rollout.group_size >= 2 or self.algorithm.name not in GROUP_NORMALISED,
            "rollout.group_size",
            self.rollout.group_size,
            f"{self.algorithm.name} compares the responses to one prompt, so it needs 2 or more",
            "The GSPO paper uses 8.",
        )

    def resolved(self, layout: Layout) -> "ResolvedConfig":
        """Return the recipe as ranks train it: on this layout, with the algorithm's own values filled in."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return ResolvedConfig(**values | {"parallel": layout, "algorithm": self.algorithm.resolved()})


@dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """This is a TrainConfig in which nothing is left to be chosen."""

    parallel: Layout = field(default_factory=Layout)
    algorithm: ResolvedAlgorithm = field(default_factory=lambda: AlgorithmConfig().resolved())


def _check_epochs(config: TrainConfig) -> None:
    """Epochs are of one data set, and say all of how long a run is."""
    number = config.num_epochs
    if number is None:
        return
    positive("", config, "num_epochs")
    at_most("", config, num_epochs=1_000_000)
    has_data = len(config.tasks) == 1 and all(task.data is not None for task in config.tasks.values())
    tasks = ", ".join(config.tasks)
    for ok, why, remedy in (
        (config.steps == DEFAULT_STEPS, f"is given beside steps {config.steps}", "Leave one of the two out."),
        (
            has_data,
            f"counts the rows of one task of data, and the recipe's tasks are {tasks:.200}",
            "Give steps, or one task with data alone.",
        ),
        (config.algorithm.name != "dpo", "counts rows of a task, and dpo learns from pairs", "Give steps."),
        (config.rollout.engine != "files", "counts prompts that are sampled; rollout.engine is files", "Give steps."),
    ):
        require(ok, "num_epochs", number, why, remedy)
