"""Every example once an epoch, another order in each, the same numbers in every layout."""

from gspo_megatron.data.epochs import epoch_batch, share_of


def test_epochs_are_permutations_end_to_end():
    """Batches of 4 over 6 examples: three steps are two epochs, the second step spans both."""
    flat = [number for step in (1, 2, 3) for number in epoch_batch(7, step, 4, 6)]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6))
    assert flat[:6] != flat[6:] and flat[:6] != list(range(6))
    assert epoch_batch(7, 2, 4, 6) == flat[4:8] and epoch_batch(8, 2, 4, 6) != flat[4:8]


def test_replicas_share_a_batch_in_order():
    items = epoch_batch(1, 1, 6, 10)
    assert share_of(items, 0, 3) + share_of(items, 1, 3) + share_of(items, 2, 3) == items
    assert share_of(items, 0, 1) == items
