"""Slices of full parameters, and initial weights that do not depend on the layout."""

import torch

from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.parameters import FullParameter
from gspo_megatron.config import Layout
from tests.backend.small import SINGLE, TP2_PP2_EP2, in_layouts, small_policy
from tools.validation.ranks import spawn


def test_gated_slice_takes_gate_and_up_of_each_rank():
    """fc1 of [gate 0..3; up 4..7] over two ranks: rank 0 holds rows 0, 1, 4, 5 and rank 1 rows 2, 3, 6, 7."""
    full = torch.arange(8.0).unsqueeze(1).expand(8, 3)
    local = torch.nn.Parameter(torch.empty(4, 3))
    pieces = [FullParameter("w", local, 0, 2, rank, (1, 1)).slice_of(full) for rank in range(2)]
    assert pieces[0][:, 0].tolist() == [0, 1, 4, 5]
    assert pieces[1][:, 0].tolist() == [2, 3, 6, 7]
    assert torch.equal(FullParameter("w", local, 0, 2, 0, (1, 1)).join(pieces), full)
    assert FullParameter("w", local, 0, 2, 0, (1, 1)).full_shape == (8, 3)


def test_row_parallel_slice_cuts_columns():
    full = torch.arange(12.0).view(2, 6)
    local = torch.nn.Parameter(torch.empty(2, 3))
    pieces = [FullParameter("w", local, 1, 2, rank, (1,)).slice_of(full) for rank in range(2)]
    assert pieces[1].tolist() == [[3, 4, 5], [9, 10, 11]]
    assert torch.equal(FullParameter("w", local, 1, 2, 0, (1,)).join(pieces), full)


def full_weights(layout: Layout) -> dict:
    policy = small_policy(layout)
    return parameters.gather_full(policy.models, policy.topology)


def test_initial_weights_are_the_same_in_every_layout():
    layouts = {"TP2xPP2-EP2": TP2_PP2_EP2, "PP2xVP2-EP2": Layout(1, 2, 2, 2, 1)}
    one = spawn(in_layouts, 1, {"x": SINGLE}, full_weights)[0]["x"]
    for other in spawn(in_layouts, 4, layouts, full_weights)[0].values():
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    # Another name is another draw: no two matrices share their numbers.
    matrices = [value.flatten()[:8] for value in one.values() if value.dim() == 2]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices)
