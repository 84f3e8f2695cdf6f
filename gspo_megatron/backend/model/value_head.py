"""The critic's model: the policy's transformer with one number a token in place of logits.

Left out: a head of several layers, and a trunk shared with the policy.
"""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.backend.layers.parameter_marks import mark
from gspo_megatron.backend.model.builder import PackedModel


class ValueHead(torch.nn.Module):
    """Linear map from hidden states to a value, whole on every tensor rank."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        for parameter in self.parameters():
            # Under sequence parallelism each tensor rank sees its own rows, so Megatron must add up the gradients.
            mark(parameter, sequence_parallel=config.sequence_parallel)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute values: [rows, hidden_size] -> [rows]; fp32 (fp64 in an fp64 model), because bf16 is too coarse for
        them: with three digits a value of 1 moves in steps of 0.008."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        return F.linear(hidden_states.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).squeeze(1)


class ValueModel(PackedModel):
    """Its last stage returns values [rows] of all tokens fed, the same on every tensor rank. No output layer."""

    def __init__(self, config: TransformerConfig, **kwargs):
        # Not tied: the embedding's gradient would be added up with the last stage's, which has no embedding here.
        super().__init__(config, **(kwargs | {"share_embeddings_and_output_weights": False}))
        if self.post_process:
            del self.output_layer
            self.value_head = ValueHead(config)

    def _postprocess(self, hidden_states, *args, **kwargs):
        if not self.post_process:
            return hidden_states
        values = self.value_head(hidden_states.squeeze(1))
        if self.config.sequence_parallel:
            # Values are gathered and not hidden states: one number a token. Every tensor rank then computes the same
            # loss from the same values, so a rank's rows get their gradient from its own copy. By default Megatron
            # takes the copies for parts of one sum and adds them: the gradient would be tensor size times too large.
            values = tensor_parallel.gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's for a language model looks for the output layer, so this starts above it."""
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)
