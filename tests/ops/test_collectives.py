"""The table of every rank is added in rank order, the last stage's message arrives, and a dead rank is an error.

In C++ and through torch.distributed alike: the ranks run each test with both.
"""

import math
import os
import signal
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.errors import LostRankError
from gspo_megatron.ops import collectives, library
from gspo_megatron.ops.sequence_ratio import sequence_partials
from tools.validation.ranks import forks, spawn

WAYS = ("C++", "torch.distributed") if library.load_collectives()[0] else ("torch.distributed",)
LARGEST = 4  # the table's column that is a maximum
TIMEOUT = 2.0  # seconds, of a collective in which a rank hangs
START = 100.0  # seconds, until the ranks have met; a busy machine takes its time


def choose(way: str) -> None:
    collectives.native = library.load_collectives()[0] if way == "C++" else None


def tables(rank: int) -> torch.Tensor:
    """[5, 6] fp64 with numbers of different size, so that another order of adding gives other bits."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(5, 6, generator=generator, dtype=torch.float64) * 3.0**rank


def reduce_on(rank: int, world_size: int) -> dict:
    """Whoever comes first: in the second round the ranks start one after the other, the last one first."""
    out = {}
    for way in WAYS:
        choose(way)
        at_once = collectives.reduce_tables(tables(rank), dist.group.WORLD, LARGEST).wait()
        time.sleep(0.1 * (world_size - rank))
        pending = collectives.reduce_tables(tables(rank), dist.group.WORLD, LARGEST)
        empty = collectives.reduce_tables(torch.zeros(0, 6, dtype=torch.float64), dist.group.WORLD).wait()
        strided = collectives.reduce_tables(tables(rank).t(), dist.group.WORLD).wait()
        broken = tables(rank)
        if rank == 1:
            broken[2] = math.nan
        late = pending.wait()
        assert late is pending.wait()
        out[way] = {
            "at once": at_once,
            "late": late,
            "empty": empty,
            "strided": strided,
            "nan": collectives.reduce_tables(broken, dist.group.WORLD, LARGEST).wait(),
        }
    return out


@pytest.mark.parametrize("world_size", [2, 4])
def test_tables_are_added_in_rank_order(world_size):
    """Expected: ((t0 + t1) + t2) + t3 number by number, and the largest of column 4. Equal bits on every rank."""
    expected = tables(0)
    for rank in range(1, world_size):
        largest = torch.maximum(expected[:, LARGEST], tables(rank)[:, LARGEST])
        expected = expected + tables(rank)
        expected[:, LARGEST] = largest
    backwards = sum(tables(rank) for rank in reversed(range(world_size)))
    assert world_size == 2 or not torch.equal(backwards[:, 0], expected[:, 0])  # the order can be seen at all
    for ways in spawn(reduce_on, world_size):
        for found in ways.values():
            assert torch.equal(found["at once"], expected) and torch.equal(found["late"], expected)
            assert found["empty"].shape == (0, 6)
            plain = [c for c in range(6) if c != LARGEST]
            assert torch.equal(found["strided"].t()[:, plain], expected[:, plain])
            assert found["nan"][2].isnan().all() and not found["nan"][[0, 1, 3, 4]].isnan().any()


LENGTHS = (4000, 3, 1, 700, 0, 33)


def cut_over(rank: int, world_size: int) -> dict[int, torch.Tensor]:
    """The table of the same tokens cut over 1, 2 and 4 context-parallel ranks: each owns every n-th run of 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    new, old = (torch.randn(tokens, generator=generator) for _ in range(2))
    mask = torch.rand(tokens, generator=generator) > 0.3
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    out = {1: sequence_partials(new, old, mask, bounds)}
    for ranks, group in ((2, pairs[rank // 2]), (4, dist.group.WORLD)):
        owner = torch.arange(tokens) // 8 % ranks
        own = sequence_partials(new, old, mask & (owner == dist.get_rank(group)), bounds)
        out[ranks] = collectives.reduce_tables(own, group, LARGEST).wait()
    return out


def test_any_number_of_context_parallel_ranks_gives_the_same_table():
    for found in spawn(cut_over, 4):
        for ranks in (2, 4):
            torch.testing.assert_close(found[ranks], found[1], rtol=1e-12, atol=1e-13)
            assert torch.equal(found[ranks][:, LARGEST], found[1][:, LARGEST])


def publish_on(rank: int, world_size: int) -> list[torch.Tensor]:
    out = []
    for way in WAYS:
        choose(way)
        message = torch.full((7,), float(rank), dtype=torch.float64)
        pending = collectives.publish(message, dist.group.WORLD, 1)
        busy = torch.ones(64, 64).matmul(torch.ones(64, 64)).sum()  # other work, while it travels
        assert busy == 64**3 and pending.wait() is pending.wait()
        out.append(pending.wait())
        with pytest.raises(ValueError, match="root = 3 is no rank of a group of 3"):
            collectives.publish(message, dist.group.WORLD, 3)
        with pytest.raises(ValueError, match="contiguous"):
            collectives.publish(torch.ones(4, 4).t(), dist.group.WORLD, 0)
        with pytest.raises(ValueError, match=r"float32 \[2, 6\]; expected fp64"):
            collectives.reduce_tables(torch.ones(2, 6), dist.group.WORLD)
        with pytest.raises(ValueError, match="maximum = 6 is no column of a table with 6"):
            collectives.reduce_tables(tables(0), dist.group.WORLD, 6)
    return out


def test_every_rank_gets_the_roots_message():
    for found in spawn(publish_on, 3):
        for message in found:
            assert torch.equal(message, torch.ones(7, dtype=torch.float64))


def lose(rank: int, folder: str, how: int, way: str, op: str) -> None:
    """Rank 1 ends by signal `how` before it takes part; the others write what they see and after how many seconds."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    choose(way)
    limit = timedelta(seconds=START)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3, timeout=limit)
    table = tables(rank)
    collectives.reduce_tables(table, dist.group.WORLD, LARGEST).wait()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT), dist.group.WORLD)
    if rank == 1:
        os.kill(os.getpid(), how)
    began = time.monotonic()
    try:
        if op == "reduce":
            collectives.reduce_tables(table, dist.group.WORLD, LARGEST).wait()
        else:
            collectives.publish(table, dist.group.WORLD, 1).wait()
        report = "no error"
    except LostRankError as error:
        report = str(error)
    with open(f"{folder}/{rank}", "w") as file:
        file.write(f"{time.monotonic() - began:.2f} {report}")
    time.sleep(1)  # a survivor that leaves breaks the other one's connection too
    os._exit(0)


LOSSES = [(way, signal.SIGKILL) for way in WAYS] + [(WAYS[0], signal.SIGSTOP)]


@pytest.mark.parametrize("op", ["reduce", "publish"])
@pytest.mark.parametrize(("way", "how"), LOSSES, ids=lambda value: getattr(value, "name", value))
def test_a_lost_rank_is_an_error_in_time(way, how, op, tmp_path):
    """Killed: seen at once. Stopped: when the group's timeout is over. Neither is ever a table or a hang."""
    context = forks()
    ranks = [context.Process(target=lose, args=(r, str(tmp_path), int(how), way, op), daemon=True) for r in range(3)]
    for process in ranks:
        process.start()
    for survivor in (0, 2):
        ranks[survivor].join(START + 30)
    ranks[1].kill()
    for survivor in (0, 2):
        seconds, message = (tmp_path / str(survivor)).read_text().split(" ", 1)
        assert float(seconds) < TIMEOUT + 1 and (how == signal.SIGSTOP or float(seconds) < 1)
        assert "over ranks [0, 1, 2] did not finish (" in message and "has ended or hangs" in message
        assert ("tables of sequences" if op == "reduce" else "last stage's results") in message
