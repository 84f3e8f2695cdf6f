"""What routing statistics and replay cost: `python tools/bench_routing.py` (add --ranks 4 for TP2 x PP2, EP2).

Three policies of the recipe's model go through the same rollout batch in turns: the pass of old log-probs and all its
updates, with statistics off, on, and with R2. Rollouts, which neither touches, are left out, so shares of a whole step
are smaller. Prints medians, and the median and quartiles of the ratios turn by turn. Exit status 1 where statistics
cost 2% or more.
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gspo_megatron import check, recipe  # noqa: E402
from gspo_megatron.config import TrainConfig  # noqa: E402
from gspo_megatron.config_routing import RoutingConfig  # noqa: E402

CHOICES = {
    "off": RoutingConfig(statistics=False),
    "statistics": RoutingConfig(),
    "R2": RoutingConfig(replay="R2"),
}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    recipe: Path = ROOT / "examples/recipes/moe_gspo.yaml"
    ranks: int = 1
    """Gloo ranks on this machine, in the recipe's layout for that many."""

    rounds: int = 15
    """Turns of each of the three."""

    prompt: int = 12
    """Tokens."""

    response: int = 8
    """Tokens, all of them trained."""


def measure(rank: int, world_size: int, config: TrainConfig, options: Options) -> dict[str, list[float]]:
    """Seconds of each turn. One rank."""
    import torch
    import torch.distributed as dist

    from gspo_megatron.algorithms import policy_loss
    from gspo_megatron.backend import batches as packing
    from gspo_megatron.backend import runtime, topology
    from gspo_megatron.backend.model import ModelShape
    from gspo_megatron.backend.policy import Policy
    from gspo_megatron.types import TrainSequence

    layout = check.resolve_layout(config, world_size, has_cuda=False)
    started, cut = runtime.start("cpu"), topology.start(layout, config.seed)
    shape = ModelShape.load(config.model.hf_config, config.data.vocab_size)
    policies = {name: Policy(replace(config, parallel=layout, routing=routing), shape, cut, started)
                for name, routing in CHOICES.items()}  # fmt: skip
    generator = torch.Generator().manual_seed(1 + cut.dp_rank)
    number = config.rollout.num_prompts * config.rollout.group_size // cut.dp_size
    length = options.prompt + options.response
    tokens = torch.randint(0, shape.vocab_size, (number, length), generator=generator).tolist()
    sequences = [TrainSequence(token_ids=row, prompt_length=options.prompt) for row in tokens]
    share = number // config.algorithm.num_minibatches
    parts = [sequences[i : i + share] for i in range(0, number, share)]
    loss = policy_loss(config.algorithm, options.response)
    times: dict[str, list[float]] = {name: [] for name in CHOICES}
    for policy in policies.values():
        policy.start_optimizer()
    for turn in range(options.rounds + 1):
        for name, policy in sorted(policies.items(), reverse=turn % 2 == 1):  # who comes first takes turns
            minibatches = [
                packing.microbatches(part, config.max_tokens_per_microbatch, cut, started.device) for part in parts
            ]
            for batch in (batch for minibatch in minibatches for batch in minibatch):
                batch.advantages = torch.randn(batch.num_sequences, generator=torch.Generator().manual_seed(turn))
            dist.barrier()
            began = time.perf_counter()
            policy.fill_old_log_probs([batch for minibatch in minibatches for batch in minibatch])
            for index, minibatch in enumerate(minibatches):
                policy.update(minibatch, loss, packing.global_counts(minibatch, cut), turn, index)
            policy.routing.take()
            dist.barrier()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - began)
    topology.stop()
    return times


def main(options: Options) -> int:
    """Print the table. Returns the exit status."""
    from tests.distributed import spawn

    config = recipe.load([str(options.recipe)])
    times = spawn(measure, options.ranks, config, options, timeout=3600)[0]
    print(
        f"{options.recipe.name}, {options.ranks} ranks, {options.rounds} turns; old log-probs and updates of one batch"
    )
    for name, seconds in times.items():
        low, middle, high = (100 * (q - 1) for q in cost(times, name))
        print(f"  {name:<11} {1000 * statistics.median(seconds):8.1f} ms   {middle:+5.1f}% ({low:+.1f} to {high:+.1f})")
    return int(cost(times, "statistics")[1] >= 1.02)


def cost(times: dict[str, list[float]], name: str) -> list[float]:
    """Quartiles of the ratios to the turn's run without statistics."""
    return statistics.quantiles([mine / base for mine, base in zip(times[name], times["off"], strict=True)], n=4)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
