"""What needs two parts of a recipe, the model's shape or the world size, checked before anything heavy is imported.

`resolve_layout` fills in the sizes that the recipe leaves open; `check` refuses what Megatron-Core or the trainer
would refuse later, or would train wrongly. Nothing here imports torch.

Left out: memory (whether the model fits), and the number of ranks a node has.
"""

import dataclasses

from gspo_megatron.config import Layout, ModelConfig, TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.config.model import MAKE_VOCAB_SIZE_DIVISIBLE_BY
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.recipe.hf_config import read_shape
from gspo_megatron.tasks.preferences import load_pairs

# ranks -> (tensor, pipeline, expert): every kind of parallelism that a world of this size can hold. On GPUs too.
# Context parallelism is never chosen here: it pays for long sequences only.
DEFAULT_LAYOUTS = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 2), 8: (2, 2, 2)}


def resolve_layout(config: TrainConfig, world_size: int, has_cuda: bool) -> Layout:
    """Fill in every size that the recipe leaves open; None for virtual stages means off, as in Megatron.

    A recipe that gives none gets DEFAULT_LAYOUTS, and data parallelism alone at other world sizes. A recipe that
    gives one gets 1 for all others: what it asks for must not depend on how many ranks it is started with.

    Raises:
        ConfigError: the recipe asks for CUDA and `has_cuda` is false.
    """
    require(config.device != "cuda" or has_cuda, "device", config.device, "no GPU that PyTorch can use was found",
            "Give auto or cpu, or install a CUDA build of torch and look at CUDA_VISIBLE_DEVICES.")  # fmt: skip
    given = config.parallel
    sizes = (given.tensor_model_parallel_size, given.pipeline_model_parallel_size, given.expert_model_parallel_size)
    virtual = given.virtual_pipeline_model_parallel_size
    virtual = None if virtual == 1 else virtual  # Megatron takes 1 for an interleaved schedule
    context = given.context_parallel_size
    defaults = (1, 1, 1)
    if {*sizes, virtual, context} == {None} and given.expert_tensor_parallel_size == 1:
        defaults = DEFAULT_LAYOUTS.get(world_size, defaults)
    tensor, pipeline, expert = (size or default for size, default in zip(sizes, defaults, strict=True))
    sizes_by_name = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "expert_model_parallel_size": expert,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": context or 1,
    }
    return Layout(**dataclasses.asdict(given) | sizes_by_name)


def check(config: TrainConfig, layout: Layout, world_size: int) -> None:
    """Raise ConfigError for a run that cannot work. Cheap checks first: the tasks' library takes a second to import.

    Args:
        config: the recipe.
        layout: as `resolve_layout` returns it.
        world_size: ranks on all nodes together.
    """
    shape = check_layout(config.model, layout, world_size)
    context = layout.context_parallel_size
    data = world_size // layout.model_ranks
    if config.algorithm.name == "dpo":
        _check_preferences(config, layout, data)
    else:
        _check_batch(config, data, context)
    warm_start = config.warm_start
    require(warm_start.steps == 0 or warm_start.batch_size % data == 0, "warm_start.batch_size", warm_start.batch_size,
            f"cannot be divided evenly {_over(data, context)}", f"Give a multiple of {data}.")  # fmt: skip
    _check_lengths(config, shape, context)
    _check_penalty(config)
    _check_routing(config, shape)
    from gspo_megatron.tasks.mixture import TaskMixture

    TaskMixture(config.tasks, config.seed)


def check_layout(model: ModelConfig, layout: Layout, world_size: int) -> Architecture:
    """Raise ConfigError where the model or the world cannot be cut this way. Returns what the model is."""
    shape = read_shape(model)
    _check_world(layout, world_size)
    _check_model(shape, layout)
    _check_vocabulary(model, shape, layout.tensor_model_parallel_size)
    return shape


def _check_world(layout: Layout, world_size: int) -> None:
    tensor, pipeline, context = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    copy = tensor * context * pipeline
    field, value = ("context", context) if context > 1 else ("tensor_model", tensor)
    named = f"tensor {tensor} x " + (f"context {context} x " if context > 1 else "")
    require(world_size % copy == 0, f"parallel.{field}_parallel_size", value,
            f"{named}pipeline {pipeline} = {copy} does not divide {world_size} ranks",
            f"Start a multiple of {copy} ranks, or lower one of them.")  # fmt: skip
    # Megatron cuts the ranks of a stage anew for the experts: tensor, context and data parallelism together.
    expert, expert_tensor = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    copy = expert * expert_tensor * pipeline
    require(world_size % copy == 0, "parallel.expert_model_parallel_size", expert,
            f"expert {expert} x expert tensor {expert_tensor} x pipeline {pipeline} = {copy} does not divide "
            f"{world_size} ranks", f"Start a multiple of {copy} ranks, or lower one of the three.")  # fmt: skip
    virtual = layout.virtual_pipeline_model_parallel_size or 1
    require(virtual == 1 or pipeline > 1, "parallel.virtual_pipeline_model_parallel_size", virtual,
            "virtual stages need a pipeline of 2 or more stages",
            "Give parallel.pipeline_model_parallel_size 2, or leave virtual stages out.")  # fmt: skip


def _check_model(shape: Architecture, layout: Layout) -> None:
    stages, virtual = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    tensor, expert_tensor = layout.tensor_model_parallel_size, layout.expert_tensor_parallel_size
    chunks = f"{stages} pipeline stages" + (f" x {virtual} virtual stages" if virtual > 1 else "")
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    if first is None and last is None:
        _divides("pipeline_model_parallel_size", stages, stages * virtual, shape, "num_hidden_layers", chunks)
    else:
        _check_uneven(shape.num_hidden_layers, stages, virtual, first, last)
    cut = f"tensor parallel size {tensor}"
    _divides("tensor_model_parallel_size", tensor, tensor, shape, "num_attention_heads", cut)
    _divides("tensor_model_parallel_size", tensor, tensor, shape, "num_key_value_heads", cut)
    if shape.latent:
        latent = shape.latent
        ranks = [("q_lora_rank", latent.q_lora_rank or tensor),
                 ("kv_lora_rank + qk_rope_head_dim", latent.kv_lora_rank + latent.qk_rope_head_dim)]  # fmt: skip
        for name, size in ranks:
            require(size % tensor == 0, "parallel.tensor_model_parallel_size", tensor,
                    f"the model's {name} {size} cannot be divided evenly over {cut}", "Give another size.")  # fmt: skip
    if shape.linear:
        # As many value heads as key heads, or a multiple: dividing these divides both.
        heads, context = shape.linear.num_key_heads, layout.context_parallel_size
        require(heads % tensor == 0, "parallel.tensor_model_parallel_size", tensor,
                f"the model's linear_num_key_heads {heads} cannot be divided evenly over {cut}",
                "Give a divisor of it.")  # fmt: skip
        require(context == 1, "parallel.context_parallel_size", context,
                f"{shape.family} has linear attention, whose memory goes through all tokens of a sequence in order",
                "Give 1, and tensor or pipeline parallelism for long sequences.")  # fmt: skip
    if 0 in shape.moe_layers:
        _divides("tensor_model_parallel_size", tensor, tensor, shape, "intermediate_size", cut)
    if shape.shared_intermediate_size:
        _divides("tensor_model_parallel_size", tensor, tensor, shape, "shared_intermediate_size", cut)
    expert = layout.expert_model_parallel_size
    if not shape.num_experts:
        for name, size in (("expert_model_parallel_size", expert), ("expert_tensor_parallel_size", expert_tensor)):
            require(size == 1, f"parallel.{name}", size, f"the model is dense ({shape.family})", "Give 1.")
        return
    _divides("expert_model_parallel_size", expert, expert, shape, "num_experts", f"expert parallel size {expert}")
    cut = f"expert tensor parallel size {expert_tensor}"
    _divides("expert_tensor_parallel_size", expert_tensor, expert_tensor, shape, "moe_intermediate_size", cut)
    require(expert_tensor == 1 or not shape.linear_bias, "parallel.expert_tensor_parallel_size", expert_tensor,
            f"experts of {shape.family} have biases, which Megatron would add once a rank", "Give 1.")  # fmt: skip


def _check_uneven(layers: int, stages: int, virtual: int, first: int | None, last: int | None) -> None:
    """Stages of unequal length: what the first and the last leave over is divided evenly among the others."""
    field = "num_layers_in_first_pipeline_stage" if first is not None else "num_layers_in_last_pipeline_stage"
    value = first if first is not None else last
    require(stages > 1 and virtual == 1, f"parallel.{field}", value,
            f"is for a pipeline of 2 or more stages without virtual ones, and there are {stages} x {virtual}",
            "Leave it out.")  # fmt: skip
    others = stages - (first is not None) - (last is not None)
    left = layers - (first or 0) - (last or 0)
    fits = left == 0 if others == 0 else left > 0 and left % others == 0
    require(fits, f"parallel.{field}", value,
            f"of the model's {layers} layers {left} are left for {others} other stages, which cannot be divided evenly",
            "Change num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage.")  # fmt: skip


def _check_vocabulary(model: ModelConfig, shape: Architecture, tensor: int) -> None:
    if model.load_hf is not None:
        _divides("tensor_model_parallel_size", tensor, tensor, shape, "vocab_size", f"tensor parallel size {tensor}")
        return
    require(MAKE_VOCAB_SIZE_DIVISIBLE_BY % tensor == 0, "parallel.tensor_model_parallel_size", tensor,
            f"must divide {MAKE_VOCAB_SIZE_DIVISIBLE_BY}, of which the padded vocabulary is a multiple",
            "Give a power of 2.")  # fmt: skip


def _divides(field: str, value: int, parts: int, shape: Architecture, name: str, cut: str) -> None:
    size = getattr(shape, name)
    fitting = [str(n) for n in range(1, min(size, 64) + 1) if size % n == 0]
    require(size % parts == 0, f"parallel.{field}", value,
            f"the model's {name} {size} cannot be divided evenly over {cut}",
            f"Numbers of parts that fit: {', '.join(fitting)}.")  # fmt: skip


def _check_batch(config: TrainConfig, data: int, context: int) -> None:
    """Groups stay whole on one replica, and every minibatch has as many responses on each data-parallel rank.

    In generation a replica is a data-parallel and context-parallel rank; in training it is a data-parallel one.
    """
    rollout, minibatches = config.rollout, config.algorithm.num_minibatches
    replicas = data * context
    require(rollout.num_prompts % replicas == 0, "rollout.num_prompts", rollout.num_prompts,
            f"cannot be divided evenly {_over(data, context)}" + (f" x context {context}" if context > 1 else ""),
            f"Give a multiple of {replicas}.")  # fmt: skip
    local = rollout.num_prompts // data * rollout.group_size
    require(local % minibatches == 0, "algorithm.num_minibatches", minibatches,
            f"{rollout.num_prompts} prompts x {rollout.group_size} responses are {local} on each of {data} "
            f"data-parallel ranks, which cannot be divided evenly into {minibatches} minibatches",
            f"Give a divisor of {local}, or change rollout.num_prompts or rollout.group_size.")  # fmt: skip


def _check_preferences(config: TrainConfig, layout: Layout, data: int) -> None:
    """DPO's pairs, all of them, and its batch. How many tokens they are is known once there is a tokenizer."""
    preference = config.algorithm.preference
    # With virtual stages the number of microbatches is a multiple of the stages', and each holds a pair or more.
    stages = layout.pipeline_model_parallel_size if (layout.virtual_pipeline_model_parallel_size or 1) > 1 else 1
    by = f" and {stages} pipeline stages, of which virtual stages want a multiple" if stages > 1 else ""
    require(preference.batch_size % (data * stages) == 0, "algorithm.preference.batch_size", preference.batch_size,
            f"cannot be divided evenly {_over(data)}{by}", f"Give a multiple of {data * stages}.")  # fmt: skip
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
    require(longest <= limit, "rollout.max_response_length", response,
            f"{parts} exceeds the model's max_position_embeddings {limit}",
            f"Lower one of the two so that they add up to {limit} or less.")  # fmt: skip
    room = config.max_tokens_per_microbatch
    require(longest <= room, "max_tokens_per_microbatch", room,
            f"{parts}, and a sequence is never split over microbatches", f"Give {longest} or more.")  # fmt: skip


def _check_penalty(config: TrainConfig) -> None:
    algorithm = config.algorithm.resolved()
    in_reward = bool(algorithm.kl.coef) and algorithm.kl.place == "reward"
    require(not in_reward or algorithm.old_logprobs != "first_minibatch", "algorithm.old_logprobs",
            algorithm.old_logprobs, "leaves the first minibatch without old log-probs, which the KL penalty in the "
            "reward needs", "Give recomputed, or algorithm.kl.place loss.")  # fmt: skip
    limit = config.rollout.max_response_length
    require((algorithm.overlong_buffer or 0) <= limit, "algorithm.overlong_buffer", algorithm.overlong_buffer,
            f"must be at most rollout.max_response_length {limit}, below which it is counted",
            "A fifth of that limit is common.")  # fmt: skip


def _check_routing(config: TrainConfig, shape: Architecture) -> None:
    """Replay and its diagnostics need the routes of a pass that computes old log-probs."""
    routing, old = config.routing, config.algorithm.old_logprobs
    reasons = (
        (shape.num_experts > 0, f"the model is dense ({shape.family})", ""),
        (config.algorithm.name != "dpo", "dpo has no old policy, so no old routes", ""),
        (old == "recomputed", f"needs the routes of a pass over all minibatches, and algorithm.old_logprobs is {old}",
         "algorithm.old_logprobs recomputed, or "),
        (routing.statistics, "uses what the statistics note", "routing.statistics true, or "),
    )  # fmt: skip
    for name, neutral in (("replay", "none"), ("diagnostics_interval", 0)):
        value = getattr(routing, name)
        for ok, why, remedy in reasons:
            require(value == neutral or ok, f"routing.{name}", value, why, f"Give {remedy}{neutral}.")
