"""The plain formulas behind ops/sequence_ratio.py in PyTorch, for any device: what the kernels are tested against.

Also the checks of types and shapes, so that an error reads the same with and without the C++ library.
"""

import torch

# In the order of SequenceTable.COLUMNS.
COLUMNS = ("num_tokens", "sum_log_ratio", "sum_sq_log_ratio", "sum_k3", "max_abs_log_ratio", "sum_entropy")
# m A over A > 0 and over A < 0, and how many tokens those are: all that the GSPO-token loss needs of advantages.
TOKEN_COLUMNS = ("sum_positive", "sum_negative", "num_positive", "num_negative")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MASKS = (torch.bool, torch.uint8, torch.float32, torch.float64)


def sequence_ids(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Number the sequence of each token, [T] int64; S for tokens that belong to none."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    ids = torch.searchsorted(cu_seqlens[1:].contiguous().long(), positions, right=True)
    return torch.where(positions < cu_seqlens[0], cu_seqlens.numel() - 1, ids)


def sequence_partials(logp_new, logp_old, mask, cu_seqlens, entropy, token_advantages):
    check_tokens(logp_new, logp_old, mask, cu_seqlens, entropy, token_advantages)
    check_boundaries(cu_seqlens, logp_new.numel())
    size, keep = cu_seqlens.numel() - 1, mask > 0
    ids = sequence_ids(cu_seqlens, logp_new.numel())

    def add(values: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(size + 1, dtype=torch.float64, device=values.device)
        return out.index_add(0, ids, torch.where(keep, values, 0.0).double())[:size]

    log_ratio = torch.where(keep, logp_new.double() - logp_old.double(), 0.0)
    largest = torch.zeros(size + 1, dtype=torch.float64, device=ids.device)
    largest = largest.scatter_reduce(0, ids, log_ratio.abs(), "amax")[:size]
    ones = torch.ones_like(log_ratio)
    columns = [add(ones), add(log_ratio), add(log_ratio.square()), add(log_ratio.expm1() - log_ratio), largest]
    columns.append(torch.zeros_like(largest) if entropy is None else add(entropy.double()))
    if token_advantages is not None:
        advantages = token_advantages.double()
        negative = advantages < 0
        columns += [add(torch.where(negative, 0.0, advantages)), add(torch.where(negative, advantages, 0.0))]
        columns += [add((advantages > 0).double()), add(negative.double())]
    return torch.stack(columns, dim=1)


def gspo_forward(logp_new, partials, advantages, mask, cu_seqlens, clip_low, clip_high, denominator, clip_dual):
    check_forward(logp_new, partials, advantages, mask, cu_seqlens, denominator)
    check_boundaries(cu_seqlens, logp_new.numel())
    tokens, total = partials[:, 0], partials[:, 1]
    counted = tokens > 0
    length = tokens.clamp(min=1)
    ratio = torch.where(counted, (total / length).exp(), 1.0)
    lower, upper = ratio.clamp(1 - clip_low, clip_dual), ratio.clamp(max=1 + clip_high)  # what A < 0, what A > 0 meets
    below, above, over = ratio < 1 - clip_low, ratio > 1 + clip_high, ratio > clip_dual
    if advantages.numel() != cu_seqlens.numel() - 1:
        positive, negative, num_positive, num_negative = partials[:, 6:10].unbind(1)
        objective = torch.where(num_positive > 0, upper * positive, 0.0)
        objective = (objective + torch.where(num_negative > 0, lower * negative, 0.0)) / length
        objective = torch.where(positive.isnan(), positive, objective)
        clipped = torch.stack([below * num_negative, above * num_positive + over * num_negative], dim=1)
        slopes = torch.stack([torch.where(above, 0.0, ratio), torch.where(below | over, 0.0, ratio)], dim=1)
    else:
        weights = advantages.double()
        objective = torch.where(weights < 0, lower, upper) * weights
        low, high = below & (weights < 0), above & (weights > 0) | over & (weights < 0)
        clipped = torch.stack([low * tokens, high * tokens], dim=1)
        slopes = torch.where(low | high, 0.0, ratio * weights).unsqueeze(1).expand(-1, 2)
    loss = -torch.where(counted, objective, 0.0).sum() / denominator
    slopes = torch.where(counted.unsqueeze(1), slopes / length.unsqueeze(1), 0.0)
    return loss, ratio, torch.where(counted.unsqueeze(1), clipped, 0.0), slopes


def gspo_backward(grad_loss, slopes, token_advantages, mask, cu_seqlens, denominator, dtype):
    ids = sequence_ids(cu_seqlens, mask.numel())
    by_token = torch.cat([slopes, slopes.new_zeros(1, 2)])[ids]  # [T, 2]
    if token_advantages is None:
        slope = by_token[:, 0]
    else:
        advantages = token_advantages.double()
        slope = advantages * torch.where(advantages < 0, by_token[:, 1], by_token[:, 0])
    inside = (mask > 0) & (ids < slopes.size(0))
    return torch.where(inside, slope * (-grad_loss / denominator), 0.0).to(dtype)


# ---- Checks; the C++ library makes the same ones ----


def _check_type(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...], words: str) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} is {tensor.dtype}; expected {words}")


def _check_vector(name: str, tensor: torch.Tensor, size: int, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; all inputs must be on one device, here {device}")
    if tensor.dim() != 1 or tensor.numel() != size:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{size}]")


def _check_packing(logp_new: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    size, device = logp_new.numel(), logp_new.device
    _check_vector("logp_new", logp_new, size, device)
    _check_type("logp_new", logp_new, FLOATS, "fp32, fp64, bf16 or fp16")
    _check_vector("mask", mask, size, device)
    _check_type("mask", mask, MASKS, "bool, uint8, fp32 or fp64")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; all inputs must be on one device, here {device}")
    _check_type("cu_seqlens", cu_seqlens, (torch.int32,), "int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; expected [S + 1]")


def check_tokens(logp_new, logp_old, mask, cu_seqlens, entropy, token_advantages) -> None:
    """Check types, shapes and devices of sequence_partials."""
    _check_packing(logp_new, mask, cu_seqlens)
    size, device = logp_new.numel(), logp_new.device
    _check_vector("logp_old", logp_old, size, device)
    _check_type("logp_old", logp_old, FLOATS, "fp32, fp64, bf16 or fp16")
    if entropy is not None:
        _check_vector("entropy", entropy, size, device)
        _check_type("entropy", entropy, FLOATS, "fp32, fp64, bf16 or fp16")
    if token_advantages is not None:
        _check_vector("advantages", token_advantages, size, device)
        _check_type("advantages", token_advantages, (torch.float32, torch.float64), "fp32 or fp64")


def check_advantages(advantages: torch.Tensor, size: int, logp_new: torch.Tensor) -> bool:
    """Check type, shape and device of advantages, [S] or [T]. Returns whether they differ by token."""
    by_token, tokens = advantages.numel() != size, logp_new.numel()
    _check_type("advantages", advantages, (torch.float32, torch.float64), "fp32 or fp64")
    if advantages.dim() != 1 or (by_token and advantages.numel() != tokens):
        shape = list(advantages.shape)
        raise ValueError(f"advantages has shape {shape}; expected [{size}], one a sequence, or [{tokens}], one a token")
    if advantages.device != logp_new.device:
        device = logp_new.device
        raise ValueError(f"advantages is on {advantages.device}; all inputs must be on one device, here {device}")
    return by_token


def check_forward(logp_new, partials, advantages, mask, cu_seqlens, denominator) -> None:
    """Check types, shapes and devices of gspo_forward."""
    _check_packing(logp_new, mask, cu_seqlens)
    size = cu_seqlens.numel() - 1
    by_token = check_advantages(advantages, size, logp_new)
    if partials.device != logp_new.device:
        raise ValueError(f"partials is on {partials.device}; all inputs must be on one device, here {logp_new.device}")
    _check_type("partials", partials, (torch.float64,), "fp64")
    all_columns = len(COLUMNS) + len(TOKEN_COLUMNS)
    wanted = (all_columns,) if by_token else (len(COLUMNS), all_columns)
    if partials.dim() != 2 or partials.size(0) != size or partials.size(1) not in wanted:
        raise ValueError(f"partials has shape {list(partials.shape)}; expected [{size}, {wanted[0]}]")
    if not denominator > 0:
        raise ValueError(f"denominator = {denominator} must be positive")


def check_boundaries(cu_seqlens: torch.Tensor, num_tokens: int) -> None:
    """Check that cu_seqlens are monotone and inside [0, T]."""
    if cu_seqlens[0] < 0:
        raise ValueError(f"cu_seqlens[0] = {int(cu_seqlens[0])} is negative")
    drops = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
    if drops.numel():
        i = int(drops[0])
        here, after = int(cu_seqlens[i]), int(cu_seqlens[i + 1])
        raise ValueError(f"cu_seqlens[{i + 1}] = {after} is less than cu_seqlens[{i}] = {here}")
    if cu_seqlens[-1] > num_tokens:
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])} but there are {num_tokens} tokens")
