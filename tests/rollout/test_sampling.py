"""Sampling by inverting the cumulative distribution, on distributions small enough to invert by hand."""

import math

import pytest
import torch

from gspo_megatron.errors import TrainingError
from gspo_megatron.rollout.random_numbers import uniforms
from gspo_megatron.rollout.sampling import SamplingParams, sample

LAST = 1 - 2.0**-53  # the largest uniform there is
FOUR = [0.2, 0.4, 0.1, 0.3]  # from the likeliest: tokens 1, 3, 0, 2
INF = math.inf


def params(**changes) -> SamplingParams:
    return SamplingParams(stop_token_ids=(), **changes)


def logits_of(probabilities: list[float]) -> list[float]:
    return [math.log(p) if p else -INF for p in probabilities]


def draw(logits: list[float], points: list[float], **changes) -> list[int]:
    """The token drawn at each uniform."""
    rows = torch.tensor([logits] * len(points), dtype=torch.float32)
    return sample(rows, torch.tensor(points, dtype=torch.float64), params(**changes))[0].tolist()


def grid(count: int) -> torch.Tensor:
    """The middles of `count` equal parts of [0, 1): a token of probability p is drawn count * p times, within 1."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_inversion_by_hand():
    """(0.2, 0.4, 0.1, 0.3) has the cumulative (0.2, 0.6, 0.7, 1): each token on both ends of its part."""
    points = [0.0, 0.1999, 0.2001, 0.5999, 0.6001, 0.6999, 0.7001, LAST]
    assert draw(logits_of(FOUR), points) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_parts_are_closed_below_and_open_above():
    """Two tokens of one half each: 0.5 belongs to the second, and the double before it to the first."""
    assert draw([3.0, 3.0], [0.0, 0.5 - 2.0**-54, 0.5, LAST]) == [0, 0, 1, 1]


@pytest.mark.parametrize("absent", [-INF, -1e4])  # masked, or too small for the exponential
def test_tokens_of_probability_zero_are_never_drawn(absent):
    """First, in the middle and last: 0 steps over the first, and 1 - 2^-53 does not fall past the last."""
    points = [0.0, 0.4999, 0.5001, LAST]
    assert draw([absent, 0.0, absent, absent, 0.0, absent], points) == [1, 1, 4, 4]
    everything = draw([absent, 0.0, absent, absent, 1.0, absent], grid(999).tolist())
    assert set(everything) == {1, 4}


def test_boundary_uniforms_stay_inside_for_many_sums():
    """1 - 2^-53 times a sum that is not exactly 1 must stay below it: the last token has probability 0 here."""
    logits = 4 * torch.randn(500, 97, generator=torch.Generator().manual_seed(2))
    logits[:, 0] = logits[:, -1] = -INF
    rows = torch.arange(500)
    for point in (0.0, LAST):
        tokens, logprobs = sample(logits, torch.full((500,), point, dtype=torch.float64), params())
        assert torch.isfinite(logits[rows, tokens]).all() and torch.isfinite(logprobs).all()


def test_a_tail_of_small_probabilities_is_drawn():
    """One token, then 1000 of 1e-9 each: 1 - 5e-7 falls into the middle of the tail, 1 - 2^-53 on its last token.

    Sums in fp32 would lose them all: next to 1 it has steps of 6e-8. The fp32 log-probs move the middle by 60 tokens.
    """
    middle, last = draw([0.0] + [math.log(1e-9)] * 1000, [1 - 5e-7, LAST])
    assert 400 < middle < 600 and last == 1000


def test_top_k_by_hand():
    """k = 2 keeps tokens 1 and 3 at 4/7 and 3/7: the border is at 0.5714, in the order of the vocabulary."""
    points = [0.0, 0.571, 0.572, LAST]
    assert draw(logits_of(FOUR), points, top_k=2) == [1, 1, 3, 3]
    assert set(draw(logits_of(FOUR), grid(50).tolist(), top_k=1)) == {1}
    for everything in (0, 4, 9):  # 0 and more than there are: all
        assert draw(logits_of(FOUR), [0.1999, 0.2001, 0.6001, LAST], top_k=everything) == [0, 1, 2, 3]


def test_top_k_keeps_k_tokens_where_probabilities_tie():
    assert set(draw([0.0] * 5, grid(100).tolist(), top_k=3)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [  # summed from the likeliest: 0.4, 0.7, 0.9, 1
        (1e-9, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {0, 1, 3}),
        (0.89, {0, 1, 3}),
        (0.91, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_is_the_smallest_set_that_reaches_p(top_p, kept):
    points = [0.0, *grid(200).tolist(), LAST]
    assert set(draw(logits_of(FOUR), points, top_p=top_p)) == kept


def test_top_p_draws_in_proportion():
    """p = 0.71 keeps (0.2, 0.4, -, 0.3) of 0.9: borders 2/9 and 6/9."""
    points = [0.2222, 0.2223, 0.6666, 0.6667]
    assert draw(logits_of(FOUR), points, top_p=0.71) == [0, 1, 1, 3]


def test_top_k_and_top_p_keep_what_both_keep():
    """p is counted over the whole distribution: k = 2 with p = 0.9 keeps 1 and 3; k = 3 with p = 0.5 as well."""
    for top_k, top_p in ((2, 0.9), (3, 0.5)):
        assert set(draw(logits_of(FOUR), grid(100).tolist(), top_k=top_k, top_p=top_p)) == {1, 3}


def test_temperature_by_hand():
    """Logits (0, ln 9) at temperature 2 are (0, ln 3): p = (1/4, 3/4), where temperature 1 has (1/10, 9/10)."""
    logits = torch.tensor([[0.0, math.log(9)]] * 2)
    tokens, logprobs = sample(logits, torch.tensor([0.2499, 0.2501], dtype=torch.float64), params(temperature=2.0))
    assert tokens.tolist() == [0, 1]
    torch.testing.assert_close(logprobs, torch.tensor([0.25, 0.75]).log(), rtol=0, atol=1e-6)


def test_greedy_takes_the_first_likeliest_and_ignores_the_rest():
    changes = {"greedy": True, "temperature": 2.0, "top_k": 1, "top_p": 0.1}
    assert draw(logits_of(FOUR), [0.0, 0.5, LAST], **changes) == [1, 1, 1]
    assert draw([1.0, 5.0, 5.0], [LAST], **changes) == [1]
    tokens, logprobs = sample(torch.tensor([[0.0, math.log(9)]]), torch.zeros(1), params(**changes))
    assert logprobs.item() == pytest.approx(math.log(0.75), abs=1e-6)


@pytest.mark.parametrize("changes", [{}, {"top_k": 1}, {"top_p": 0.1}, {"top_k": 2, "top_p": 0.3}, {"greedy": True}])
def test_the_log_prob_is_that_of_the_whole_distribution(changes):
    """Token 1 has ln 0.4 however few tokens are left to draw from; renormalised it would be 0 or ln 4/7."""
    tokens, logprobs = sample(
        torch.tensor([logits_of(FOUR)]), torch.tensor([0.3], dtype=torch.float64), params(**changes)
    )
    assert tokens.tolist() == [1] and tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert logprobs.item() == pytest.approx(math.log(0.4), abs=1e-6)


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(9)
    logits, points = 3 * torch.randn(20, 31, generator=generator), uniforms(torch.arange(20), 0)
    chosen = params(temperature=0.8, top_k=12, top_p=0.9)
    tokens, logprobs = sample(logits, points, chosen)
    assert len(set(tokens.tolist())) > 5
    for row in range(20):
        token, logprob = sample(logits[row : row + 1], points[row : row + 1], chosen)
        assert token.item() == tokens[row] and logprob.item() == logprobs[row]


@pytest.mark.parametrize("changes", [{}, {"greedy": True}, {"top_k": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([0.0, math.nan, 1.0], "2 finite ones of 3 (1 nan)"),
        ([0.0, INF, -INF], "1 finite ones of 3 (1 inf, 1 -inf)"),
        ([-INF] * 3, "0 finite ones of 3 (3 -inf)"),
        ([math.nan] * 3, "0 finite ones of 3 (3 nan)"),
    ],
)
def test_logits_that_are_no_distribution_draw_nothing(changes, row, told):
    """Inversion would find no place and take the last token; the likeliest would be the one that is not a number."""
    logits = torch.tensor([[0.0, 1.0, 2.0], row])
    with pytest.raises(TrainingError, match="logits of 1 of 2 responses are no distribution") as error:
        sample(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), params(**changes))
    assert told in str(error.value) and "optimizer.lr" in str(error.value)


def test_a_temperature_that_makes_logits_overflow_is_told():
    with pytest.raises(TrainingError, match="3 finite ones of 3, at rollout.temperature = 1e-40"):
        draw([1.0, 2.0, 3.0], [0.5], temperature=1e-40)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, FOUR), ({"top_k": 3}, [2 / 9, 4 / 9, 0, 3 / 9]), ({"temperature": 0.5}, [4 / 30, 16 / 30, 1 / 30, 9 / 30])],
)
def test_frequencies(changes, expected):
    """An even grid gives n p to within one; random uniforms give a chi-square below its 99.9 % point.

    16.27 is that point for three degrees of freedom, and more than it for two. At temperature 1/2 p is p^2 over 0.3.
    """
    count = 9000
    for points, random in ((grid(count), False), (uniforms(torch.arange(count), 0), True)):
        rows = torch.tensor([logits_of(FOUR)]).expand(count, 4)
        counts = torch.bincount(sample(rows, points, params(**changes))[0], minlength=4).tolist()
        differences = [(n, count * p) for n, p in zip(counts, expected, strict=True) if p]
        assert sum(n for n, _ in differences) == count
        if random:
            assert sum((n - mean) ** 2 / mean for n, mean in differences) < 16.27
        else:
            assert all(abs(n - mean) <= 1.01 for n, mean in differences)
