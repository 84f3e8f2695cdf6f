"""Log-probability and entropy of target tokens from hidden states and the LM head; [T, V] logits are never held.

The logits are made tile by tile (so many tokens by so many rows of the weight), reduced to four numbers a token, and
made again in the backward. They are not rounded to the model's type: bf16 logits alone move the sequence log-ratio by
more than GSPO's clip range (tools/validation/ratio_accuracy.py).

Types: bf16 inputs give fp32 logits (on a CPU, where no matrix product takes bf16 to fp32, from upcast tiles; on CUDA by
torch.mm(out_dtype), which nobody has run yet), fp32 gives fp32, fp64 gives fp64. In the backward of bf16 inputs the
gradient of a tile's logits is rounded to bf16 for the two products with weight and hidden; their sums over tiles are in
fp32 and are rounded to bf16 once. On a CPU each tile's product is rounded to bf16 as well.

Left out: a bias, a check that targets lie in the vocabulary (on a GPU it would wait for the device), second
derivatives, and a native kernel: on a CPU the products in fp32 are most of the time.
"""

import math

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from gspo_megatron.ops.vocab_logprobs import bounded_, combine, gather_and_combine, local_stats, place_in_shard

CHUNK_TOKENS = 1024
# Rows of the weight in a tile. On a CPU 8 MB stay in cache; a GPU needs larger tiles to be busy (not measured).
VOCAB_BLOCK = {"cpu": 2048, "cuda": 16384}
TYPES = (torch.bfloat16, torch.float32, torch.float64)


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log softmax(hidden weight^T / temperature)[target] and the entropy of that distribution, in nats.

    Under tensor parallelism the gradient of `hidden` is this rank's part of a sum over the group. Megatron's region
    before the call adds the parts up: gather_from_sequence_parallel_region where hidden states are sharded by tokens,
    copy_to_tensor_model_parallel_region otherwise. The one collective in here is an all-gather of 4 numbers a token
    in the forward. Tokens that get no gradient (masked, clipped) cost nothing in the backward.

    Args:
        hidden: [T, H] bf16, fp32 or fp64, the same on every rank of tp_group; differentiable.
        weight: [V/TP, H] in the same type, this rank's consecutive rows of the LM head; differentiable.
        targets: [T] int64, global token ids; the caller sees to it that they lie in the vocabulary.
        temperature: divides the logits, > 0.
        tp_group: ranks that hold the vocabulary in group-rank order; None: the vocabulary is whole.
        chunk_tokens: tokens in a tile; memory grows with it, values differ by rounding only.

    Returns:
        (logprobs [T], entropy [T]) fp32, fp64 for fp64 inputs; both differentiable.

    Raises:
        TypeError: a type other than those above.
        ValueError: shapes that do not fit, a temperature that is not positive, chunk_tokens below 1.
    """
    _check(hidden, weight, targets, temperature, chunk_tokens)
    return _LinearLogprobs.apply(hidden, weight, targets, temperature, tp_group, chunk_tokens)


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float, chunk_tokens: int
) -> None:
    if hidden.dtype not in TYPES:
        raise TypeError(f"hidden is {hidden.dtype}; it must be bf16, fp32 or fp64: convert it with hidden.to(...)")
    if weight.dtype is not hidden.dtype:
        raise TypeError(
            f"weight is {weight.dtype} and hidden is {hidden.dtype}; both must have one type: convert one of them"
        )
    if targets.dtype is not torch.int64:
        raise TypeError(f"targets are {targets.dtype}; token ids must be int64: convert them with targets.long()")
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; it must be [T, H]: flatten the tokens, squeeze the batch of 1"
        )
    if weight.dim() != 2 or weight.size(0) == 0 or weight.size(1) != hidden.size(1):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be [V/TP, H] with H = {hidden.size(1)}, hidden's last "
            "size: pass the LM head's weight as it is stored, not transposed"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; they must be [T] with T = {hidden.size(0)}, hidden's first "
            "size: under sequence parallelism gather the hidden states first"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite: 1.0 leaves the logits alone")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1: {CHUNK_TOKENS} is the default")


class _Logits:
    """Makes tiles of logits / temperature in one buffer: a tile is gone when the next is made."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, temperature: float, chunk_tokens: int):
        self.hidden, self.weight, self.temperature = hidden, weight, temperature
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        block = VOCAB_BLOCK.get(hidden.device.type, VOCAB_BLOCK["cuda"])
        self.chunks, self.blocks = _slices(hidden.size(0), chunk_tokens), _slices(weight.size(0), block)
        # Fresh pages for every tile would cost a CPU as much time as the exponentials.
        size = min(hidden.size(0), chunk_tokens) * min(weight.size(0), block)
        self._buffer, self._spare = (torch.empty(size, dtype=self.dtype, device=hidden.device) for _ in range(2))

    def tile(self, rows: slice, block: slice) -> torch.Tensor:
        """[n, m] in fp32 or fp64; the caller may overwrite it."""
        a, b = self.hidden[rows], self.weight[block].t()
        if a.dtype is not self.dtype and a.is_cuda:
            out = torch.mm(a, b, out_dtype=self.dtype)
        else:
            out = self._buffer[: a.size(0) * b.size(1)].view(a.size(0), b.size(1))
            torch.mm(a.to(self.dtype), b.to(self.dtype), out=out)
        return out if self.temperature == 1.0 else out.div_(self.temperature)

    def spare(self, like: torch.Tensor) -> torch.Tensor:
        """A second buffer of a tile's shape."""
        return self._spare[: like.numel()].view_as(like)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, tp_group, chunk_tokens):
        logits = _Logits(hidden, weight, temperature, chunk_tokens)
        first = 0 if tp_group is None else dist.get_rank(tp_group) * weight.size(0)
        parts = torch.empty(len(logits.blocks), 4, hidden.size(0), dtype=logits.dtype, device=hidden.device)
        for number, block in enumerate(logits.blocks):
            local, inside = place_in_shard(targets, first + block.start, block.stop - block.start)
            for rows in logits.chunks:
                tile = logits.tile(rows, block)
                parts[number, :, rows] = local_stats(tile, local[rows], inside[rows], logits.spare(tile))[0]
        logprobs, entropy, top, total = gather_and_combine(combine(parts), tp_group)
        ctx.save_for_backward(hidden, weight, targets, entropy, top, total)
        ctx.temperature, ctx.first, ctx.chunk_tokens = temperature, first, chunk_tokens
        ctx.set_materialize_grads(False)  # None instead of zeros: whether the entropy's gradient is needed
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, entropy, top, total = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        grad_logprobs = torch.zeros_like(top) if grad_logprobs is None else grad_logprobs
        active = grad_logprobs != 0 if grad_entropy is None else (grad_logprobs != 0) | (grad_entropy != 0)
        index = active.nonzero().squeeze(1)  # the rest costs nothing
        if index.numel() < hidden.size(0):
            per_token = [grad_logprobs, grad_entropy, targets, entropy, top, total]
            per_token = [x if x is None else x[index] for x in per_token]
        else:
            index, per_token = None, [grad_logprobs, grad_entropy, targets, entropy, top, total]
        logits = _Logits(hidden if index is None else hidden[index], weight, ctx.temperature, ctx.chunk_tokens)
        tiles = _LogitGradients(logits, ctx.first, *per_token)
        grad_hidden, grad_weight = _products(tiles, *ctx.needs_input_grad[:2])
        if grad_hidden is not None and index is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, index, grad_hidden)
        return grad_hidden, grad_weight, None, None, None, None


class _LogitGradients:
    """Makes tiles of the loss's gradient by the logits."""

    def __init__(
        self,
        logits: _Logits,
        first: int,
        grad_logprobs: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        targets: torch.Tensor,
        entropy: torch.Tensor,
        top: torch.Tensor,
        total: torch.Tensor,
    ):
        """Per-token tensors are [T], of the tokens of `logits`; grad_entropy may be None."""
        self.logits, self.first, self.targets = logits, first, targets
        self.by_logprobs = (grad_logprobs / logits.temperature).unsqueeze(-1)  # [T, 1], as the others
        self.by_entropy = None if grad_entropy is None else (grad_entropy / logits.temperature).unsqueeze(-1)
        self.entropy, self.top, self.total = (x.unsqueeze(-1) for x in (entropy, top, total))

    def tile(self, rows: slice, block: slice) -> torch.Tensor:
        """[n, m] in the type of hidden: 1[j = target] g - p_j (g + e (log p_j + H)), with g and e the gradients of
        log-prob and entropy by temperature."""
        x = self.logits.tile(rows, block).sub_(self.top[rows])
        g, total = self.by_logprobs[rows], self.total[rows]
        if self.by_entropy is None:
            x = x.exp_().mul_(-g / total)
        else:
            log_p = bounded_(x.sub_(total.log()))
            p = torch.exp(log_p, out=self.logits.spare(x))
            x = log_p.add_(self.entropy[rows]).mul_(self.by_entropy[rows]).add_(g).mul_(p).neg_()
        local, inside = place_in_shard(self.targets[rows], self.first + block.start, block.stop - block.start)
        x.scatter_add_(-1, local.unsqueeze(-1), torch.where(inside.unsqueeze(-1), g, 0.0))
        return x.to(self.logits.hidden.dtype)


def _products(
    gradients: _LogitGradients, need_hidden: bool, need_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(gradient of hidden [T, H], gradient of weight [V/TP, H]) in their types, None where not needed.

    Blocks of the vocabulary are the outer loop, so that a block of the weight's gradient is complete, and rounded once,
    before the next begins: no copy of the whole in fp32.
    """
    logits = gradients.logits
    hidden, weight = logits.hidden, logits.weight
    grad_hidden = torch.zeros_like(hidden, dtype=logits.dtype) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    for block in logits.blocks:
        part = None if grad_weight is None else torch.zeros_like(weight[block], dtype=logits.dtype)
        for rows in logits.chunks:
            tile = gradients.tile(rows, block)  # [n, m]
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], tile, weight[block])
            if part is not None:
                _add_product(part, tile.t(), hidden[rows])
        if grad_weight is not None and part is not None:
            grad_weight[block] = part
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, with the sum in total's type."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(a, b))


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
