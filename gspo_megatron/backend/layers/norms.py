"""RMSNorms for Megatron's slots: of the hidden states or each head, and of all heads together (OLMoE)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from gspo_megatron.backend.layers.parameter_marks import mark


class RMSNorm(torch.nn.Module):
    """RMSNorm for the local spec; its weight says that it is shared by sequence-parallel ranks.

    Megatron's local wrapper refuses sequence parallelism because torch's module cannot say so.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, zero_centred: bool | None = None, **kwargs
    ):
        """zero_centred: the factor is 1 + weight; None: as the config says."""
        super().__init__()
        self.eps = eps
        self.zero_centred = config.layernorm_zero_centered_gamma if zero_centred is None else zero_centred
        start = torch.zeros if self.zero_centred else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        mark(self.weight, sequence_parallel=config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise: [..., hidden_size] -> the same."""
        if not self.zero_centred:
            return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)  # 1 + weight would lose the weight's bits in bf16
        return F.rms_norm(x.to(wide), (x.size(-1),), 1 + self.weight.to(wide), self.eps).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """Sum over a group; every rank's part of the loss depends on the sum, so its gradient is summed too."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm over the query (or key) of all heads together; each tensor rank has its heads' part of the weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, heads: int, eps: float = 1e-5, **kwargs):
        """hidden_size: of one head; heads: of the whole model."""
        super().__init__()
        self.eps, self.size = eps, heads * hidden_size
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.cuts = dist.get_world_size(self.group)
        self.weight = torch.nn.Parameter(torch.ones(self.size // self.cuts, dtype=config.params_dtype))
        # Not marked, its gradient's norm would be counted on rank 0 alone.
        mark(self.weight, tensor_model_parallel=self.cuts > 1, partition_dim=0, partition_stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise: [tokens, 1, heads / TP, hidden_size] -> the same."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum((-2, -1), keepdim=True)
        if self.cuts > 1:
            squares = _SumOverRanks.apply(squares, self.group)
        normed = wide * torch.rsqrt(squares / self.size + self.eps)
        return normed.to(x.dtype) * self.weight.view(x.shape[-2:])

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's default would take the weight for whole on every tensor rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)
