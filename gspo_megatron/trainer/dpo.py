"""DPO takes optimizer steps on pairs of a better and a worse answer, against a frozen reference: no rollouts, no
rewards.

Sequences 2p and 2p + 1 of what a replica packs are the chosen and the rejected answer of its pair p, and `unit=2` keeps
them in one microbatch. The reference is the policy as this phase finds it. Every rank tokenizes all pairs (a pass over
text, no communication), so that an error is the same on every rank.

Left out: reference log-probs kept from one epoch to the next (a forward pass at each step instead of a table that must
fit the data), and accuracy on the recipe's tasks, which the pairs need not be about.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.algorithms.dpo import PREFERENCE_LOSSES
from gspo_megatron.algorithms.interface import Loss
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.backend.engine.reference import FrozenReference
from gspo_megatron.batch import PackedBatch, TrainSequence
from gspo_megatron.config import PreferenceConfig, TrainConfig
from gspo_megatron.data.chat import example_tokens
from gspo_megatron.data.epochs import epoch_batch, share_of
from gspo_megatron.data.packing import padded_lengths
from gspo_megatron.errors import RolloutError
from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.metrics.reduce import gather_rows, optimizer_metrics
from gspo_megatron.process import progress
from gspo_megatron.routing.statistics import routing_metrics
from gspo_megatron.tasks.preferences import PreferencePair, load_pairs
from gspo_megatron.trainer import sanity_checks
from gspo_megatron.trainer.run import Run


@dataclass(frozen=True)
class EncodedPair:
    """A pair has both answers after the same prompt."""

    chosen: TrainSequence
    rejected: TrainSequence


@dataclass(frozen=True)
class HeldOut:
    """Holds this replica's held-out pairs, packed once; the reference's log-probs stay as they are."""

    batches: list[PackedBatch]
    num_pairs: int  # of all replicas, without the fillers that give each replica as many


def encode_pairs(run: Run) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Return (training pairs, held-out pairs) as tokens. Raises RolloutError, on every rank, for one that is too
    long."""
    data = load_pairs(run.config.algorithm.preference)
    return encode_all(data.train, run), encode_all(data.held_out, run)


def train_preferences(run: Run, pairs: tuple[list[EncodedPair], list[EncodedPair]]) -> None:
    """Take all DPO steps, with evaluations before, between and after. Rows go to the metrics under phase "dpo"."""
    config = run.config
    train, held_out = pairs
    run.policy.start_optimizer()
    run.reference = FrozenReference(run.policy.models)
    loss = policy_loss(config.algorithm)
    first = run.restore("dpo")
    held = pack_held_out(run, held_out)
    run.reporter.phase("dpo", config.steps, max(first - 1, 0))
    for step in range(first, config.steps + 1):
        progress.step("dpo", step)
        row = run_step(run, loss, train, step) if step else {"phase": "dpo", "step": 0}
        if step % config.eval_interval == 0 or step == config.steps:
            row |= evaluate_pairs(run, held)
        run.reporter.row(row)
        run.maybe_save("dpo", step, row)


def run_step(run: Run, loss: Loss, pairs: list[EncodedPair], step: int) -> dict:
    """Take one optimizer step on preference.batch_size pairs over all replicas. Returns the metric row."""
    config, policy, topology = run.config, run.policy, run.topology
    preference = config.algorithm.preference
    clock = StepClock(run.runtime.device)
    chosen = epoch_batch(config.seed, step, preference.batch_size, len(pairs))
    mine = share_of(chosen, topology.dp_rank, topology.dp_size)
    batches = run.policy.microbatches(flat([pairs[i] for i in mine]), unit=2)
    with clock.part("ref_logprobs"), run.frozen_reference.in_place():
        policy.fill_ref_log_probs(batches)
    with clock.part("update"):
        counts = global_counts(batches, topology)
        result = policy.update(batches, loss, counts)
    table = result.stats.table
    mine_by_pair = log_ratios_of(table.column("sum_log_ratio"), table.column("num_tokens"), preference).view(-1, 2)
    log_ratios = gather_rows(mine_by_pair, topology.dp_group)
    row: dict[str, Any] = {"phase": "dpo", "step": step} | optimizer_metrics([result], topology.dp_group)
    run.reporter.tell(step, sanity_checks.update_findings([result], row, config.faults.max_ratio))
    row |= {f"dpo/{name}": value for name, value in pair_metrics(log_ratios, preference).items() if name != "loss"}
    row |= clock.read()
    tokens = sum(len(sequence.token_ids) for sequence in flat([pairs[i] for i in chosen]))
    row["perf/tokens_per_second"] = tokens / row["time/step"]
    return row


@torch.no_grad()
def evaluate_pairs(run: Run, held: HeldOut) -> dict[str, float]:
    """Return dpo/eval_*, by a forward pass, and route/* of the last update. A collective over all ranks."""
    clock = StepClock(run.runtime.device)
    policy = run.policy
    policy.fill_old_log_probs(held.batches)

    def by_token(number: int) -> torch.Tensor:
        batch = held.batches[number]
        return batch.filled("old_logprobs").double() - batch.filled("ref_logprobs").double()

    preference = run.config.algorithm.preference
    sums = policy.sums_by_sequence(held.batches, by_token)
    lengths = policy.sums_by_sequence(held.batches, lambda number: torch.ones_like(held.batches[number].loss_mask))
    by_sequence = unpacked(log_ratios_of(sums, lengths, preference), held.batches)
    log_ratios = gather_rows(by_sequence.view(-1, 2), run.topology.dp_group)[: held.num_pairs]
    metrics = pair_metrics(log_ratios, preference)
    row = {f"dpo/eval_{name}": value for name, value in metrics.items()} | {"dpo/eval_num": held.num_pairs}
    return row | routing_metrics(policy.routing.take(), policy.routing.topk) | {"time/eval": clock.read()["time/step"]}


def log_ratios_of(sums: torch.Tensor, lengths: torch.Tensor, preference: PreferenceConfig) -> torch.Tensor:
    """Return the log-ratios that the loss compares.

    Args:
        sums: [S] fp64, sum_t (logp - ref) of each answer. lengths: [S] fp64, its trained tokens.
    """
    return sums / lengths if preference.length_normalised else sums


def pair_metrics(log_ratios: torch.Tensor, preference: PreferenceConfig) -> dict[str, float]:
    """Return means over pairs of what DPO looks at.

    A tie counts as half right: before the first step every h is 0, and rounding would decide elsewhere.

    Args:
        log_ratios: [P, 2] fp64, of the chosen and of the rejected answer, as log_ratios_of gives them.
    """
    chosen, rejected = log_ratios.unbind(1)
    h = chosen - rejected
    loss = PREFERENCE_LOSSES[preference.loss](h, preference.beta)
    metrics = {
        "margin": preference.beta * h,
        "accuracy": (h.sign() + 1) / 2,
        "chosen": chosen,
        "rejected": rejected,
        "loss": loss,
    }
    return {name: float(values.mean()) for name, values in metrics.items()}


def unpacked(sums: torch.Tensor, batches: list[PackedBatch]) -> torch.Tensor:
    """Put numbers of the batches' sequences, [S of all batches], into the order in which the sequences were given."""
    order = torch.tensor([i for batch in batches for i in batch.sources], device=sums.device)
    return torch.empty_like(sums).index_copy(0, order, sums)


def flat(pairs: list[EncodedPair]) -> list[TrainSequence]:
    """Return chosen and rejected in turn, as dpo_loss wants them."""
    return [sequence for pair in pairs for sequence in (pair.chosen, pair.rejected)]


def encode_pair(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, stop_token_ids: tuple[int, ...]
) -> EncodedPair:
    """Encode the prompt, and each answer as the chat template writes it, with the token that ends it.

    Raises ConfigError or RolloutError (data/chat.py), and RolloutError for two answers that are the same.
    """

    def encoded(answer: str) -> TrainSequence:
        prompt, response = example_tokens(tokenizer, stop_token_ids, pair.prompt, answer, pair.where)
        return TrainSequence(prompt + response, len(prompt))

    both = EncodedPair(encoded(pair.chosen), encoded(pair.rejected))
    if both.chosen == both.rejected:
        raise RolloutError(
            f"{pair.where}: the chat template makes the same tokens of chosen and rejected. Remove the pair: it "
            "prefers nothing."
        )
    return both


def check_length(pair: EncodedPair, where: str, config: TrainConfig, positions: int) -> None:
    """Raise RolloutError for a pair that no microbatch holds or whose sequences the model has no positions for.

    Args:
        where: its file and line.
        positions: the model's max_position_embeddings.
    """
    context = config.parallel.context_parallel_size or 1
    lengths = padded_lengths([pair.chosen, pair.rejected], 2 * context if context > 1 else 1)
    padded = f" with padding to multiples of {2 * context}" if context > 1 else ""
    prompt, limit, room = pair.chosen.prompt_length, config.data.max_prompt_length, config.max_tokens_per_microbatch
    if prompt > limit:
        raise RolloutError(
            f"data.max_prompt_length = {limit}: the prompt of {where}, has {prompt} tokens. Give "
            f"data.max_prompt_length at least {prompt}, or remove the pair."
        )
    if max(lengths) > positions:
        raise RolloutError(
            f"{where}: prompt and answer have {max(lengths)} tokens{padded}, more than the model's "
            f"max_position_embeddings {positions}. Shorten or remove the pair."
        )
    if sum(lengths) > room:
        raise RolloutError(
            f"max_tokens_per_microbatch = {room}: the pair of {where}, has {lengths[0]} + {lengths[1]} tokens{padded} "
            f"and stays in one microbatch. Give max_tokens_per_microbatch at least {sum(lengths)}, or remove the pair."
        )


def encode_all(pairs: list[PreferencePair], run: Run) -> list[EncodedPair]:
    """Return every pair as token ids. Raises RolloutError, on every rank alike, for one that is too long."""
    encoded = [encode_pair(pair, run.tokenizer, run.stops.token_ids) for pair in pairs]
    positions = run.policy.models[0].max_sequence_length
    for pair, both in zip(pairs, encoded, strict=True):
        check_length(both, pair.where, run.config, positions)
    return encoded


def pack_held_out(run: Run, pairs: list[EncodedPair]) -> HeldOut:
    """Pack this replica's share, with the reference's log-probs: the weights as run.reference has them. Fillers at the
    end make it the same number on every replica, and with virtual stages one that their schedule can cut."""
    topology = run.topology
    unit = topology.dp_size * (topology.pp_size if topology.vp_size > 1 else 1)
    filled = pairs + [pairs[-1]] * (-len(pairs) % unit)
    batches = run.policy.microbatches(flat(share_of(filled, topology.dp_rank, topology.dp_size)), unit=2)
    with run.frozen_reference.in_place():
        run.policy.fill_ref_log_probs(batches)
    return HeldOut(batches, len(pairs))
