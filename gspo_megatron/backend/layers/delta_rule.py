"""The gated delta rule (arXiv 2412.06464) and the short convolution in front of it, in plain PyTorch.

Per head, a memory S [k, v] is read and written token by token, with a decay a in (0, 1] and a rate b in (0, 1):

    u_t = b_t (v_t - a_t S_{t-1}' k_t),   S_t = a_t S_{t-1} + k_t u_t',   o_t = S_t' q_t

`chunked` does CHUNK tokens at once: within a chunk every u is linear in the memory before it, with a unit triangular
system between them. `step` is the formula itself. Both return the memory, so that one goes on where the other ended.

Left out: fused kernels (package fla).
"""

import torch
import torch.nn.functional as F

CHUNK = 64


def causal_convolution(
    x: torch.Tensor, weight: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU of a convolution of each channel with its own kernel, over a token and those before it.

    Args:
        x: [n, L, C].
        weight: [C, K]; the last column is the token's own.
        before: [n, K - 1, C], what came before x (zeros: nothing).

    Returns:
        [n, L, C], and [n, K - 1 + L, C]: `before` and x joined.
    """
    joined = torch.cat([before, x], 1)
    length, wide = x.size(1), torch.promote_types(x.dtype, torch.float32)
    taps = (joined[:, tap : tap + length].to(wide) * weight[:, tap].to(wide) for tap in range(weight.size(1)))
    return F.silu(sum(taps, torch.zeros((), dtype=wide))).to(x.dtype), joined


def unit(x: torch.Tensor) -> torch.Tensor:
    """Scale vectors to length 1: [..., d] -> the same shape."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    rate: torch.Tensor,
    memory: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Go through L tokens of n sequences. A token with rate 0 and log-decay 0 leaves the memory alone.

    Args:
        query, key: [n, L, heads, k]. value: [n, L, heads, v]. All of one floating type, fp32 or wider.
        log_decay, rate: [n, L, heads].
        memory: [n, heads, k, v], before the first token.

    Returns:
        [n, L, heads, v], and the memory behind the last token.
    """
    length = query.size(1)
    size = min(CHUNK, length)
    query, key, value, log_decay, rate = (_chunks(x, size) for x in (query, key, value, log_decay, rate))
    reach = log_decay.cumsum(-1)  # [n, heads, chunks, C]: log of the decay from the chunk's start on
    # Between a token and those before it; -inf before exp, because its upper triangle would overflow.
    later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    between = (reach.unsqueeze(-1) - reach.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    grown = reach.exp().unsqueeze(-1)
    rated = key * rate.unsqueeze(-1)
    system = rated @ key.transpose(-1, -2) * between  # its diagonal counts as 1
    right = torch.cat([value * rate.unsqueeze(-1), rated * grown], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, read = solved.split((value.size(-1), key.size(-1)), -1)  # u = written - read S
    inside = query @ key.transpose(-1, -2) * between
    query = query * grown
    key = key * (reach[..., -1:] - reach).exp().unsqueeze(-1)
    out = []
    for chunk in range(reach.size(2)):
        u = written[:, :, chunk] - read[:, :, chunk] @ memory
        out.append(query[:, :, chunk] @ memory + inside[:, :, chunk] @ u)
        memory = grown[:, :, chunk, -1:] * memory + key[:, :, chunk].transpose(-1, -2) @ u
    return torch.cat(out, 2)[:, :, :length].transpose(1, 2), memory


def _chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[n, L, heads, ...] -> [n, heads, chunks, size, ...], filled up with zeros."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.size(1) % size))
    return x.transpose(1, 2).unflatten(2, (-1, size))


def step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    rate: torch.Tensor,
    memory: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Go through one token of n sequences: the arguments of `chunked` without L."""
    memory = log_decay.exp()[..., None, None] * memory
    u = rate.unsqueeze(-1) * (value - (key.unsqueeze(-2) @ memory).squeeze(-2))
    memory = memory + key.unsqueeze(-1) * u.unsqueeze(-2)
    return (query.unsqueeze(-2) @ memory).squeeze(-2), memory
