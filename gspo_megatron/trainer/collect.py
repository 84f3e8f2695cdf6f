"""One RL step's rollouts are sampled and scored, and, where the recipe asks for it, what has no signal is sampled anew.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a group whose rewards are all equal has no gradient. Each
further round takes as many fresh prompts as the first; a replica keeps its groups with signal until it has its share.
After `resampling_rounds`, groups without signal fill the rest; their advantages are 0, whatever penalties their rewards
get (advantages/estimator.py). Left out: rounds of a size fitted to what is missing,
and a choice over all replicas: which groups are kept depends on the data-parallel size.
"""

import torch
import torch.distributed as dist

from gspo_megatron.batch import RolloutGroup
from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.rollout.generation import join_context
from gspo_megatron.rollout.random_numbers import round_seed
from gspo_megatron.rollout.scoring import score
from gspo_megatron.trainer.offline import read_groups
from gspo_megatron.trainer.run import Run


def collect(run: Run, version: int, seed: int, clock: StepClock) -> tuple[list[RolloutGroup], dict[str, float]]:
    """Return this replica's share of rollout.num_prompts groups, with rewards, and metrics of sampling. A collective.

    Args:
        version: of the weights.
        seed: of the step.
    """
    limit = run.config.algorithm.resampling_rounds
    if run.rollouts is not None:
        return read_groups(run, run.rollouts, clock), {}
    metrics = run.weight_sync.sync(version)
    groups = _round(run, seed, clock)
    if limit == 0:
        return groups, metrics
    share = len(groups)
    kept = [group for group in groups if group.has_signal]
    flat = [group for group in groups if not group.has_signal]
    rounds = 1
    while rounds <= limit and _most_missing(run, share - len(kept)) > 0:
        groups = _round(run, round_seed(seed, rounds), clock)
        kept += [group for group in groups if group.has_signal]
        flat += [group for group in groups if not group.has_signal]
        rounds += 1
    metrics |= {"sampling/rounds": float(rounds)} | _metrics(run, kept, flat, share)
    return (kept + flat)[:share], metrics


def _metrics(run: Run, kept: list[RolloutGroup], flat: list[RolloutGroup], share: int) -> dict[str, float]:
    """Count over all replicas. reward/mean is of the groups that are trained on; reward/sampled of all that were
    sampled."""
    rewards = [score.reward for group in kept + flat for score in group.scores if score.reward is not None]
    sums = torch.tensor(
        [len(kept), len(flat), max(share - len(kept), 0), max(len(kept) - share, 0), share, sum(rewards), len(rewards)],
        dtype=torch.float64,
        device=run.runtime.device,
    )
    dist.all_reduce(sums, group=run.topology.dp_group)
    signal, without, filled, unused, shares, reward, number = sums.tolist()
    return {
        "sampling/without_signal": without / (signal + without),
        "sampling/filled": filled / shares,
        "sampling/unused": unused,
        "reward/sampled": reward / max(number, 1.0),
    }


def _round(run: Run, seed: int, clock: StepClock) -> list[RolloutGroup]:
    config = run.config.rollout
    prompts = run.prompts.next(config.num_prompts)
    with clock.part("rollout"):
        limit, params = config.max_response_length, run.sampling_params()
        groups = run.generator.generate(prompts, config.group_size, limit, params, seed)
    with clock.part("reward"):
        told = run.reporter.scored(sum(len(group.completions) for group in groups))
        score(groups, run.mixture, run.topology, run.runtime.device, told)
    return join_context(groups, run.topology)


def _most_missing(run: Run, missing: int) -> int:
    """Return the most over replicas: all of them sample while one needs it, for their experts and prompts are
    shared."""
    most = torch.tensor([missing], device=run.runtime.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=run.topology.dp_group)
    return int(most)
