"""Bytes and time of getting sequence ratios under context parallelism: our table, or vectors of log-probs.

    python -m tools.benchmarks.communication [--ranks 2 4] [--sequences 32] [--length 32768]

One microbatch of S sequences is cut over context-parallel ranks of this machine (Gloo over the loopback device). Each
way ends with every rank knowing the sum of the log-ratio of all S sequences, from new and old log-probs of its own
tokens:

- table: sequence_partials on the rank's own tokens, then reduce_tables: one all-gather of S x 8 numbers in fp64;
- gather: all-gather of the log-prob vectors, then the sums (as verl, ROLL, NeMo-RL and ms-swift do);
- all-reduce: vectors of full length, 0 where another rank owns the token, are added, then the sums (as slime does).

The vectors are fp32 and of the new policy alone, which favours the last two: old log-probs have to come once more.
`payload` is what one rank hands to the collective, `on the wire` what the loopback device carried by rank and call,
protocol headers included (other traffic of the machine counts too, so leave it alone). Ways take turns; medians.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gspo_megatron.ops import library
from gspo_megatron.ops.collectives import reduce_tables
from gspo_megatron.ops.sequence_ratio import COLUMNS, sequence_partials

EXTRA = 2  # columns that the losses add to those of sequence_partials: KL to the reference, rollout mismatch
REPEATS = 15


class Share:
    """This rank's part of a microbatch: the same 1/CP of every sequence."""

    def __init__(self, sequences: int, length: int):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.sequences, self.own = sequences, length // ranks
        generator = torch.Generator().manual_seed(rank)
        self.old = -torch.rand(sequences * self.own, generator=generator)
        self.new = self.old + 0.01 * torch.randn(self.old.shape, generator=generator)
        self.mask = torch.ones_like(self.new)
        self.bounds = torch.arange(sequences + 1, dtype=torch.int32) * self.own
        self.first = rank * self.own
        self.padded = torch.zeros(sequences, length)
        self.length = length

    def table(self) -> torch.Tensor:
        partials = sequence_partials(self.new, self.old, self.mask, self.bounds)
        wide = torch.nn.functional.pad(partials, (0, EXTRA))
        assert dist.group.WORLD is not None
        return reduce_tables(wide, dist.group.WORLD, COLUMNS.index("max_abs_log_ratio")).wait()[:, 1]

    def gather(self) -> torch.Tensor:
        whole = self.new.new_empty(dist.get_world_size() * self.new.numel())
        dist.all_gather_single(whole, self.new)
        return whole.view(-1, self.sequences, self.own).double().sum((0, 2)) - self._old()

    def all_reduce(self) -> torch.Tensor:
        self.padded.zero_()
        self.padded[:, self.first : self.first + self.own] = self.new.view(self.sequences, self.own)
        dist.all_reduce(self.padded)
        return self.padded.double().sum(1) - self._old()

    def _old(self) -> torch.Tensor:
        """Sums of the old log-probs, which these ways are given for nothing."""
        if not hasattr(self, "old_sums"):
            self.old_sums = self.old.view(self.sequences, self.own).double().sum(1)
            dist.all_reduce(self.old_sums)
        return self.old_sums

    def payload(self) -> dict[str, int]:
        return {
            "table": self.sequences * (len(COLUMNS) + EXTRA) * 8,
            "gather": self.new.numel() * 4,
            "all-reduce": self.padded.numel() * 4,
        }


def carried() -> int:
    """Bytes that the loopback device has sent since the machine started."""
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def measure(call: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """(seconds, bytes on the wire by rank) of one call, all ranks together."""
    dist.barrier()
    time.sleep(0.01)  # until the barrier's own bytes are through
    before, began = carried(), time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    time.sleep(0.03)
    sent = (carried() - before) / dist.get_world_size()
    dist.barrier()
    return seconds, sent


def on_rank(rank: int, ranks: int, store: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    share = Share(args.sequences, args.length)
    ways = {"table": share.table, "gather": share.gather, "all-reduce": share.all_reduce}
    sums = {name: way() for name, way in ways.items()}
    worst = max(float((sums[name] - sums["table"]).abs().max()) for name in ways)
    if worst > 1e-3:
        raise SystemExit(f"the ways disagree by {worst:.1e}")
    found: dict[str, list] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            found[name].append(measure(way))
    if rank == 0:
        base = statistics.median(seconds for seconds, _ in found["table"])
        for name, rows in found.items():
            seconds, sent = (statistics.median(column) for column in zip(*rows, strict=True))
            print(
                f"{ranks:>5} {name:<11} {share.payload()[name]:>12,} {sent:>14,.0f} {seconds * 1e3:>9.2f} "
                f"{seconds / base:>7.1f}x",
                flush=True,
            )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=32768, help="tokens a sequence, a multiple of every --ranks")
    args = parser.parse_args()
    if any(args.length % ranks for ranks in args.ranks):
        parser.error(f"--length {args.length} is not a multiple of every number in --ranks {args.ranks}")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    print(
        f"torch {torch.__version__}, {args.sequences} sequences of {args.length} tokens, one thread a rank; "
        f"reduce_tables: {library.status()['reduce_tables']}"
    )
    print(f"{'ranks':>5} {'way':<11} {'payload, B':>12} {'on the wire, B':>14} {'ms':>9} {'time':>8}")
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(on_rank, args=(ranks, f"{folder}/store", args), nprocs=ranks, start_method="spawn")


if __name__ == "__main__":
    main()
