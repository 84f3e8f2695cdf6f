"""Supervised steps on gold answers, through the same Megatron path as RL, because random weights never earn a reward.

The labelled set is fixed, and stop_accuracy ends this phase while RL has room; RL then goes on with fresh prompts and
rewards alone.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist

from gspo_megatron.algorithms.supervised import supervised_loss
from gspo_megatron.backend.batches import global_counts
from gspo_megatron.config import TrainConfig
from gspo_megatron.evaluation import evaluate
from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.run import Run
from gspo_megatron.types import TrainSequence


def warm_start(run: Run) -> None:
    """Run all supervised steps. Rows go to the metrics under phase "warm_start"."""
    config = run.config.warm_start
    if config.steps == 0:
        return
    run.policy.start_optimizer(warm_start=True)
    examples = _examples(run)
    run.reporter.phase("warm_start", config.steps)
    for step in range(1, config.steps + 1):
        clock = StepClock(run.runtime.device)
        chosen = _batch(run.config, step, len(examples))
        share = len(chosen) // run.topology.dp_size
        mine = [examples[i] for i in chosen[run.topology.dp_rank * share : (run.topology.dp_rank + 1) * share]]
        batches = run.microbatches(mine)
        counts = global_counts(batches, run.topology)
        result = run.policy.update(batches, supervised_loss, counts)
        loss = torch.tensor(result.loss, dtype=torch.float64, device=run.runtime.device)
        dist.all_reduce(loss, group=run.topology.dp_group)
        row = {"phase": "warm_start", "step": step, "loss": float(loss), "lr": result.learning_rate,
               "grad_norm": result.grad_norm} | clock.read()  # fmt: skip
        if step % config.eval_interval == 0 or step == config.steps:
            clock = StepClock(run.runtime.device)
            row |= evaluate(run)
            row["time/eval"] = clock.read()["time/step"]
        run.reporter.row(row)
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


def _batch(config: TrainConfig, step: int, num_examples: int) -> list[int]:
    """Example numbers of one step over all ranks: epochs of seeded permutations, end to end."""
    size = config.warm_start.batch_size
    numbers = []
    for position in range((step - 1) * size, step * size):
        epoch, place = divmod(position, num_examples)
        numbers.append(int(_permutation(config.seed, epoch, num_examples)[place]))
    return numbers


@lru_cache(maxsize=2)  # a batch touches two epochs at most
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)
