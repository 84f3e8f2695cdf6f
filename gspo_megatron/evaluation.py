"""Greedy accuracy on held-out prompts."""

import torch

from gspo_megatron.metrics.reduce import gather_rows
from gspo_megatron.rollout import groups as rollouts
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.tasks.mixture import TaskMixture, is_correct
from gspo_megatron.types import Prompt


def evaluate(engine: MegatronEngine, prompts: list[Prompt], mixture: TaskMixture, tokenizer,
             max_tokens: int) -> dict[str, float]:  # fmt: skip
    """Share of prompts whose likeliest response is right, overall and by task. A collective over all ranks."""
    topology, device = engine.topology, engine.device
    # Every replica must get as many prompts; the fillers are not counted.
    filled = prompts + [prompts[-1]] * (-len(prompts) % topology.dp_size)
    params = SamplingParams(max_tokens, (tokenizer.eos_token_id,), greedy=True)
    groups = rollouts.generate(engine, filled, 1, params, 0, tokenizer)
    rollouts.score(groups, mixture, topology, device)
    tasks = mixture.names
    rows = [
        (is_correct(g.rewards[0]), tasks.index(g.prompt.item.task), len(g.completions[0].token_ids)) for g in groups
    ]
    rows = gather_rows(torch.tensor(rows, dtype=torch.float64, device=device), topology.dp_group)[: len(prompts)]
    correct, task, length = rows.unbind(1)
    metrics = {"eval/accuracy": correct.mean(), "eval/response_length": length.mean(), "eval/num": len(prompts)}
    for index, name in enumerate(tasks):
        if bool((task == index).any()):
            metrics[f"eval/accuracy_{name}"] = correct[task == index].mean()
    return {key: float(value) for key, value in metrics.items()}
