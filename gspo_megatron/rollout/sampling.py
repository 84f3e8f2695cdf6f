"""Sampling of one token from logits, driven by a uniform number that belongs to the response and the position
(random_numbers.py)."""

from dataclasses import dataclass

import torch

from gspo_megatron.errors import TrainingError
from gspo_megatron.rollout.stop_strings import StopStrings


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
    logprobs = torch.log_softmax(logits / params.temperature, dim=-1)
    if params.greedy:
        tokens = logits.argmax(-1)
    else:
        probs = _truncate(logprobs.double().exp(), params)
        cumulative = probs.cumsum(-1)
        target = uniform.to(cumulative.device).unsqueeze(1) * cumulative[:, -1:]
        # right=True steps over tokens of probability 0; the clamp guards the last bit of the sum.
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.size(-1) - 1)
    picked = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    if bool(picked.isnan().any()):  # one bad logit makes the whole row's log-probs not a number
        raise TrainingError(_no_distribution(logits, picked.isnan(), params.temperature))
    return tokens, picked


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


def _truncate(probs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[n, V] -> the same with 0 where top-k or top-p cut (the likeliest token always stays)."""
    if params.top_k == 0 and params.top_p == 1.0:
        return probs
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    if params.top_k:
        # Renormalised before top-p, as transformers and vLLM do.
        ordered[:, params.top_k :] = 0.0
        ordered = ordered / ordered.sum(-1, keepdim=True)
    if params.top_p < 1.0:
        # A token stays while the ones before it hold less than top_p.
        ordered = ordered * ((ordered.cumsum(-1) - ordered) < params.top_p)
    return torch.zeros_like(probs).scatter(1, index, ordered)
