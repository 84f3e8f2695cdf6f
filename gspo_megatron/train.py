"""READ FIRST. A training run from start to end, and one RL step in the order in which it happens.

Every rank runs this file; what differs between ranks (their stage, their shard, their replica's prompts) is inside
Policy and MegatronEngine. Left out: resuming a run, a reference model (the KL coefficient is 0), a critic.
"""

import dataclasses

from gspo_megatron import run as runs
from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend import checkpoint
from gspo_megatron.config import ParallelConfig, TrainConfig
from gspo_megatron.evaluation import evaluate
from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.metrics.plots import draw
from gspo_megatron.metrics.reduce import load_metrics, update_metrics
from gspo_megatron.rollout import groups as rollouts
from gspo_megatron.run import Run
from gspo_megatron.warm_start import warm_start

SAMPLES_A_STEP = 2  # written to samples.jsonl for people to read


def train(config: TrainConfig, layout: ParallelConfig) -> None:
    """Warm start, then RL. `layout` has every size filled in and has been checked (check.py)."""
    run = runs.start(dataclasses.replace(config, parallel=layout))
    warm_start(run)
    run.policy.start_optimizer()
    run.reporter.phase("rl", config.steps)
    run.reporter.row({"phase": "rl", "step": 0} | held_out_accuracy(run))
    for step in range(1, config.steps + 1):
        row = run_step(run, step)
        if step % config.eval_interval == 0 or step == config.steps:
            row |= held_out_accuracy(run)
        run.reporter.row(row)
    checkpoint.save(run.policy, run.folder / "checkpoints" / f"step_{config.steps:06d}")
    if run.runtime.is_main:
        pictures = draw(run.folder)
        run.reporter.note(f"done: {run.folder} has the checkpoint, metrics.jsonl and {len(pictures)} plots")
    runs.stop(run)


def run_step(run: Run, step: int) -> dict:
    """One RL step: sample, score, compare within groups, and optimize in minibatches. Returns the metric row."""
    config, policy = run.config, run.policy
    clock = StepClock(run.runtime.device)

    with clock.part("rollout"):
        prompts = run.prompts.next(config.rollout.num_prompts)
        seed = step_seed(config, step)
        groups = rollouts.generate(
            run.engine, prompts, config.rollout.group_size, run.sampling_params(), seed, run.tokenizer
        )
    with clock.part("reward"):
        rollouts.score(groups, run.mixture, run.topology, run.runtime.device)
    advantages = rollouts.advantages(groups, config.algorithm, seed)
    sequences = rollouts.train_sequences(groups, advantages)
    order_seed = (config.seed, step, run.topology.dp_rank)
    parts = rollouts.minibatches(sequences, config.algorithm.num_minibatches, order_seed)
    minibatches = [policy.microbatches(part) for part in parts]

    with clock.part("old_logprobs"):
        policy.fill_old_log_probs([batch for batches in minibatches for batch in batches])
    with clock.part("update"):
        loss, results = policy_loss(config.algorithm), []
        for batches in minibatches:
            counts = policy.global_counts(batches)
            results.append(policy.update(batches, loss, counts))

    row = {"phase": "rl", "step": step} | update_metrics(results, run.topology.dp_group)
    row |= rollouts.group_metrics(groups, advantages, run.mixture.names, run.topology, run.runtime.device)
    row |= load_metrics(policy.expert_load.take()) | clock.read()
    row["perf/tokens_per_second"] = row.pop("tokens") / row["time/step"]
    for group in groups[:SAMPLES_A_STEP]:
        run.reporter.sample({"step": step, "task": group.prompt.item.task, "prompt": group.prompt.item.question,
                             "response": group.texts[0], "reward": group.rewards[0]})  # fmt: skip
    return row


def held_out_accuracy(run: Run) -> dict[str, float]:
    """eval/* metrics with the seconds they took."""
    clock = StepClock(run.runtime.device)
    return evaluate(run) | {"time/eval": clock.read()["time/step"]}


def step_seed(config: TrainConfig, step: int) -> int:
    """Of a step's samples: another for every (seed, step), the same in every layout."""
    return config.seed * 1_000_003 + step
