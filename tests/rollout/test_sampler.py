"""Requests that no engine could answer are refused where they are made."""

import pytest

from gspo_megatron.rollout.sampler import SampleRequest


@pytest.mark.parametrize(
    ("tokens", "seeds", "limit", "message"),
    [
        ([], (1,), 3, "token_ids is empty"),
        ([1], (), 3, "seeds is empty"),
        ([1], (5, -1), 3, "seeds has -1: give numbers from 0"),
        ([1], (2**63,), 3, "seeds has 9223372036854775808"),
        ([1], (1,), 0, "max_tokens = 0: give 1 or more"),
    ],
)
def test_what_no_engine_could_answer_is_refused(tokens, seeds, limit, message):
    with pytest.raises(ValueError, match=message):
        SampleRequest(tokens, seeds, limit)


def test_seeds_reach_to_the_ends_of_their_range():
    assert SampleRequest([0], (0, 2**63 - 1), 1).seeds == (0, 2**63 - 1)
