"""This checks what needs two parts of a recipe, the model's shape or the world size, before anything heavy is imported.

`check` refuses what the trainer would refuse later, or would train wrongly; how the model is cut is layout.py. Nothing
here imports torch.

Left out: memory (whether the model fits), and the number of ranks a node has.
"""

import importlib.util
from contextlib import closing
from typing import TYPE_CHECKING

from gspo_megatron.config import Layout, TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.recipe.hf_config import check_stop_ids, generation_stops
from gspo_megatron.recipe.layout import check_latent, check_layout
from gspo_megatron.recipe.rollout_files import check_rollouts
from gspo_megatron.tasks.preferences import load_pairs

if TYPE_CHECKING:
    from gspo_megatron.tasks.mixture import TaskMixture


def check(
    config: TrainConfig, layout: Layout, world_size: int, transformer_engine: bool = False, rewards: bool = False
) -> None:
    """Raise ConfigError for a run that cannot work. Cheap checks first: the tasks' library takes a second to import.

    Args:
        config: the recipe.
        layout: as `resolve_layout` returns it.
        world_size: ranks on all nodes together.
        transformer_engine: its layers will run, see `uses_transformer_engine`.
        rewards: load the reward functions too, which are code of the user's.
    """
    shape = check_layout(config.model, layout, world_size)
    check_latent(shape, transformer_engine)
    context = layout.context_parallel_size
    data = world_size // layout.model_ranks
    if config.algorithm.name == "dpo":
        _check_preferences(config, layout, data)
    else:
        _check_batch(config, data, context)
    warm_start = config.warm_start
    require(
        warm_start.steps == 0 or warm_start.batch_size % data == 0,
        "warm_start.batch_size",
        warm_start.batch_size,
        f"cannot be divided evenly {_over(data, context)}",
        f"Give a multiple of {data}.",
    )
    _check_lengths(config, shape, context)
    _check_stops(config, shape)
    _check_penalty(config)
    _check_routing(config, shape)
    _check_trackers(config)
    check_rollouts(config)
    from gspo_megatron.tasks.mixture import TaskMixture

    mixture = TaskMixture(config.tasks, config.seed)
    _check_warm_start(config, mixture)
    if rewards:
        check_rewards(config, mixture)


def check_rewards(config: TrainConfig, mixture: "TaskMixture") -> list[str]:
    """Load every reward function and environment in such a process as it will run in; prompts of `mixture` tell of the
    tools from here on. Returns sentences about them.

    Raises:
        ConfigError: one cannot be loaded, or has no form that is known, or wants a column that the data have not.
    """
    from gspo_megatron.tasks.environments import EnvironmentRunner
    from gspo_megatron.tasks.rewards import RewardRunner

    notes: list[str] = []
    schemas = {}
    for name, task in config.tasks.items():
        columns = list(mixture.tasks[name].item("train", 0).entry) if task.data is not None else []
        if task.reward:
            with closing(RewardRunner(name, task, config.faults)) as runner:
                notes += runner.check(columns)
        if task.environment is not None:
            with closing(EnvironmentRunner(name, task, config.faults)) as environment:
                notes += environment.check(columns)
                schemas[name] = environment.loaded().schemas
    mixture.use_tools(schemas)
    return notes


def _check_warm_start(config: TrainConfig, mixture: "TaskMixture") -> None:
    """Gold answers must be there, and be found where a task's extractor looks."""
    if config.warm_start.steps and any(
        task.answer_extractor != "none" or task.data is not None for task in config.tasks.values()
    ):
        for index in range(8 * len(mixture.names)):  # so that nearly surely each task is among them
            mixture.gold_response(mixture.item("warm_start", index))


def uses_transformer_engine(config: TrainConfig, has_gpu: bool) -> bool:
    """Tell, without importing torch, whether the model builder will take Transformer Engine's layers."""
    is_installed = importlib.util.find_spec("transformer_engine") is not None
    return has_gpu and config.device != "cpu" and config.model.params_dtype == "bf16" and is_installed


def _check_batch(config: TrainConfig, data: int, context: int) -> None:
    """Groups stay whole on one replica, and every minibatch has as many responses on each data-parallel rank.

    In generation a replica is a data-parallel and context-parallel rank; in training it is a data-parallel one.
    """
    rollout, minibatches = config.rollout, config.algorithm.num_minibatches
    replicas = data * context
    require(
        rollout.num_prompts % replicas == 0,
        "rollout.num_prompts",
        rollout.num_prompts,
        f"cannot be divided evenly {_over(data, context)}" + (f" x context {context}" if context > 1 else ""),
        f"Give a multiple of {replicas}.",
    )
    local = rollout.num_prompts // data * rollout.group_size
    require(
        local % minibatches == 0,
        "algorithm.num_minibatches",
        minibatches,
        f"{rollout.num_prompts} prompts x {rollout.group_size} responses are {local} on each of {data} "
        f"data-parallel ranks, which cannot be divided evenly into {minibatches} minibatches",
        f"Give a divisor of {local}, or change rollout.num_prompts or rollout.group_size.",
    )


def _check_preferences(config: TrainConfig, layout: Layout, data: int) -> None:
    """DPO's pairs, all of them, and its batch. How many tokens they are is known once there is a tokenizer."""
    preference = config.algorithm.preference
    # With virtual stages the number of microbatches is a multiple of the stages', and each holds a pair or more.
    stages = layout.pipeline_model_parallel_size if (layout.virtual_pipeline_model_parallel_size or 1) > 1 else 1
    by = f" and {stages} pipeline stages, of which virtual stages want a multiple" if stages > 1 else ""
    require(
        preference.batch_size % (data * stages) == 0,
        "algorithm.preference.batch_size",
        preference.batch_size,
        f"cannot be divided evenly {_over(data)}{by}",
        f"Give a multiple of {data * stages}.",
    )
    load_pairs(preference)


def _over(data: int, context: int = 1) -> str:
    sizes = "tensor / context / pipeline" if context > 1 else "tensor / pipeline"
    return f"over {data} data-parallel ranks (ranks / {sizes})"


def _check_lengths(config: TrainConfig, shape: Architecture, context: int) -> None:
    prompt, response = config.data.max_prompt_length, config.rollout.max_response_length
    longest, limit = prompt + response, shape.max_position_embeddings
    parts = f"data.max_prompt_length {prompt} + rollout.max_response_length {response} = {longest}"
    if longest % (2 * context) and context > 1:
        longest += -longest % (2 * context)
        parts += f", {longest} with padding to a multiple of {2 * context} (twice parallel.context_parallel_size),"
    require(
        longest <= limit,
        "rollout.max_response_length",
        response,
        f"{parts} exceeds the model's max_position_embeddings {limit}",
        f"Lower one of the two so that they add up to {limit} or less.",
    )
    room = config.max_tokens_per_microbatch
    require(
        longest <= room,
        "max_tokens_per_microbatch",
        room,
        f"{parts}, and a sequence is never split over microbatches",
        f"Give {longest} or more.",
    )


def _check_stops(config: TrainConfig, shape: Architecture) -> None:
    """Stop tokens of a model whose vocabulary is known; that of a tokenizer trained here is, once there is one."""
    generation_stops(config.model)
    if config.model.load_hf is not None:
        check_stop_ids(config.rollout, shape.vocab_size)


def _check_penalty(config: TrainConfig) -> None:
    algorithm = config.algorithm.resolved()
    require(
        not algorithm.kl.is_in_reward or algorithm.old_logprobs != "first_minibatch",
        "algorithm.old_logprobs",
        algorithm.old_logprobs,
        "leaves the first minibatch without old log-probs, which the KL penalty in the reward needs",
        "Give recomputed, or algorithm.kl.place loss.",
    )
    limit = config.rollout.max_response_length
    require(
        (algorithm.overlong_buffer or 0) <= limit,
        "algorithm.overlong_buffer",
        algorithm.overlong_buffer,
        f"must be at most rollout.max_response_length {limit}, below which it is counted",
        "A fifth of that limit is common.",
    )


def _check_trackers(config: TrainConfig) -> None:
    """Libraries of trackers must be there. (A folder ./wandb, as W&B makes them, is found too, but has no origin.)"""
    for name in ("wandb", "mlflow"):
        if getattr(config.tracking, name):
            found = importlib.util.find_spec(name)
            is_there = found is not None and found.origin is not None
            remedy = f"Run: pip install 'gspo-megatron[{name}]'"
            require(is_there, f"tracking.{name}", True, f"the package {name} is not installed", remedy)


def needs_whole_pass(config: TrainConfig) -> bool:
    """Tell whether something asks for log-probs or routes of the old policy before the first minibatch is trained.

    Where nothing does, its own forward gives its old log-probs: the weights and the packing are those of the pass.
    """
    kl, routing = config.algorithm.resolved().kl, config.routing
    return kl.is_in_reward or routing.replay != "none" or routing.diagnostics_interval > 0


def _check_routing(config: TrainConfig, shape: Architecture) -> None:
    """Replay and its diagnostics need the routes of a pass that computes old log-probs."""
    routing, old = config.routing, config.algorithm.old_logprobs
    reasons = (
        (shape.num_experts > 0, f"the model is dense ({shape.family})", ""),
        (config.algorithm.name != "dpo", "dpo has no old policy, so no old routes", ""),
        (
            old == "recomputed",
            f"needs the routes of a pass over all minibatches, and algorithm.old_logprobs is {old}",
            "algorithm.old_logprobs recomputed, or ",
        ),
        (routing.statistics, "uses what the statistics note", "routing.statistics true, or "),
    )
    for name, neutral in (("replay", "none"), ("diagnostics_interval", 0)):
        value = getattr(routing, name)
        for ok, why, remedy in reasons:
            require(value == neutral or ok, f"routing.{name}", value, why, f"Give {remedy}{neutral}.")
