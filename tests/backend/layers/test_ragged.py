"""Sequences grouped by length: who is with whom, how much is filled up, and that nothing gets lost on the way."""

import torch

from gspo_megatron.backend.layers.ragged import SLACK, LengthGroup, Ragged


def of(*lengths: int) -> Ragged:
    return Ragged.of(torch.tensor(lengths))


def test_a_grid_has_each_sequence_in_a_row_of_its_own():
    group, packed = LengthGroup.of([0, 1], [2, 1], torch.device("cpu")), torch.tensor([[1.0], [2.0], [3.0]])
    assert group.grid(packed).squeeze(-1).tolist() == [[1, 2], [3, 0]] and group.lengths.tolist() == [2, 1]
    assert torch.equal(group.flat(group.grid(packed)), packed)


def test_short_sequences_share_a_call_and_long_ones_are_alone():
    """100^2 - 77^2 = 4071 pairs are less than 4096, 100^2 - 76^2 = 4224 are more; 1000^2 - 998^2 = 3996, and
    1000^2 - 997^2 = 5991."""
    assert SLACK == 4096
    groups = of(998, 76, 100, 1000, 77, 997).groups
    assert [group.sequences.tolist() for group in groups] == [[1], [4, 2], [5], [0, 3]]
    assert [group.length for group in groups] == [76, 100, 997, 1000]


def test_equal_lengths_are_one_grid_in_the_packed_order():
    found = of(5, 5, 5)
    assert found.order is None and len(found.groups) == 1 and found.groups[0].places is None


def test_what_is_cut_is_joined_again():
    """Lengths 90, 3, 91, 3, 200 in three groups; each token and its gradient come back to their own place."""
    found = of(90, 3, 91, 3, 200)
    packed = torch.arange(387.0, requires_grad=True)
    assert len(found.groups) == 3
    doubled = found.by_group(lambda grid: 2 * grid, packed)
    assert torch.equal(doubled, 2 * packed)
    doubled.backward(packed.detach())
    assert torch.equal(packed.grad, 2 * packed.detach())
    assert found.by_sequence([group.lengths for group in found.groups]).tolist() == [90, 3, 91, 3, 200]


def test_a_row_sees_its_own_sequence():
    """The first token of each sequence, by a function of the grid."""
    found = of(90, 3, 91, 3, 200)
    starts = torch.tensor([0, 90, 93, 184, 187])
    first = found.by_group(lambda grid: grid[:, :1].expand_as(grid), torch.arange(387))
    assert torch.equal(first, starts.repeat_interleave(torch.tensor([90, 3, 91, 3, 200])))


def test_what_is_filled_up_of_ragged_lengths_is_below_two_percent():
    """Log-normal lengths of 200 tokens in the middle, 50 to 840: query-key pairs with and without what is filled up."""
    generator = torch.Generator().manual_seed(1)
    lengths = (200 * torch.exp(0.58 * torch.randn(64, generator=generator))).long()
    assert int(lengths.max()) > 10 * int(lengths.min())
    pairs = sum(group.length**2 * group.sequences.numel() for group in Ragged.of(lengths).groups)
    assert pairs / int(lengths.square().sum()) < 1.02
