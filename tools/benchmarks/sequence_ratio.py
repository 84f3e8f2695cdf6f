"""Time, bandwidth and memory of the GSPO loss: eager PyTorch, torch.compile of it, and ops/sequence_ratio.py.

    python -m tools.benchmarks.sequence_ratio [--tokens 8192 1048576] [--lengths 16 4096] [--no-compile] [--threads 2]

Each group of rows is one packed microbatch of ragged sequences, fp32, mask 0 on one fifth of the tokens. The forms are
those of tools/benchmarks/gspo_forms.py: `padded` is the loss alone on tensors that are padded already (padding is not
timed), `packed` the same by index_add, `same outputs` adds to `padded` the sums that our table has besides, and the
others are written as four libraries write them, with their metrics. All get the same numbers, take turns in one run,
and the median is shown. `slower` is a row's time by ours.

Extra memory is the highest point of torch's allocations over what was there before: of the forward, or of forward and
backward together without the bytes of the gradient, whichever is more (for the eager forms that is a lower bound: an
intermediate may become their gradient). Of ours, the table of sums, the ratios and the clip counts are results that the
trainer keeps, 72 bytes a sequence; the last line of a group says how much is left without them.

`of copy` is the time of a copy that moves as many bytes as the operation must (forward: new, old and mask read;
backward: mask read, gradient written; entropy is left out everywhere), with as many threads, by the row's time.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gspo_megatron.ops import library
from gspo_megatron.ops.sequence_ratio import gspo_surrogate, sequence_partials
from tools.benchmarks import gspo_forms as forms

LOOPED_SEQUENCES = 8192  # a form that loops over sequences in Python is left out above
KEPT = 8 * (6 + 1 + 2)  # bytes a sequence of ours that are results: table, ratio, clip counts


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

    @property
    def packed(self) -> tuple[torch.Tensor, ...]:
        return self.new, self.old, self.mask, self.advantages

    def pad(self) -> tuple[torch.Tensor, ...]:
        """(new, old, mask), each [S, longest], and the advantages."""
        rows = [list(x.detach().split(self.lengths)) for x in (self.new, self.old, self.mask)]
        new, old, mask = (torch.nn.utils.rnn.pad_sequence(r, batch_first=True) for r in rows)
        return new.requires_grad_(), old, mask, self.advantages


def ours(case: Case) -> tuple[torch.Tensor, ...]:
    partials = sequence_partials(case.new, case.old, case.mask, case.bounds)
    return gspo_surrogate(case.new, partials, case.advantages, case.mask, case.bounds, forms.LOW, forms.HIGH, case.size)


def variants(case: Case, compiled: bool) -> dict[str, tuple[Callable, torch.Tensor]]:
    """name -> (function that gives the loss and what comes with it, leaf that gets the gradient)."""
    padded, packed = case.pad(), (*case.packed, case.ids)
    # Padding to the longest must stay affordable; these lengths at most double the tokens.
    calls: dict[str, tuple[Callable, tuple[Any, ...]]] = {
        "padded": (forms.padded, padded),
        "packed": (forms.packed, packed),
        "same outputs": (forms.same_outputs, padded),
        "as in TRL": (forms.trl, padded),
        "as in verl": (forms.verl, padded),
        "as in NeMo-RL": (forms.nemo_rl, padded),
    }
    if case.size <= LOOPED_SEQUENCES:
        calls["as in slime"] = forms.slime, (*case.packed, case.lengths)
    if compiled:
        torch._dynamo.reset()
        for name in ("padded", "packed", "same outputs"):
            form, inputs = calls[name]
            calls[f"compiled {name}"] = torch.compile(form, dynamic=False), inputs
    out: dict[str, tuple[Callable, torch.Tensor]] = {}
    for name, (form, inputs) in calls.items():
        out[name] = functools.partial(form, *inputs), inputs[0]
    out["ours"] = functools.partial(ours, case), case.new
    return out


def loss_of(result: torch.Tensor | tuple) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def check(case: Case, functions: dict[str, tuple[Callable, torch.Tensor]]) -> None:
    """All forms give one loss: a form that computes something else would be no measure."""
    losses = {name: float(loss_of(call()).detach()) for name, (call, _) in functions.items()}
    for name, loss in losses.items():
        scale = float(case.advantages.abs().mean())
        assert abs(loss - losses["ours"]) <= 1e-4 * scale, f"{name} gives {loss}, ours {losses['ours']}"


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


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes allocated at the highest point of one call, from torch's profiler of allocations."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        keep = call()
    deltas = [(e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    del keep
    now = peak = 0
    for _, delta in sorted(deltas, key=lambda event: event[0]):
        now += delta
        peak = max(peak, now)
    return peak


def measure(case: Case, args: argparse.Namespace) -> None:
    tokens = case.new.numel()
    functions = variants(case, args.compile)
    check(case, functions)

    def step(call, leaf):
        def run():
            result = call()
            return torch.autograd.grad(loss_of(result), leaf), result

        return run

    extra: dict[str, int] = {}
    for phase, moved in (("forward", 12), ("fwd+bwd", 20)):
        calls = {n: f if phase == "forward" else step(f, leaf) for n, (f, leaf) in functions.items()}
        # A copy reads and writes: as many bytes in all as the op must move.
        source = torch.ones(tokens * moved // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        times = medians({**calls, "copy": functools.partial(target.copy_, source)}, args.seconds)
        for name, (_, leaf) in functions.items():
            peak = peak_memory(calls[name])
            extra[name] = peak if phase == "forward" else max(extra[name], peak - leaf.numel() * 4)
        report(case, phase, moved, times, extra)


def report(case: Case, phase: str, moved: int, times: dict[str, float], extra: dict[str, int]) -> None:
    label = f"{case.new.numel():>8} {case.size:>6} {phase:<8}"
    for name, memory in extra.items():
        print(
            f"{label} {name:<21} {times[name] * 1e3:>9.3f} {times[name] / times['ours']:>7.2f}x "
            f"{times['copy'] / times[name]:>7.0%} {memory / 2**20:>9.3f}",
            flush=True,
        )
    speed = case.new.numel() * moved / times["copy"] / 1e9
    print(f"{label} {'copy':<21} {times['copy'] * 1e3:>9.3f} {'':>16} {speed:>7.1f} GB/s")
    eager = min((n for n in extra if n != "ours" and not n.startswith("compiled")), key=times.__getitem__)
    line = f"ours: {times[eager] / times['ours']:.2f}x the fastest eager form ({eager})"
    compiled = [n for n in extra if n.startswith("compiled")]
    if compiled:
        best = min(compiled, key=times.__getitem__)
        line += f", {times[best] / times['ours']:.2f}x the fastest compiled one ({best.removeprefix('compiled ')})"
    left = (extra["ours"] - KEPT * case.size) / 2**20
    print(f"{label} {line}; {times['copy'] / times['ours']:.0%} of a copy; {left:.3f} MiB beside results\n", flush=True)


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
    print(f"{'tokens':>8} {'seqs':>6} {'phase':<8} {'variant':<21} {'ms':>9} {'slower':>8} {'of copy':>7} {'MiB':>9}")
    for tokens in args.tokens:
        for length in args.lengths:
            if length <= tokens:
                measure(Case(tokens, length), args)


if __name__ == "__main__":
    main()
