"""Virtual stages with fewer sequences than microbatches: padding fills the schedule, and counts nowhere."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.algorithms.interface import GlobalCounts
from gspo_megatron.backend.engine.microbatches import global_counts, microbatches
from gspo_megatron.batch import TrainSequence
from gspo_megatron.config import AlgorithmConfig, Layout, RoutingConfig
from gspo_megatron.data.packing import pack, padding_alone
from gspo_megatron.routing.rollout_routes import UNKNOWN, SequenceRoutes
from tests.backend.engine.test_critic import small_critic
from tests.backend.small import SINGLE, VOCAB, in_layouts
from tools.validation.ranks import spawn

LAYOUTS = {  # on four ranks
    "PP2xVP2xDP2": Layout(1, 2, 2, 1, 1),
    "CP2xPP2xVP2-EP2": Layout(1, 2, 2, 2, 1, context_parallel_size=2),
}
THREE, SIX = 3, 6
FITS = 64  # tokens of a microbatch: one sequence of 60


def sequences(number: int) -> list[TrainSequence]:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(0, VOCAB, (SIX, 60), generator=generator).tolist()
    advantages = [1.0, -0.5, 0.25, -1.0, 0.75, -0.25]
    return [TrainSequence(drawn[i], 20, advantages[i], group_id=i) for i in range(number)]


def step(layout: Layout, number: int) -> dict:
    """One optimizer step of policy and critic on `number` sequences over all replicas; R2 takes the old routes
    again."""
    policy, critic = small_critic(layout)
    policy.routing.config = RoutingConfig(replay="R2")
    cut = policy.topology
    batches = microbatches(sequences(number)[cut.dp_rank :: cut.dp_size], FITS, cut, policy.device)
    policy.fill_old_log_probs(batches)
    counts = global_counts(batches, cut)
    result = policy.update(batches, policy_loss(AlgorithmConfig()), counts)
    critic.fill_values(batches)
    for batch in batches:
        batch.returns = None if batch.values is None else batch.values + batch.loss_mask
        if cut.cp_size > 1 and batch.values is not None:
            dist.all_reduce(batch.values, group=cut.cp_group)
            batch.returns = batch.values + batch.loss_mask
    learned = critic.update(batches, counts)
    ids = [i for batch in batches for i in batch.group_id.tolist()]
    routed = policy.routing.take()[0]
    loss = torch.tensor(result.stats.loss, dtype=torch.float64)
    dist.all_reduce(loss, group=cut.dp_group)
    return {
        "microbatches": len(batches),
        "counts": counts,
        "rows": dict(zip(ids, result.stats.table.values.tolist(), strict=True)),
        "loss": float(loss),
        "grad_norm": result.grad_norm,
        "values": learned.metrics(),
        "tokens": float(learned.tokens),
        "routed": routed.layers.tolist(),
        "load": float(routed.load.sum()),
    }


def masked_step(layout: Layout) -> tuple:
    """(counts, loss, gradient norm, whether weights changed) where no token is trained: all responses were cut."""
    policy, _ = small_critic(layout)
    cut = [dataclasses.replace(sequence, loss_mask=[0] * 40) for sequence in sequences(THREE)]
    batches = microbatches(cut, FITS, policy.topology, policy.device)
    counts = global_counts(batches, policy.topology)
    result = policy.update(batches, policy_loss(AlgorithmConfig(name="dapo")), counts)
    return counts, result.stats.loss, result.grad_norm, result.stepped


def one_rank(rank: int, world_size: int) -> dict:
    steps = {number: in_layouts(rank, world_size, {"x": SINGLE}, step, number)["x"] for number in (THREE, SIX)}
    return steps | {"masked": in_layouts(rank, world_size, {"x": SINGLE}, masked_step)["x"]}


def four_ranks(rank: int, world_size: int) -> dict:
    numbers = {"PP2xVP2xDP2": SIX, "CP2xPP2xVP2-EP2": THREE}
    return {
        name: in_layouts(rank, world_size, {name: layout}, step, numbers[name])[name]
        for name, layout in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def single() -> dict:
    return spawn(one_rank, 1)[0]


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return spawn(four_ranks, 4, timeout=280)


def test_a_step_without_a_trained_token_is_zero_and_changes_nothing(single):
    """Its denominators are 1, since a loss refuses 0."""
    assert single["masked"] == (GlobalCounts(1, 1), 0.0, 0.0, False)


@pytest.mark.parametrize(("name", "number"), [("PP2xVP2xDP2", SIX), ("CP2xPP2xVP2-EP2", THREE)])
def test_three_sequences_on_two_stages_are_the_step_of_one_process(single, ranks, name, number):
    """Each replica has three microbatches of a sequence, and the interleaved schedule wants a multiple of two: the
    fourth is padding. Counts, tokens of experts and rows of the table are the same numbers, the rest differs by
    rounding."""
    alone, rows = single[number], {}
    assert alone["microbatches"] == number
    for rank in ranks:
        ours = rank[name]
        rows |= ours["rows"]
        assert ours["microbatches"] == 4
        assert ours["counts"] == alone["counts"] and ours["tokens"] == alone["tokens"] == 40 * number
        assert ours["load"] == alone["load"]
        for layer, expected in zip(ours["routed"], alone["routed"], strict=True):
            assert layer[:4] == expected[:4] and layer[4] == pytest.approx(expected[4], rel=1e-5)
        assert ours["loss"] == pytest.approx(alone["loss"], abs=1e-9)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert ours["values"] == pytest.approx(alone["values"], rel=1e-4, abs=1e-6)
    assert set(rows) == set(alone["rows"])
    for sequence, row in rows.items():
        assert row == pytest.approx(alone["rows"][sequence], rel=1e-5, abs=1e-5)


def test_padding_has_the_fields_of_its_neighbours():
    routes = SequenceRoutes((1, 3), torch.zeros(2, 4, 2, dtype=torch.int16))
    other = pack([TrainSequence([1, 2, 3, 4], 1, rollout_logprobs=[-1.0] * 3, routes=routes)], 8, 2)[0]
    padding = padding_alone(other, 2)
    assert (padding.num_sequences, padding.num_tokens, padding.sources) == (0, 2, [])
    assert padding.rollout_routes.shape == (2, 2, 2) and bool((padding.rollout_routes == UNKNOWN).all())
    assert padding.rollout_layers == (1, 3) and padding.rollout_logprobs.tolist() == [0.0, 0.0]
    assert not padding.loss_mask.any()
