"""The tasks of a run, with the processes in which rewards are computed and environments live."""

import torch.distributed as dist

from gspo_megatron.backend.parallel.collective_errors import together
from gspo_megatron.config import TrainConfig
from gspo_megatron.tasks.dataset import Scorer
from gspo_megatron.tasks.environments import EnvironmentRunner, EpisodeScorer
from gspo_megatron.tasks.isolation import ScoringProcess
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.tasks.rewards import RewardRunner


def build_mixture(config: TrainConfig, scores: bool) -> TaskMixture:
    """Return the recipe's tasks with what scores and answers. A collective where there are environments.

    Args:
        scores: this rank does, so the processes come up while the model is built.

    Raises:
        ConfigError: a task cannot be used; for an environment on every rank.
    """
    process = ScoringProcess(config.faults)
    has_data = {name: task for name, task in config.tasks.items() if task.data}
    functions = {name: RewardRunner(name, task, config.faults) for name, task in has_data.items() if task.reward}
    environments = {
        name: EnvironmentRunner(name, task, config.faults) for name, task in has_data.items() if task.environment
    }
    if scores:
        if len(has_data) < len(config.tasks):
            process.start()
        for function in functions.values():
            function.start()
        for environment in environments.values():
            environment.start()
    rewards: dict[str, Scorer] = dict(functions)
    rewards |= {name: EpisodeScorer(name, has_data[name], functions.get(name)) for name in environments}
    mixture = TaskMixture(config.tasks, config.seed, process, rewards, environments)
    if environments:
        mixture.use_tools(_schemas(mixture))
    return mixture


def _schemas(mixture: TaskMixture) -> dict[str, tuple[dict, ...]]:
    """Return the tools of each task's environment, as rank 0 finds them. A collective."""
    found: list = [None]
    with together():
        if dist.get_rank() == 0:
            found[0] = {name: runner.loaded().schemas for name, runner in mixture.environments.items()}
    dist.broadcast_object_list(found, src=0)
    return found[0]
