"""Attention's softmax of one layer, on torch's SDPA: its scale, its window and its sinks (GPT-OSS, arXiv 2508.10925).

A sink is a logit of a head that takes its share of the softmax and gives no value. SDPA knows no such thing, so there
is one key more in front, of which each query sees its head's sink through a dimension that nothing else has, and whose
value is 0. In front, because then a causal mask stays causal.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Softmax:
    """What queries do with the keys that they may see. Shapes: S sequences, n query heads, g key heads."""

    scale: float
    window: int | None = None  # a query sees itself and the window - 1 tokens before it; None: all before it
    sinks: torch.Tensor | None = None  # [n], logits (not scaled)

    def causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend, all from position 0: query [S, n, L, d], key [S, g, L, d], value [S, g, L, v] -> [S, n, L, v]."""
        length = query.size(2)
        if self.window is not None and self.window < length:
            return self.at(torch.arange(length, device=query.device)[None], query, key, value)
        if self.sinks is None:
            return self._attend(query, key, value, is_causal=True)
        query, key, value = self._with_sinks(self.sinks, query, key, value)
        query = F.pad(query, (0, 0, 1, 0))  # a query for the sink's own place; its output is dropped
        return self._attend(query, key, value, is_causal=True)[:, :, 1:, :-1]

    def at(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend with queries anywhere among the keys.

        Args:
            positions: [S or 1, N or 1] int64, of the queries.
            query: [S, n, N, d].
            key: [S, g, K, d], from position 0; key i is seen by the queries at positions from i on.
            value: [S, g, K, v].

        Returns:
            [S, n, N, v].
        """
        places = torch.arange(key.size(2), device=query.device)
        mask = places <= positions.unsqueeze(-1)  # [S, N, K]
        if self.window is not None:
            mask = mask & (places > positions.unsqueeze(-1) - self.window)
        mask = mask.unsqueeze(1)
        if self.sinks is None:
            return self._attend(query, key, value, attn_mask=mask)
        query, key, value = self._with_sinks(self.sinks, query, key, value)
        return self._attend(query, key, value, attn_mask=F.pad(mask, (1, 0), value=True))[..., :-1]

    def one(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend with one query a sequence. The heads that share keys stand as queries of one head, so that no key is
        copied for each of them.

        Args:
            positions: [S] int64, of the query.
            query: [S, n, d].
            key: [S, g, K, d], as in `at`.
            value: [S, g, K, v].

        Returns:
            [S, n, v].
        """
        return self.at(positions.unsqueeze(1), query.unflatten(1, (key.size(1), -1)), key, value).flatten(1, 2)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **mask) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=self.scale, enable_gqa=True, **mask)

    def _with_sinks(
        self, sinks: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor]:
        """[S, n, N, d + 1], [S, g, 1 + K, d + 1], [S, g, 1 + K, v + 1]: every last dimension is the sinks' own."""
        logits = (sinks / self.scale).to(query.dtype).view(1, query.size(1), -1, 1)  # see `one`
        query = torch.cat([query, logits.expand(*query.shape[:-1], 1)], -1)
        key, value = (F.pad(x, (0, 1, 1, 0)) for x in (key, value))
        seen = torch.zeros_like(key[:1, :1])
        seen[..., 0, -1] = 1.0
        return [query, key + seen, value]
