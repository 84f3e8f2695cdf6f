"""The warm start takes supervised steps on gold answers, through RL's Megatron path: random weights never earn a
reward.

The labelled set is fixed, and stop_accuracy ends this phase while RL has room; RL then goes on with fresh prompts and
rewards alone.
"""

from typing import Any

from gspo_megatron.algorithms.supervised import supervised_loss
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.batch import TrainSequence
from gspo_megatron.data.epochs import epoch_batch, share_of
from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.metrics.reduce import optimizer_metrics
from gspo_megatron.process import progress
from gspo_megatron.trainer import sanity_checks
from gspo_megatron.trainer.evaluation import evaluate
from gspo_megatron.trainer.run import Run


def warm_start(run: Run) -> None:
    """Run all supervised steps. Rows go to the metrics under phase "warm_start"."""
    config = run.config.warm_start
    if config.steps == 0 or run.is_past_warm_start:
        return
    run.policy.start_optimizer(warm_start=True)
    examples = _examples(run)
    first = max(run.restore("warm_start"), 1)
    run.reporter.phase("warm_start", config.steps, first - 1)
    for step in range(first, config.steps + 1):
        progress.step("warm_start", step)
        clock = StepClock(run.runtime.device)
        chosen = epoch_batch(run.config.seed, step, config.batch_size, len(examples))
        mine = share_of(chosen, run.topology.dp_rank, run.topology.dp_size)
        batches = run.microbatches([examples[i] for i in mine])
        counts = global_counts(batches, run.topology)
        result = run.policy.update(batches, supervised_loss, counts)
        row: dict[str, Any] = {"phase": "warm_start", "step": step}
        row |= optimizer_metrics([result], run.topology.dp_group) | clock.read()
        run.reporter.tell(step, sanity_checks.update_findings([result], row, run.config.faults.max_ratio))
        if step % config.eval_interval == 0 or step == config.steps:
            clock = StepClock(run.runtime.device)
            with progress.part("evaluation"):
                row |= evaluate(run)
            row["time/eval"] = clock.read()["time/step"]
        run.reporter.row(row)
        run.maybe_save("warm_start", step, row)
        if row.get("eval/accuracy", 0.0) >= config.stop_accuracy:
            run.reporter.note(f"warm start ends: held-out accuracy reached {config.stop_accuracy:g}")
            return


def _examples(run: Run) -> list[TrainSequence]:
    examples = []
    for index in range(run.config.warm_start.num_examples):
        item = run.mixture.item("warm_start", index)
        prompt = run.prompts.encode_prompt(item)
        examples.append(TrainSequence(prompt + run.prompts.encode_answer(item), len(prompt)))
    return examples
