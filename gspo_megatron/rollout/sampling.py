"""Sampling of one token from logits, driven by a uniform number that belongs to the response and the position
(random_numbers.py)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gspo_megatron.errors import TrainingError
from gspo_megatron.rollout.stop_strings import StopStrings

BLOCK = 128  # tokens whose weights are added up first
SORTED = 256  # of the likeliest tokens, at first, where top-p asks which they are


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. `greedy` takes the likeliest and ignores the rest."""

    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    greedy: bool = False
    stop_strings: StopStrings | None = None


def sample(logits: torch.Tensor, uniform: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row by inverting the cumulative distribution at `uniform`.

    Args:
        logits: [n, V] fp32.
        uniform: [n] fp64 in [0, 1).

    Returns:
        (tokens [n] int64, logprobs [n] fp32): the log-prob is that of softmax(logits / temperature) over all tokens,
        before top-k and top-p cut it, because training compares it with the whole distribution.

    Raises:
        TrainingError: a row is no distribution, because a logit is not a number or inf, or all are -inf.
    """
    scaled = logits if params.temperature == 1.0 else logits / params.temperature
    peak = scaled.amax(-1, keepdim=True)
    weights = (scaled - peak).exp()  # of the distribution, not normalised
    blocks, sums = _blocks(weights)
    total = sums.sum(-1, keepdim=True)
    if bool((bad := total.isnan().squeeze(1)).any()):  # one bad logit makes the whole row's sum not a number
        raise TrainingError(_no_distribution(logits, bad, params.temperature))
    if params.greedy:
        tokens = logits.argmax(-1)
    else:
        if params.top_k or params.top_p < 1.0:
            blocks, sums = _blocks(_truncated(weights, total, params))
        tokens = _drawn(blocks, sums, uniform.to(logits.device))
    logprobs = (scaled.gather(1, tokens.unsqueeze(1)) - peak).double() - total.log()
    return tokens, logprobs.squeeze(1).float()


def _blocks(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, V] -> [n, blocks, BLOCK], and their sums [n, blocks] fp64: a cumulative distribution of two levels makes no
    fp64 of the whole vocabulary."""
    if padding := -weights.size(1) % BLOCK:
        weights = F.pad(weights, (0, padding))
    blocks = weights.unflatten(1, (-1, BLOCK))
    return blocks, blocks.sum(-1, dtype=torch.float64)


def _drawn(blocks: torch.Tensor, sums: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution at uniform [n] fp64: [n] int64."""
    ends = sums.cumsum(-1)
    target = uniform.unsqueeze(1) * ends[:, -1:]
    block = _place(ends, target)
    begin = F.pad(ends, (1, 0)).gather(1, block)
    inside = blocks.take_along_dim(block.unsqueeze(2), 1).squeeze(1).double().cumsum(-1)
    return (block * BLOCK + _place(inside, target - begin)).squeeze(1)


def _place(ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Which part of [n, parts], given by where each ends, has the target [n, 1]: [n, 1], never a part of weight 0."""
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())  # rounding may put the target behind all of them
    return torch.minimum(torch.searchsorted(ends, target, right=True), last)


def _no_distribution(logits: torch.Tensor, bad: torch.Tensor, temperature: float) -> str:
    """Say in words what is wrong with the first of the rows [n] bool from which nothing can be drawn."""
    row = logits[int(bad.nonzero()[0])]
    finite = int(torch.isfinite(row).sum())
    kinds = {
        "nan": int(row.isnan().sum()),
        "inf": int((row == torch.inf).sum()),
        "-inf": int((row == -torch.inf).sum()),
    }
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return (
        f"sampling: the logits of {int(bad.sum())} of {bad.numel()} responses are no distribution; the first has "
        f"{finite} finite ones of {row.numel()}" + (f" ({found})" if found else "") + f", at rollout.temperature = "
        f"{temperature:g}. The weights are broken or too large for their type: look at loss and grad_norm in "
        "metrics.jsonl, lower optimizer.lr, and start again from a checkpoint before that."
    )


def _truncated(weights: torch.Tensor, total: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[n, V] -> the same with 0 where top-k or top-p cut (the likeliest token always stays). total: [n, 1] fp64."""
    best = _likeliest(weights, total, params)
    # Renormalised after top-k and before top-p, as transformers and vLLM do.
    share = best.double() / (best.double().sum(-1, keepdim=True) if params.top_k else total)
    # A token stays while the ones before it hold less than top_p.
    number = ((share.cumsum(-1) - share) < params.top_p).sum(-1, keepdim=True)
    least = best.gather(1, number - 1)
    kept = weights >= least
    if bool((kept.sum(-1, keepdim=True) > number).any()):  # of equal ones the first
        above, equal = weights > least, weights == least
        kept = above | (equal & (equal.cumsum(-1) <= number - above.sum(-1, keepdim=True)))
    return weights * kept


def _likeliest(weights: torch.Tensor, total: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Weights of the top_k likeliest tokens, or of as many as hold top_p: [n, some], falling."""
    size = weights.size(1)
    count = min(params.top_k or SORTED, size)
    while True:  # the whole vocabulary is not sorted where few tokens hold top_p
        best = weights.topk(count, dim=-1).values
        if params.top_k or count == size:
            return best
        if bool((best[:, :-1].sum(-1, keepdim=True, dtype=torch.float64) >= params.top_p * total).all()):
            return best
        count = min(8 * count, size)
