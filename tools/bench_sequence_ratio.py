"""Time, bandwidth and memory of the GSPO loss: eager PyTorch, torch.compile of it, and ops/sequence_ratio.py.

    python tools/bench_sequence_ratio.py [--tokens 8192 1048576] [--no-compile] [--threads 2]

Each row is one packed microbatch of ragged sequences, fp32, mask 0 on one fifth of the tokens. `padded` is the form in
which the loss is usually written: [S, longest] tensors, masked sum, exp, clamp, minimum, mean; `packed` is the same by
index_add without padding. All variants get the same numbers, alternate in one run, and the median is shown. Extra
memory is the rise of the process's peak over inputs and gradient in one call. Bandwidth is the bytes that must move
(forward: new, old and mask read; backward: mask read, gradient written; entropy is left out everywhere) by time, as a
share of a copy of as many bytes with as many threads.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from gspo_megatron.ops import library
from gspo_megatron.ops.sequence_ratio import gspo_surrogate, sequence_partials

LOW, HIGH = 3e-4, 4e-4


def ragged(tokens: int, mean_length: int, generator: torch.Generator) -> list[int]:
    """Lengths from 1/2 to 3/2 of the mean that sum to `tokens`."""
    lengths, left = [], tokens
    while left > 0:
        drawn = int(torch.randint(mean_length // 2, mean_length * 3 // 2 + 1, (1,), generator=generator))
        lengths.append(min(drawn, left))
        left -= lengths[-1]
    return lengths


class Case:
    """One packed microbatch and its padded copy."""

    def __init__(self, tokens: int, mean_length: int):
        generator = torch.Generator().manual_seed(tokens + mean_length)
        self.lengths = ragged(tokens, mean_length, generator)
        self.size = len(self.lengths)
        old = -torch.rand(tokens, generator=generator) * 3
        self.new = (old + 0.01 * torch.randn(tokens, generator=generator)).requires_grad_()
        self.old, self.mask = old, (torch.rand(tokens, generator=generator) > 0.2).float()
        self.bounds = torch.tensor([0, *self.lengths]).cumsum(0).int()
        self.advantages = torch.randn(self.size, generator=generator)
        self.ids = torch.repeat_interleave(torch.arange(self.size), torch.tensor(self.lengths))

    def pad(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(new, old, mask), each [S, longest]."""
        rows = [list(x.detach().split(self.lengths)) for x in (self.new, self.old, self.mask)]
        new, old, mask = (torch.nn.utils.rnn.pad_sequence(r, batch_first=True) for r in rows)
        return new.requires_grad_(), old, mask


def padded_loss(new, old, mask, advantages):
    """The usual form, fp32."""
    mean = ((new - old) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    ratio = mean.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages).mean()


def packed_loss(new, old, mask, advantages, ids):
    """The usual form without padding, fp32."""
    total = torch.zeros_like(advantages).index_add(0, ids, (new - old) * mask)
    ratio = (total / torch.zeros_like(advantages).index_add(0, ids, mask).clamp(min=1)).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages).mean()


def variants(case: Case, compiled: bool) -> dict[str, tuple[Callable, torch.Tensor]]:
    """name -> (function that gives the loss, leaf that gets the gradient)."""
    out: dict[str, tuple[Callable, torch.Tensor]] = {}
    new, old, mask = case.pad()
    # Padding to the longest must stay affordable; these lengths at most double the tokens.
    out["eager padded"] = (lambda: padded_loss(new, old, mask, case.advantages)), new
    out["eager packed"] = (lambda: packed_loss(case.new, case.old, case.mask, case.advantages, case.ids)), case.new
    if compiled:
        torch._dynamo.reset()
        fast_padded = torch.compile(padded_loss, dynamic=False)
        fast_packed = torch.compile(packed_loss, dynamic=False)
        out["compiled padded"] = (lambda: fast_padded(new, old, mask, case.advantages)), new
        out["compiled packed"] = (
            (lambda: fast_packed(case.new, case.old, case.mask, case.advantages, case.ids)), case.new,
        )  # fmt: skip

    def ours():
        partials = sequence_partials(case.new, case.old, case.mask, case.bounds)
        return gspo_surrogate(
            case.new, partials, case.advantages, case.mask, case.bounds, LOW, HIGH, case.size
        )[0]  # fmt: skip

    out["ours"] = ours, case.new
    return out


def medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Seconds a call, the calls taking turns so that a disturbance of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def extra_memory(call: Callable[[], object]) -> int:
    """Bytes allocated at the highest point of one call, from torch's profiler of allocations."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        keep = call()
    deltas = [(e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, delta in sorted(deltas):
        now += delta
        peak = max(peak, now)
    del keep
    return peak


def measure(case: Case, args: argparse.Namespace) -> None:
    tokens = case.new.numel()
    functions = variants(case, args.compile)

    def step(loss, leaf):
        return lambda: torch.autograd.grad(loss(), leaf)

    for phase, moved in (("forward", 12), ("fwd+bwd", 20)):
        calls = {n: f if phase == "forward" else step(f, leaf) for n, (f, leaf) in functions.items()}
        # A copy reads and writes: as many bytes in all as the op must move.
        source = torch.ones(tokens * moved // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        calls["copy"] = lambda source=source, target=target: target.copy_(source)
        times = medians(calls, args.seconds)
        base = min(times[n] for n in functions if n.startswith("eager"))
        for name in functions:
            gradient = 0 if phase == "forward" else functions[name][1].numel() * 4
            extra = (extra_memory(calls[name]) - gradient) / 2**20
            print(
                  f"{tokens:>8} {case.size:>6} {phase:<8} {name:<16} {times[name] * 1e3:>9.3f} "
                  f"{base / times[name]:>7.2f}x {times['copy'] / times[name]:>7.0%} {extra:>9.2f}", flush=True,
            )  # fmt: skip
        print(f"{tokens:>8} {case.size:>6} {phase:<8} {'copy':<16} {times['copy'] * 1e3:>9.3f} "
              f"        {tokens * moved / times['copy'] / 1e9:>6.1f} GB/s", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 65536, 2**20, 2**22])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 4096, 131072], help="mean sequence length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="at least this long for each group of rows")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads; {library.status()['sequence_partials']}")
    print(f"{'tokens':>8} {'seqs':>6} {'phase':<8} {'variant':<16} {'ms':>9} {'speedup':>8} {'of copy':>7} {'MiB':>9}")
    for tokens in args.tokens:
        for length in args.lengths:
            if length <= tokens:
                measure(Case(tokens, length), args)


if __name__ == "__main__":
    main()
