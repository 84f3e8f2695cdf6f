"""Random numbers of sampling: a seed for each response, and from it a uniform number for each of its tokens.

Nothing here has a state, so a number depends on (seed of the step, prompt, response, place of the token) and on nothing
of the layout, of other responses, or of what was drawn before. A seed is a hash, never one more than another's: engines
outside count upwards from the seed that they are given. Uniform numbers are SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), whose output at a place is computed without those before it.
"""

import torch

from gspo_megatron.tasks.splits import hash64

SEEDS = 2**63  # how many there are: each fits into an int64
_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's constants


def round_seed(seed: int, number: int) -> int:
    """Return the seed of a further round of prompts in a step, from 0 to 2^63 - 1."""
    return hash64("round", seed, number) % SEEDS


def response_seed(seed: int, uid: int, number: int) -> int:
    """Return the seed of a response, from 0 to 2^63 - 1.

    Args:
        seed: of the step or the evaluation.
        uid: of the prompt.
        number: of the response among those to the prompt.
    """
    return hash64("response", seed, uid, number) % SEEDS


def turn_seed(seed: int, tokens: int) -> int:
    """Return the seed with which a response goes on after an environment has spoken, from 0 to 2^63 - 1.

    Args:
        seed: of the response.
        tokens: how many stand behind its prompt.
    """
    return hash64("turn", seed, tokens) % SEEDS


def uniforms(seeds: torch.Tensor, place: int) -> torch.Tensor:
    """Return [n] fp64 in [0, 1), the multiples of 2^-53; the same bits on every device.

    Args:
        seeds: [n] int64, of responses.
        place: of the token in its response, from 0.
    """
    return _shifted(splitmix64(seeds, place), 11).double() * 2.0**-53


def splitmix64(seeds: torch.Tensor, place: int) -> torch.Tensor:
    """Return the output at a place (0 is the first) of each generator of these states: 64 bits as [n] int64."""
    mixed = seeds + _signed(_INCREMENT * (place + 1))
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(_FIRST)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(_SECOND)
    return mixed ^ _shifted(mixed, 31)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Shift to the right and fill with zeros, where int64's own shift repeats the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def _signed(bits: int) -> int:
    """Return the int64 of the lowest 64 bits."""
    low = bits % 2**64
    return low - 2**64 if low >= 2**63 else low
