"""From a model's output, one row a token that it was fed, to vectors indexed by the target token.

The row of token t has seen the tokens up to t, so it speaks about token t + 1 of the same sequence: its log-prob, or
the value before it is chosen. The row of a sequence's last token speaks about nothing.
"""

from dataclasses import dataclass

import torch

from gspo_megatron.backend.layers.attention import PackedPlan
from gspo_megatron.batch import PackedBatch


@dataclass(frozen=True)
class Targets:
    """The target of each row that this rank feeds: all T tokens, or `plan.rows` under context parallelism."""

    index: torch.Tensor  # [rows] int64; anything where `real` is False
    real: torch.Tensor  # [rows] bool
    own: torch.Tensor | None  # [T] bool, the targets of this context-parallel rank; None: all
    num_tokens: int  # T

    @classmethod
    def of(cls, batch: PackedBatch, plan: PackedPlan) -> "Targets":
        total, device = batch.num_tokens, batch.tokens.device
        rows = torch.arange(total, device=device) if plan.rows is None else plan.rows
        index = (rows + 1).clamp(max=total - 1)
        real = (rows + 1 < total) & (batch.position_ids[index] > 0)
        own = None
        if plan.rows is not None:
            own = torch.zeros(total, dtype=torch.bool, device=device)
            own[index[real]] = True
        return cls(index, real, own, total)

    def scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """Put rows in their tokens' places: [rows] -> [T], 0 where a token has no row here; differentiable."""
        return rows.new_zeros(self.num_tokens).index_add(0, self.index, torch.where(self.real, rows, 0.0))
