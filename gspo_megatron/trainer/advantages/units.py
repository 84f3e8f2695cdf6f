"""What has an advantage of its own: a response, or each turn of one (algorithm.advantage_level).

Turns of the same number in a group are compared with each other, by what came from each on: the reward of the response
less the rewards of the turns before. That is the normalised return of a turn of GTPO (arXiv 2511.14846) without a
discount; MT-GRPO (arXiv 2505.11821) compares turns so too, but adds the turn's own reward to the outcome's advantage.

Left out: a discount, and groups by the state in which turns begin (GiGPO, arXiv 2505.10978).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from gspo_megatron.batch import Minibatch, RolloutGroup, Turns

Key = tuple[int, int]


@dataclass(frozen=True)
class Unit:
    """A unit is a turn of a response, or all of it."""

    response: int  # its number among all of the groups'
    key: Key | None  # (uid, turn): units of one key are compared; None: the response has no reward, so with none
    before: float  # rewards of the turns before it
    start: int  # its first token, by the place in prompt and response
    stop: int
    tokens: int  # that the model wrote
    has_signal: bool  # of its group


def units_of(groups: Sequence[RolloutGroup], by_turn: bool) -> list[Unit]:
    """Return the units of all responses, in their order; without `by_turn`, one each."""
    found: list[Unit] = []
    number = 0
    for group in groups:
        prompt, uid, signal = len(group.prompt.token_ids), group.prompt.uid, group.has_signal
        for completion, score in zip(group.completions, group.scores, strict=True):
            turns = completion.turns if by_turn else None
            parts = _parts(turns, len(completion.token_ids), has_rewards=score.error is None)
            for turn, (start, stop, before) in enumerate(parts):
                key = None if score.reward is None else (uid, turn)
                mask = completion.loss_mask
                tokens = stop - start if mask is None else sum(mask[start:stop])
                found.append(Unit(number, key, before, prompt + start, prompt + stop, tokens, signal))
            number += 1
    return found


def compared(units: Sequence[Unit]) -> torch.Tensor:
    """Return [U] int64: units of equal numbers are compared."""
    numbers: dict[Key | int, int] = {}
    return torch.tensor([numbers.setdefault(u.key or -1 - i, len(numbers)) for i, u in enumerate(units)])


def fill_tokens(minibatches: Sequence[Minibatch], units: Sequence[Unit], values: torch.Tensor) -> None:
    """Set the advantages of every batch, [T] fp32: at each trained token the value of its unit, else 0.

    Args:
        values: [U] fp64.
    """
    of_response: dict[int, list[tuple[Unit, float]]] = {}
    for unit, value in zip(units, values.tolist(), strict=True):
        of_response.setdefault(unit.response, []).append((unit, value))
    for batch, numbers in (pair for minibatch in minibatches for pair in minibatch.numbered()):
        found = torch.zeros(batch.num_tokens)
        for number, begin in zip(numbers, batch.cu_seqlens.tolist(), strict=False):  # a padding segment begins none
            for unit, value in of_response[number]:
                found[begin + unit.start : begin + unit.stop] = value
        batch.advantages = found.to(batch.tokens.device) * batch.loss_mask


def means(units: Sequence[Unit], values: torch.Tensor) -> torch.Tensor:
    """Return [P * G] fp64: of each response the mean of [U] values over the tokens that the model wrote."""
    responses = torch.tensor([unit.response for unit in units])
    tokens = torch.tensor([unit.tokens for unit in units], dtype=torch.float64)
    sums = values.new_zeros(int(responses[-1]) + 1, 2)
    sums = sums.index_add(0, responses, torch.stack([values * tokens, tokens], dim=1))
    return sums[:, 0] / sums[:, 1].clamp(min=1)


def _parts(turns: Turns | None, length: int, has_rewards: bool) -> list[tuple[int, int, float]]:
    """(start, stop, rewards before) of each turn. A failed response has the recipe's on_error for all of them."""
    if turns is None:
        return [(0, length, 0.0)]
    before = accumulate(turns.rewards if has_rewards else [0.0] * len(turns.rewards), initial=0.0)
    bounds = pairwise([*turns.starts, length])
    return [(start, stop, done) for (start, stop), done in zip(bounds, before, strict=False)]
