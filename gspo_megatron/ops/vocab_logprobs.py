"""Log-probability and entropy of target tokens from vocabulary-parallel logits, without gathering the vocabulary.

Each tensor-parallel rank holds logits of V/TP consecutive tokens. One all-gather of four numbers a token (`stats`: max,
sum of exponentials, target logit, entropy term) replaces the three all-reduces of Megatron's cross-entropy; the
combination is in rank order, so that every rank gets the same bits. linear_logprobs.py combines its blocks of the
vocabulary by the same functions.

Left out: the form that starts from hidden states and never holds [T, V] (linear_logprobs.py), second derivatives, and
a check that targets lie in the vocabulary (on a GPU it would wait for the device).
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

NOTHING = -1e4  # its exponential is exactly 0, in fp64 too


def vocab_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, tp_group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log softmax(logits / temperature)[target] and the entropy of that distribution, in nats.

    Args:
        logits: [T, V/TP] fp32 or fp64, this rank's shard; differentiable.
        targets: [T] int64, global token ids.
        temperature: divides the logits, > 0.
        tp_group: ranks that hold the vocabulary in group-rank order; None: the vocabulary is whole.

    Returns:
        (logprobs [T], entropy [T]) in the logits' type, both differentiable. The entropy's gradient costs time only
        where one arrives. A logit of -inf is a token of probability 0, which adds nothing to either; a token whose
        logits are all -inf, or one of them inf or not a number, gets not-a-number.

    Raises:
        TypeError: logits in another type.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits are {logits.dtype}; log-probs of GSPO need fp32 or fp64 logits")
    return _VocabLogprobs.apply(logits, targets, temperature, tp_group)


def bounded_(exponents: torch.Tensor) -> torch.Tensor:
    """Raise what is below NOTHING to it, in place; not-a-number stays. exp() of both is 0, and p log p = 0 at p = 0
    comes out of the product, which a logit of -inf would make 0 * inf."""
    return exponents.clamp_(min=NOTHING)


def local_stats(
    scaled: torch.Tensor, local: torch.Tensor, inside: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the four numbers a token over n consecutive tokens of the vocabulary.

    Args:
        scaled: [T, n] logits / temperature; overwritten.
        local: [T] int64, the target's place among the n, anything in range where it is not there.
        inside: [T] bool, the target is one of the n.
        out: [T, n] that takes the exponentials; None: a new tensor.

    Returns:
        (stats [4, T]: max, sum of exp(x - max), target's x or 0, sum of exp(x - max) (x - max);
        exponentials exp(x - max) [T, n]).
    """
    target = torch.where(inside, scaled.gather(-1, local.unsqueeze(-1)).squeeze(-1), 0.0)
    # Where all n logits are -inf, any finite maximum does: their exponentials are 0.
    top = scaled.amax(dim=-1).clamp(min=torch.finfo(scaled.dtype).min)  # [T]
    shifted = bounded_(scaled.sub_(top.unsqueeze(-1)))
    exponentials = torch.exp(shifted, out=out)
    return torch.stack([top, exponentials.sum(-1), target, torch.linalg.vecdot(exponentials, shifted)]), exponentials


def combine(parts: torch.Tensor) -> torch.Tensor:
    """Combine stats of consecutive parts of the vocabulary, in order: [parts, 4, T] -> [4, T] of them together."""
    tops, totals, targets, weights = parts.unbind(1)  # each [parts, T]
    top = tops.amax(0)
    shift = bounded_(tops - top)
    rescale = shift.exp()
    # sum of exp(x - top) (x - top): each part's term is shifted by its own maximum first.
    weighted = ((weights + totals * shift) * rescale).sum(0)
    return torch.stack([top, (totals * rescale).sum(0), targets.sum(0), weighted])


def gather_and_combine(
    stats: torch.Tensor, tp_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather all ranks' stats [4, T] -> (logprobs, entropy, max, sum of exp(x - max)) of the vocabulary, each [T].

    One all-gather over tp_group; none where it is None or has one rank.
    """
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    gathered = stats.unsqueeze(0)
    if size > 1:
        gathered = stats.new_empty(size * 4, stats.size(1))
        dist.all_gather_into_tensor(gathered, stats, group=tp_group)
        gathered = gathered.view(size, 4, -1)
    top, total, target, weighted = combine(gathered)
    log_total = total.log()
    return target - top - log_total, log_total - weighted / total, top, total


def place_in_shard(targets: torch.Tensor, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (place [T] int64 among the `size` token ids from `first` on, clamped; [T] bool, if it is one of them)."""
    local = targets - first
    return local.clamp(0, size - 1), (local >= 0) & (local < size)


class _VocabLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, tp_group):
        rank = 0 if tp_group is None else dist.get_rank(tp_group)
        shard = logits.size(-1)
        local, inside = place_in_shard(targets, rank * shard, shard)
        stats, exponentials = local_stats(logits / temperature, local, inside)  # [4, T], [T, V/TP]
        own_top = stats[0]
        logprobs, entropy, top, total = gather_and_combine(stats, tp_group)
        softmax = exponentials.mul_((own_top - top).exp().div_(total).unsqueeze(-1))
        ctx.save_for_backward(softmax, local, inside, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # None instead of zeros: whether the entropy's gradient is needed
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        softmax, local, inside, entropy = ctx.saved_tensors
        grad = None
        if grad_logprobs is not None:
            # d logp / d logit_j = (1[j = target] - softmax_j) / temperature
            scale = (grad_logprobs / ctx.temperature).unsqueeze(-1)
            grad = softmax * -scale
            grad.scatter_add_(
                -1, local.unsqueeze(-1), torch.where(inside, grad_logprobs / ctx.temperature, 0.0).unsqueeze(-1)
            )
        if grad_entropy is not None:
            # d H / d logit_j = -p_j (log p_j + H) / temperature; entr(p) = -p log p, 0 at p = 0
            term = torch.special.entr(softmax).addcmul_(softmax, entropy.unsqueeze(-1), value=-1)
            term.mul_((grad_entropy / ctx.temperature).unsqueeze(-1))
            grad = term if grad is None else grad.add_(term)
        return grad, None, None, None
