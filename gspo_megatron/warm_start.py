"""Supervised steps on gold answers, through the same Megatron path as RL, because random weights never earn a reward.

The labelled set is small and fixed, so its accuracy levels off; RL then goes on with fresh prompts and rewards alone.
"""

import numpy as np
import torch
import torch.distributed as dist

from gspo_megatron.algorithms.supervised import supervised_loss
from gspo_megatron.config import TrainConfig
from gspo_megatron.data.packing import microbatches_needed, pack
from gspo_megatron.evaluation import evaluate
from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.run import Run
from gspo_megatron.types import PackedBatch, TrainSequence


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
        batches = pack_minibatch(run, mine)
        counts = run.policy.global_counts(batches)
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


def pack_minibatch(run: Run, sequences: list[TrainSequence]) -> list[PackedBatch]:
    """This replica's microbatches of one optimizer step; as many on every replica. A collective."""
    limit, topology = run.config.max_tokens_per_microbatch, run.topology
    needed = torch.tensor([microbatches_needed(sequences, limit)], device=run.runtime.device)
    dist.all_reduce(needed, op=dist.ReduceOp.MAX, group=topology.dp_group)
    count = int(needed)
    if topology.vp_size > 1:
        count = -(-count // topology.pp_size) * topology.pp_size  # the interleaved schedule wants a multiple
    batches = pack(sequences, limit, topology.tp_size, count)
    return [batch.to(run.runtime.device) for batch in batches]


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


def _permutation(seed: int, epoch: int, size: int, _cache: dict = {}) -> np.ndarray:  # noqa: B006
    key = (seed, epoch, size)
    if key not in _cache:
        _cache.clear()
        _cache[key] = np.random.default_rng((seed, epoch)).permutation(size)
    return _cache[key]
