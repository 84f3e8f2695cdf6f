"""Rotary frequencies of a head's pairs of dimensions, plain and as they are scaled for a longer context.

Yarn's factor on cosine and sine is not here: latent attention's angles have it (latent_attention.py), and in plain
attention it goes into the softmax's scale (transformer_config.py). Left out: scalings that depend on the sequence's
length (dynamic, longrope).
"""

import math

import torch

from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.rope_scaling import Linear, Llama3, Yarn


def inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """Return [d / 2] fp32, radians a position, of the part of each head that is rotated."""
    latent = architecture.latent
    dim = latent.qk_rope_head_dim if latent else int(architecture.head_dim * architecture.rotary_share)
    plain = 1.0 / architecture.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = architecture.rope_scaling
    match scaling:
        case None:
            return plain
        case Linear():
            return plain / scaling.factor
        case Llama3():
            return _llama3(plain, scaling)
        case Yarn():
            return _yarn(plain, dim, architecture.rope_theta, scaling)


def _llama3(plain: torch.Tensor, scaling: Llama3) -> torch.Tensor:
    """Wavelengths of more than context / low are stretched by `factor`, those of less than context / high are kept, and
    in between it goes linearly in context / wavelength (Llama 3, arXiv 2407.21783, and its published code)."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * (1 - kept) + plain * kept


def _yarn(plain: torch.Tensor, dim: int, base: float, yarn: Yarn) -> torch.Tensor:
    """YaRN, arXiv 2309.00071, equations 17 to 23."""

    def dimension(rotations: float) -> float:
        """Where so many rotations fit into the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)
