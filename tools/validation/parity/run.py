"""One case on the ranks of a process group: the step in Megatron, and how far it is from the truth.

Every rank compares its own pieces of the gradient, so each replica's copy counts, not only the one that a gather would
pick. Left out: the weights after the step; Adam's first step moves each by the sign of its gradient, so where a
gradient is of the size of rounding, layouts differ by twice the learning rate.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.parallel import runtime, topology
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.batch import UpdateResult
from gspo_megatron.config import AlgorithmConfig, ModelConfig, RolloutConfig, TrainConfig
from tools.validation.parity import fixture
from tools.validation.parity.cases import BY_NAME, CHUNK_TOKENS, Case, NamedLayout
from tools.validation.parity.formula import RULES, Truth, check_fixture, truth

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
# (loss over mean |A|, largest error of a ratio, gradient): what fp32 leaves room for; fp64: rounding.
LIMITS = {"fp32": (1e-6, 1e-5, 1e-5), "fp64": (1e-11, 1e-11, 1e-11)}
NORM_LIMIT = 1e-5  # of the norm that Megatron reports, which it adds up in fp32 whatever the model's type
EPSILON = 3e-4  # GSPO's clip range, which bf16's error of the ratio stands beside; bf16 has no limit


@dataclass(frozen=True)
class Errors:
    """Of one case, over all ranks."""

    loss: float  # absolute, over mean |A|
    gradient: float  # norm of the difference over the norm, all parameters, each piece by its worst copy
    ratio: float  # largest, absolute
    grad_norm: float  # relative, of the norm that Megatron reports
    counts: int  # sequences whose number of trained or clipped tokens differs
    worst: str  # the parameter that contributes most to `gradient`
    seconds: float

    def failures(self, dtype: str) -> list[str]:
        """One sentence for each limit that is broken."""
        if dtype not in LIMITS:
            return []
        loss, ratio, gradient = LIMITS[dtype]
        held = (
            ("loss", self.loss, loss),
            ("ratio", self.ratio, ratio),
            ("gradient", self.gradient, gradient),
            ("gradient norm", self.grad_norm, NORM_LIMIT),
        )
        found = [f"{name} is off by {error:.1e}, limit {limit:.0e}" for name, error, limit in held if not error < limit]
        if found and not self.gradient < gradient:
            found.append(f"most of the gradient's error is in {self.worst}")
        return found + ([f"trained or clipped tokens of {self.counts} sequences differ"] if self.counts else [])


def build_policy(case: Case, cut: topology.Topology) -> Policy:
    """The fixture's model in this layout."""
    config = TrainConfig(
        seed=fixture.SEED,
        rollout=RolloutConfig(temperature=case.temperature),
        model=ModelConfig(recompute=case.recompute, logprob_chunk_tokens=CHUNK_TOKENS if case.chunked else 0),
    ).resolved(case.layout.parallel)
    started = runtime.init_process_group("auto" if dist.get_backend() == "nccl" else "cpu")
    policy = Policy(config, fixture.model_shape(case.tied), cut, started, DTYPES[case.dtype])
    fixture.vary_norms(policy.models, cut)
    return policy


def run_case(case: Case, truth: Truth, change: Callable[[Policy, list], None] | None = None) -> Errors:
    """A collective over all ranks.

    Args:
        change: called with the policy and its batches before the step; tests break something there.
    """
    with started(case.layout) as cut:
        return _step(case, truth, cut, change)


@contextmanager
def started(layout: NamedLayout) -> Iterator[topology.Topology]:
    """The layout's process groups. Gloo ends a group's threads when nothing refers to it any more, and models and
    optimizers are full of cycles that do: without a collection each layout would leave some hundred threads behind."""
    cut = topology.initialize_model_parallel(layout.parallel, seed=fixture.SEED)
    try:
        yield cut
    finally:
        del cut
        gc.collect()
        topology.destroy_model_parallel()
        gc.collect()


def _step(case: Case, truth: Truth, cut: topology.Topology, change: Callable | None) -> Errors:
    began, rule = time.monotonic(), RULES[case.algorithm]
    policy = build_policy(case, cut)
    policy.start_optimizer()
    assert policy.optimizer is not None
    for part in policy.optimizer.chained_optimizers:
        part.config.clip_grad = 0.0  # Megatron scales main_grad in place when it clips, and refuses fp64
    items = fixture.rollouts(rule.pairs)
    numbered = fixture.packed(items, rule.advantages, cut, case.microbatches, case.padded, 2 if rule.pairs else 1)
    for batch, numbers in numbered:
        batch.old_logprobs = fixture.place(batch, [truth.old[i] for i in numbers])
        if rule.uses_ref:
            batch.ref_logprobs = fixture.place(batch, [truth.ref[i] for i in numbers])
    batches = [batch.to(policy.device) for batch, _ in numbered]
    if change is not None:
        change(policy, batches)
    loss = policy_loss(AlgorithmConfig(name=cast(Any, case.algorithm)), fixture.MAX_RESPONSE)
    result = policy.update(batches, loss, global_counts(batches, cut))
    if case.layout.distributed_optimizer:
        gather_gradient_shards(policy)
    errors = _errors(policy, result, truth, [i for _, numbers in numbered for i in numbers], began)
    forget(policy)
    return errors


def forget(policy: Policy) -> None:
    """Break the cycles that Python's collector cannot see, because they run through autograd's nodes: each gradient
    accumulator holds its hook, the hook DDP, DDP the accumulators, and token dispatchers the last forward's graph."""
    for chunk in policy.network.chunks:
        chunk.grad_accs.clear()
        for module in chunk.modules():
            if hasattr(module, "token_dispatcher"):
                del module.token_dispatcher


def gather_gradient_shards(policy: Policy) -> None:
    """Whole sums in every main_grad: with the distributed optimizer each rank is left with its shard of the sum."""
    for chunk in policy.network.chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = shard_buffer(bucket.grad_data, ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)


def _errors(policy: Policy, result: UpdateResult, truth: Truth, numbers: list[int], began: float) -> Errors:
    cut, table = policy.topology, result.stats.table
    loss = torch.tensor(result.stats.loss, dtype=torch.float64, device=policy.device)
    dist.all_reduce(loss, group=cut.dp_group)
    mean = table.column("sum_log_ratio") / table.column("num_tokens").clamp(min=1)
    columns = ("num_tokens", "clipped_low_tokens", "clipped_high_tokens")
    counts = torch.stack([table.column(name) for name in columns], dim=1).cpu()
    norm = sum(float(g.square().sum()) for g in truth.gradient.values()) ** 0.5
    gradient, worst = gradient_error(policy, truth.gradient)
    mine = {
        "loss": abs(float(loss) - truth.loss) / truth.scale,
        "ratio": float((mean.exp().cpu() - truth.ratios[numbers]).abs().max()),
        "grad_norm": abs(result.grad_norm - norm) / norm,
        "counts": int((counts != truth.counts[numbers]).any(1).sum()),
    }
    everyone = gather_objects(mine)
    # Not max(): of a number and a nan it gives either.
    largest = {name: torch.tensor([float(rank[name]) for rank in everyone]).double().max().item() for name in mine}
    return Errors(
        loss=largest["loss"],
        gradient=gradient,
        ratio=largest["ratio"],
        grad_norm=largest["grad_norm"],
        counts=int(largest["counts"]),
        worst=worst,
        seconds=time.monotonic() - began,
    )


@torch.no_grad()
def gradient_error(policy: Policy, truth: dict[str, torch.Tensor]) -> tuple[float, str]:
    """(norm of the difference over the norm, the parameter with the largest part in it). A collective.

    Each rank compares its pieces of the full gradient; of a piece that several ranks hold the worst copy counts.
    """
    mine: dict[tuple[str, int], tuple[float, int]] = {}
    for model in policy.models:
        for p in parameters.named(model, policy.topology):
            difference = cast(Any, p.local).main_grad.cpu().double() - p.slice_of(truth[p.name])
            piece = (p.name, p.cut_rank if p.cuts > 1 else 0)
            mine[piece] = max(float(difference.square().sum()), mine.get(piece, (0.0, 0))[0]), p.cuts
    everyone = gather_objects(mine)
    pieces: dict[tuple[str, int], float] = {}
    cuts: dict[str, int] = {}
    for rank in everyone:
        for piece, (square, number) in rank.items():
            before = pieces.get(piece, 0.0)
            pieces[piece] = square if not square <= before else before  # a nan stays
            cuts[piece[0]] = number
    missing = {(name, k) for name in truth for k in range(cuts.get(name, 1))} ^ set(pieces)
    if missing:
        return float("nan"), f"{sorted(missing)[0][0]}, which no rank or an unknown one holds"
    by_name = {name: sum(pieces[name, k] for k in range(cuts[name])) for name in truth}
    size = sum(float(g.square().sum()) for g in truth.values())
    return (sum(by_name.values()) / size) ** 0.5, max(by_name, key=by_name.__getitem__)


def truth_key(case: Case) -> tuple:
    return case.algorithm, case.tied, case.temperature


def truths(cases: list[Case]) -> dict[tuple, Truth]:
    """The truth of every case, on one rank. Raises AssertionError where the fixture is not what it should be."""
    found = {}
    for case in cases:
        if truth_key(case) in found:
            continue
        plain = replace(case, layout=BY_NAME["one rank"], dtype="fp64", recompute=False, chunked=False)
        rule = RULES[case.algorithm]
        with started(plain.layout) as cut:
            found[truth_key(case)] = truth(build_policy(plain, cut), fixture.rollouts(rule.pairs), case.algorithm)
        check_fixture(found[truth_key(case)], rule)
    return found
