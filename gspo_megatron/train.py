"""READ FIRST. A training run from start to end, and one RL step in the order in which it happens.

Every rank runs this file; what differs between ranks (their stage, their shard, their replica's prompts) is inside
Policy and MegatronEngine. Where an algorithm's advantages come from is estimator.py. DPO has no rollouts, see
preferences.py. What of a run is kept, and where it goes on, is in run.py and resume.py.
"""

import dataclasses

from gspo_megatron import health, whereabouts
from gspo_megatron import run as runs
from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.batches import global_counts
from gspo_megatron.backend.critic import Critic
from gspo_megatron.backend.reference import FrozenReference
from gspo_megatron.config import ParallelConfig, TrainConfig
from gspo_megatron.critic_advantages import CriticAdvantages
from gspo_megatron.estimator import AdvantageEstimator, GroupAdvantages
from gspo_megatron.evaluation import evaluate
from gspo_megatron.hf import export
from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.metrics.plots import draw
from gspo_megatron.metrics.reduce import update_metrics
from gspo_megatron.metrics.routing import ratio_parts, step_routing
from gspo_megatron.preferences import encode_pairs, train_preferences
from gspo_megatron.rollout import groups as rollouts
from gspo_megatron.rollout.collect import collect
from gspo_megatron.run import Run
from gspo_megatron.types import Minibatch
from gspo_megatron.warm_start import warm_start
from gspo_megatron.watchdog import Watchdog

SAMPLES_A_STEP = 2  # written to samples.jsonl for people to read


def train(config: TrainConfig, layout: ParallelConfig) -> None:
    """Warm start, then RL or DPO. `layout` has every size filled in and has been checked (check.py)."""
    run = runs.start(dataclasses.replace(config, parallel=layout))
    watchdog = Watchdog(run.topology.coordinates, config.faults)
    if config.algorithm.name == "dpo":
        pairs = encode_pairs(run)  # before the warm start, because a pair may be too long
        warm_start(run)
        train_preferences(run, pairs)
    else:
        warm_start(run)
        reinforce(run)
    if config.save_hf:
        hf, companions = run.hf_files()
        policy, target = run.policy, run.folder / "hf"
        export.export(policy.models, policy.topology, target, hf, policy.shape.architecture, companions=companions)
    if run.runtime.is_main:
        pictures = draw(run.folder)
        run.reporter.note(f"done: {run.folder} has the checkpoint, metrics.jsonl and {len(pictures)} plots")
    watchdog.stop()
    runs.stop(run)


def reinforce(run: Run) -> None:
    """All RL steps, with evaluations before, between and after."""
    config = run.config
    run.policy.start_optimizer()
    if config.algorithm.kl.coef:
        run.reference = FrozenReference(run.policy.models)
    estimator = make_estimator(run)
    first = run.first_step("rl", estimator.critic)
    run.reporter.phase("rl", config.steps, max(first - 1, 0))
    for step in range(first, config.steps + 1):
        whereabouts.step("rl", step)
        row = run_step(run, estimator, step) if step else {"phase": "rl", "step": 0}
        if step % config.eval_interval == 0 or step == config.steps:
            row |= held_out_accuracy(run)
        run.reporter.row(row)
        run.keep("rl", step, row, estimator.critic)


def make_estimator(run: Run) -> AdvantageEstimator:
    """PPO's advantages come from a critic, which starts from the policy as RL finds it; all others' from groups."""
    if run.config.algorithm.name != "ppo":
        return GroupAdvantages(run.config, run.policy)
    critic = Critic(run.config, run.policy.shape, run.topology, run.runtime)
    critic.start_from(run.policy)
    critic.start_optimizer()
    return CriticAdvantages(run.config, run.policy, critic)


def run_step(run: Run, estimator: AdvantageEstimator, step: int) -> dict:
    """One RL step: sample, score, compare within groups, and optimize in minibatches. Returns the metric row."""
    config, policy = run.config, run.policy
    clock = StepClock(run.runtime.device)
    seed = step_seed(config, step)

    groups, sampling = collect(run, seed, clock)
    run.publish_written()  # the longest part of a step is over: a kill from here on finds the last step's checkpoint
    sequences = rollouts.train_sequences(groups)
    parts = rollouts.minibatch_indices(groups, config.algorithm.num_minibatches, (config.seed, step))
    minibatches = [Minibatch(part, run.microbatches([sequences[i] for i in part])) for part in parts]

    with clock.part("old_logprobs"):
        fill_log_probs(run, minibatches)
    if step == 1:
        for sentence in health.findings(policy, minibatches, sequences):
            run.reporter.warn(sentence)
    advantages = estimator.fill(groups, minibatches, seed)
    with clock.part("update"):
        loss, results = policy_loss(config.algorithm, config.rollout.max_response_length), []
        learned: dict[str, float] = {}
        for number, minibatch in enumerate(minibatches):
            counts = global_counts(minibatch.batches, run.topology)
            results.append(policy.update(minibatch.batches, loss, counts, step, number))
            learned |= estimator.learn(minibatch, counts)

    row = {"phase": "rl", "step": step} | update_metrics(results, run.topology.dp_group) | sampling | learned
    row |= rollouts.group_metrics(groups, advantages, run.mixture.names, run.topology, run.runtime.device)
    row |= step_routing(policy, results)
    interval = config.routing.diagnostics_interval
    if interval and step % interval == 0:
        with clock.part("diagnostics"):
            row |= ratio_parts(policy, [batch for minibatch in minibatches for batch in minibatch.batches])
    row |= clock.read()
    row["perf/tokens_per_second"] = row.pop("tokens") / row["time/step"]
    run.reporter.tell(step, health.update_findings(results, row, config.faults.max_ratio))
    if row["update/skipped"]:
        run.reporter.note(f"step {step}: {row['update/skipped']:.0f} of {len(results)} updates changed nothing: "
                          "their gradient was exactly 0 (no advantage, or all clipped or masked)")  # fmt: skip
    for group in groups[:SAMPLES_A_STEP]:
        run.reporter.sample({"step": step, "task": group.prompt.item.task, "prompt": group.prompt.item.question,
                             "response": group.texts[0], "reward": group.rewards[0]})  # fmt: skip
    return row


def fill_log_probs(run: Run, minibatches: list[Minibatch]) -> None:
    """Old log-probs as the recipe chooses them (algorithm.old_logprobs), and the reference's where there is one."""
    choice = run.config.algorithm.old_logprobs
    batches = [batch for minibatch in minibatches for batch in minibatch.batches]
    if choice == "rollout":
        for batch in batches:
            batch.old_logprobs = batch.rollout_logprobs
    else:
        skipped = len(minibatches[0].batches) if choice == "first_minibatch" else 0
        if batches[skipped:]:
            run.policy.fill_old_log_probs(batches[skipped:])
    if run.reference:
        with run.reference.in_place():
            run.policy.fill_ref_log_probs(batches)


def held_out_accuracy(run: Run) -> dict[str, float]:
    """eval/* metrics with the seconds they took."""
    clock = StepClock(run.runtime.device)
    with whereabouts.part("evaluation"):
        return evaluate(run) | {"time/eval": clock.read()["time/step"]}


def step_seed(config: TrainConfig, step: int) -> int:
    """Of a step's samples: another for every (seed, step), the same in every layout."""
    return config.seed * 1_000_003 + step
