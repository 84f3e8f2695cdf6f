"""Load, entropy and change from made-up counts. That the counts are right is tested in engine/test_routing.py."""

import math

import pytest
import torch

from gspo_megatron.routing.ratio_parts import log_ratio_parts, spread
from gspo_megatron.routing.routes import changed_experts
from gspo_megatron.routing.statistics import COLUMNS, MinibatchRouting, routing_metrics


def minibatch(*layers: tuple, load: list | None = None) -> MinibatchRouting:
    """Rows (tokens, compared, changed_tokens, changed_experts, entropy); each layer's load is even by default."""
    assert len(COLUMNS) == 5
    rows = torch.tensor(layers, dtype=torch.float64)
    even = [[2.0] * 4 if row[0] else [0.0] * 4 for row in layers]
    return MinibatchRouting(rows, torch.tensor(load or even, dtype=torch.float64), torch.zeros(1, 1, 2))


def test_load_by_hand():
    """Layer 1 is even (1). Layer 2 has mean 4 and max 8 (2), one expert without a token. Layer 3: max 16 (4), three."""
    load = [[4, 4, 4, 4], [8, 0, 4, 4], [0, 16, 0, 0]]
    metrics = routing_metrics([minibatch(*[(8, 0, 0, 0, 0.0)] * 3, load=load)], topk=2)
    assert metrics["route/load_imbalance"] == pytest.approx(7 / 3)
    assert metrics["route/load_imbalance_max"] == 4.0 and metrics["route/dead_experts"] == 4.0
    assert metrics["route/by_layer/load_imbalance"] == [1.0, 2.0, 4.0]
    assert "route/changed_tokens" not in metrics  # one minibatch: nothing to compare with


def test_change_by_hand():
    """Layer 2 is dense. In the second minibatch 1 + 3 of 10 + 10 tokens and 1 + 4 of their 40 experts change, in the
    third 2 + 4 of 10 + 10 and 2 + 6 of 40: over both 10/40 tokens and 13/80 experts; after one update 5/40. The first
    minibatch does not count, whatever it holds."""
    found = [
        minibatch((10, 10, 9, 9, 5.0), (0, 0, 0, 0, 0), (10, 10, 9, 9, 9.0)),
        minibatch((10, 10, 1, 1, 7.0), (0, 0, 0, 0, 0), (10, 10, 3, 4, 3.0)),
        minibatch((10, 10, 2, 2, 6.0), (0, 0, 0, 0, 0), (10, 10, 4, 6, 3.0)),
    ]
    metrics = routing_metrics(found, topk=2)
    assert metrics["route/changed_tokens"] == 10 / 40 and metrics["route/changed_experts"] == 13 / 80
    assert metrics["route/changed_experts_one_update"] == 5 / 40
    assert metrics["route/by_minibatch/changed_experts"] == [5 / 40, 8 / 40]
    assert metrics["route/by_layer/changed_tokens"] == [3 / 20, None, 7 / 20]
    assert metrics["route/by_layer/changed_experts"] == [3 / 40, None, 10 / 40]
    assert metrics["route/by_layer/entropy"] == pytest.approx([18 / 30, None, 15 / 30])
    assert metrics["route/entropy"] == pytest.approx(33 / 60)


def test_a_dense_model_has_no_routing_metrics():
    assert routing_metrics([], topk=2) == {}
    assert routing_metrics([minibatch((0, 0, 0, 0, 0.0))], topk=2) == {}


def test_the_order_of_experts_is_no_change():
    """{0, 3} is {3, 0}; of {1, 2} against {2, 5} one is new; of {4, 6} against {1, 2} both are."""
    old = {1: torch.tensor([[0, 3], [2, 5], [1, 2]]), 2: torch.tensor([[7, 1], [0, 1], [0, 1]])}
    new = {1: torch.tensor([[3, 0], [1, 2], [4, 6]]), 2: torch.tensor([[1, 7], [0, 1], [2, 3]])}
    assert changed_experts(new, old, [1, 2], torch.arange(3)).tolist() == [[0, 1, 2], [0, 0, 2]]
    assert changed_experts(new, old, [2], torch.tensor([2])).tolist() == [[2]]


def test_spread_by_hand():
    """Two sequences of two tokens each. Log-ratios 1, 3 | 5, 7, of which changed routes add 0, 2 | 0, 2 and weights the
    rest 1, 1 | 5, 5. Over tokens: variance 5, of the routes 1, of the weights 4. Means 2 | 6, 1 | 1 and 1 | 5: variance
    4, 0 and 4. A third sequence has no trained token."""
    old = torch.zeros(4)
    free, fixed = torch.tensor([1.0, 3, 5, 7]), torch.tensor([1.0, 1, 5, 5])
    total, weights, routes = log_ratio_parts(old, free, fixed)
    assert routes.tolist() == [0, 2, 0, 2] and weights.tolist() == [1, 1, 5, 5] and total.tolist() == free.tolist()
    by_sequence = torch.stack([total, weights, routes], dim=1).view(2, 2, 3)
    empty = torch.zeros(1, 3, dtype=torch.float64)
    sums, squares = torch.cat([by_sequence.sum(1), empty]), torch.cat([by_sequence.square().sum(1), empty])
    found = spread(torch.tensor([2.0, 2, 0], dtype=torch.float64), sums, squares)
    assert found == pytest.approx(
        {
            "ratio_parts/token_total": 5.0,
            "ratio_parts/token_weights": 4.0,
            "ratio_parts/token_routes": 1.0,
            "ratio_parts/sequence_total": 4.0,
            "ratio_parts/sequence_weights": 4.0,
            "ratio_parts/sequence_routes": 0.0,
        }
    )
    assert spread(torch.zeros(1), empty, empty) == {} and math.isfinite(found["ratio_parts/token_total"])
