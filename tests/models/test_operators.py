"""Operators by value: what is merged, that splitting is its inverse, and that both commute with tensor cuts."""

import pytest
import torch

from gspo_megatron.models.operators import (
    Interleave,
    MergeConvolution,
    MergeDeltaNet,
    MergeGatedQkv,
    MergeGateUp,
    MergeQkv,
    Rename,
)

QKV = MergeQkv(queries=4, dim=2)  # two query heads of size 2 share a key and a value head

GATED_QKV = MergeGatedQkv(queries=4, dim=2)
DELTA_NET = MergeDeltaNet(qkvz=(1, 1, 2, 2), ba=(2, 2))  # two value heads of size 1 to a key head of size 1
CONVOLUTION = MergeConvolution(rows=(2, 2, 4))


def test_qkv_is_by_group():
    """Two groups. q rows 0..7, k rows 10..13, v rows 20..23: group 0 gets q 0..3, k 10, 11, v 20, 21."""
    q, k, v = (torch.arange(first, last).float().unsqueeze(1) for first, last in ((0, 8), (10, 14), (20, 24)))
    merged = QKV.merge([q, k, v])
    assert merged[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    assert QKV.merge([q[:, 0], k[:, 0], v[:, 0]]).tolist() == merged[:, 0].tolist()  # a bias has no columns


def test_gates_of_queries_stand_behind_the_group_s_queries():
    """One group. Head 0 has query 0, 1 and gate 2, 3; head 1 has query 4, 5 and gate 6, 7; key 8, 9, value 10, 11."""
    q, k, v = (torch.arange(first, last).float() for first, last in ((0, 8), (8, 10), (10, 12)))
    assert GATED_QKV.merge([q, k, v]).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]


def test_linear_attention_is_by_kind_and_not_by_key_head():
    """Two key heads. The first has query 0, key 1, values 2, 3, z 4, 5, the second 6 to 11; beta and alpha 12, 13 | 14,
    15 and 16, 17 | 18, 19."""
    merged = DELTA_NET.merge([torch.arange(12.0), torch.arange(12.0, 20)])
    assert merged.tolist() == [0, 6, 1, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 16, 17, 14, 15, 18, 19]
    blocks = list(merged.split([2, 2, 4, 4, 4, 4]))  # as a checkpoint has them
    assert [piece.tolist() for piece in DELTA_NET.from_blocks(blocks)] == [list(range(12)), list(range(12, 20))]


def test_gate_stands_before_up():
    assert MergeGateUp().merge([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]).tolist() == [1, 2, 3, 4]


def test_interleaved_rows_are_told_apart():
    """Gate 1, 2 and up 3, 4 stand as 1, 3, 2, 4."""
    assert Interleave().merge([torch.tensor([1.0, 3.0, 2.0, 4.0])]).tolist() == [1, 2, 3, 4]


CASES = {
    "rename": (Rename(), [(6, 3)]),
    "gate up": (MergeGateUp(), [(4, 3), (4, 3)]),
    "interleaved": (Interleave(), [(8, 3)]),
    "interleaved bias": (Interleave(), [(8,)]),
    "qkv": (QKV, [(8, 3), (4, 3), (4, 3)]),
    "qkv bias": (QKV, [(8,), (4,), (4,)]),
    "gated qkv": (GATED_QKV, [(16, 3), (4, 3), (4, 3)]),
    "linear attention": (DELTA_NET, [(12, 3), (8, 3)]),
    "convolution": (CONVOLUTION, [(2, 1, 3), (2, 1, 3), (4, 1, 3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_split_is_the_inverse_and_shapes_are_right(name):
    operator, shapes = CASES[name]
    pieces = [torch.randn(shape) for shape in shapes]
    merged = operator.merge(pieces)
    assert operator.shapes(tuple(merged.shape)) == shapes
    assert all(torch.equal(a, b) for a, b in zip(operator.split(merged), pieces, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_rank_s_slices_merge_to_its_slice(name):
    """Two tensor ranks: what each merges of its own slices splits into those slices, so no rank needs another's."""
    operator, shapes = CASES[name]
    pieces = [torch.randn(shape) for shape in shapes]
    slices = [[piece.chunk(2)[rank] for piece in pieces] for rank in range(2)]
    back = [operator.split(operator.merge(own)) for own in slices]
    for index, piece in enumerate(pieces):
        assert torch.equal(torch.cat([back[0][index], back[1][index]]), piece)
