"""Seeds of responses and the uniform numbers of their tokens, against published numbers and by statistics.

Nothing is drawn here, so a test of statistics passes always or never; its limit is the 99.9 % point of chance.
"""

import hashlib
import itertools
import math

import pytest
import torch

from gspo_megatron.rollout.random_numbers import response_seed, round_seed, splitmix64, turn_seed, uniforms

BITS = 2**64
PUBLISHED = {  # the first outputs of SplitMix64, from its state
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC],
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
}


def plain(state: int, count: int) -> list[int]:
    """SplitMix64 as its paper writes it, one output after the other, in integers without a limit."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % BITS
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % BITS
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % BITS
        found.append(z ^ (z >> 31))
    return found


def outputs(states: list[int], count: int) -> list[list[int]]:
    """[states][count], each with int64's sign."""
    by_place = [splitmix64(torch.tensor(states), place) for place in range(count)]
    return torch.stack(by_place, 1).tolist()


@pytest.mark.parametrize("state", PUBLISHED)
def test_the_outputs_are_the_published_ones(state):
    assert plain(state, len(PUBLISHED[state])) == PUBLISHED[state]
    assert [number % BITS for number in outputs([state], len(PUBLISHED[state]))[0]] == PUBLISHED[state]


def test_int64_wraps_as_64_bits_do():
    """Every output of many states at once, the largest and negative ones too, and far places without those before."""
    states = [0, 1, 2**63 - 1, -1, -(2**63), *(response_seed(1, uid, 0) for uid in range(200))]
    for state, row in zip(states, outputs(states, 40), strict=True):
        assert [number % BITS for number in row] == plain(state % BITS, 40)
    far = plain(7, 100_001)[-1]
    assert int(splitmix64(torch.tensor([7]), 100_000)) % BITS == far


def test_a_uniform_is_the_upper_53_bits():
    """As fractions of 2^53: none is 1, and none is rounded."""
    states = list(range(2000))
    found = torch.stack([uniforms(torch.tensor(states), place) for place in range(3)], 1)
    assert found.dtype == torch.float64 and 0 <= found.min() and found.max() < 1
    for state, row in zip(states, found.tolist(), strict=True):
        assert row == [(number >> 11) / 2**53 for number in plain(state, 3)]


@pytest.fixture(scope="module")
def square() -> torch.Tensor:
    """[1000 neighbouring seeds, 1000 places], worse than what hashes give."""
    return torch.stack([uniforms(torch.arange(1000), place) for place in range(1000)], 1)


def test_they_are_uniform(square):
    """Kolmogorov and Smirnov: the largest distance to the straight line is below 1.95 / sqrt(n). Each row and each
    column alone too, where the limit of 2000 tests together is 2.78 (0.001 / 2000 = 2 exp(-2 d^2))."""

    def distance(numbers: torch.Tensor) -> torch.Tensor:
        count = numbers.size(-1)
        steps = torch.arange(count + 1, dtype=torch.float64) / count
        ordered = numbers.sort(-1).values
        below, above = (ordered - steps[:-1]).amax(-1), (steps[1:] - ordered).amax(-1)
        return torch.maximum(below, above) * math.sqrt(count)

    assert distance(square.flatten()) < 1.95
    assert distance(square).max() < 2.78 and distance(square.T).max() < 2.78


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (500, 0), (0, 500)])
def test_neighbours_are_independent(square, step):
    """Of a seed and the next, a place and the next, both, and far ones: pairs on a grid of 16 x 16 cells. Chi-square
    has 255 degrees of freedom, whose 99.9 % point is 330.5. No number is in two pairs."""
    seeds, places = step
    every = tuple(2 if by == 1 else 1 for by in step)
    first = square[: 1000 - seeds : every[0], : 1000 - places : every[1]]
    second = square[seeds :: every[0], places :: every[1]]
    cells = (first * 16).long() * 16 + (second * 16).long()
    counts = torch.bincount(cells.flatten(), minlength=256).double()
    expected = first.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 330.5


def test_each_bit_of_a_seed_turns_half_of_the_bits():
    """64 bits of 2000 hashed seeds: of 128,000 bits 64,000 change within 6 standard errors of 179."""
    seeds = torch.tensor([response_seed(3, uid, 0) for uid in range(2000)])
    for bit in range(63):
        changed = splitmix64(seeds, 0) ^ splitmix64(seeds ^ (1 << bit), 0)
        count = sum(int(((changed >> place) & 1).sum()) for place in range(64))
        assert abs(count - 64_000) < 6 * 179


def test_a_million_seeds_are_distinct():
    """10 steps, 1000 prompts, 100 responses: two of them would be equal with probability 5e-8. What a further round or
    turn asks with is none of them. Nor is any the next number of another, or one of the next 1000, which an engine that
    counts upwards from a seed would come to: with probability 1e-4 by chance."""
    found = [
        response_seed(step, uid, number) for step, uid, number in itertools.product(range(10), range(1000), range(100))
    ]
    others = [round_seed(step, number) for step, number in itertools.product(range(10), range(100))]
    others += [turn_seed(seed, tokens) for seed, tokens in itertools.product(found[:100], range(1, 101))]
    seeds = torch.tensor([*found, *others]).sort().values
    assert seeds.numel() == 1_000_000 + 1_000 + 10_000
    assert seeds.diff().min() > 1000  # and none twice
    assert 0 <= seeds[0] < 2**63 * 1e-4 and seeds[-1] > 2**63 * (1 - 1e-4)


def test_seeds_are_the_same_in_every_process_and_version():
    """What hashlib gives for the words by themselves: a run that goes on elsewhere or later draws the same."""

    def hashed(*words: object) -> int:
        text = "\x1f".join(str(word) for word in words)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % 2**63

    seed = response_seed(1_000_004, 7, 3)
    assert seed == hashed("response", 1_000_004, 7, 3) == 1893857519659709007
    assert turn_seed(seed, 12) == hashed("turn", seed, 12) == 8971433437544756605
    assert round_seed(1_000_004, 2) == hashed("round", 1_000_004, 2) == 6476285702735704442
