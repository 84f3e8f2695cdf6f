"""An optimizer step sees these examples of a fixed set: epochs of seeded permutations, end to end.

A pure function of seed and step, the same on every rank, so nothing is saved for a resumed run. Left out: streams of
fresh prompts (prompts.py).
"""

from functools import lru_cache

import numpy as np


def epoch_batch(seed: int, step: int, size: int, num_examples: int) -> list[int]:
    """Return example numbers of one step (from 1) over all ranks; its batch may span two epochs or more."""
    numbers = []
    for position in range((step - 1) * size, step * size):
        epoch, place = divmod(position, num_examples)
        numbers.append(int(_permutation(seed, epoch, num_examples)[place]))
    return numbers


def share_of(items: list, rank: int, replicas: int) -> list:
    """Return the items of one data-parallel replica; `replicas` divides their number."""
    share = len(items) // replicas
    return items[rank * share : (rank + 1) * share]


@lru_cache(maxsize=2)  # a batch touches two epochs at most, unless it is larger than the set
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)
