"""What a caller of a loss can get wrong is refused in the caller's own names, before anything is computed.

Types, shapes and devices cost no synchronisation with a GPU; the mask's values (`trained`) do, and only padded inputs
are asked for theirs. Left out: values of log-probs and advantages. One that is not finite makes a loss that is not.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from gspo_megatron.ops.sequence_ratio_reference import FLOATS, MASKS

ADVANTAGES = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
Entry = TypeVar("Entry")


def given(tensor: torch.Tensor | None, name: str, otherwise: str = "") -> torch.Tensor:
    """Return what a loss cannot do without. Raises ValueError where it was not given.

    Args:
        otherwise: what the caller may do as well.
    """
    if tensor is None:
        raise ValueError(f"{name} = None: this loss needs it. Give {name}{otherwise}.")
    return tensor


def entry(table: Mapping[str, Entry], value: str, option: str) -> Entry:
    """Return what a table has for an option's value. Raises ValueError for one that it has not."""
    if value not in table:
        raise ValueError(f"{option} = {value!r}: must be one of {', '.join(table)}.")
    return table[value]


def check_type(name: str, value: object, types: Sequence[torch.dtype]) -> None:
    """Raise TypeError for what is no tensor of one of these types."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: must be a tensor. Give torch.tensor({name}).")
    if value.dtype not in types:
        wanted = ", ".join(str(one).removeprefix("torch.") for one in types)
        raise TypeError(f"{name} is {value.dtype}: must be one of {wanted}. Convert it, as by {name}.to({types[0]}).")


def check_logprobs(logprobs: object, dims: int, form: str) -> None:
    """Check logprobs, which all else is compared with. Raises TypeError, or ValueError for another number of dims."""
    check_type("logprobs", logprobs, FLOATS)
    if isinstance(logprobs, torch.Tensor) and logprobs.dim() != dims:
        raise ValueError(f"logprobs has shape {list(logprobs.shape)}: must be {form}.")


def check_fit(name: str, value: torch.Tensor, shapes: Mapping[str, tuple[int, ...]], logprobs: torch.Tensor) -> None:
    """Raise ValueError where a tensor has none of these shapes (each by what it holds), or is not where logprobs is."""
    if tuple(value.shape) not in shapes.values():
        wanted = " or ".join(f"{list(shape)}, {what}" for what, shape in shapes.items())
        raise ValueError(f"{name} has shape {list(value.shape)}: must be {wanted}. Cut or index it to that shape.")
    if value.device != logprobs.device:
        device = logprobs.device
        raise ValueError(
            f"{name} is on {value.device}: must be on {device} as logprobs is. Give {name}.to('{device}')."
        )


def check_log_probs(log_probs: Mapping[str, torch.Tensor | None], logprobs: torch.Tensor) -> None:
    """Check by name what has a number a token; None was not given. Raises TypeError or ValueError."""
    for name, values in log_probs.items():
        if values is not None:
            check_type(name, values, FLOATS)
            check_fit(name, values, {"as logprobs": tuple(logprobs.shape)}, logprobs)


def check_advantages(advantages: torch.Tensor | None, sequences: int, logprobs: torch.Tensor) -> None:
    """Check [sequences], or one a token; None was not given. Raises TypeError or ValueError."""
    if advantages is not None:
        check_type("advantages", advantages, ADVANTAGES)
        shapes = {"one a sequence": (sequences,), "one a token": tuple(logprobs.shape)}
        check_fit("advantages", advantages, shapes, logprobs)


def check_packing(loss_mask: torch.Tensor, cu_seqlens: torch.Tensor, sequences: int, logprobs: torch.Tensor) -> None:
    """Check the mask [T], and how many bounds there are. Raises TypeError or ValueError."""
    check_type("loss_mask", loss_mask, MASKS)
    check_fit("loss_mask", loss_mask, {"as logprobs": tuple(logprobs.shape)}, logprobs)
    check_type("cu_seqlens", cu_seqlens, (torch.int32,))
    size = max(cu_seqlens.numel(), sequences + 1)
    check_fit("cu_seqlens", cu_seqlens, {f"bounds of num_sequences = {sequences}, or more": (size,)}, logprobs)


def trained(loss_mask: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Return which tokens are trained, [B, L] bool.

    Raises:
        TypeError: loss_mask is no tensor.
        ValueError: it does not fit, or has a value that is neither 0 nor 1.
    """
    if not isinstance(loss_mask, torch.Tensor):
        check_type("loss_mask", loss_mask, MASKS)
    check_fit("loss_mask", loss_mask, {"as logprobs": tuple(logprobs.shape)}, logprobs)
    wrong = ((loss_mask != 0) & (loss_mask != 1)).nonzero()
    if wrong.numel():
        place = wrong[0].tolist()
        value = loss_mask[tuple(place)].item()
        raise ValueError(f"loss_mask{place} = {value}: must be 0 or 1. Weigh tokens by advantages, one a token.")
    return loss_mask == 1


def warn_of_halves(log_probs: Mapping[str, torch.Tensor | None]) -> None:
    """Warn the caller of a loss once where log-probs are in half precision."""
    halves = [name for name, values in log_probs.items() if values is not None and values.dtype in HALVES]
    if halves:
        warnings.warn(
            f"{', '.join(halves)}: in half precision. Between -8 and -16 bf16 numbers are 0.06 apart (fp16: 0.008), "
            "and GSPO clips the mean log-ratio of a sequence at 4e-4, so the ratio loses its digits. Compute log-probs "
            "in fp32, from logits in fp32.",
            stacklevel=4,
        )
