"""The surrogate that clips each token by itself, summed by sequence: what GRPO, Dr. GRPO, DAPO and PPO share.

With d_t = logp_new - logp_old and r_t = exp(d_t), sequence i has

    objective_i = sum_t m_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)

(DeepSeekMath, arXiv 2402.03300, equation 3; arXiv 1707.06347, equation 7), and where A_t < 0 not below dual A_t (arXiv
1912.09729, equation 5). `token_surrogate_forward` reads the tokens once and leaves these sums beside those of the
sequence ratio; `token_surrogate_backward` reads them once more and writes the gradient. Nothing of the size of a token
vector lives between the two but their inputs. Weights, denominators and regularizers are the caller's, by sequence.

They run in C++ where the library was built (ops/library.py) and from ops/token_surrogate_reference.py elsewhere: the
same names, shapes and errors. Left out: a gradient of the gradient, and one for logp_old or the advantages.
"""

import math

import torch
from torch.library import define, impl, register_autograd, register_fake

from gspo_megatron.ops import library
from gspo_megatron.ops import sequence_ratio_reference as sequences
from gspo_megatron.ops import token_surrogate_reference as reference

COLUMNS = sequences.COLUMNS + reference.SURROGATE_COLUMNS


def token_objectives(
    logp_new: torch.Tensor,
    logp_old: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    entropy: torch.Tensor | None,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float = math.inf,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the clipped surrogate and the log-ratio by sequence over trained tokens, in one pass over memory.

    Deterministic: the same bits for any number of threads and any packing of the same sequences, in the gradient too.

    Args:
        logp_new: [T] fp32, fp64, bf16 or fp16, log-probs in nats, differentiable. What stands where the mask is 0 is
            not looked at, NaN included, here and in every other vector.
        logp_old: [T], the types of logp_new (they may differ).
        mask: [T] bool, uint8, fp32 or fp64; a token counts where it is above 0.
        cu_seqlens: [S+1] int32, monotone, at most T: sequence i is tokens cu_seqlens[i] to cu_seqlens[i+1]. Tokens
            outside (a padding segment) belong to no sequence.
        entropy: [T] in nats, the types of log-probs; None: its column is 0. No gradient flows through here.
        advantages: [S] fp32 or fp64, or [T] with one a token ([S] where S = T).
        clip_low, clip_high: 1 - clip_low and 1 + clip_high bound the ratio.
        clip_dual: where A < 0 the ratio is bounded above by this too; infinity: not.

    Returns:
        (objective [S] fp64, differentiable by logp_new; table [S, 9] fp64 with COLUMNS, without gradient, whose last
        column is the objective again).

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes that do not agree, devices that differ, cu_seqlens not monotone or past T.
    """
    return torch.ops.gspo_megatron.token_surrogate_forward(
        logp_new, logp_old, mask, cu_seqlens, entropy, advantages, clip_low, clip_high, clip_dual
    )


# ---- Registration: schema, reference, fake, autograd ----

_TAGS = (torch.Tag.pt2_compliant_tag,)
_CLIP = "float clip_low, float clip_high, float clip_dual"
define(
    "gspo_megatron::token_surrogate_forward",
    "(Tensor logp_new, Tensor logp_old, Tensor mask, Tensor cu_seqlens, Tensor? entropy, Tensor advantages,"
    f" {_CLIP}) -> (Tensor objective, Tensor table)",
    tags=_TAGS,
)
define(
    "gspo_megatron::token_surrogate_backward",
    "(Tensor grad, Tensor logp_new, Tensor logp_old, Tensor mask, Tensor cu_seqlens, Tensor advantages,"
    f" {_CLIP}) -> Tensor",
    tags=_TAGS,
)
# "default" is CompositeExplicitAutograd: any device without a kernel of its own.
impl("gspo_megatron::token_surrogate_forward", "default")(reference.token_surrogate_forward)
impl("gspo_megatron::token_surrogate_backward", "default")(reference.token_surrogate_backward)


@register_fake("gspo_megatron::token_surrogate_forward")
def _(logp_new, logp_old, mask, cu_seqlens, entropy, advantages, clip_low, clip_high, clip_dual):
    reference.check_tokens(logp_new, logp_old, mask, cu_seqlens, entropy, advantages)
    size = cu_seqlens.numel() - 1
    return tuple(logp_new.new_empty(shape, dtype=torch.float64) for shape in ((size,), (size, len(COLUMNS))))


@register_fake("gspo_megatron::token_surrogate_backward")
def _(grad, logp_new, logp_old, mask, cu_seqlens, advantages, clip_low, clip_high, clip_dual):
    reference.check_tokens(logp_new, logp_old, mask, cu_seqlens, None, advantages)
    return logp_new.new_empty(logp_new.shape)


def _setup_context(ctx, inputs, output):
    logp_new, logp_old, mask, cu_seqlens, _, advantages, *clip = inputs
    # Inputs that live anyway: the ratio of each token is cheaper to compute again than to keep.
    ctx.save_for_backward(logp_new, logp_old, mask, cu_seqlens, advantages)
    ctx.clip = clip
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_objective, _):
    if grad_objective is None:
        return (None,) * 9
    gradient = torch.ops.gspo_megatron.token_surrogate_backward(grad_objective, *ctx.saved_tensors, *ctx.clip)
    return (gradient,) + (None,) * 8


register_autograd("gspo_megatron::token_surrogate_forward", _backward, setup_context=_setup_context)
library.load()
