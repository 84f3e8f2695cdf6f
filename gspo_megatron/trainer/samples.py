"""A few responses of each step and of each evaluation are written to samples.jsonl, for people to read.

They are of rank 0's replica: the first response to each of its first prompts, then the second to each. Rank 0 knows all
there is to say of them in every layout: its replica's groups are whole there, and the table of an update is published
to every pipeline stage and context-parallel rank.

Left out: the likeliest responses of an evaluation (those of samples.jsonl are sampled), and dpo, which has none.
"""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gspo_megatron.batch import Minibatch, RolloutGroup, SequenceTable, UpdateResult
from gspo_megatron.trainer.advantages.estimator import by_response
from gspo_megatron.trainer.run import Run


def log_step(
    run: Run,
    step: int,
    groups: list[RolloutGroup],
    advantages: torch.Tensor,
    minibatches: list[Minibatch],
    results: list[UpdateResult],
) -> None:
    """Write down responses of an RL step that were learned from, where this rank is the one that writes.

    Args:
        advantages: [P * G], in the order of the responses.
        results: one a minibatch.
    """
    count = run.config.tracking.log_samples
    if not count or not run.runtime.is_main:
        return
    table = table_by_response(minibatches, results)
    for group, index, number in chosen(groups, count):
        row = {"phase": "rl", "step": step, "split": "train"} | sample(run.tokenizer, group, index)
        run.reporter.sample(row | {"advantage": float(advantages[number])} | ratio(table, number))


def log_evaluation(run: Run, phase: str, step: int, groups: list[RolloutGroup]) -> None:
    """Write down responses to held-out prompts, where this rank is the one that writes."""
    if run.runtime.is_main:
        for group, index, _ in chosen(groups, run.config.tracking.log_samples):
            row = {"phase": phase, "step": step, "split": "eval"} | sample(run.tokenizer, group, index)
            run.reporter.sample(row)


def chosen(groups: list[RolloutGroup], count: int) -> list[tuple[RolloutGroup, int, int]]:
    """Return up to `count` responses as (group, place in it, place among all), one a group before a second of any."""
    size = len(groups[0].completions)
    every = [(group, index, place * size + index) for index in range(size) for place, group in enumerate(groups)]
    return every[:count]


def sample(tokenizer: PreTrainedTokenizerBase, group: RolloutGroup, index: int) -> dict[str, Any]:
    """Return what is known of a response before anything is learned from it. The prompt is as the model saw it."""
    item, completion, score = group.prompt.item, group.completions[index], group.scores[index]
    return {
        "task": item.task,
        "prompt": tokenizer.decode(group.prompt.token_ids),
        "question": item.question,
        "answer": item.answer if item.has_answer else None,
        "response": group.texts[index],
        "reward": score.reward,
        "parts": score.parts,
        "advantage": None,
        "ratio": None,
        "clipped": None,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
    }


def table_by_response(minibatches: list[Minibatch], results: list[UpdateResult]) -> SequenceTable:
    """Return the results of all updates, [P * G, columns] in the order of the responses, each of which is in one."""
    return SequenceTable(by_response(torch.cat([result.stats.table.values for result in results]), minibatches))


def ratio(table: SequenceTable, number: int) -> dict[str, Any]:
    """Return a response's sequence ratio in its update, exp(mean log-ratio), and whether clipping took gradient from
    it; null for one that is not trained on."""
    tokens, log_ratio, low, high = (
        table.column(name)[number]
        for name in ("num_tokens", "sum_log_ratio", "clipped_low_tokens", "clipped_high_tokens")
    )
    if not tokens:
        return {"ratio": None, "clipped": None}
    return {"ratio": float((log_ratio / tokens).exp()), "clipped": bool(low + high > 0)}
