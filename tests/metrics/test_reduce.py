"""Metrics of one step by hand, and from two replicas with different data as from one that has it all."""

import math

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.batch import SequenceStats, SequenceTable, UpdateResult
from gspo_megatron.metrics.reduce import gather_rows, update_metrics
from tools.validation.ranks import spawn

LN2, LN3 = math.log(2), math.log(3)
# num_tokens, sum d, sum d^2, sum k3, max |d|, sum entropy, ref KL, mismatch, clipped low, clipped high
DOUBLE = [2, 2 * LN2, 1.0, 0.5, 1.5, 3.0, 1.0, 0.2, 0, 2]  # s = 2, both tokens clipped
HALF = [3, -3 * LN2, 2.0, 1.5, 2.5, 1.0, 2.0, -0.6, 2, 0]  # s = 1/2, two of three tokens clipped
ONE = [4, 0.0, 3.0, 0.25, 0.5, 4.0, 0.0, 0.0, 0, 0]  # s = 1
THREE = [1, LN3, 4.0, 0.25, LN3, 0.5, 0.0, 0.3, 0, 1]  # s = 3
EVEN = [2, 0.0, 0.0, 0.5, 0.25, 1.5, 3.0, 0.0, 0, 0]  # s = 1
NOTHING = [0, 0.0, 0.0, 0.0, 99.0, 99.0, 99.0, 99.0, 0, 0]  # no trained token: not counted, whatever else it holds
REPLICAS = [
    [(0.1, [DOUBLE, NOTHING], 1.0, 1e-3), (0.3, [HALF], 3.0, 5e-4)],
    [(0.2, [ONE, THREE], 1.0, 1e-3), (-0.2, [EVEN], 3.0, 5e-4)],
]


def results(rows) -> list[UpdateResult]:
    tables = [(loss, SequenceTable(torch.tensor(table, dtype=torch.float64)), *rest) for loss, table, *rest in rows]
    return [UpdateResult(SequenceStats(1, 0, loss, table), norm, rate, True) for loss, table, norm, rate in tables]


def reduced(rank, world_size):
    """(metrics over both ranks, over one that has all rows, of a batch without trained tokens, gathered rows)."""
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    first, second = REPLICAS
    everything = [(a[0] + b[0], a[1] + b[1], *a[2:]) for a, b in zip(first, second, strict=True)]
    return (
        update_metrics(results(REPLICAS[rank]), dist.group.WORLD),
        update_metrics(results(everything), alone),
        update_metrics(results([(0.0, [NOTHING], 0.0, 1e-3)]), dist.group.WORLD),
        gather_rows(torch.tensor([[rank, 0.5], [rank, 1.5]]), dist.group.WORLD),
        gather_rows(torch.tensor([[7.0 + rank]]), alone),
    )


@pytest.fixture(scope="module")
def ranks():
    return spawn(reduced, 2)


def test_metrics_of_two_replicas_by_hand(ranks):
    """Ratios 2, 1/2, 1, 3, 1 of 5 sequences with 12 tokens: mean 7.5 / 5, squared deviations 1/4, 1, 1/4, 9/4, 1/4.

    The mean of the replicas' means would be (1.25 + 5/3) / 2 = 1.458. Losses: (0.1 + 0.2) and (0.3 - 0.2), mean 0.2.
    Sum of d: (2 - 3) ln 2 + ln 3; of k3 0.5 + 1.5 + 0.25 + 0.25 + 0.5 = 3; of entropy 3 + 1 + 4 + 0.5 + 1.5 = 10.
    The first updates' log s are ln 2, 0 and ln 3: the noise floor, did those come before any change, is their rms.
    Mismatch by sequence |0.2 / 2|, |-0.6 / 3|, 0, |0.3 / 1|, 0: mean 0.6 / 5. KL to the reference 6 / 12.
    """
    expected = {
        "loss": 0.2,
        "grad_norm": 2.0,
        "lr": 5e-4,
        "update/skipped": 0.0,
        "update/not_finite": 0.0,
        "ratio/noise_floor": math.sqrt((LN2**2 + LN3**2) / 3),
        "ratio/mean": 1.5,
        "ratio/std": math.sqrt(4 / 5),
        "ratio/min": 0.5,
        "ratio/max": 3.0,
        "ratio/max_abs_token_log_ratio": 2.5,
        "clip/seq_low": 1 / 5,
        "clip/seq_high": 2 / 5,
        "clip/token": 5 / 12,
        "kl/k1": (LN2 - LN3) / 12,
        "kl/k3": 3 / 12,
        "kl/ref": 0.5,
        "mismatch/mean": 0.12,
        "mismatch/max": 0.3,
        "entropy": 10 / 12,
    }
    for metrics, *_ in ranks:
        assert metrics == pytest.approx(expected, abs=1e-14)


def test_two_replicas_give_what_one_with_all_rows_gives(ranks):
    for together, alone, *_ in ranks:
        assert together == pytest.approx(alone, abs=1e-14)
        assert together == ranks[0][0]  # the same bits on both


def test_a_batch_without_trained_tokens_has_no_ratio(ranks):
    for _, _, empty, *_ in ranks:
        assert empty == {"loss": 0.0, "grad_norm": 0.0, "lr": 1e-3, "update/skipped": 0.0, "update/not_finite": 0.0}


def test_rows_are_gathered_in_rank_order(ranks):
    for number, (*_, rows, own) in enumerate(ranks):
        assert rows.tolist() == [[0, 0.5], [0, 1.5], [1, 0.5], [1, 1.5]]
        assert own.tolist() == [[7.0 + number]]
