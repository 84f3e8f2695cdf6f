"""Error of the sequence ratio s = exp(mean log-ratio) against exact sums, for values chosen to be hard to add.

    python -m tools.validation.sum_accuracy [--lengths 128 4096 131072]

Log-probs are fp32, so each log-ratio logp_new - logp_old is a known number and math.fsum adds them without error. Shown
is the relative error of s: with the sums of ops/sequence_ratio.py, and with fp32 arithmetic as eager PyTorch does it
(torch.sum adds in a tree, and in one running total where a loop or an index_add adds token by token). Epsilon, the clip
range that the ratio is held against, is 3e-4.
"""

import argparse
import math

import torch

from gspo_megatron.ops.sequence_ratio import sequence_partials

EPSILON = 3e-4


def hard_values(length: int, generator: torch.Generator) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """name -> (new, old), each [length] fp32 log-probs in nats."""
    old = -12 * torch.rand(length, generator=generator)
    noise = torch.randn(length, generator=generator)
    cancel = torch.where(torch.arange(length) % 2 == 0, 9.0, -9.0) * (1 + 1e-3 * noise.abs())
    return {
        "small noise": (old + 1e-3 * noise, old),
        "one shift": (old + 3e-4, old),  # all of one sign, at the clip bound itself
        "large, cancelling": (old - 30 + cancel, old - 30),
        "one huge token": (torch.cat([old[:1] - 80, old[1:] + 1e-4]), old),
    }


def ratios(new: torch.Tensor, old: torch.Tensor) -> dict[str, float]:
    """name -> s."""
    length = new.numel()
    bounds = torch.tensor([0, length], dtype=torch.int32)
    table = sequence_partials(new, old, torch.ones(length), bounds)
    running = torch.zeros(1).index_add(0, torch.zeros(length, dtype=torch.int64), new - old)
    return {
        "ours": math.exp(float(table[0, 1] / table[0, 0])),
        "fp32 sum": float((new - old).mean().exp()),
        "fp32 running": float((running[0] / length).exp()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 4096, 131072])
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    print(
        f"{'tokens':>7} {'values':<18} {'ours':>9} {'fp32 sum':>9} {'fp32 running':>12}   relative error of s "
        f"(epsilon {EPSILON:g})"
    )
    for length in args.lengths:
        for name, (new, old) in hard_values(length, generator).items():
            exact = math.exp(math.fsum((new.double() - old.double()).tolist()) / length)
            errors = [abs(s / exact - 1) for s in ratios(new, old).values()]
            print(f"{length:>7} {name:<18} {errors[0]:>9.1e} {errors[1]:>9.1e} {errors[2]:>12.1e}", flush=True)


if __name__ == "__main__":
    main()
