"""These checks say, in sentences for the user, what is wrong with a run's numbers though training goes on.

`findings` and `truncation_findings` look at the first step, once, for what works but is hardly meant; `update_findings`
at every step. Only the last pipeline stage has old log-probs, so it tells the others whether it found something, by the
channel that results of an update take. Rank 0 prints, so the replica that is looked at is rank 0's; the others are
filled by the same code.

Left out: old log-probs of another packing than the update's. train.py updates on the very batch objects that were
filled, so that cannot happen there, and `lint.warnings` speaks of old_logprobs = rollout, where it does.
`gspo-megatron doctor --noise-floor` measures what it costs.
"""

from collections.abc import Sequence

import torch

from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.batch import Minibatch, PackedBatch, TrainSequence, UpdateResult
from gspo_megatron.ops.sequence_ratio_reference import sequence_ids

ENOUGH = 64  # fp32 numbers that are all bf16 numbers by chance: 2^-16 each


def findings(policy: Policy, minibatches: Sequence[Minibatch], sequences: Sequence[TrainSequence]) -> list[str]:
    """Return sentences for the user, the same on every rank of a replica. A collective over pipeline stages.

    Args:
        minibatches: with old log-probs filled in (None: the update takes its own forward's).
        sequences: this replica's responses, by the numbers in the minibatches.
    """
    flag = None
    if policy.topology.is_last_stage:
        batches = [batch for minibatch in minibatches for batch in minibatch.batches]
        flag = torch.tensor([is_stored_in_bf16(batches)], dtype=torch.float64, device=policy.device)
    found = []
    if bool(policy.from_last_stage(flag, 1)):
        found.append(
            "old log-probs: every one of them is a bf16 number, so they were stored or sent as bf16. That alone puts "
            "an error of about 1.5e-4 on the log-ratio of 64 tokens, half of GSPO's clip range. Keep them in fp32, or "
            "give algorithm.old_logprobs recomputed."
        )
    return found + mask_findings(minibatches, sequences)


def update_findings(results: Sequence[UpdateResult], row: dict, max_ratio: float) -> list[str]:
    """Return sentences about updates skipped for a number that is not finite, and about a ratio above max_ratio."""
    found = [
        f"update {number} of {len(results)} was skipped on all ranks: {result.not_finite}"
        for number, result in enumerate(results, 1)
        if result.not_finite
    ]
    largest = row.get("ratio/max", 0.0)
    if largest > max_ratio:
        found.append(
            f"ratio/max is {largest:.3g}, above faults.max_ratio = {max_ratio:g}: a response is now that many times as "
            "likely a token as when it was sampled. Where its advantage is negative, its gradient is as many times too "
            "large before optimizer.clip_grad. Lower optimizer.lr or num_minibatches, or bound it by "
            "algorithm.clip_ratio_dual; if it is so from the first minibatch, old log-probs are of another model."
        )
    return found


def truncation_findings(row: dict, limit: int, stops: str, most: float) -> list[str]:
    """Return a sentence where nearly all responses of the first step were cut: perhaps none can end by itself.

    Args:
        most: a larger share is nearly all (faults.max_truncated).
        limit: rollout.max_response_length.
        stops: what ends a response, in words.
    """
    truncated = row["response/truncated"]
    if truncated <= most:
        return []
    return [
        f"response/truncated is {truncated:.2f}: nearly all responses were cut at rollout.max_response_length = "
        f"{limit}. They would end at {stops}. If the model ends its turns by another token, give that to "
        "rollout.stop_token_ids; if its answers are longer, raise rollout.max_response_length."
    ]


def is_stored_in_bf16(batches: Sequence[PackedBatch]) -> bool:
    """Tell whether all trained old log-probs that are not 0, at least ENOUGH of them, are what rounding to bf16 leaves.
    (Under context parallelism those of other ranks are 0.)"""
    trained = [batch.old_logprobs[batch.loss_mask > 0] for batch in batches if batch.old_logprobs is not None]
    if not trained:
        return False
    values = torch.cat(trained)
    values = values[values != 0]
    return values.numel() >= ENOUGH and bool((values.bfloat16().to(values.dtype) == values).all())


def mask_findings(minibatches: Sequence[Minibatch], sequences: Sequence[TrainSequence]) -> list[str]:
    """Return a sentence with the first response whose trained tokens are not all of its tokens: |y| would be
    another."""
    for minibatch in minibatches:
        for batch, numbers in minibatch.numbered():
            size = batch.num_sequences
            ids = sequence_ids(batch.cu_seqlens[: size + 1], batch.num_tokens)
            trained = torch.zeros(size + 1, dtype=torch.int64, device=ids.device).index_add(
                0, ids, (batch.loss_mask > 0).long()
            )
            for number, count in zip(numbers, trained[:-1].tolist(), strict=True):
                # A sequence with a mask of its own (several turns) may leave tokens out.
                has_own_mask = sequences[number].loss_mask is not None
                length = sequences[number].response_length
                if count != length and not has_own_mask:
                    return [
                        f"loss_mask: response {number} has {length} tokens, of which {count} are trained. The "
                        "sequence ratio is a mean over the trained ones, so the response has another ratio and length "
                        "than it seems. Give the sequence a mask of its own if that is meant."
                    ]
    return []
