"""Reinforcement learning stands here: all steps, and one step in the order in which it happens.

What differs between ranks (their stage, their shard, their replica's prompts) is inside Policy and Sampler. How
a batch is learned from, once it is sampled and scored, is gspo_trainer.py.
"""

from typing import Any

from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.metrics.reduce import update_metrics
from gspo_megatron.metrics.rollout import group_metrics
from gspo_megatron.metrics.routing import step_routing
from gspo_megatron.process import progress
from gspo_megatron.trainer import samples, sanity_checks
from gspo_megatron.trainer.collect import collect
from gspo_megatron.trainer.diagnostics.ratio_parts import ratio_parts
from gspo_megatron.trainer.evaluation import evaluate
from gspo_megatron.trainer.gspo_trainer import GspoTrainer, step_seed
from gspo_megatron.trainer.offline import save_groups
from gspo_megatron.trainer.run import Run


def reinforce(run: Run) -> None:
    """Take all RL steps, with evaluations before, between and after."""
    config = run.config
    trainer = GspoTrainer(config, policy=run.policy)
    run.reference, critic = trainer.reference, trainer.estimator.critic
    first = run.restore("rl", critic)
    trainer.version = max(first - 1, 0)
    run.reporter.phase("rl", config.steps, max(first - 1, 0))
    for step in range(first, config.steps + 1):
        progress.step("rl", step)
        row = run_step(run, trainer, step) if step else {"phase": "rl", "step": 0}
        if step % config.eval_interval == 0 or step == config.steps:
            row |= held_out_accuracy(run, step)
        run.reporter.row(row)
        run.maybe_save("rl", step, row, critic)


def run_step(run: Run, trainer: GspoTrainer, step: int) -> dict:
    """Take one RL step: sample, score, and learn from what came of it. Returns the metric row."""
    config, policy = run.config, run.policy
    clock = StepClock(run.runtime.device)
    seed = step_seed(config, step)

    groups, sampling = collect(run, trainer.version, seed, clock)
    save_groups(run, step, groups)
    run.finish_written()  # the longest part of a step is over: a kill from here on finds the last step's checkpoint
    learned = trainer.learn(groups, step, seed, clock=clock)
    results = learned.results
    if step == 1:
        for sentence in sanity_checks.findings(policy, learned.minibatches, learned.sequences):
            run.reporter.warn(sentence)

    row: dict[str, Any] = (
        {"phase": "rl", "step": step} | update_metrics(results, run.topology.dp_group) | sampling | learned.metrics
    )
    row |= group_metrics(groups, learned.advantages, run.mixture.names, run.topology.dp_group, run.runtime.device)
    row |= step_routing(policy.routing.take(), policy.routing.topk, results, run.topology.dp_group)
    interval = config.routing.diagnostics_interval
    if interval and step % interval == 0:
        with clock.part("diagnostics"):
            row |= ratio_parts(policy, [batch for minibatch in learned.minibatches for batch in minibatch.batches])
    row |= clock.read()
    row["perf/tokens_per_second"] = row.pop("tokens") / row["time/step"]
    run.reporter.tell(step, sanity_checks.update_findings(results, row, config.faults.max_ratio))
    if step == 1:
        stops = run.stops.described(run.tokenizer)
        limit, most = config.rollout.max_response_length, config.faults.max_truncated
        told = sanity_checks.truncation_findings(row, limit, stops, most)
        run.collapse.told |= {"response/truncated"} if told else set()  # the same, with what it means at a start
        run.reporter.tell(step, told)
    run.reporter.tell(step, run.collapse.findings(row))
    if row["update/skipped"]:
        run.reporter.note(
            f"step {step}: {row['update/skipped']:.0f} of {len(results)} updates changed nothing: "
            "their gradient was exactly 0 (no advantage, or all clipped or masked)"
        )
    samples.log_step(run, step, groups, learned.advantages, learned.minibatches, results)
    return row


def held_out_accuracy(run: Run, step: int) -> dict[str, float]:
    """Return eval/* metrics with the seconds they took."""
    clock = StepClock(run.runtime.device)
    with progress.part("evaluation"):
        return evaluate(run, "rl", step) | {"time/eval": clock.read()["time/step"]}
