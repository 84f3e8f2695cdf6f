"""One DPO step gives the same loss, log-ratios and gradient in every layout."""

import random

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.engine.microbatches import global_counts, microbatches
from gspo_megatron.backend.engine.reference import FrozenReference
from gspo_megatron.backend.model import parameters
from gspo_megatron.batch import TrainSequence
from gspo_megatron.config import AlgorithmConfig, Layout, PreferenceConfig
from gspo_megatron.data.epochs import share_of
from tests.backend.small import SINGLE, TP2_PP2_EP2, VOCAB, in_layouts, small_policy
from tools.validation.ranks import spawn

CASES = {  # on four ranks; what the sizes leave over is data parallelism
    "TP2xPP2-EP2": TP2_PP2_EP2,
    "TP2xDP2": Layout(2, 1, None, 1, 1),
    "PP2xVP2xDP2-EP2": Layout(1, 2, 2, 2, 1),
}
DPO = AlgorithmConfig("dpo", preference=PreferenceConfig(beta=0.1))


def pairs() -> list[list[TrainSequence]]:
    """Eight pairs of unequal length."""
    generator = random.Random(3)

    def tokens(low: int, high: int) -> list[int]:
        return [generator.randrange(VOCAB) for _ in range(generator.randint(low, high))]

    prompts = [tokens(1, 6) for _ in range(8)]
    return [[TrainSequence(prompt + tokens(1, 12), len(prompt)) for _ in range(2)] for prompt in prompts]


def move(models: list[torch.nn.Module]) -> None:
    """The same other weights in every layout, so that the policy is not its reference."""
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.mul_(1.05)


def step(layout: Layout) -> dict:
    """One update on this replica's share of the pairs, in microbatches of at most 48 tokens."""
    policy = small_policy(layout)
    cut = policy.topology
    reference = FrozenReference(policy.models)
    move(policy.models)
    mine = [sequence for pair in share_of(pairs(), cut.dp_rank, cut.dp_size) for sequence in pair]
    batches = microbatches(mine, 48, cut, policy.device, unit=2)
    with reference.in_place():
        policy.fill_ref_log_probs(batches)
    for part in policy.optimizer.chained_optimizers:
        part.config.clip_grad = 0.0  # Megatron scales main_grad in place when it clips
    counts = global_counts(batches, cut)
    result = policy.update(batches, policy_loss(DPO), counts)
    loss = torch.tensor(result.stats.loss, dtype=torch.float64)
    dist.all_reduce(loss, group=cut.dp_group)
    gradient = parameters.gather_full(policy.models, cut, lambda p: p.main_grad)
    rows = result.stats.table.column("sum_log_ratio").view(-1, 2)
    by_pair = {
        batch.source_index[i] // 2 + cut.dp_rank * len(mine) // 2: None
        for batch in batches
        for i in range(0, batch.num_sequences, 2)
    }
    return {
        "loss": float(loss),
        "counts": counts,
        "grad_norm": result.grad_norm,
        "microbatches": len(batches),
        "log_ratios": dict(zip(by_pair, rows.tolist(), strict=True)),
        "dp_rank": cut.dp_rank,
        "gradient": gradient if dist.get_rank() == 0 else None,
    }


def both_frozen_and_moved(rank: int, world_size: int) -> dict:
    """The reference step, and what the reference gives after the policy has moved and before."""
    one = in_layouts(rank, world_size, {"one": SINGLE}, step)["one"]
    return one | in_layouts(rank, world_size, {"frozen": SINGLE}, frozen)


def frozen(layout: Layout) -> list[float]:
    """Largest change of the reference's log-probs over an update, and of the policy's own."""
    policy = small_policy(layout)
    reference = FrozenReference(policy.models)
    batches = microbatches([s for pair in pairs() for s in pair], 400, policy.topology, policy.device, unit=2)
    found = []
    for _ in range(2):
        with reference.in_place():
            policy.fill_ref_log_probs(batches)
        policy.fill_old_log_probs(batches)
        found.append([torch.cat([getattr(b, name) for b in batches]) for name in ("ref_logprobs", "old_logprobs")])
        policy.update(batches, policy_loss(DPO), global_counts(batches, policy.topology))
    return [float((after - before).abs().max()) for before, after in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def reference() -> dict:
    return spawn(both_frozen_and_moved, 1)[0]


@pytest.fixture(scope="module")
def layouts() -> list[dict]:
    return spawn(in_layouts, 4, CASES, step, timeout=280)


def test_reference_is_not_trivial(reference):
    """Sixteen sequences in several microbatches, and margins of both signs, so that the pairs' weights differ."""
    assert reference["counts"].num_sequences == 16 and reference["microbatches"] > 2
    h = [chosen - rejected for chosen, rejected in reference["log_ratios"].values()]
    assert min(h) < -0.5 and max(h) > 0.05 and reference["grad_norm"] > 0.01


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_rank(reference, layouts, name):
    """Loss to 1e-6, log-ratios and gradient to 1e-5: the limits that fp32 leaves room for."""
    results = [by_layout[name] for by_layout in layouts]
    assert results[0]["counts"] == reference["counts"]
    assert abs(results[0]["loss"] - reference["loss"]) < 1e-6
    found = {pair: row for result in results for pair, row in result["log_ratios"].items()}
    assert set(found) == set(reference["log_ratios"]) == set(range(8))
    for pair, row in reference["log_ratios"].items():
        assert found[pair] == pytest.approx(row, abs=1e-5)
    ours, theirs = results[0]["gradient"], reference["gradient"]
    assert set(ours) == set(theirs)
    difference = sum(float((ours[n] - value).double().square().sum()) for n, value in theirs.items())
    size = sum(float(value.double().square().sum()) for value in theirs.values())
    assert (difference / size) ** 0.5 < 1e-5
    assert results[0]["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)


def test_the_reference_stays_where_it_was(reference):
    """To the bit, while the policy moves."""
    reference_moved, policy_moved = reference["frozen"]
    assert reference_moved == 0 and policy_moved > 1e-4
