"""Checks the CUDA kernels of the losses on a GPU. Not yet run: we had no GPU, only a compiler and an emulation.

    pip install --no-build-isolation --no-deps .   (with a torch that has CUDA, and nvcc)
    python tools/gpu_check.py [--build] [--cases 40] [--tokens 8192 1048576] [--no-sanitizer]

In this order; it stops at the first wrong result with exit code 1, and exits 2 where there is no GPU:

1. with --build, the package is built and installed from this folder, CUDA kernels required;
2. fresh random inputs in all types against the plain formulas in fp64 on the CPU, both kinds of advantages, dual clip;
   twice with the same bits; wrong cu_seqlens give a loss that is not a number;
3. forward and backward captured in a CUDA graph and replayed on new numbers;
4. compute-sanitizer's memcheck and racecheck over a small case, where the tool is installed;
5. the time of each op beside the bytes that it must move, as a share of a device-to-device copy's bandwidth.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
FLOATS = ("float32", "float64", "bfloat16", "float16")
LENGTHS = (0, 1, 2, 7, 8, 9, 100, 1023, 1025, 4095, 4096, 4097, 9000, 131072)


def build() -> None:
    """Install the package from this folder; an error where the kernels do not build."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(ROOT)]
    subprocess.run(command, check=True, env=os.environ | {"GSPO_MEGATRON_NATIVE": "1"})


def random_case(lengths: list[int], generator, new_dtype: str, old_dtype: str, mask_dtype: str, spread: float):
    """On the CPU: (new [T], old [T], mask [T], cu_seqlens [S+1], entropy [T], advantages [S], advantages [T])."""
    import torch

    tokens = sum(lengths) + 5  # 5 of padding
    old = -3 * torch.rand(tokens, generator=generator)
    new = old + spread * torch.randn(tokens, generator=generator)
    mask = (torch.rand(tokens, generator=generator) > 0.3).to(getattr(torch, mask_dtype))
    advantages = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (len(lengths), tokens)]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    entropy = torch.rand(tokens, generator=generator)
    return (new.to(getattr(torch, new_dtype)), old.to(getattr(torch, old_dtype)), mask, cu, entropy, *advantages)


def run(case, by_token: bool, ops, dual: float = math.inf):
    """(partials, loss, ratios, clipped, slopes, gradient), and of the surrogate by token (objective, table, gradient).

    Of `ops`, on whatever device the case is.
    """
    import torch

    new, old, mask, cu, entropy, by_sequence, token = case
    token = token if by_token else None
    table = ops.sequence_partials(new, old, mask, cu, entropy, token)
    advantages = token if by_token else by_sequence
    forward = ops.gspo_forward(new, table, advantages, mask, cu, 0.05, 0.1, 3.0, dual)
    scale = torch.full((), 1.5, dtype=torch.float64, device=new.device)
    gradient = ops.gspo_backward(scale, forward[3], token, mask, cu, 3.0, new.dtype)
    clip = (0.05, 0.1, dual)
    objective, sums = ops.token_surrogate_forward(new, old, mask, cu, entropy, advantages, *clip)
    grad = torch.arange(1, cu.numel(), dtype=torch.float64, device=new.device)
    by_itself = ops.token_surrogate_backward(grad, new, old, mask, cu, advantages, *clip)
    return table, *forward, gradient, objective, sums, by_itself


def check_numbers(cases: int, seed: int) -> None:
    """Random cases against the formulas on the CPU; equal bits on a second run."""
    import torch

    from gspo_megatron.ops import library, sequence_ratio_reference, token_surrogate_reference

    both = vars(sequence_ratio_reference) | vars(token_surrogate_reference)
    formulas = SimpleNamespace(**{op: both[op] for op in library.OPS})
    generator = torch.Generator().manual_seed(seed)

    def draw(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    for i in range(cases):
        lengths = [draw(LENGTHS) for _ in range(1 + i % 7)]
        masks = ("bool", "uint8", "float32", "float64")
        case = random_case(lengths, generator, draw(FLOATS), draw(FLOATS), draw(masks), draw((0.001, 0.3, 3.0)))
        on_device = [x.cuda() for x in case]
        for by_token in (False, True):
            for dual in (math.inf, 1.2):
                got = run(on_device, by_token, torch.ops.gspo_megatron, dual)
                again = run(on_device, by_token, torch.ops.gspo_megatron, dual)
                assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
                for at, (a, b) in enumerate(zip(got, run(case, by_token, formulas, dual), strict=True)):
                    gradient = at in (5, 8)
                    eps = torch.finfo(b.dtype).eps if gradient else 0.0  # the last digit may round the other way
                    torch.testing.assert_close(
                        a.cpu(), b, rtol=max(1e-9, 2 * eps), atol=1e-7 if gradient else 1e-9, equal_nan=True
                    )
        # Another place in memory, so other widths of access: the same bits.
        begin, end = int(case[3][-2]), int(case[3][-1])
        cu = torch.tensor([0, end - begin], dtype=torch.int32, device="cuda")
        parts = [on_device[k][begin:end].clone() for k in (0, 1, 2, 4)]
        alone = torch.ops.gspo_megatron.sequence_partials(*parts[:3], cu, parts[3], None)
        whole = torch.ops.gspo_megatron.sequence_partials(*on_device[:5], None)
        assert torch.equal(alone[0], whole[-1]), "a sequence's sums depend on its neighbours"
    for wrong in ([-5, 4, 90], [0, 60, 40], [0, 50, 900]):
        case = [x.cuda() for x in random_case([45, 45], generator, "float32", "float32", "bool", 0.1)]
        case[3] = torch.tensor(wrong, dtype=torch.int32, device="cuda")
        got = run(case, False, torch.ops.gspo_megatron)
        assert got[1].isnan() and got[6].isnan().any(), f"cu_seqlens {wrong} went unseen"
    torch.cuda.synchronize()
    print(f"numbers: {cases} random cases equal the formulas, twice with the same bits")


def check_graph() -> None:
    """One capture of all ops, replayed on other log-probs and other boundaries."""
    import torch

    generator = torch.Generator().manual_seed(1)
    lengths = ([5000, 3, 0, 9000], [1, 13000, 1000, 2])  # as many sequences and tokens
    cases = [random_case(one, generator, "float32", "float32", "float32", 0.1) for one in lengths]
    static = [x.cuda() for x in cases[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static, True, torch.ops.gspo_megatron)  # the allocator warms up outside the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static, True, torch.ops.gspo_megatron)
    for source, target in zip(cases[1], static, strict=True):
        target.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    want = run(static, True, torch.ops.gspo_megatron)
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True)), "a replayed graph differs"
    print("graph: captured and replayed on other numbers")


def check_memory() -> None:
    """compute-sanitizer over one small case in a process of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("sanitizer: compute-sanitizer is not installed; left out")
        return
    for name in ("memcheck", "racecheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, __file__, "--small"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        print(f"sanitizer: {name} finds nothing")


def time_ms(work, repeats: int = 50) -> float:
    """Median milliseconds of one call on the device, the second-level cache filled with other data before each."""
    import torch

    flush = torch.empty(128 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats + 5):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[5:])[repeats // 2]


def measure(tokens: int, mean_length: int = 4096) -> None:
    """One row for each op: fp32 log-probs, a mask of bytes, one advantage a sequence."""
    import torch

    ops = torch.ops.gspo_megatron
    generator = torch.Generator().manual_seed(2)
    size = max(1, tokens // mean_length)
    lengths = [tokens // size] * size
    case = random_case(lengths, generator, "float32", "float32", "bool", 0.01)
    new, old, mask, cu, _, advantages, _ = (x.cuda() for x in case)
    table = ops.sequence_partials(new, old, mask, cu, None, None)
    slopes = ops.gspo_forward(new, table, advantages, mask, cu, 3e-4, 4e-4, 1.0, math.inf)[3]
    one, ones = (torch.ones(shape, dtype=torch.float64, device="cuda") for shape in ((), (size,)))
    inputs, clip = (new, old, mask, cu), (0.2, 0.28, math.inf)
    rows = {
        "sequence_partials": (9, lambda: ops.sequence_partials(new, old, mask, cu, None, None)),
        "gspo_forward": (0, lambda: ops.gspo_forward(new, table, advantages, mask, cu, 3e-4, 4e-4, 1.0, math.inf)),
        "gspo_backward": (5, lambda: ops.gspo_backward(one, slopes, None, mask, cu, 1.0, torch.float32)),
        "token_surrogate_forward": (9, lambda: ops.token_surrogate_forward(*inputs, None, advantages, *clip)),
        "token_surrogate_backward": (13, lambda: ops.token_surrogate_backward(ones, *inputs, advantages, *clip)),
    }
    for name, (bytes_a_token, work) in rows.items():
        milliseconds, moved = time_ms(work), bytes_a_token * new.numel()
        line = f"{name:24} {tokens:9} tokens {size:5} sequences {milliseconds * 1e3:9.1f} us {moved / 1e6:8.2f} MB"
        if moved:
            source = torch.empty(moved // 2, dtype=torch.int8, device="cuda")  # read once and written once
            target = torch.empty_like(source)
            copy = time_ms(lambda a=source, b=target: b.copy_(a))
            line += f" {moved / milliseconds / 1e6:8.1f} GB/s, {100 * copy / milliseconds:.0f}% of a copy's bandwidth"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="build and install the package first")
    parser.add_argument("--cases", type=int, default=40, help="random cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 131072, 1048576, 16777216])
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--small", action="store_true", help="only two random cases; what the sanitizer runs")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print(f"no GPU that torch {torch.__version__} can use: nothing was checked", file=sys.stderr)
        return 2
    if args.build:
        build()
    from gspo_megatron.ops import library, sequence_ratio, token_surrogate  # noqa: F401  (define the ops)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {library.status()['sequence_partials']}")
    if not library.has_cuda():
        print("the CUDA kernels were not built: run with --build", file=sys.stderr)
        return 1
    check_numbers(2 if args.small else args.cases, args.seed)
    if args.small:
        return 0
    check_graph()
    if not args.no_sanitizer:
        check_memory()
    for tokens in args.tokens:
        measure(tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
