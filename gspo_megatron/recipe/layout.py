"""The parallel layout is filled in where a recipe leaves it open, and what the model or the world cannot be cut into is
refused. Nothing here imports torch."""

import dataclasses

from gspo_megatron.config import Layout, ModelConfig, TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.config.model import MAKE_VOCAB_SIZE_DIVISIBLE_BY
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.recipe.hf_config import read_shape

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
    require(
        config.device != "cuda" or has_cuda,
        "device",
        config.device,
        "no GPU that PyTorch can use was found",
        "Give auto or cpu, or install a CUDA build of torch and look at CUDA_VISIBLE_DEVICES.",
    )
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


def check_layout(model: ModelConfig, layout: Layout, world_size: int) -> Architecture:
    """Raise ConfigError where the model or the world cannot be cut this way. Returns what the model is."""
    shape = read_shape(model)
    _check_world(layout, world_size)
    _check_model(shape, layout)
    _check_vocabulary(model, shape, layout.tensor_model_parallel_size)
    return shape


def check_latent(shape: Architecture, transformer_engine: bool) -> None:
    """Raise ConfigError where Transformer Engine's layers would run latent attention, as long as they compute something
    else there than transformers does."""
    require(
        shape.latent is None or not transformer_engine,
        "model.params_dtype",
        "bf16",
        f"{shape.family} has latent attention, which Transformer Engine's layers compute otherwise than transformers",
        "Give fp32, or start without a GPU or where Transformer Engine is not installed: then the layers are our own.",
    )


def _check_world(layout: Layout, world_size: int) -> None:
    tensor, pipeline, context = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    copy = tensor * context * pipeline
    field, value = ("context", context) if context > 1 else ("tensor_model", tensor)
    named = f"tensor {tensor} x " + (f"context {context} x " if context > 1 else "")
    require(
        world_size % copy == 0,
        f"parallel.{field}_parallel_size",
        value,
        f"{named}pipeline {pipeline} = {copy} does not divide {world_size} ranks",
        f"Start a multiple of {copy} ranks, or lower one of them.",
    )
    # Megatron cuts the ranks of a stage anew for the experts: tensor, context and data parallelism together.
    expert, expert_tensor = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    copy = expert * expert_tensor * pipeline
    require(
        world_size % copy == 0,
        "parallel.expert_model_parallel_size",
        expert,
        f"expert {expert} x expert tensor {expert_tensor} x pipeline {pipeline} = {copy} does not divide "
        f"{world_size} ranks",
        f"Start a multiple of {copy} ranks, or lower one of the three.",
    )
    virtual = layout.virtual_pipeline_model_parallel_size or 1
    require(
        virtual == 1 or pipeline > 1,
        "parallel.virtual_pipeline_model_parallel_size",
        virtual,
        "virtual stages need a pipeline of 2 or more stages",
        "Give parallel.pipeline_model_parallel_size 2, or leave virtual stages out.",
    )


def _check_model(shape: Architecture, layout: Layout) -> None:
    stages, virtual = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    tensor, expert_tensor = layout.tensor_model_parallel_size, layout.expert_tensor_parallel_size
    chunks = f"{stages} pipeline stages" + (f" x {virtual} virtual stages" if virtual > 1 else "")
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    if first is None and last is None:
        _divides("pipeline_model_parallel_size", stages, stages * virtual, shape, "num_hidden_layers", chunks)
    else:
        _check_uneven(shape.num_hidden_layers, stages, virtual, first, last)
    _check_tensor(shape, tensor)
    if shape.linear:
        context = layout.context_parallel_size
        require(
            context == 1,
            "parallel.context_parallel_size",
            context,
            f"{shape.family} has linear attention, whose memory goes through all tokens of a sequence in order",
            "Give 1, and tensor or pipeline parallelism for long sequences.",
        )
    expert = layout.expert_model_parallel_size
    if not shape.num_experts:
        for name, size in (("expert_model_parallel_size", expert), ("expert_tensor_parallel_size", expert_tensor)):
            require(size == 1, f"parallel.{name}", size, f"the model is dense ({shape.family})", "Give 1.")
        return
    _divides("expert_model_parallel_size", expert, expert, shape, "num_experts", f"expert parallel size {expert}")
    cut = f"expert tensor parallel size {expert_tensor}"
    _divides("expert_tensor_parallel_size", expert_tensor, expert_tensor, shape, "moe_intermediate_size", cut)
    require(
        expert_tensor == 1 or not shape.linear_bias,
        "parallel.expert_tensor_parallel_size",
        expert_tensor,
        f"experts of {shape.family} have biases, which Megatron would add once a rank",
        "Give 1.",
    )


def _check_tensor(shape: Architecture, tensor: int) -> None:
    """Every size that tensor parallelism cuts must be divisible. Megatron would give several ranks a copy of the same
    key/value head where there are fewer heads than ranks; we have not built that."""
    sizes = {"num_attention_heads": shape.num_attention_heads, "num_key_value_heads": shape.num_key_value_heads}
    if shape.latent:
        sizes |= {"q_lora_rank": shape.latent.q_lora_rank} if shape.latent.q_lora_rank else {}
        sizes["kv_lora_rank + qk_rope_head_dim"] = shape.latent.kv_lora_rank + shape.latent.qk_rope_head_dim
    if shape.linear:
        # As many value heads as key heads, or a multiple: dividing these divides both.
        sizes["linear_num_key_heads"] = shape.linear.num_key_heads
    if 0 in shape.moe_layers:
        sizes["intermediate_size"] = shape.intermediate_size
    if shape.shared_intermediate_size:
        sizes["shared_intermediate_size"] = shape.shared_intermediate_size
    fitting = [str(n) for n in range(1, 65) if all(size % n == 0 for size in sizes.values())]
    for name, size in sizes.items():
        require(
            size % tensor == 0,
            "parallel.tensor_model_parallel_size",
            tensor,
            f"the model's {name} {size} cannot be divided evenly over tensor parallel size {tensor}",
            f"Sizes that fit the model: {', '.join(fitting)}.",
        )


def _check_uneven(layers: int, stages: int, virtual: int, first: int | None, last: int | None) -> None:
    """Stages of unequal length: what the first and the last leave over is divided evenly among the others."""
    field = "num_layers_in_first_pipeline_stage" if first is not None else "num_layers_in_last_pipeline_stage"
    value = first if first is not None else last
    require(
        stages > 1 and virtual == 1,
        f"parallel.{field}",
        value,
        f"is for a pipeline of 2 or more stages without virtual ones, and there are {stages} x {virtual}",
        "Leave it out.",
    )
    others = stages - (first is not None) - (last is not None)
    left = layers - (first or 0) - (last or 0)
    fits = left == 0 if others == 0 else left > 0 and left % others == 0
    require(
        fits,
        f"parallel.{field}",
        value,
        f"of the model's {layers} layers {left} are left for {others} other stages, which cannot be divided evenly",
        "Change num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage.",
    )


def _check_vocabulary(model: ModelConfig, shape: Architecture, tensor: int) -> None:
    if model.load_hf is not None:
        _divides("tensor_model_parallel_size", tensor, tensor, shape, "vocab_size", f"tensor parallel size {tensor}")
        return
    require(
        MAKE_VOCAB_SIZE_DIVISIBLE_BY % tensor == 0,
        "parallel.tensor_model_parallel_size",
        tensor,
        f"must divide {MAKE_VOCAB_SIZE_DIVISIBLE_BY}, of which the padded vocabulary is a multiple",
        "Give a power of 2.",
    )


def _divides(field: str, value: int, parts: int, shape: Architecture, name: str, cut: str) -> None:
    size = getattr(shape, name)
    fitting = [str(n) for n in range(1, min(size, 64) + 1) if size % n == 0]
    require(
        size % parts == 0,
        f"parallel.{field}",
        value,
        f"the model's {name} {size} cannot be divided evenly over {cut}",
        f"Numbers of parts that fit: {', '.join(fitting)}.",
    )
