"""The cover is one, the matrix has what it promises, and the fixture is as awkward as it says."""

from itertools import combinations, product

import torch

from gspo_megatron.data.validate import check_batch
from tools.validation.parity import cases, fixture
from tools.validation.parity.cases import BY_NAME, LAYOUTS, Case


def test_every_legal_pair_of_values_occurs():
    factors = {"layout": ("a", "b", "c"), "n": (1, 2), "padded": (False, True), "recompute": (False, True)}

    def legal(choice: dict) -> bool:
        return not (choice["layout"] == "b" and choice["n"] == 2)

    chosen = cases.pairwise(factors, legal)
    for (a, first), (b, second) in combinations(factors.items(), 2):
        for x, y in product(first, second):
            wanted = not (a == "layout" and x == "b" and b == "n" and y == 2)
            assert any(c[a] == x and c[b] == y for c in chosen) == wanted, (a, x, b, y)
    assert len(chosen) < 10 and chosen == cases.pairwise(factors, legal)  # of 20 legal choices, and the same every time


def test_matrix_has_every_layout_in_every_number_of_microbatches():
    matrix = cases.matrix()
    assert len({case.name for case in matrix}) == len(matrix)
    fp32 = [c for c in matrix if c.dtype == "fp32" and c.algorithm.startswith("gspo")]
    for layout in LAYOUTS:
        mine = [c for c in fp32 if c.layout is layout]
        assert {c.microbatches for c in mine} >= set(cases.microbatches(layout)), layout.name
        for choice in ("padded", "recompute", "chunked"):
            assert {getattr(c, choice) for c in mine} == {False, True}, (layout.name, choice)
        assert {c.algorithm for c in mine} == {"gspo", "gspo_token"}
    assert len({c.layout for c in matrix if c.dtype == "fp64"}) >= 8
    for algorithm in ("ppo", "dpo", "grpo", "dr_grpo", "dapo"):
        assert len({c.layout for c in matrix if c.algorithm == algorithm}) >= 6
    assert {c.layout for c in cases.small()} == set(LAYOUTS)


def test_layouts_use_all_their_ranks():
    for layout in LAYOUTS:
        assert layout.data * layout.tensor * layout.context * layout.pipeline == layout.ranks
        assert Case(layout).layout is BY_NAME[layout.name]


def test_rollouts_are_awkward():
    items = fixture.rollouts()
    lengths = [s.response_length for s in items.sequences]
    trained = [sum(s.loss_mask) for s in items.sequences]
    assert min(lengths) == 0 and max(lengths) == 60 and 1 in lengths
    assert [length for length, n in zip(lengths, trained, strict=True) if length and not n] == [fixture.MASKED]
    gaps = ["".join(map(str, s.loss_mask)).strip("0") for s in items.sequences]
    assert sum("0" in gap for gap in gaps) >= 5  # turns of others between trained tokens
    assert any(s.loss_mask[:1] == [0] and sum(s.loss_mask) for s in items.sequences)  # and before the first
    assert any(s.loss_mask[-1:] == [0] and sum(s.loss_mask) for s in items.sequences)  # and behind the last
    assert len({len(group) for group in fixture.GROUPS}) >= 4
    equal = [s for s in items.sequences if s.group_id == fixture.EQUAL_REWARDS]
    assert len(equal) > 1 and all(s.advantage == 0 for s in equal)
    assert max(len(s.token_ids) for s in items.sequences) <= fixture.PADDED_LENGTH
    pairs = fixture.rollouts(pairs=True)
    assert all(sum(s.loss_mask) for s in pairs.sequences) and len(pairs.sequences) == 2 * len(fixture.PAIRS)


class OneOf:
    """What `packed` asks of a topology: a replica of `dp_size`, TP2 x CP2."""

    def __init__(self, dp_rank: int, dp_size: int):
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.sequence_multiple = self.microbatch_multiple = 4


def test_replicas_share_out_every_sequence_in_unequal_microbatches():
    items, seen, sizes = fixture.rollouts(), [], set()
    for rank in range(4):
        for batch, numbers in fixture.packed(items, "token", OneOf(rank, 4), 5, padded=False):
            check_batch(batch)
            seen += numbers
            sizes.add(batch.num_tokens)
            for start, i in zip(batch.cu_seqlens.tolist(), numbers, strict=False):
                tokens = torch.tensor(items.sequences[i].token_ids)
                assert torch.equal(batch.tokens[start : start + tokens.numel()], tokens)
                advantages = batch.advantages[start : start + tokens.numel()]
                assert torch.equal(advantages, items.token_advantages[i])
    assert sorted(seen) == list(range(len(items.sequences))) and len(sizes) > 8
    (batch, _), *_ = fixture.packed(items, "group", OneOf(0, 1), 2, padded=True)
    assert set(torch.diff(batch.cu_seqlens).tolist()) == {fixture.PADDED_LENGTH}
    assert [len(part) for part in fixture.split(24, 5)] == [2, 3, 5, 6, 8]
    assert [len(part) for part in fixture.split(6, 5)] == [1, 1, 1, 1, 2]
