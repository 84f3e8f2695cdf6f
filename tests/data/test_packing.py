"""Packing: every number of a small batch by value, then what holds for any batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.batch import TrainSequence
from gspo_megatron.data.packing import microbatches_needed, pack
from gspo_megatron.errors import RolloutError


def sequence(length: int, prompt: int = 1, start: int = 100, **fields) -> TrainSequence:
    return TrainSequence(token_ids=list(range(start, start + length)), prompt_length=prompt, **fields)


def sequences(*lengths: int) -> list[TrainSequence]:
    return [sequence(length, start=1000 * i, group_id=i) for i, length in enumerate(lengths, start=1)]


def test_one_microbatch_by_value():
    first = sequence(3, 2, 10, advantage=0.5, reward=1.0, group_id=7, rollout_logprobs=[-0.1])
    second = sequence(4, 1, 20, advantage=-2.0, group_id=8, truncated=True, rollout_logprobs=[-0.2, -0.3, -0.4])
    (batch,) = pack([first, second], max_tokens=7, pad_to_multiple=4)
    assert batch.tokens.tolist() == [10, 11, 12, 20, 21, 22, 23, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 8] and batch.num_sequences == 2
    assert batch.loss_mask.tolist() == [0, 0, 1, 0, 1, 1, 1, 0]
    assert batch.advantages.tolist() == [0.5, -2.0] and batch.rewards.tolist() == [1.0, 0.0]
    assert batch.group_id.tolist() == [7, 8] and batch.truncated.tolist() == [False, True]
    torch.testing.assert_close(batch.rollout_logprobs, torch.tensor([0, 0, -0.1, 0, -0.2, -0.3, -0.4, 0]))
    assert batch.old_logprobs is None and batch.source_index == [0, 1]
    types = [batch.tokens, batch.position_ids, batch.cu_seqlens, batch.loss_mask, batch.advantages, batch.group_id]
    assert [t.dtype for t in types] == [
        torch.int64,
        torch.int64,
        torch.int32,
        torch.float32,
        torch.float32,
        torch.int64,
    ]
    assert batch.to(torch.device("cpu")).source_index == [0, 1]


def test_padding_positions_restart_and_no_segment_is_added_without_need():
    (batch,) = pack(sequences(5), max_tokens=8, pad_to_multiple=8)
    assert batch.cu_seqlens.tolist() == [0, 5, 8] and batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    (batch,) = pack(sequences(8), max_tokens=8, pad_to_multiple=8)
    assert batch.cu_seqlens.tolist() == [0, 8]


def test_each_sequence_is_filled_up_to_its_multiple():
    """Two context-parallel ranks and two tensor ranks: sequences of 4 and 8 tokens, T / 2 even, and the padding segment
    a multiple of 4 as well."""
    first = sequence(3, 2, 10, rollout_logprobs=[-0.1])
    second = sequence(5, 1, 20, rollout_logprobs=[-0.2, -0.3, -0.4, -0.5], loss_mask=[1, 0, 0, 1])
    (batch,) = pack([first, second], max_tokens=12, pad_to_multiple=8, sequence_multiple=4)
    assert batch.tokens.tolist() == [10, 11, 12, 0, 20, 21, 22, 23, 24, 0, 0, 0, 0, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, *range(8), *range(4)]
    assert batch.cu_seqlens.tolist() == [0, 4, 12, 16] and batch.num_sequences == 2
    assert batch.loss_mask.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    rollout = [0, 0, -0.1, 0, 0, -0.2, -0.3, -0.4, -0.5, 0, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(batch.rollout_logprobs, torch.tensor(rollout))
    assert batch.loss_mask.dtype == torch.float32


def test_one_length_for_all_is_a_padded_batch():
    (batch,) = pack(sequences(3, 5, 1), max_tokens=15, pad_to_multiple=1, sequence_multiple=5)
    assert batch.tokens.view(3, 5)[:, 0].tolist() == [1000, 2000, 3000]
    assert batch.position_ids.view(3, 5).tolist() == [[0, 1, 2, 3, 4]] * 3 and batch.num_sequences == 3


def test_max_tokens_counts_the_padding_of_sequences():
    assert microbatches_needed(sequences(5, 5), 10) == 1
    assert microbatches_needed(sequences(5, 5), 10, sequence_multiple=4) == 2
    assert [b.num_tokens for b in pack(sequences(5, 5), 10, 1, sequence_multiple=4)] == [8, 8]


def test_an_empty_response_is_kept_with_no_trained_token():
    empty, full = sequence(3, 3, rollout_logprobs=[]), sequence(3, 2, rollout_logprobs=[-1.0])
    (batch,) = pack([empty, full], max_tokens=6, pad_to_multiple=1)
    assert batch.num_sequences == 2 and batch.loss_mask.tolist() == [0, 0, 0, 0, 0, 1]
    assert batch.rollout_logprobs.tolist() == [0, 0, 0, 0, 0, -1]


def test_microbatches_are_balanced_and_keep_order():
    batches = pack(sequences(9, 2, 8, 3, 2), max_tokens=16, pad_to_multiple=1)
    assert [batch.source_index for batch in batches] == [[0, 1, 4], [2, 3]]  # 13 and 11 tokens
    assert [batch.tokens[0].item() for batch in batches] == [1000, 3000]


def test_a_given_number_of_microbatches_is_made_even_where_fewer_would_do():
    batches = pack(sequences(4, 4, 4, 4), max_tokens=100, pad_to_multiple=1, num_microbatches=3)
    assert sorted(batch.num_sequences for batch in batches) == [1, 1, 2]
    assert microbatches_needed(sequences(4, 4, 4, 4), 100) == 1


def test_neighbours_of_a_unit_stay_together_in_their_order():
    """Pairs of 9 + 2, 3 + 8 and 2 + 2 tokens: the longest two (11 each) go apart, the third joins the first. By
    single sequences the balance would be 9 + 3 and 8 + 2 + 2 + 2, which splits every pair."""
    batches = pack(sequences(9, 2, 3, 8, 2, 2), max_tokens=16, pad_to_multiple=4, unit=2)
    assert [batch.source_index for batch in batches] == [[0, 1, 4, 5], [2, 3]]
    assert batches[0].cu_seqlens.tolist() == [0, 9, 11, 13, 15, 16] and batches[1].cu_seqlens.tolist() == [0, 3, 11, 12]
    assert microbatches_needed(sequences(9, 2, 3, 8, 2, 2), 16, unit=2) == 2


@settings(deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12), more=st.integers(0, 3)
)
def test_any_pairs_are_packed_whole(lengths, more):
    flat = sequences(*[length for pair in lengths for length in pair])
    count = min(microbatches_needed(flat, 18, unit=2) + more, len(lengths))
    batches = pack(flat, 18, 1, count, unit=2)
    assert len(batches) == count and all(batch.num_tokens <= 18 for batch in batches)
    for batch in batches:
        assert [i for i in batch.source_index if i % 2 == 0] == [i - 1 for i in batch.source_index if i % 2]
        assert batch.source_index == sorted(batch.source_index)
    assert sorted(i for batch in batches for i in batch.source_index) == list(range(len(flat)))


def test_a_pair_too_long_for_a_microbatch_is_refused():
    """Each of 6 tokens fits in 10, the two together do not; they would have been packed over the limit."""
    for work in (microbatches_needed, lambda s, limit, unit: pack(s, limit, 1, unit=unit)):
        with pytest.raises(RolloutError, match="= 10: sequences 2 to 3 have 12 tokens .* Give .* at least 12"):
            work(sequences(1, 1, 6, 6), 10, unit=2)
    with pytest.raises(ValueError, match="3 sequences are no multiple of unit = 2"):
        pack(sequences(1, 1, 1), 10, 1, unit=2)


def test_first_fit_saves_a_microbatch_that_balancing_would_need():
    # Longest first into the emptier bin: 6+4+4 and 6+4. First fit: 6+6 and 4+4+4.
    hard = sequences(6, 6, 4, 4, 4)
    assert microbatches_needed(hard, 12) == 2
    assert sorted(batch.num_tokens for batch in pack(hard, 12, 1)) == [12, 12]
    assert sorted(batch.num_tokens for batch in pack(hard, 12, 1, num_microbatches=2)) == [12, 12]


def test_balancing_saves_a_microbatch_that_first_fit_would_need():
    # First fit: 8, 4+3, 3+2+2, 2. Balanced: 8, 4+2+2, 3+3+2.
    lengths = sequences(3, 3, 8, 4, 2, 2, 2)
    assert microbatches_needed(lengths, 8) == 3
    assert [batch.num_tokens for batch in pack(lengths, 8, 1)] == [8, 8, 8]


def test_one_microbatch_more_works_where_its_balance_would_overflow():
    # Graham's worst case for longest-first on 8 bins: 31 tokens in one, while 7 bins of 30 hold everything.
    worst = sequences(*[length for length in range(15, 8, -1) for _ in range(2)], 8, 8, 8)
    assert microbatches_needed(worst, 30) == 7
    batches = pack(worst, 30, 1, num_microbatches=8)
    assert len(batches) == 8 and max(batch.num_tokens for batch in batches) <= 30


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (dict(sequences=sequences(3, 9), max_tokens=8), r"max_tokens_per_microbatch = 8: sequence 1 has 9 tokens"),
        (dict(sequences=sequences(8, 8, 8), max_tokens=8, num_microbatches=2), "= 2: 24 tokens do not fit"),
        (dict(sequences=sequences(2, 2), max_tokens=8, num_microbatches=3), "num_microbatches = 3 must lie"),
        (dict(sequences=sequences(2, 2), max_tokens=8, num_microbatches=0), "num_microbatches = 0 must lie"),
        (dict(sequences=[], max_tokens=8), "no sequence to pack"),
        (dict(sequences=[sequence(0, 0)], max_tokens=8), "sequence 0: prompt_length = 0 must lie between 1 and its 0"),
        (dict(sequences=[sequence(2, 0)], max_tokens=8), "sequence 0: prompt_length = 0"),
        (dict(sequences=[sequence(2, 3)], max_tokens=8), "sequence 0: prompt_length = 3"),
        (dict(sequences=[sequence(3, 1, rollout_logprobs=[0.0])], max_tokens=8), "1 rollout_logprobs for 2 response"),
        (dict(sequences=[sequence(2), sequence(2, rollout_logprobs=[0.0])], max_tokens=8), "1: rollout_logprobs"),
        (
            dict(sequences=[sequence(9)], max_tokens=9, sequence_multiple=4),
            "9 tokens .12 with padding to a multiple of 4",
        ),
        (dict(sequences=[sequence(4, 1, loss_mask=[1, 1])], max_tokens=8), "2 numbers in loss_mask for 3 response"),
        (
            dict(sequences=sequences(2) + [sequence(4, 1, loss_mask=[1, 0.5, 2])], max_tokens=8),
            r"sequence 1: loss_mask\[1\] = 0.5 must be 0 or 1",
        ),
    ],
)
def test_what_cannot_be_packed_is_told(arguments, told):
    with pytest.raises(RolloutError, match=told):
        pack(**arguments, pad_to_multiple=1)


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(
    lengths=LENGTHS,
    max_tokens=st.integers(32, 90),
    multiple=st.sampled_from([1, 2, 8]),
    more=st.integers(0, 40),
    fill=st.sampled_from([1, 1, 4]),
)
def test_any_batch(lengths, max_tokens, multiple, more, fill):
    """`fill`: each sequence is filled up to a multiple of so many tokens."""
    given_sequences = sequences(*lengths)
    needed = microbatches_needed(given_sequences, max_tokens, sequence_multiple=fill)
    count = min(needed + more, len(lengths))
    batches = pack(given_sequences, max_tokens, multiple * fill, num_microbatches=count, sequence_multiple=fill)
    assert len(batches) == count
    assert sorted(i for batch in batches for i in batch.source_index) == list(range(len(lengths)))
    for batch in batches:
        ends = batch.cu_seqlens.tolist()
        assert 0 < ends[batch.num_sequences] <= max_tokens
        assert batch.num_tokens % (multiple * fill) == 0 and ends[-1] == batch.num_tokens
        assert all(end % fill == 0 for end in ends)
        assert len(ends) - 1 - batch.num_sequences == (batch.num_tokens != ends[batch.num_sequences])
        for k, i in enumerate(batch.source_index):
            tokens = batch.tokens[ends[k] : ends[k + 1]].tolist()
            assert tokens[: lengths[i]] == given_sequences[i].token_ids and not any(tokens[lengths[i] :])
            assert len(tokens) - lengths[i] < fill
            assert batch.group_id[k] == given_sequences[i].group_id
        assert batch.source_index == sorted(batch.source_index)
    totals = [batch.cu_seqlens[batch.num_sequences].item() for batch in batches]
    assert sum(batch.loss_mask.sum().item() for batch in batches) == sum(lengths) - len(lengths)
    assert needed >= -(-sum(lengths) // max_tokens) and max(totals) <= max_tokens
