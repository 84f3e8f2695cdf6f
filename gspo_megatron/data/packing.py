"""Sequences become microbatches: packed end to end (THD), balanced by tokens, never splitting a sequence.

A sequence stays whole because its ratio is a mean over all its tokens and is needed before its first backward. Balance
counts tokens, not attention's squares: responses of one rollout are of similar length, and the linear layers dominate.
Every sequence can be filled up at its end to a multiple of some length: of 2 CP tokens, so that context-parallel ranks
get equal chunks of it (context_parallel.py cuts them; each rank keeps the whole microbatch), or of the longest length,
which makes an ordinary padded batch.

Left out: moving sequences between ranks (every rank knows all sequences and keeps its own).
"""

import heapq
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from gspo_megatron.batch import PackedBatch, TrainSequence
from gspo_megatron.errors import RolloutError
from gspo_megatron.routing.rollout_routes import UNKNOWN


def pack(
    sequences: Sequence[TrainSequence],
    max_tokens: int,
    pad_to_multiple: int,
    num_microbatches: int | None = None,
    unit: int = 1,
    sequence_multiple: int = 1,
) -> list[PackedBatch]:
    """Make microbatches of at most `max_tokens` tokens each, as equal in tokens as a greedy choice makes them.

    Args:
        max_tokens: of one microbatch, each sequence with its own padding.
        pad_to_multiple: every microbatch is filled up to a multiple of this many tokens by a segment of its own, which
            is not counted in max_tokens nor in num_sequences. Where it is a multiple of sequence_multiple
            (Topology.microbatch_multiple), that segment's length is one too.
        num_microbatches: exactly that many (all data-parallel ranks must run the same number, see
            `microbatches_needed`); None: as few as fit.
        unit: so many neighbours in `sequences` stay neighbours in one microbatch (2 for preference pairs).
        sequence_multiple: every sequence is filled up to a multiple of this many tokens (token 0, mask 0).

    Returns:
        Within a microbatch the sequences keep their order, and `source_index` tells where each came from.

    Raises:
        RolloutError: a sequence is empty, too long or its parts disagree, neighbours are too long together, or the
            number of microbatches does not work.
    """
    _check(sequences, max_tokens, unit, sequence_multiple)
    if num_microbatches is None:
        num_microbatches = microbatches_needed(sequences, max_tokens, unit, sequence_multiple)
    bins = _fill(_unit_lengths(sequences, unit, sequence_multiple), max_tokens, num_microbatches)
    places = [[i * unit + k for i in units for k in range(unit)] for units in bins]
    return [_join(sequences, indices, pad_to_multiple, sequence_multiple) for indices in places]


def microbatches_needed(
    sequences: Sequence[TrainSequence], max_tokens: int, unit: int = 1, sequence_multiple: int = 1
) -> int:
    """Return a number of microbatches for which `pack` works, as does every larger one up to len(sequences) / unit.

    All data-parallel ranks run the maximum of their numbers. Raises RolloutError as `pack` does.
    """
    _check(sequences, max_tokens, unit, sequence_multiple)
    return len(_fewest(_unit_lengths(sequences, unit, sequence_multiple), max_tokens))


def padding_alone(like: PackedBatch, pad_to_multiple: int) -> PackedBatch:
    """Return a microbatch of the padding segment and no sequence, with the optional fields of another microbatch."""
    tokens, whole = pad_to_multiple, torch.zeros(pad_to_multiple, dtype=torch.float32)
    routes = like.rollout_routes
    if routes is not None:
        routes = routes.new_full((routes.size(0), tokens, routes.size(2)), UNKNOWN)
    return PackedBatch(
        tokens=torch.zeros(tokens, dtype=torch.int64),
        position_ids=torch.arange(tokens, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        num_sequences=0,
        loss_mask=whole,
        advantages=torch.zeros(0, dtype=torch.float32),
        rollout_logprobs=None if like.rollout_logprobs is None else whole.clone(),
        rollout_routes=routes,
        rollout_layers=like.rollout_layers,
        rewards=torch.zeros(0, dtype=torch.float32),
        group_id=torch.zeros(0, dtype=torch.int64),
        truncated=torch.zeros(0, dtype=torch.bool),
        source_index=[],
    )


def padded_lengths(sequences: Sequence[TrainSequence], multiple: int) -> list[int]:
    """Return the tokens of each sequence as `pack` lays it out."""
    return [-(-len(sequence.token_ids) // multiple) * multiple for sequence in sequences]


def _unit_lengths(sequences: Sequence[TrainSequence], unit: int, multiple: int) -> list[int]:
    lengths = padded_lengths(sequences, multiple)
    return [sum(lengths[i : i + unit]) for i in range(0, len(lengths), unit)]


def _check(sequences: Sequence[TrainSequence], max_tokens: int, unit: int, multiple: int) -> None:
    """Refuse what no packing can hold, and records whose parts would be put at the wrong tokens."""
    if len(sequences) % unit:
        raise ValueError(f"{len(sequences)} sequences are no multiple of unit = {unit}")
    if not sequences:
        raise RolloutError(
            "there is no sequence to pack: each rank needs one a minibatch. Raise rollout.num_prompts or "
            "lower algorithm.num_minibatches."
        )
    padded = padded_lengths(sequences, multiple)
    for i, sequence in enumerate(sequences):
        length, logprobs = len(sequence.token_ids), sequence.rollout_logprobs
        if padded[i] > max_tokens:
            filled = f" ({padded[i]} with padding to a multiple of {multiple})" if multiple > 1 else ""
            raise RolloutError(
                f"max_tokens_per_microbatch = {max_tokens}: sequence {i} has {length} tokens{filled} and is never "
                f"split. Give max_tokens_per_microbatch at least {padded[i]}, or lower "
                "rollout.max_response_length."
            )
        if not 1 <= sequence.prompt_length <= length:
            # Nothing precedes the first token, so it has no log-prob and cannot be part of a response.
            raise RolloutError(
                f"sequence {i}: prompt_length = {sequence.prompt_length} must lie between 1 and its "
                f"{length} tokens. Check the rollout engine."
            )
        if (logprobs is None) != (sequences[0].rollout_logprobs is None):
            raise RolloutError(
                f"sequence {i}: rollout_logprobs must be given for all sequences of a batch or for none. "
                "Check the rollout engine."
            )
        if logprobs is not None and len(logprobs) != sequence.response_length:
            raise RolloutError(
                f"sequence {i}: {len(logprobs)} rollout_logprobs for {sequence.response_length} response "
                "tokens, must be one a token. Check the rollout engine."
            )
        _check_mask(i, sequence)
    for i, length in enumerate(_unit_lengths(sequences, unit, multiple)):
        if length > max_tokens:  # where unit is 1, a sequence's own message above
            raise RolloutError(
                f"max_tokens_per_microbatch = {max_tokens}: sequences {i * unit} to {(i + 1) * unit - 1} have {length} "
                f"tokens and stay in one microbatch. Give max_tokens_per_microbatch at least {length}."
            )


def _check_mask(i: int, sequence: TrainSequence) -> None:
    mask = sequence.loss_mask
    if mask is None:
        return
    if len(mask) != sequence.response_length:
        raise RolloutError(
            f"sequence {i}: {len(mask)} numbers in loss_mask for {sequence.response_length} response tokens, must be "
            "one a token. Check the rollout engine."
        )
    bad = next((k for k, value in enumerate(mask) if value not in (0, 1)), None)
    if bad is not None:
        raise RolloutError(
            f"sequence {i}: loss_mask[{bad}] = {mask[bad]!r} must be 0 or 1. Check the rollout engine; weights of "
            "tokens belong in the advantages."
        )


def _fill(lengths: list[int], max_tokens: int, count: int) -> list[list[int]]:
    """Exactly `count` non-empty bins of at most max_tokens; indices ascend in a bin, bins by their first index."""
    if not 1 <= count <= len(lengths):
        raise RolloutError(
            f"num_microbatches = {count} must lie between 1 and the number of sequences of this rank, "
            f"{len(lengths)}: each microbatch holds one. Lower algorithm.num_minibatches, or make "
            "rollout.num_prompts * rollout.group_size a multiple of it times the data-parallel "
            "size."
        )
    bins = _balance(lengths, count)
    if not _fits(bins, lengths, max_tokens):
        # Balancing into more bins can overflow where fewer did not; then halve the fullest of the fewer.
        bins = _fewest(lengths, max_tokens)
        if len(bins) > count:
            raise RolloutError(
                f"num_microbatches = {count}: {sum(lengths)} tokens do not fit at "
                f"max_tokens_per_microbatch = {max_tokens}. Give num_microbatches at least {len(bins)} "
                "(microbatches_needed), or raise max_tokens_per_microbatch."
            )
        while len(bins) < count:
            fullest = max((b for b in bins if len(b) > 1), key=lambda b: sum(lengths[i] for i in b))
            bins.remove(fullest)
            halves = _balance([lengths[i] for i in fullest], 2)
            bins += [[fullest[i] for i in half] for half in halves]
    return sorted(sorted(indices) for indices in bins)


def _fewest(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """The least number of balanced bins that fit, or first-fit decreasing where that takes fewer."""
    packed = _first_fit(lengths, max_tokens)
    for count in range(-(-sum(lengths) // max_tokens), len(packed)):
        bins = _balance(lengths, count)
        if _fits(bins, lengths, max_tokens):
            return bins
    return packed


def _balance(lengths: list[int], count: int) -> list[list[int]]:
    """Longest first into the bin with the fewest tokens so far (Graham 1969, LPT)."""
    bins: list[list[int]] = [[] for _ in range(count)]
    # Bins that are level take turns by count, so that sequences of equal (or no) length spread over all of them.
    heap = [(0, 0, k) for k in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, size, k = heapq.heappop(heap)
        bins[k].append(i)
        heapq.heappush(heap, (tokens + lengths[i], size + 1, k))
    return [sorted(indices) for indices in bins]


def _first_fit(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: few bins, not balanced."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        k = next((k for k, free in enumerate(room) if free >= lengths[i]), len(bins))
        if k == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[k].append(i)
        room[k] -= lengths[i]
    return bins


def _fits(bins: list[list[int]], lengths: list[int], max_tokens: int) -> bool:
    return all(sum(lengths[i] for i in indices) <= max_tokens for indices in bins)


def _join(
    sequences: Sequence[TrainSequence], indices: list[int], pad_to_multiple: int, sequence_multiple: int
) -> PackedBatch:
    """One microbatch of the named sequences, see PackedBatch for the shapes."""
    chosen = [sequences[i] for i in indices]
    lengths = padded_lengths(chosen, sequence_multiple)
    padding = -sum(lengths) % pad_to_multiple
    segments = [*lengths, padding] if padding else lengths
    tokens: list[int] = []
    mask: list[int] = []
    rollout: list[float] = []
    for sequence, length in zip(chosen, lengths, strict=True):
        fill = [0] * (length - len(sequence.token_ids))
        trained = [1] * sequence.response_length if sequence.loss_mask is None else sequence.loss_mask
        tokens += sequence.token_ids + fill
        mask += [0] * sequence.prompt_length + trained + fill
        rollout += [0.0] * sequence.prompt_length + (sequence.rollout_logprobs or []) + [0.0] * len(fill)
    has_rollout = chosen[0].rollout_logprobs is not None
    routes, layers = _join_routes(chosen, lengths, padding)
    fill = [0] * padding
    return PackedBatch(
        tokens=torch.tensor(tokens + fill, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length, dtype=torch.int64) for length in segments]),
        cu_seqlens=torch.tensor([0, *segments], dtype=torch.int64).cumsum(0).to(torch.int32),
        num_sequences=len(chosen),
        loss_mask=torch.tensor(mask + fill, dtype=torch.float32),
        advantages=torch.tensor([sequence.advantage for sequence in chosen], dtype=torch.float32),
        rollout_logprobs=torch.tensor(rollout + [0.0] * padding, dtype=torch.float32) if has_rollout else None,
        rollout_routes=routes,
        rollout_layers=layers,
        rewards=torch.tensor([sequence.reward for sequence in chosen], dtype=torch.float32),
        group_id=torch.tensor([sequence.group_id for sequence in chosen], dtype=torch.int64),
        truncated=torch.tensor([sequence.truncated for sequence in chosen], dtype=torch.bool),
        source_index=list(indices),
    )


def _join_routes(
    chosen: list[TrainSequence], lengths: list[int], padding: int
) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """Return rollout_routes and rollout_layers of a batch, None and () where its rollout recorded none."""
    if chosen[0].routes is None:
        return None, ()
    recorded = [sequence.routes for sequence in chosen if sequence.routes is not None]
    padded = [routes.padded(length) for routes, length in zip(recorded, lengths, strict=True)]
    return pad(torch.cat(padded, dim=1), (0, 0, 0, padding), value=UNKNOWN), recorded[0].layers
