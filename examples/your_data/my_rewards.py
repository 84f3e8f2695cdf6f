"""Reward functions in the form of TRL: lists in, one number a response out. Columns of the data come by their names."""

import re

NUMBER = re.compile(r"-?\d+")


def exact_number(completions, answer, **kwargs):
    """Give 1 where the last number of a response is that of the gold answer, and a part of it for digits in place."""
    return [_score(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def _score(completion: str, gold: str) -> float:
    wanted = NUMBER.findall(gold)[-1]
    found = NUMBER.findall(completion)
    if not found:
        return 0.0
    if found[-1] == wanted:
        return 1.0
    right = sum(one == other for one, other in zip(found[-1], wanted, strict=False))
    return 0.5 * right / max(len(found[-1]), len(wanted))
