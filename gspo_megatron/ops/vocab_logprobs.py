"""Log-probability and entropy of target tokens from vocabulary-parallel logits, without gathering the vocabulary.

Each tensor-parallel rank holds logits of V/TP consecutive tokens. One all-gather of four numbers a token (max, sum of
exponentials, target logit, entropy term) replaces the three all-reduces of Megatron's cross-entropy; the combination
is in rank order, so that every rank gets the same bits.

Left out: the entropy's gradient, and the form that starts from hidden states and never holds [T, V].
"""

import torch
import torch.distributed as dist


def vocab_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, tp_group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature)[target] and the entropy of that distribution, in nats.

    Args:
        logits: [T, V/TP] fp32 or fp64, this rank's shard; differentiable.
        targets: [T] int64, global token ids.
        temperature: divides the logits, > 0.
        tp_group: ranks that hold the vocabulary in group-rank order; None: the vocabulary is whole.

    Returns:
        (logprobs [T], entropy [T]) in the logits' type; the entropy carries no gradient.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits are {logits.dtype}; log-probs of GSPO need fp32 or fp64 logits")
    return _VocabLogprobs.apply(logits, targets, temperature, tp_group)


class _VocabLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, tp_group):
        size = 1 if tp_group is None else dist.get_world_size(tp_group)
        rank = 0 if size == 1 else dist.get_rank(tp_group)
        shard = logits.size(-1)
        scaled = logits / temperature  # [T, V/TP]
        local = targets - rank * shard
        inside = (local >= 0) & (local < shard)
        local = local.clamp(0, shard - 1)

        top = scaled.max(dim=-1).values  # [T]
        shifted = scaled - top.unsqueeze(-1)
        exponentials = shifted.exp()
        total = exponentials.sum(-1)
        weighted = torch.linalg.vecdot(exponentials, shifted)  # sum of exp(x - top) (x - top)
        target = torch.where(inside, scaled.gather(-1, local.unsqueeze(-1)).squeeze(-1), 0.0)

        stats = torch.stack([top, total, target, weighted])  # [4, T]
        if size > 1:
            gathered = stats.new_empty(size * 4, stats.size(1))
            dist.all_gather_into_tensor(gathered, stats, group=tp_group)
            gathered = gathered.view(size, 4, -1)
        else:
            gathered = stats.unsqueeze(0)
        tops, totals, target, weights = gathered[:, 0], gathered[:, 1], gathered[:, 2].sum(0), gathered[:, 3]
        global_top = tops.max(0).values  # [T]
        rescale = (tops - global_top).exp()  # [TP, T]
        global_total = (totals * rescale).sum(0)
        # sum of p (x - global_top) over the whole vocabulary: each shard's term is shifted by its own maximum first.
        mean_shifted = ((weights + totals * (tops - global_top)) * rescale).sum(0) / global_total
        log_total = global_total.log()
        logprobs = target - global_top - log_total
        entropy = log_total - mean_shifted

        softmax = exponentials.mul_((top - global_top).exp().div_(global_total).unsqueeze(-1))
        ctx.save_for_backward(softmax, local, inside)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        # d logp / d logit_j = (1[j = target] - softmax_j) / temperature
        softmax, local, inside = ctx.saved_tensors
        scale = (grad_logprobs / ctx.temperature).unsqueeze(-1)
        grad = softmax * -scale
        grad.scatter_add_(
            -1, local.unsqueeze(-1), torch.where(inside, grad_logprobs / ctx.temperature, 0.0).unsqueeze(-1)
        )
        return grad, None, None, None
