"""Reinforcement learning stands here: all steps, and one step in the order in which it happens.

What differs between ranks (their stage, their shard, their replica's prompts) is inside Policy and MegatronEngine.
Where an algorithm's advantages come from is advantages/.
"""

from typing import Any

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.engine.critic import Critic
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.backend.engine.reference import FrozenReference
from gspo_megatron.batch import Minibatch
from gspo_megatron.config import TrainConfig
from gspo_megatron.data.sequences import minibatch_indices, train_sequences
from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.metrics.reduce import update_metrics
from gspo_megatron.metrics.rollout import group_metrics
from gspo_megatron.metrics.routing import step_routing
from gspo_megatron.process import progress
from gspo_megatron.trainer import sanity_checks
from gspo_megatron.trainer.advantages.critic import CriticAdvantages
from gspo_megatron.trainer.advantages.estimator import AdvantageEstimator, GroupAdvantages
from gspo_megatron.trainer.collect import collect
from gspo_megatron.trainer.diagnostics.ratio_parts import ratio_parts
from gspo_megatron.trainer.evaluation import evaluate
from gspo_megatron.trainer.run import Run

SAMPLES_A_STEP = 2  # written to samples.jsonl for people to read


def reinforce(run: Run) -> None:
    """Take all RL steps, with evaluations before, between and after."""
    config = run.config
    run.policy.start_optimizer()
    if config.algorithm.kl.coef:
        run.reference = FrozenReference(run.policy.models)
    estimator = make_estimator(run)
    first = run.restore("rl", estimator.critic)
    run.reporter.phase("rl", config.steps, max(first - 1, 0))
    for step in range(first, config.steps + 1):
        progress.step("rl", step)
        row = run_step(run, estimator, step) if step else {"phase": "rl", "step": 0}
        if step % config.eval_interval == 0 or step == config.steps:
            row |= held_out_accuracy(run)
        run.reporter.row(row)
        run.maybe_save("rl", step, row, estimator.critic)


def make_estimator(run: Run) -> AdvantageEstimator:
    """PPO's advantages come from a critic, which starts from the policy as RL finds it; all others' from groups."""
    if run.config.algorithm.name != "ppo":
        return GroupAdvantages(run.config, run.policy)
    critic = Critic(run.config, run.policy.shape, run.topology, run.runtime)
    critic.start_from(run.policy)
    critic.start_optimizer()
    return CriticAdvantages(run.config, run.policy, critic)


def run_step(run: Run, estimator: AdvantageEstimator, step: int) -> dict:
    """Take one RL step: sample, score, compare within groups, and optimize in minibatches. Returns the metric row."""
    config, policy = run.config, run.policy
    clock = StepClock(run.runtime.device)
    seed = step_seed(config, step)

    groups, sampling = collect(run, seed, clock)
    run.finish_written()  # the longest part of a step is over: a kill from here on finds the last step's checkpoint
    sequences = train_sequences(groups, config.algorithm.mask_truncated_completions)
    parts = minibatch_indices(groups, config.algorithm.num_minibatches, (config.seed, step))
    minibatches = [Minibatch(part, run.microbatches([sequences[i] for i in part])) for part in parts]

    with clock.part("old_logprobs"):
        fill_log_probs(run, minibatches)
    if step == 1:
        for sentence in sanity_checks.findings(policy, minibatches, sequences):
            run.reporter.warn(sentence)
    advantages = estimator.fill(groups, minibatches, seed)
    with clock.part("update"):
        loss, results = policy_loss(config.algorithm, config.rollout.max_response_length), []
        learned: dict[str, float] = {}
        for number, minibatch in enumerate(minibatches):
            counts = global_counts(minibatch.batches, run.topology)
            results.append(policy.update(minibatch.batches, loss, counts, step, number))
            learned |= estimator.learn(minibatch, counts)

    row: dict[str, Any] = (
        {"phase": "rl", "step": step} | update_metrics(results, run.topology.dp_group) | sampling | learned
    )
    row |= group_metrics(groups, advantages, run.mixture.names, run.topology.dp_group, run.runtime.device)
    row |= step_routing(policy.routing.take(), policy.routing.topk, results, run.topology.dp_group)
    interval = config.routing.diagnostics_interval
    if interval and step % interval == 0:
        with clock.part("diagnostics"):
            row |= ratio_parts(policy, [batch for minibatch in minibatches for batch in minibatch.batches])
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
    for group in groups[:SAMPLES_A_STEP]:
        run.reporter.sample(
            {
                "step": step,
                "task": group.prompt.item.task,
                "prompt": group.prompt.item.question,
                "response": group.texts[0],
                "reward": group.scores[0].reward,
                "parts": group.scores[0].parts,
            }
        )
    return row


def fill_log_probs(run: Run, minibatches: list[Minibatch]) -> None:
    """Fill in old log-probs as the recipe chooses them (algorithm.old_logprobs), and the reference's if there is
    one."""
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
    """Return eval/* metrics with the seconds they took."""
    clock = StepClock(run.runtime.device)
    with progress.part("evaluation"):
        return evaluate(run) | {"time/eval": clock.read()["time/step"]}


def step_seed(config: TrainConfig, step: int) -> int:
    """Return the seed of a step's samples: another one for every (seed, step), the same in every layout."""
    return config.seed * 1_000_003 + step
