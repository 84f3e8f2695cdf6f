"""Every pipeline stage holds the right table for the right minibatch, whichever stage is late."""

import time

import pytest
import torch

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.algorithms.interface import LossInputs, LossOutputs
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.backend.parallel import pipeline_broadcast
from gspo_megatron.batch import SequenceTable
from gspo_megatron.config import AlgorithmConfig, Layout
from gspo_megatron.errors import TrainingError
from tests.backend.small import fixed_batches, in_layouts, small_policy
from tools.validation.ranks import spawn

LAYOUTS = {
    "PP2": Layout(1, 2, None, 1, 1),
    "PP4": Layout(1, 4, None, 1, 1),
    "PP2xVP2": Layout(1, 2, 2, 1, 1),
}
DELAY = 0.15  # seconds, at every microbatch; all four take about as long together


def updates(layout: Layout) -> list[dict]:
    """Two minibatches with each stage late in turn. What arrived here, and on the last stage what its loss gave."""
    policy, out = small_policy(layout), []
    cut = policy.topology
    loss = policy_loss(AlgorithmConfig())
    for late in (0, cut.pp_size - 1):
        hook = None
        if cut.pp_rank == late:
            hook = policy.models[0].register_forward_pre_hook(lambda *_: time.sleep(DELAY))
        for minibatch in (0, 1):
            given: list[LossOutputs] = []

            def kept(inputs: LossInputs, given: list = given) -> LossOutputs:
                given.append(loss(inputs))
                return given[-1]

            batches = fixed_batches(advantage_seed=10 * late + minibatch)
            counts = global_counts(batches, cut)
            stats = policy.update(batches, kept, counts, step=7 + late, minibatch=minibatch).stats
            out.append(
                {
                    "numbers": (stats.step, stats.minibatch),
                    "loss": stats.loss,
                    "table": stats.table.values,
                    "given": torch.cat([one.table.values for one in given]) if given else None,
                    "value": float(torch.stack([one.value for one in given]).sum()) if given else None,
                }
            )
        if hook:
            hook.remove()
    return out


def four_ranks(rank: int, world_size: int) -> tuple[int, dict]:
    return rank, in_layouts(rank, world_size, LAYOUTS, updates)


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return [found for _, found in sorted(spawn(four_ranks, 4), key=lambda pair: pair[0])]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_stage_has_what_the_last_ones_loss_gave(ranks, name):
    """Four updates: each stage's tables and losses are the bits of the last stage's, and no two updates' are the same.

    All data-parallel replicas get the same batches here, so the stages of one replica can be found by the tables.
    """
    truths = [found[name] for found in ranks if found[name][0]["given"] is not None]
    late_stages = (0, LAYOUTS[name].pipeline_model_parallel_size - 1)
    for found in ranks:
        assert [update["numbers"] for update in found[name]] == [(7 + late, m) for late in late_stages for m in (0, 1)]
        for number, update in enumerate(found[name]):
            assert any(torch.equal(update["table"], truth[number]["given"]) for truth in truths)
            assert any(update["loss"] == truth[number]["value"] for truth in truths)
    tables = [update["table"] for update in ranks[0][name]]
    assert not any(torch.equal(a, b) for i, a in enumerate(tables) for b in tables[:i])


class Arrived:
    """A message that is there."""

    def __init__(self, *numbers: float):
        self.numbers = torch.tensor(numbers, dtype=torch.float64)

    def wait(self) -> torch.Tensor:
        return self.numbers


def test_a_stale_table_is_refused():
    row = [1.0] * len(SequenceTable.COLUMNS)
    stats = pipeline_broadcast.PendingStats(Arrived(3, 1, 1, -0.5, *row), (3, 1, 1), stage=0).wait()
    assert (stats.step, stats.minibatch, stats.loss) == (3, 1, -0.5) and stats.table.values.tolist() == [row]
    wanted = r"stage 0 waits for the results of step 3, minibatch 1 .* those of step 3, minibatch 0"
    with pytest.raises(TrainingError, match=wanted):
        pipeline_broadcast.PendingStats(Arrived(3, 0, 1, -0.5, *row), (3, 1, 1), stage=0).wait()


def out_of_step(rank: int, world_size: int) -> str:
    """Stage 0 believes to be one minibatch further."""
    policy = small_policy(LAYOUTS["PP2"])
    batches = fixed_batches()
    try:
        policy.update(batches, policy_loss(AlgorithmConfig()), global_counts(batches, policy.topology), 5, 1 - rank)
    except TrainingError as error:
        return str(error)
    return ""


def test_stages_that_count_differently_are_told_apart():
    first, last = spawn(out_of_step, 2)
    assert "waits for the results of step 5, minibatch 1 (14 sequences) and got those of step 5, minibatch 0" in first
    assert last == ""
