"""A packed batch is held to what its record says. Every message names the field and the first bad index.

`check_batch` looks at what the data side made, before any work; `first_not_finite` explains a gradient that came out as
not a number, where looking at each step would cost a synchronisation.
"""

import torch

from gspo_megatron.batch import PackedBatch
from gspo_megatron.errors import RolloutError

TOKEN_FIELDS = ("position_ids", "loss_mask", "old_logprobs", "ref_logprobs", "rollout_logprobs", "values", "returns")
OVERFLOW = 88.0  # exp of more is infinite in fp32
SEQUENCE_FIELDS = ("rewards", "group_id", "truncated")


def check_batch(batch: PackedBatch) -> None:
    """Raise RolloutError unless lengths agree, cu_seqlens ascend, masks are 0 or 1 and all numbers are finite.

    For batches on the CPU: each look is a synchronisation elsewhere.
    """
    size, tokens = batch.num_sequences, batch.num_tokens
    _require(size >= 1 and tokens >= 1, "num_sequences", size, f"with {tokens} tokens: a batch must not be empty")
    _check_bounds(batch)
    for name in TOKEN_FIELDS + SEQUENCE_FIELDS:
        values = getattr(batch, name)
        if values is not None:
            wanted = tokens if name in TOKEN_FIELDS else size
            _require(values.numel() == wanted, name, list(values.shape), f"must have shape [{wanted}]")
    number = batch.advantages.numel()
    _require(
        number in (size, tokens),
        "advantages",
        list(batch.advantages.shape),
        f"must have shape [{size}], one a sequence, or [{tokens}], one a token",
    )
    _check_mask(batch)
    for name in ("advantages", "rewards", "rollout_logprobs", "old_logprobs", "ref_logprobs"):
        values = getattr(batch, name)
        bad = None if values is None else _first(~torch.isfinite(values))
        _require(bad is None, f"{name}[{bad}]", None if bad is None else float(values[bad]), "must be finite")


def first_not_finite(batch: PackedBatch, logprobs: torch.Tensor) -> str | None:
    """Name the first trained token whose log-prob, or first sequence or token whose advantage, is not finite.

    Where all are, the trained token with the largest log-ratio, if its exponential overflows in fp32.
    """
    trained = batch.loss_mask > 0
    fields = {"logprobs": logprobs}
    fields |= {name: getattr(batch, name) for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")}
    for name, values in fields.items():
        bad = None if values is None else _first(trained & ~torch.isfinite(values))
        if bad is not None:
            return (
                f"{name}[{bad}] = {float(values[bad])}, {_place(batch, bad)}, must be finite. The weights are as "
                "before this step; if they are finite, lower the learning rate and resume before it"
            )
    bad = _first(~torch.isfinite(batch.advantages))
    if bad is not None:
        return f"advantages[{bad}] = {float(batch.advantages[bad])} must be finite. Check the rewards"
    if batch.old_logprobs is None or not bool(trained.any()):
        return None
    log_ratio = torch.where(trained, logprobs - batch.old_logprobs, 0.0)
    worst = int(log_ratio.argmax())
    if float(log_ratio[worst]) < OVERFLOW:
        return None
    return (
        f"logprobs[{worst}] = {float(logprobs[worst]):g} and old_logprobs[{worst}] = "
        f"{float(batch.old_logprobs[worst]):g}, {_place(batch, worst)}: the ratio exp({float(log_ratio[worst]):g}) "
        "overflows. The weights are as before this step. Old log-probs are of another model or text, or the policy has "
        "run away: lower optimizer.lr"
    )


def _place(batch: PackedBatch, position: int) -> str:
    sequence = int(torch.searchsorted(batch.cu_seqlens[1:].contiguous(), position, right=True))
    return f"token {position - int(batch.cu_seqlens[sequence])} of sequence {sequence}"


def _check_bounds(batch: PackedBatch) -> None:
    bounds = batch.cu_seqlens.tolist()
    size, tokens = batch.num_sequences, batch.num_tokens
    _require(
        len(bounds) in (size + 1, size + 2),
        "cu_seqlens",
        list(batch.cu_seqlens.shape),
        f"must have {size + 1} entries, or {size + 2} with a padding segment",
    )
    _require(bounds[0] == 0, "cu_seqlens[0]", bounds[0], "must be 0")
    for i in range(1, len(bounds)):
        _require(
            bounds[i] > bounds[i - 1],
            f"cu_seqlens[{i}]",
            bounds[i],
            f"must be above cu_seqlens[{i - 1}] = {bounds[i - 1]}",
        )
    _require(
        bounds[-1] == tokens, f"cu_seqlens[{len(bounds) - 1}]", bounds[-1], f"must be the {tokens} tokens there are"
    )


def _check_mask(batch: PackedBatch) -> None:
    mask = batch.loss_mask
    bad = _first((mask != 0) & (mask != 1))
    _require(bad is None, f"loss_mask[{bad}]", None if bad is None else float(mask[bad]), "must be 0 or 1")
    starts = batch.cu_seqlens[:-1].long()
    bad = _first(mask[starts] != 0)
    place = None if bad is None else int(starts[bad])
    _require(bad is None, f"loss_mask[{place}]", 1, "is a sequence's first token, which nothing predicts: must be 0")
    end = int(batch.cu_seqlens[batch.num_sequences])
    bad = _first(mask[end:] != 0)
    _require(bad is None, f"loss_mask[{end + (bad or 0)}]", 1, "is padding: must be 0")


def _first(bad: torch.Tensor) -> int | None:
    found = bad.nonzero()
    return int(found[0]) if found.numel() else None


def _require(ok: bool, field: str, value: object, constraint: str) -> None:
    if not ok:
        raise RolloutError(
            f"{field} = {value}: {constraint}. Check what made the batch (rollout engine, data/packing.py)."
        )
