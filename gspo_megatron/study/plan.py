"""What is trained in a study stands here: literal tables of arms and settings, and the runs that they make.

The margins and rules by which findings.py judges are here too, so that they stand before the first run.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPE = Path("examples/recipes/study_routing_replay.yaml")

ARMS: dict[str, dict[str, Any]] = {
    "gspo": {"algorithm.name": "gspo"},
    "gspo_R2": {"algorithm.name": "gspo", "routing.replay": "R2"},
    "grpo": {"algorithm.name": "grpo"},
    "grpo_R2": {"algorithm.name": "grpo", "routing.replay": "R2"},
    "gspo_R3": {"algorithm.name": "gspo", "routing.replay": "R3"},
    "grpo_R3": {"algorithm.name": "grpo", "routing.replay": "R3"},
    "gspo_token": {"algorithm.name": "gspo_token"},
    "gspo_token_R2": {"algorithm.name": "gspo_token", "routing.replay": "R2"},
    "dapo": {"algorithm.name": "dapo"},
    "dapo_R2": {"algorithm.name": "dapo", "routing.replay": "R2"},
    "dr_grpo": {"algorithm.name": "dr_grpo"},
    "ppo": {"algorithm.name": "ppo"},
}
ALGORITHM_ARMS = ("gspo", "gspo_token", "grpo", "dr_grpo", "dapo", "ppo")  # dpo has no rollouts and no reward by step
MAIN_ARMS = ("gspo", "gspo_R2", "grpo", "grpo_R2")
LEARNING_RATES = (2e-4, 4e-4, 6e-4, 1e-3)
OTHER_LEARNING_RATE = 4e-4  # of arms and settings that are run at one
ALGORITHM_LEARNING_RATES = (1e-4, 2e-4, 4e-4)  # each algorithm is compared at its own best

# Beforehand: what counts as the outcome of a run, as collapse, and as the same.
OUTCOME_FROM = 0.6  # a run's outcome is its held-out accuracy, mean over evaluations after this share of its steps
COLLAPSE = 0.5  # a run has collapsed where its outcome is below this share of the accuracy it started from
EQUIVALENCE_MARGIN = 0.05  # of accuracy: two arms are the same where the 90% interval of their difference is within it
EQUIVALENCE_CONFIDENCE = 0.9
CONFIDENCE = 0.95  # of all other intervals
THRESHOLD = 0.6  # held-out accuracy that the algorithms are timed to


@dataclass(frozen=True)
class Setting:
    """Says how a group of runs differs from the recipe, whatever the arm."""

    about: str
    model: dict[str, Any] = field(default_factory=dict)  # changes to the model's config.json
    overrides: dict[str, Any] = field(default_factory=dict)  # changes to the recipe


SETTINGS: dict[str, Setting] = {
    "main": Setting("the recipe as it is"),
    "minibatches_8": Setting("8 updates a rollout batch", overrides={"algorithm.num-minibatches": 8}),
    "minibatches_16": Setting("16 updates a rollout batch", overrides={"algorithm.num-minibatches": 16}),
    "experts_32": Setting("32 experts a layer", model={"num_experts": 32}),
    "layers_8": Setting("8 layers", model={"num_hidden_layers": 8}),
}
# Added after the first 137 runs were seen, because their intervals of R2's help to GRPO were wider than the margin, and
# because at OTHER_LEARNING_RATE all harder settings were past the edge already (see routing_replay). The rules above
# stand. Nothing is chosen by what these runs show: all of them are in the report, and R2's help to GRPO is judged over
# all settings and learning rates together, with these among them.
HARDER, HARDER_LEARNING_RATE = "experts_32", 3e-4
FIRST_SEEDS = 5

PP2_EP2 = {"parallel.pipeline-model-parallel-size": 2, "parallel.expert-model-parallel-size": 2}


@dataclass(frozen=True)
class RunSpec:
    """Names one training run of a study."""

    arm: str
    setting: str
    lr: float
    seed: int
    ranks: int = 1  # 4: PP2 x EP2 x DP2

    @property
    def name(self) -> str:
        """Return the name of its data file."""
        layout = "" if self.ranks == 1 else f".ranks{self.ranks}"
        return f"{self.arm}.{self.setting}.lr{self.lr:g}.seed{self.seed}{layout}"

    @property
    def overrides(self) -> dict[str, Any]:
        """Return the recipe's overrides, but for where the run starts and is written."""
        layout = PP2_EP2 if self.ranks > 1 else {}
        return {
            **ARMS[self.arm],
            **SETTINGS[self.setting].overrides,
            "optimizer.lr": self.lr,
            "seed": self.seed,
            **layout,
        }

    @property
    def start(self) -> "StartSpec":
        return StartSpec(self.setting if SETTINGS[self.setting].model else "main", self.seed)


@dataclass(frozen=True)
class StartSpec:
    """Names the weights that all arms of a seed start from: a warm start of the setting's model."""

    setting: str
    seed: int

    @property
    def name(self) -> str:
        return f"start.{self.setting}.seed{self.seed}"


def routing_replay(seeds: int, rates: tuple[float, ...] = LEARNING_RATES) -> list[RunSpec]:
    """Return {gspo, grpo} x {free, R2} at every learning rate; further arms, harder settings and four ranks at one of
    them; what was added.

    In the order in which they are best run: seed by seed, so that a study that is cut short has whole seeds.
    """
    few, rate = min(seeds, 3), OTHER_LEARNING_RATE
    runs = [RunSpec(arm, "main", lr, seed) for seed in range(1, seeds + 1) for lr in rates for arm in MAIN_ARMS]
    some = range(1, few + 1)
    runs += [RunSpec("gspo", "main", rate, seed, ranks=4) for seed in some]
    further = ("gspo_token", "gspo_token_R2", "dapo", "dapo_R2")
    runs += [RunSpec(arm, "main", rate, seed) for seed in some for arm in further]
    for name, setting in SETTINGS.items():
        if name != "main":
            # Is there a setting in which replay helps GRPO? Updates a rollout batch are part of the stability margin.
            arms = ("grpo", "grpo_R2") if setting.model else MAIN_ARMS
            runs += [RunSpec(arm, name, rate, seed) for seed in some for arm in arms]
    runs += [RunSpec(arm, "main", rate, seed) for seed in some for arm in ("gspo_R3", "grpo_R3")]
    # Added later. As many seeds again where all arms are stable, so that the margin is judged for GRPO as for GSPO; and
    # a rate nearer to the edge in the harder setting in which R2's seeds were best beside free ones.
    runs += [RunSpec(arm, "main", min(rates), seed) for seed in range(seeds + 1, 2 * seeds + 1) for arm in MAIN_ARMS]
    return runs + [
        RunSpec(arm, HARDER, HARDER_LEARNING_RATE, seed) for seed in range(1, seeds + 1) for arm in ("grpo", "grpo_R2")
    ]


def was_added(spec: RunSpec) -> bool:
    """Tell whether a run, of the study that this repository keeps, was planned after its first runs were seen."""
    return (spec.setting, spec.lr) == (HARDER, HARDER_LEARNING_RATE) or spec.seed > FIRST_SEEDS


def algorithms(seeds: int, rates: tuple[float, ...] = ALGORITHM_LEARNING_RATES) -> list[RunSpec]:
    """Return every algorithm with rollouts, routing free, at every learning rate."""
    return [RunSpec(arm, "main", lr, seed) for seed in range(1, seeds + 1) for lr in rates for arm in ALGORITHM_ARMS]
