"""The recipe's `parallel` section says how the world is cut. Names are Megatron-Core's.

`Layout` is the same with every size filled in, as recipe/check.py resolves it.
"""

from dataclasses import dataclass

from gspo_megatron.config.constraints import STRICT, require


@dataclass(frozen=True)
class ParallelConfig:
    """How the world is cut (Megatron-Core's names). None: chosen from the world size (recipe/check.py)."""

    __pydantic_config__ = STRICT
    tensor_model_parallel_size: int | None = None
    """Tensor parallelism; sequence parallelism is always on with it (Megatron demands it for MoE)."""
    pipeline_model_parallel_size: int | None = None
    """Pipeline stages; the layers are divided among them."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Virtual stages a rank (interleaved schedule); None: off."""
    expert_model_parallel_size: int | None = None
    """Ranks over which the experts of a layer are divided; they are taken from tensor, context and data parallelism."""
    expert_tensor_parallel_size: int = 1
    """Ranks that share each expert's matrices."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks (ZeRO-1); over context-parallel ones too."""
    context_parallel_size: int | None = None
    """Ranks that share the tokens of every sequence in training. Each sequence is padded to a multiple of twice this
    size and cut into that many chunks; a rank computes one from the front and its mirror image from the back, so that
    causal attention costs all the same. Rollouts use these ranks as further data-parallel ones. None: 1, off."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Where stages are to be of unequal length: the first has the embedding besides. None: as the others."""
    num_layers_in_last_pipeline_stage: int | None = None
    """The last one has the LM head and the loss besides. None: as the others."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
        ):
            value = getattr(self, name)
            require(
                value is None or value >= 1, f"parallel.{name}", value, "must be at least 1", "Give 1 to turn it off."
            )


@dataclass(frozen=True)
class Layout(ParallelConfig):
    """A layout is a ParallelConfig with every size filled in. Virtual stages stay None where they are off, as in
    Megatron."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    context_parallel_size: int = 1

    @property
    def model_ranks(self) -> int:
        """Return how many ranks train one copy of the model together: tensor x context x pipeline."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size
