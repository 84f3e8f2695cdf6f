"""The warm start takes supervised steps on gold answers, through RL's Megatron path: random weights never earn a
reward.

The labelled set is fixed, and stop_accuracy ends this phase while RL has room; RL then goes on with fresh prompts and
rewards alone.
"""

from typing import Any

from gspo_megatron.algorithms.supervised import supervised_loss
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.batch import TrainSequence
from gspo_megatron.config import ResolvedConfig
from gspo_megatron.data.epochs import epoch_batch, share_of
from gspo_megatron.data.packing import padded_lengths
from gspo_megatron.errors import RolloutError
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
    score = run.resumed.score if run.resumed is not None else None
    if score is not None and score >= config.stop_accuracy:
        run.reporter.note(f"warm start had ended: held-out accuracy reached {config.stop_accuracy:g}")
        return
    run.reporter.phase("warm_start", config.steps, first - 1)
    for step in range(first, config.steps + 1):
        progress.step("warm_start", step)
        clock = StepClock(run.runtime.device)
        chosen = epoch_batch(run.config.seed, step, config.batch_size, len(examples))
        mine = share_of(chosen, run.topology.dp_rank, run.topology.dp_size)
        batches = run.policy.microbatches([examples[i] for i in mine])
        counts = global_counts(batches, run.topology)
        result = run.policy.update(batches, supervised_loss, counts)
        row: dict[str, Any] = {"phase": "warm_start", "step": step}
        row |= optimizer_metrics([result], run.topology.dp_group) | clock.read()
        run.reporter.tell(step, sanity_checks.update_findings([result], row, run.config.faults.max_ratio))
        if step % config.eval_interval == 0 or step == config.steps:
            clock = StepClock(run.runtime.device)
            with progress.part("evaluation"):
                row |= evaluate(run, "warm_start", step)
            row["time/eval"] = clock.read()["time/step"]
        run.reporter.row(row)
        run.maybe_save("warm_start", step, row)
        if row.get("eval/accuracy", 0.0) >= config.stop_accuracy:
            run.reporter.note(f"warm start ends: held-out accuracy reached {config.stop_accuracy:g}")
            return


def _examples(run: Run) -> list[TrainSequence]:
    examples = []
    positions = run.policy.models[0].max_sequence_length
    for index in range(run.config.warm_start.num_examples):
        item = run.mixture.item("warm_start", index)
        if item.epoch:
            continue  # a row of data is there once
        example = run.prompts.encode_example(item, run.stops.token_ids)
        check_length(example, item.task, run.config, positions)
        examples.append(example)
    return examples


def check_length(example: TrainSequence, task: str, config: ResolvedConfig, positions: int) -> None:
    """Raise RolloutError for an example that no microbatch holds or that the model has no positions for.

    Args:
        positions: the model's max_position_embeddings.
    """
    context = config.parallel.context_parallel_size
    (length,) = padded_lengths([example], 2 * context if context > 1 else 1)
    limits = {
        "the model's max_position_embeddings": positions,
        "max_tokens_per_microbatch": config.max_tokens_per_microbatch,
    }
    for name, limit in limits.items():
        if length > limit:
            raise RolloutError(
                f"tasks.{task}: question and gold answer have {length} tokens, more than {name} {limit}. Narrow "
                f"tasks.{task}.options, or set warm_start.steps = 0."
            )
