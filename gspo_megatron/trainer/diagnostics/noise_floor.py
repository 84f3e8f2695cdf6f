"""This measures how far log-probs of the same weights are apart, on the recipe's own model, layout and responses.

Every comparison gives one number a response, log s = (1/|y|) sum_t (logp_a - logp_b), which should be 0. What one rank
computed travels to all as [N] fp64, so each of them ends with the same rows (rows.py names and judges them).

Left out: two world sizes (a command has one), context parallelism 1 against 2, and other engines than the embedded one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.checkpoint import sharded as checkpoints
from gspo_megatron.backend.engine import microbatches as packing
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime as runtimes
from gspo_megatron.backend.parallel import topology as topologies
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.runtime import Runtime
from gspo_megatron.batch import PackedBatch, Score, TrainSequence
from gspo_megatron.config import AlgorithmConfig, Layout, ResolvedConfig, RoutingConfig, TrainConfig
from gspo_megatron.data.packing import padded_lengths
from gspo_megatron.data.prompts import PromptSource
from gspo_megatron.data.sequences import train_sequences
from gspo_megatron.data.stops import find_stops
from gspo_megatron.data.tokenizer import build_tokenizer, size_of
from gspo_megatron.errors import TrainingError
from gspo_megatron.ops.sequence_ratio_reference import sequence_ids
from gspo_megatron.rollout.generation import Generator
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.trainer.build import build_policy
from gspo_megatron.trainer.diagnostics.rows import NoiseFloor, Row, tensor_counterpart
from gspo_megatron.trainer.run import sampling_params

SEED = 20_250_718  # of the samples and of the other order of packing


@dataclass(frozen=True)
class _Bench:
    """What stays the same in every comparison."""

    config: ResolvedConfig
    runtime: Runtime
    shape: ModelShape
    checkpoint: Path | None
    sequences: list[TrainSequence]  # of all replicas, on every rank

    @property
    def size(self) -> int:
        return len(self.sequences)

    def share(self, policy: Policy, order: list[int] | None = None) -> list[int]:
        """Return the numbers of this replica's responses."""
        order = list(range(self.size)) if order is None else order
        cut = policy.topology
        return [number for number in order if number % cut.dp_size == cut.dp_rank]

    def packed(self, policy: Policy, mine: list[int], limit: int) -> list[PackedBatch]:
        """Pack the responses of these numbers. A collective over data parallelism."""
        chosen = [self.sequences[i] for i in mine]
        return packing.microbatches(chosen, limit, policy.topology, policy.device)


def measure(config: TrainConfig, layout: Layout, num_prompts: int, checkpoint: Path | None) -> NoiseFloor:
    """Measure all rows, the same on every rank. Starts and ends the process groups; a collective over all ranks.

    Args:
        layout: as recipe/check.py resolves it.
        num_prompts: over all replicas, a multiple of their number (data x context parallel ranks).
        checkpoint: weights to load; None: the recipe's initial ones.
    """
    # The load-balancing loss is no part of a log-prob, but its gradient would make the update below change weights.
    model = replace(config.model, moe_aux_loss_coeff=0.0)
    # Nor is replay: it would hide what routes do, and another layout has none to replay.
    config = replace(config, model=model, routing=RoutingConfig(statistics=False)).resolved(layout)
    runtime = runtimes.init_process_group(config.device)
    topology = topologies.initialize_model_parallel(layout, config.seed)
    mixture = TaskMixture(config.tasks, config.seed)
    tokenizer = build_tokenizer(config, mixture)
    shape = ModelShape.of(config.model, size_of(tokenizer))
    bench = _Bench(config, runtime, shape, checkpoint, [])
    policy = _policy(bench, topology)
    source = PromptSource(mixture, tokenizer, "train", config.data.max_prompt_length)
    source.hold_to_limit(config.tasks, source.row_lengths())
    prompts = source.next(num_prompts)
    params = sampling_params(config.rollout, find_stops(config, tokenizer, shape.vocab_size), tokenizer)
    rollout, generator = config.rollout, Generator(MegatronEngine(policy), topology, policy.device, tokenizer)
    groups = generator.generate(prompts, rollout.group_size, rollout.max_response_length, params, SEED)
    bench = replace(bench, sequences=_of_all_replicas(groups, policy))

    rows, base = _same_layout(bench, policy)
    rows.append(_body(bench, policy))
    described = topology.describe()
    topologies.destroy_model_parallel()
    rows.insert(3, _other_tensor_size(bench, described, base))
    runtimes.destroy_process_group()
    lengths = [sequence.response_length for sequence in bench.sequences]
    return NoiseFloor(
        rows,
        f"{described} = {runtime.world_size} ranks",
        f"{runtime.device.type} ({runtime.backend})",
        bench.size,
        sum(lengths) / len(lengths),
    )


def _policy(bench: _Bench, topology: topologies.Topology, dtype: torch.dtype | None = None) -> Policy:
    policy = build_policy(bench.config, bench.shape, topology, bench.runtime, dtype)
    if bench.checkpoint:
        checkpoints.load_weights(policy.network, bench.checkpoint)
    return policy


def _of_all_replicas(groups: list, policy: Policy) -> list[TrainSequence]:
    """Gather what all replicas sampled. It is small: token ids and log-probs of some hundred responses."""
    for group in groups:
        group.scores = [Score(0.0)] * len(group.completions)
    everyone = gather_objects(train_sequences(groups), policy.topology.dp_cp_group)
    return [sequence for mine in everyone for sequence in mine]


def _same_layout(bench: _Bench, policy: Policy) -> tuple[list[Row], torch.Tensor]:
    """Return rows a, b, c and e, and the mean log-probs [N] fp64 that they compare with."""
    limit, mine = bench.config.max_tokens_per_microbatch, bench.share(policy)
    batches = bench.packed(policy, mine, limit)
    policy.fill_old_log_probs(batches)
    base = _by_response(bench, policy, mine, batches, _sequence_means)
    again = _update_that_changes_nothing(bench, policy, mine, batches)

    order = torch.randperm(bench.size, generator=torch.Generator().manual_seed(SEED)).tolist()
    other = _means(bench, policy, order=order)

    replicas = policy.topology.dp_size  # in training
    lengths = padded_lengths(bench.sequences, policy.topology.sequence_multiple)
    tokens = max(sum(lengths[replica::replicas]) for replica in range(replicas))
    tighter = max(*lengths, -(-tokens // (2 * len(batches))))
    split = bench.packed(policy, mine, tighter)
    more = Row("c", f"microbatches a replica: {len(batches)}, and the responses cannot be cut into more")
    if len(split) > len(batches):
        policy.fill_old_log_probs(split)
        means = _by_response(bench, policy, mine, split, _sequence_means)
        more = _row("c", f"microbatches a replica: {len(split)} instead of {len(batches)}", base - means)

    sampled = [torch.tensor(s.rollout_logprobs, dtype=torch.float64).mean() for s in bench.sequences]
    rows = [
        _row("a", "old log-probs against the update's own forward, as in training", again),
        _row("b", f"responses in another order; microbatches a replica: {len(batches)}", base - other),
        more,
        _row("e", "log-probs that sampling gave against a pass of the training engine", base - torch.stack(sampled)),
    ]
    return rows, base


def _update_that_changes_nothing(
    bench: _Bench, policy: Policy, mine: list[int], batches: list[PackedBatch]
) -> torch.Tensor:
    """Return log s [N] of an update whose advantages are all 0: its forward, its recomputation, but no gradient."""
    policy.start_optimizer()
    plain = AlgorithmConfig(name="gspo").resolved()  # without entropy bonus and KL term, which have a gradient
    result = policy.update(batches, policy_loss(plain), packing.global_counts(batches, policy.topology))
    policy.network.optimizer = policy.network.schedule = None
    if result.stepped:
        raise TrainingError("an update without advantages changed the weights, so nothing can be compared.")
    table = result.stats.table
    log_s = table.column("sum_log_ratio") / table.column("num_tokens").clamp(min=1)
    parts = log_s.split([batch.num_sequences for batch in batches])
    # The table is whole on every context-parallel rank.
    is_first = dist.get_rank(policy.topology.cp_group) == 0
    return _by_response(bench, policy, mine, batches, lambda number, _: parts[number] * is_first)


def _means(bench: _Bench, policy: Policy, order: list[int] | None = None) -> torch.Tensor:
    """Return [N] fp64 on every rank: each response's mean log-prob by a pass of the training engine."""
    mine = bench.share(policy, order)
    batches = bench.packed(policy, mine, bench.config.max_tokens_per_microbatch)
    policy.fill_old_log_probs(batches)
    return _by_response(bench, policy, mine, batches, _sequence_means)


def _sequence_means(number: int, batch: PackedBatch) -> torch.Tensor:
    """Return [S] fp64 of old_logprobs. Tokens of other context-parallel ranks are 0, so the ranks' means add up."""
    size, trained = batch.num_sequences, batch.loss_mask > 0
    ids = sequence_ids(batch.cu_seqlens[: size + 1], batch.num_tokens)
    sums = torch.zeros(2, size + 1, dtype=torch.float64, device=ids.device)
    sums[0].index_add_(0, ids, torch.where(trained, batch.filled("old_logprobs").double(), 0.0))
    sums[1].index_add_(0, ids, trained.double())
    return (sums[0] / sums[1].clamp(min=1))[:-1]


def _by_response(
    bench: _Bench,
    policy: Policy,
    mine: list[int],
    batches: list[PackedBatch],
    values: Callable[[int, PackedBatch], torch.Tensor],
) -> torch.Tensor:
    """Return [N] fp64 on every rank, on the CPU: values(number, batch) [S] of the last stages, at the
    responses' numbers."""
    total = torch.zeros(bench.size, dtype=torch.float64, device=policy.device)
    if policy.topology.is_last_stage and policy.topology.tp_rank == 0:
        for number, batch in enumerate(batches):
            total[[mine[i] for i in batch.sources]] = values(number, batch)
    dist.all_reduce(total)
    return total.cpu()


def _body(bench: _Bench, policy: Policy) -> Row:
    """Measure row f. Both sides have weights rounded to bf16, so what differs is the arithmetic. Changes `policy`'s
    weights."""
    means = {}
    for dtype in (torch.float32, torch.bfloat16):
        own = policy.models[0].config.params_dtype is dtype
        twin = policy if own else _policy(bench, policy.topology, dtype)
        with torch.no_grad():
            for model in twin.models:
                for parameter in model.parameters():
                    parameter.copy_(parameter.bfloat16())
        means[dtype] = _means(bench, twin)
    difference = means[torch.float32] - means[torch.bfloat16]
    return _row("f", "weights rounded to bf16, computed with in bf16 and in fp32", difference)


def _other_tensor_size(bench: _Bench, described: str, base: torch.Tensor) -> Row:
    """Measure row d. The first layout's process groups must be gone; initial weights depend on (seed, name) alone."""
    layout, world_size = bench.config.parallel, bench.runtime.world_size
    other = tensor_counterpart(bench.config, layout, world_size)
    if isinstance(other, str):
        return Row("d", other)
    topology = topologies.initialize_model_parallel(other, bench.config.seed)
    elsewhere = replace(bench, config=replace(bench.config, parallel=other))
    means = _means(elsewhere, _policy(elsewhere, topology))
    topologies.destroy_model_parallel()
    return _row("d", f"{topology.describe()} instead of {described}", base - means)


def _row(key: str, compared: str, log_s: torch.Tensor) -> Row:
    return Row(key, compared, float(log_s.square().mean().sqrt()), float(log_s.abs().max()))
