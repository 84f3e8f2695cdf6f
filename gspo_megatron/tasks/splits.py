"""Which questions are trained on, which warm a model up, and which are held out: a hash of the text decides."""

import hashlib

# Sixteenths of the hash space. RL takes fresh questions all the time, the evaluation needs a few hundred.
SPLITS = {"train": range(0, 10), "warm_start": range(10, 14), "eval": range(14, 16)}


def split_of(question: str) -> str:
    """Return the only split in which a question may appear.

    A function of the text alone, not of seed or task: no run's evaluation holds a question that another run
    was trained on.
    """
    bucket = hash64("split", question) % 16
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def hash64(*parts: object) -> int:
    """Return 64 bits that are the same in every process and version; Python's hash() of a string is not."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
