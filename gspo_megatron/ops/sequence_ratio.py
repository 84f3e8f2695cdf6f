"""The sequence ratio and its clipped surrogate on packed log-probs (GSPO, arXiv 2507.18071, sections 4.1 and 4.3).

Three operators: `sequence_partials` reads the tokens once and leaves a few fp64 sums a sequence; `gspo_forward` turns
those into ratios, clip decisions and the loss; `gspo_backward` writes the gradient of every token in one pass. Between
the first two, tables of several context-parallel ranks can be added, since all columns but one are sums.

They run in C++ where the library was built (ops/library.py) and from ops/sequence_ratio_reference.py elsewhere: the
same names, shapes and errors. Left out: a gradient of the gradient; ratios clipped token by token are in
ops/token_surrogate.py.
"""

import math

import torch
from torch.library import define, impl, register_autograd, register_fake

from gspo_megatron.ops import library
from gspo_megatron.ops import sequence_ratio_reference as reference

COLUMNS = reference.COLUMNS
TOKEN_COLUMNS = reference.TOKEN_COLUMNS


def sequence_partials(
    logp_new: torch.Tensor,
    logp_old: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    entropy: torch.Tensor | None = None,
    token_advantages: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum the log-ratio d_t = logp_new - logp_old by sequence over trained tokens, in one pass over memory.

    Deterministic: the same bits for any number of threads and any packing of the same sequences.

    Args:
        logp_new, logp_old: [T] fp32, fp64, bf16 or fp16 (types may differ), log-probs in nats. No gradient flows
            through here; `gspo_surrogate` has it. What stands where the mask is 0 is not looked at, NaN included.
        mask: [T] bool, uint8, fp32 or fp64; a token counts where it is above 0.
        cu_seqlens: [S+1] int32, monotone, at most T: sequence i is tokens cu_seqlens[i] to cu_seqlens[i+1]. Tokens
            outside (a padding segment) belong to no sequence.
        entropy: [T] in nats, the types of log-probs; without it, its column is 0.
        token_advantages: [T] fp32 or fp64, for GSPO-token with advantages that differ by token.

    Returns:
        [S, 6] fp64 with COLUMNS, or [S, 10] with COLUMNS + TOKEN_COLUMNS where token_advantages are given.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes that do not agree, devices that differ, cu_seqlens not monotone or past T.
    """
    with torch.no_grad():
        return torch.ops.gspo_megatron.sequence_partials(
            logp_new, logp_old, mask, cu_seqlens, entropy, token_advantages
        )


def gspo_surrogate(
    logp_new: torch.Tensor,
    partials: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    clip_low: float,
    clip_high: float,
    denominator: float,
    clip_dual: float = math.inf,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute -(1/denominator) sum_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i), s_i = exp(mean d_t).

    With one advantage a token it is GSPO-token (equation 13): the mean over a sequence's trained tokens of the same
    minimum, whose gradient reaches each token with its own advantage.

    Args:
        logp_new: [T], what the gradient goes to; its values are not read, they are in `partials` already.
        partials: [S, 6] or [S, 10] fp64 of `sequence_partials` over the same tokens (of all context-parallel ranks).
        advantages: [S] fp32 or fp64, or [T] with one a token ([S] where S = T); [T] needs partials with 10 columns.
        mask, cu_seqlens: as in `sequence_partials`.
        denominator: sequences with a trained token in the whole optimizer step, over all ranks and microbatches.
        clip_dual: where A < 0 the ratio is bounded above by this too (dual clip, arXiv 1912.09729); infinity: not.

    Returns:
        (loss [] fp64, differentiable; ratios [S] fp64, 1 where no token is trained; clipped [S, 2] fp64, trained tokens
        that lost their gradient to the lower and to an upper bound).

    Raises:
        TypeError, ValueError: as in `sequence_partials`; also a denominator that is not positive.
    """
    loss, ratios, clipped, _ = torch.ops.gspo_megatron.gspo_forward(
        logp_new, partials, advantages, mask, cu_seqlens, clip_low, clip_high, denominator, clip_dual
    )
    return loss, ratios, clipped


# ---- Registration: schema, reference, fake, autograd ----

_TAGS = (torch.Tag.pt2_compliant_tag,)
define(
    "gspo_megatron::sequence_partials",
    "(Tensor logp_new, Tensor logp_old, Tensor mask, Tensor cu_seqlens, Tensor? entropy, Tensor? token_advantages)"
    " -> Tensor",
    tags=_TAGS,
)
define(
    "gspo_megatron::gspo_forward",
    "(Tensor logp_new, Tensor partials, Tensor advantages, Tensor mask, Tensor cu_seqlens, float clip_low,"
    " float clip_high, float denominator, float clip_dual)"
    " -> (Tensor loss, Tensor ratios, Tensor clipped, Tensor slopes)",
    tags=_TAGS,
)
define(
    "gspo_megatron::gspo_backward",
    "(Tensor grad_loss, Tensor slopes, Tensor? token_advantages, Tensor mask, Tensor cu_seqlens, float denominator,"
    " ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
# "default" is CompositeExplicitAutograd: any device without a kernel of its own.
impl("gspo_megatron::sequence_partials", "default")(reference.sequence_partials)
impl("gspo_megatron::gspo_forward", "default")(reference.gspo_forward)
impl("gspo_megatron::gspo_backward", "default")(reference.gspo_backward)


@register_fake("gspo_megatron::sequence_partials")
def _(logp_new, logp_old, mask, cu_seqlens, entropy, token_advantages):
    reference.check_tokens(logp_new, logp_old, mask, cu_seqlens, entropy, token_advantages)
    columns = len(COLUMNS) if token_advantages is None else len(COLUMNS) + len(TOKEN_COLUMNS)
    return logp_new.new_empty((cu_seqlens.numel() - 1, columns), dtype=torch.float64)


@register_fake("gspo_megatron::gspo_forward")
def _(logp_new, partials, advantages, mask, cu_seqlens, clip_low, clip_high, denominator, clip_dual):
    reference.check_forward(logp_new, partials, advantages, mask, cu_seqlens, denominator)
    size = cu_seqlens.numel() - 1
    shapes = ((), (size,), (size, 2), (size, 2))
    return tuple(partials.new_empty(shape, dtype=torch.float64) for shape in shapes)


@register_fake("gspo_megatron::gspo_backward")
def _(grad_loss, slopes, token_advantages, mask, cu_seqlens, denominator, dtype):
    return mask.new_empty(mask.shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    logp_new, _, advantages, mask, cu_seqlens, _, _, denominator, _ = inputs
    _, ratios, clipped, slopes = output
    by_token = advantages.numel() != cu_seqlens.numel() - 1
    # For GSPO two numbers a sequence, and inputs that live anyway: no intermediate of token size.
    ctx.save_for_backward(slopes, advantages if by_token else None, mask, cu_seqlens)
    ctx.dtype, ctx.denominator = logp_new.dtype, denominator
    ctx.mark_non_differentiable(ratios, clipped, slopes)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *unused):
    if grad_loss is None:
        return (None,) * 9
    slopes, token_advantages, mask, cu_seqlens = ctx.saved_tensors
    gradient = torch.ops.gspo_megatron.gspo_backward(
        grad_loss, slopes, token_advantages, mask, cu_seqlens, ctx.denominator, ctx.dtype
    )
    return (gradient,) + (None,) * 8


register_autograd("gspo_megatron::gspo_forward", _backward, setup_context=_setup_context)
library.load()
