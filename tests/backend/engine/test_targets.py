"""Rows of an output become vectors by target token."""

from types import SimpleNamespace

import torch

from gspo_megatron.backend.engine.targets import Targets
from gspo_megatron.batch import PackedBatch


def batch() -> PackedBatch:
    """Sequences of 3, 1 and 2 tokens."""
    return PackedBatch(
        tokens=torch.arange(6),
        position_ids=torch.tensor([0, 1, 2, 0, 0, 1]),
        cu_seqlens=torch.tensor([0, 3, 4, 6], dtype=torch.int32),
        num_sequences=3,
        loss_mask=torch.zeros(6),
        advantages=torch.zeros(3),
    )


def plan(rows: list[int] | None) -> SimpleNamespace:
    """A PackedPlan as Targets sees it."""
    return SimpleNamespace(rows=None if rows is None else torch.tensor(rows))


def test_a_row_speaks_about_the_next_token_of_its_sequence():
    """The rows of the last tokens (2, 3 and 5) go nowhere, even where they hold no number."""
    rows = torch.tensor([10.0, 11, torch.nan, torch.nan, 14, torch.nan], requires_grad=True)
    targets = Targets.of(batch(), plan(None))
    found = targets.scatter(rows)
    assert found.tolist() == [0, 10, 11, 0, 0, 14]
    assert targets.own is None
    found.sum().backward()
    assert rows.grad.tolist() == [1, 1, 0, 0, 1, 0]


def test_context_parallel_ranks_together_have_every_target_once():
    rows = torch.tensor([10.0, 11, 12, 13, 14, 15])
    halves = [Targets.of(batch(), plan(part)) for part in ([0, 5, 3], [1, 2, 4])]
    found = [half.scatter(rows[part]) for half, part in zip(halves, ([0, 5, 3], [1, 2, 4]), strict=True)]
    assert found[0].tolist() == [0, 10, 0, 0, 0, 0]
    assert found[1].tolist() == [0, 0, 11, 0, 0, 14]
    assert [half.own.tolist() for half in halves] == [[bool(x) for x in part.tolist()] for part in found]
