"""What does a checkpoint cost training, and how large is it? `python -m tools.benchmarks.checkpoint [--rounds 3]`

Trains the example recipe (its own batch, 4 Gloo ranks) in rounds of steps: without checkpoints, with one after each
step that training waits for, and with one after each step that a thread writes meanwhile. The cost of one checkpoint is
the difference of the medians of (step + checkpoint); its share of training is that over the time between two of them
at the recipe's interval. Times are rank 0's, from barrier to barrier.

The size is that of the folder without its tokenizer and config, beside what it must hold: each weight, its fp32 copy
where the weight is bf16, and Adam's two moments, each once. torch stores each shard as a zip of its own, with about
1.2 kB of padding and directory: a fixed cost that shows in the recipe's small model and not in one of 78 M parameters.

Exit status: 0 when the asynchronous checkpoint costs less than 5%, and the larger one's size is within 2%, else 1.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from gspo_megatron.config import Layout, ResolvedConfig
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.trainer import build, rl
from gspo_megatron.trainer import run as runs
from gspo_megatron.trainer.gspo_trainer import GspoTrainer
from tools.validation.launching import ROOT
from tools.validation.ranks import spawn

MODES = ("none", "waited for", "asynchronous")
COST, SIZE = 0.05, 0.02
LARGER = {"hidden_size": 512, "num_hidden_layers": 8, "moe_intermediate_size": 384, "num_experts": 16}


def steps_of(run: runs.Run, trainer, mode: str, first: int, count: int) -> list[float]:
    """Seconds of each step with its checkpoint."""
    set_mode(run, mode)
    seconds = []
    for step in range(first, first + count):
        dist.barrier()
        began = time.perf_counter()
        run.maybe_save("rl", step, rl.run_step(run, trainer, step))
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    wait_until_visible(run)
    return seconds


def set_mode(run: runs.Run, mode: str) -> None:
    checkpoint = dataclasses.replace(
        run.config.checkpoint, interval=0 if mode == "none" else 1, asynchronous=mode == "asynchronous"
    )
    run.config = dataclasses.replace(run.config, checkpoint=checkpoint, steps=10**6)


def wait_until_visible(run: runs.Run) -> None:
    while run.saver.is_writing:
        time.sleep(0.002)
    dist.barrier()
    run.finish_written()


def costs(rank: int, world_size: int, folder: Path, rounds: int, count: int) -> dict[str, list[float]]:
    config = load(folder, Layout(2, 2, None, 2, 1))
    run = build.build_run(config)
    trainer = GspoTrainer(run.config, policy=run.policy)
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    steps_of(run, trainer, "asynchronous", 1, 1)  # warms up
    for number in range(rounds):
        for place, mode in enumerate(MODES):
            found[mode] += steps_of(run, trainer, mode, 2 + (number * len(MODES) + place) * count, count)
    build.close_run(run)
    return found


def load(folder: Path, layout: Layout, *words: str) -> ResolvedConfig:
    given = [str(ROOT / "examples/recipes/moe_gspo.yaml"), "--device", "cpu", "--output-dir", str(folder), *words]
    return load_recipe(given, program="bench_checkpoint").resolved(layout)


def sizes(rank: int, world_size: int, folder: Path, hf_config: str, dtype: str) -> tuple[int, int, float, float]:
    """(parameters, bytes of the folder, seconds that training waits, seconds until it is visible)."""
    words = ("--model.hf-config", hf_config, "--model.params-dtype", dtype, "--name", dtype)
    run = build.build_run(load(folder, Layout(1, 2, None, 1, 1), *words))
    run.policy.start_optimizer()
    set_mode(run, "asynchronous")
    began = time.perf_counter()
    run.maybe_save("rl", 1, {})
    waited = time.perf_counter() - began
    wait_until_visible(run)
    total = time.perf_counter() - began
    own = torch.tensor(float(sum(p.numel() for model in run.policy.models for p in model.parameters())))
    dist.all_reduce(own)
    checkpoint = run.folder / "checkpoints/step_000001"
    bytes_ = sum(path.stat().st_size for path in checkpoint.iterdir() if path.is_file())
    build.close_run(run)
    return int(own), bytes_, waited, total


def main(rounds: int = 3, steps: int = 3) -> int:
    """Measure.

    Args:
        rounds: of all three modes, one after the other; 0: sizes alone.
        steps: of each mode in a round.
    """
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_") as name:
        is_cheap = not rounds or report_costs(Path(name), rounds, steps)
        return 0 if report_sizes(Path(name)) and is_cheap else 1


def report_costs(folder: Path, rounds: int, steps: int) -> bool:
    found = spawn(costs, 4, folder, rounds, steps, timeout=60 + 60 * rounds * steps)[0]
    medians = {mode: statistics.median(seconds) for mode, seconds in found.items()}
    interval = load_recipe([str(ROOT / "examples/recipes/moe_gspo.yaml")]).checkpoint.interval
    for mode, seconds in found.items():
        cost = medians[mode] - medians["none"]
        share = cost / (interval * medians["none"])
        costs_ = f"; one costs {1000 * cost:.0f} ms, {100 * share:.2f}% of training at interval {interval}"
        print(
            f"{mode:13} step {medians[mode]:.2f} s (median of {len(seconds)}, {min(seconds):.2f} to "
            f"{max(seconds):.2f}){costs_ if mode != 'none' else ''}",
            flush=True,
        )
    return medians["asynchronous"] - medians["none"] < COST * interval * medians["none"]


def report_sizes(folder: Path) -> bool:
    config, small = folder / "larger.json", ROOT / "examples/models/qwen3_moe_tiny/config.json"
    config.write_text(json.dumps(json.loads(small.read_text()) | LARGER))
    for model, dtype, each in ((small, "fp32", 12), (config, "bf16", 14)):
        count, size, waited, total = spawn(sizes, 2, folder, str(model), dtype, timeout=120)[0]
        excess = size / (each * count) - 1
        waits = f"training waits {1000 * waited:.0f} ms of {1000 * total:.0f}"
        print(
            f"{count / 1e6:6.1f} M parameters in {dtype}: {size / 1e6:.1f} MB, {100 * excess:+.2f}% of {each} "
            f"bytes a parameter; {waits}",
            flush=True,
        )
    return excess < SIZE  # of the larger one


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
