"""Group-limited routing whose groups are ranked by their best experts."""

from types import SimpleNamespace

import pytest
import torch

from gspo_megatron.backend.engine.router_hooks import RouterTap
from gspo_megatron.backend.layers.expert_groups import RankedGroups

# Groups of two: (0, 1), (2, 3), (4, 5).
SCORES = torch.tensor([[0.9, 0.0, 0.5, 0.45, 0.3, 0.2], [0.1, 0.2, 0.5, 0.6, 0.7, 0.0]])


def by_hand(best: int) -> list[set[int]]:
    """One group of three is kept, and both of its experts are taken.

    Best expert: row 0 has 0.9, 0.5, 0.3 and keeps group 0; row 1 has 0.2, 0.6, 0.7 and keeps group 2.
    Sum of two: row 0 has 0.9, 0.95, 0.5 and keeps group 1; row 1 has 0.3, 1.1, 0.7 and keeps group 1.
    """
    return {1: [{0, 1}, {4, 5}], 2: [{2, 3}, {2, 3}]}[best]


@pytest.mark.parametrize("best", [1, 2])
def test_groups_are_ranked_by_their_best_experts(best):
    values, indices = RankedGroups(best).get_replay_topk(SCORES, 2, 3, 1)
    assert [set(row) for row in indices.tolist()] == by_hand(best)
    assert torch.equal(values, SCORES.gather(1, indices)) and torch.all(values[:, 0] >= values[:, 1])


def test_two_groups_of_three():
    """Best expert, two groups kept, three experts: row 0 keeps groups 0 and 1 and takes 0, 2, 3; row 1 keeps groups 1
    and 2 and takes 4, 3, 2, not expert 5 of its best group."""
    _, indices = RankedGroups(1).choose(SCORES, 3, 3, 2)
    assert indices.tolist() == [[0, 2, 3], [4, 3, 2]]


def test_a_tap_asks_the_router_s_own_rule():
    """And Megatron's where the router has none."""

    def default(scores, topk, num_groups, group_topk):
        return scores.topk(topk, dim=1)

    own = RouterTap(SimpleNamespace(layer_number=1, router_replay=RankedGroups(1)))
    plain = RouterTap(SimpleNamespace(layer_number=1, router_replay=None))
    chosen = [set(row) for row in own.get_replay_topk(SCORES, 2, 3, 1, default)[1].tolist()]
    assert chosen == by_hand(1)
    assert plain.get_replay_topk(SCORES, 2, 3, 1, default)[1].tolist() == [[0, 2], [4, 3]]
