"""The GSPO loss (arXiv 2507.18071, equation 5) in eager PyTorch, as usually written and as four libraries write it.

For tools/benchmarks/sequence_ratio.py. Each form is our own wording of the formulas that the library evaluates, with
the metrics that it forms beside the loss, because those cost time and memory too; the value and the gradient of all
forms agree where sequences are not empty. Left out: what a library does around the loss (moving numbers to the host,
collectives, corrections that are off by default), and padding the tensors.

Padded forms take new, old, mask [S, L] fp32 (L: the longest sequence) and advantages [S]; packed ones take [T].
"""

import torch

LOW, HIGH = 3e-4, 4e-4


def clipped(ratio: torch.Tensor) -> torch.Tensor:
    return ratio.clamp(1 - LOW, 1 + HIGH)


def masked_mean(x: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return (x * mask).sum(dim) / mask.sum(dim).clamp(min=1)


def padded(new, old, mask, advantages):
    """Nothing but the loss: masked sum, exp, clamp, minimum, mean."""
    ratio = masked_mean(new - old, mask, -1).exp()
    return -torch.minimum(ratio * advantages, clipped(ratio) * advantages).mean()


def packed(new, old, mask, advantages, ids):
    """The same without padding; ids [T] int64 name each token's sequence."""
    total = torch.zeros_like(advantages).index_add(0, ids, (new - old) * mask)
    ratio = (total / torch.zeros_like(advantages).index_add(0, ids, mask).clamp(min=1)).exp()
    return -torch.minimum(ratio * advantages, clipped(ratio) * advantages).mean()


def same_outputs(new, old, mask, advantages):
    """The minimal padded form and the other numbers that our operators return with it.

    By sequence: tokens, sums of d, d^2 and exp(d) - 1 - d, max |d|, and the tokens that each bound has clipped.
    """
    d = (new - old) * mask
    tokens, total = mask.sum(-1), d.sum(-1)
    ratio = (total / tokens.clamp(min=1)).exp()
    loss = -torch.minimum(ratio * advantages, clipped(ratio) * advantages).mean()
    with torch.no_grad():
        spread = torch.stack([d.square().sum(-1), (d.expm1() - d).sum(-1), d.abs().amax(-1)])
        low = (ratio < 1 - LOW) & (advantages < 0)
        high = (ratio > 1 + HIGH) & (advantages > 0)
        counts = torch.stack([low * tokens, high * tokens])
    return loss, tokens, total.detach(), spread, ratio.detach(), counts


def trl(new, old, mask, advantages):
    """importance_sampling_level="sequence", loss_type="grpo": ratios [S, 1], the loss spread over tokens by its mask.

    Metrics: the shares of sequences clipped low, high and either way.
    """
    weights = masked_mean(new - old, mask, -1).unsqueeze(-1)
    ratio = weights.exp()
    column = advantages.unsqueeze(1)
    by_token = -torch.min(ratio * column, clipped(ratio) * column)
    loss = masked_mean(by_token, mask, -1).mean()
    low = (ratio < 1 - LOW) & (column < 0)
    high = (ratio > 1 + HIGH) & (column > 0)
    return loss, low.float().mean(), high.float().mean(), (low | high).float().mean()


def verl(new, old, mask, advantages):
    """policy_loss.loss_mode="gspo": the ratio of a sequence at each token, its gradient through that token's log-prob.

    Log-ratio = new - sg(new) + sg(mean), clamped at 10; mean over tokens, then over sequences. The advantages come as
    [S, L] there, which is not timed. Metrics: clip fraction over tokens, and the mean of old - new.
    """
    d = new - old
    mean = (d * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    ratio = (new - new.detach() + mean.detach().unsqueeze(-1)).clamp(max=10.0).exp()
    column = advantages.unsqueeze(1).expand_as(new)
    plain, bounded = -column * ratio, -column * clipped(ratio)
    by_token = torch.maximum(plain, bounded)
    tokens = mask.sum(-1)
    loss = ((by_token * mask).sum(-1) / (tokens + 1e-8)).mean()
    return loss, masked_mean((bounded > plain).float(), mask), masked_mean(-d, mask)


def nemo_rl(new, old, mask, advantages):
    """sequence_level_importance_ratios=true: the sequence's ratio repeated for each token, mean over tokens, sequences.

    Metrics: mean, least and largest ratio, before and after clipping. Those of the rollout engine's log-probs (four
    divergences between it and the old policy) are left out: they are not part of this loss.
    """
    ratio = masked_mean(new - old, mask, -1).unsqueeze(-1).exp().repeat(1, new.size(1))
    bounded = clipped(ratio)
    column = advantages.unsqueeze(1).expand_as(new)
    by_token = torch.max(-column * ratio, -column * bounded)
    loss = masked_mean(by_token, mask, -1).mean()
    with torch.no_grad():
        inside = mask.bool()
        metrics = [
            f(x)
            for x in (ratio, bounded)
            for f in (lambda y: masked_mean(y, mask), lambda y: y[inside].min(), lambda y: y[inside].max())
        ]
    return loss, *metrics


def slime(new, old, mask, advantages, lengths):
    """advantage_estimator="gspo": packed; a loop over sequences for the mean, which is expanded to tokens again.

    Log-probs come as lists of sequences there: splitting is a view. slime compiles the elementwise middle part; here
    it is eager as the rest. Metrics: means by sequence of the clip decision and of the mean log-ratio.
    """
    news, olds, masks = new.split(lengths), old.split(lengths), mask.split(lengths)
    means = [masked_mean(b - a, m) for a, b, m in zip(news, olds, masks, strict=True)]
    kl = torch.cat([mean.expand_as(a) for mean, a in zip(means, news, strict=True)])
    ratio = (-kl).exp()
    column = torch.repeat_interleave(advantages, torch.tensor(lengths))
    plain, bounded = -ratio * column, -clipped(ratio) * column

    def by_sequence(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([masked_mean(y, m) for y, m in zip(x.split(lengths), masks, strict=True)]).mean()

    loss = by_sequence(torch.maximum(plain, bounded))
    with torch.no_grad():
        return loss, by_sequence((bounded > plain).float()), by_sequence(kl)
