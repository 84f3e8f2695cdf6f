"""What routing statistics and replay cost: `python -m tools.benchmarks.routing` (add --ranks 4 for TP2 x PP2, EP2).

Three policies of the recipe's model go through the same rollout batch in turns: the pass of old log-probs and all its
updates, with statistics off, on, and with R2; with the metrics that they end in. Rollouts, which neither touches, are
left out, so shares of a whole step are smaller. Prints medians, and quartiles of the ratios turn by turn,
by the clock and in CPU seconds of all ranks: the latter do not count what other programs on this machine take. On a
machine that is not idle both scatter by more than statistics cost, so the CPU seconds inside the statistics' own calls
are printed, too: all of the cost but what it does to caches. Exit status 1 where those are 2% or more, or the lower
quartile of the ratios of CPU seconds is.
"""

import importlib
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from gspo_megatron.config import RoutingConfig, TrainConfig
from gspo_megatron.recipe.layout import resolve_layout
from gspo_megatron.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]

CHOICES = {
    "off": RoutingConfig(statistics=False),
    "statistics": RoutingConfig(),
    "R2": RoutingConfig(replay="R2"),
}


MOST = 0.02  # that statistics may cost
OWN_CALLS = {  # none calls another
    "gspo_megatron.backend.engine.router_hooks.RouterTap": ("_entropy", "confirm"),
    "gspo_megatron.routing.routes.RouteTrace": ("choose",),
    "gspo_megatron.backend.engine.routing_watch.RoutingWatch": ("_trace", "after_old", "after_update", "take"),
    "gspo_megatron.metrics.routing": ("step_routing",),
}


class Stopwatch:
    """Adds up the CPU seconds inside wrapped calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, owner: Any, name: str) -> None:
        """Put the wrapped call in the place of owner.name."""
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - began

        setattr(owner, name, timed)


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


Turn = tuple[float, float, float]  # seconds, CPU seconds, and CPU seconds in the statistics' own calls


def measure(rank: int, world_size: int, config: TrainConfig, options: Options) -> dict[str, list[Turn]]:
    """Every turn of one rank."""
    import torch
    import torch.distributed as dist

    from gspo_megatron.algorithms import policy_loss
    from gspo_megatron.backend.engine import microbatches as packing
    from gspo_megatron.backend.engine.policy import Policy
    from gspo_megatron.backend.model.shape import ModelShape
    from gspo_megatron.backend.parallel import runtime, topology
    from gspo_megatron.batch import TrainSequence
    from gspo_megatron.metrics import routing as metrics

    own = Stopwatch()
    for owner, names in OWN_CALLS.items():
        for name in names:
            own.wrap(getattr(importlib.import_module(owner.rpartition(".")[0]), owner.rpartition(".")[2]), name)
    layout = resolve_layout(config, world_size, has_cuda=False)
    started, cut = runtime.init_process_group("cpu"), topology.initialize_model_parallel(layout, config.seed)
    shape = ModelShape.load(config.model.hf_config, config.data.vocab_size)
    policies = {
        name: Policy(replace(config, routing=routing).resolved(layout), shape, cut, started)
        for name, routing in CHOICES.items()
    }
    generator = torch.Generator().manual_seed(1 + cut.dp_rank)
    number = config.rollout.num_prompts * config.rollout.group_size // cut.dp_size
    length = options.prompt + options.response
    tokens = torch.randint(0, shape.vocab_size, (number, length), generator=generator).tolist()
    sequences = [TrainSequence(token_ids=row, prompt_length=options.prompt) for row in tokens]
    share = number // config.algorithm.num_minibatches
    parts = [sequences[i : i + share] for i in range(0, number, share)]
    loss = policy_loss(config.algorithm, options.response)
    orders = list(itertools.permutations(CHOICES))  # so that nobody always comes after the same
    times: dict[str, list[Turn]] = {name: [] for name in CHOICES}
    for policy in policies.values():
        policy.start_optimizer()
    for turn in range(options.rounds + 1):
        for name in orders[turn % len(orders)]:
            policy = policies[name]
            minibatches = [
                packing.microbatches(part, config.max_tokens_per_microbatch, cut, started.device) for part in parts
            ]
            for batch in (batch for minibatch in minibatches for batch in minibatch):
                batch.advantages = torch.randn(batch.num_sequences, generator=torch.Generator().manual_seed(turn))
            dist.barrier()
            own.seconds = 0.0
            began, worked = time.perf_counter(), time.process_time()
            policy.fill_old_log_probs([batch for minibatch in minibatches for batch in minibatch])
            results = [
                policy.update(minibatch, loss, packing.global_counts(minibatch, cut), turn, index)
                for index, minibatch in enumerate(minibatches)
            ]
            metrics.step_routing(policy.routing.take(), policy.routing.topk, results, cut.dp_group)
            worked = time.process_time() - worked
            dist.barrier()
            if turn:  # the first one warms up
                times[name].append((time.perf_counter() - began, worked, own.seconds))
    topology.destroy_model_parallel()
    return times


def main(options: Options) -> int:
    """Print the table. Returns the exit status."""
    from tools.validation.ranks import spawn

    config = load_recipe([str(options.recipe)])
    ranks = spawn(measure, options.ranks, config, options, timeout=3600)
    clock = {name: [seconds for seconds, _, _ in turns] for name, turns in ranks[0].items()}
    cpu, inside = (
        {name: [sum(rank[name][turn][which] for rank in ranks) for turn in range(options.rounds)] for name in CHOICES}
        for which in (1, 2)
    )
    print(
        f"{options.recipe.name}, {options.ranks} ranks, {options.rounds} turns; old log-probs and updates of one batch"
    )
    for kind, times in (("clock", clock), ("CPU", cpu)):
        for name, seconds in times.items():
            low, middle, high = (100 * (q - 1) for q in cost(times, name))
            print(
                f"  {kind:<6} {name:<11} {1000 * statistics.median(seconds):8.1f} ms   {middle:+5.1f}% "
                f"({low:+.1f} to {high:+.1f})"
            )
    shares = {name: sum(inside[name]) / sum(cpu[name]) for name in CHOICES}
    print("  CPU inside their own calls: " + ", ".join(f"{name} {share:.2%}" for name, share in shares.items()))
    return int(max(cost(cpu, "statistics")[0] - 1, shares["statistics"]) >= MOST)


def cost(times: dict[str, list[float]], name: str) -> list[float]:
    """Quartiles of the ratios to the turn's run without statistics."""
    return statistics.quantiles([mine / base for mine, base in zip(times[name], times["off"], strict=True)], n=4)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
