"""A policy is evaluated by its accuracy on held-out prompts."""

import dataclasses

import torch

from gspo_megatron.batch import RolloutGroup
from gspo_megatron.metrics.reduce import gather_rows
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.rollout.scoring import score
from gspo_megatron.trainer.run import Run
from gspo_megatron.trainer.samples import log_evaluation

SEED = 20_250_718  # the same random numbers at every evaluation of every run


def evaluate(run: Run, phase: str, step: int) -> dict[str, float]:
    """Measure accuracy and reward on the held-out prompts after a step. A collective over all ranks.

    eval/accuracy is pass@1: the share of right answers among data.eval_samples responses a prompt, sampled as in the
    rollouts. eval/accuracy_greedy is the share of prompts whose likeliest response is right. eval/reward is the mean
    reward of the sampled ones, a few of which go to samples.jsonl.
    """
    metrics: dict[str, torch.Tensor | float] = {**run.weight_sync.sync(step if phase == "rl" else 0)}
    sampled = run.sampling_params()
    groups = _responses(run, sampled, run.config.data.eval_samples)
    log_evaluation(run, phase, step, groups)
    correct, task, length, reward, is_kept = _results(run, groups)
    likeliest, *_ = _results(run, _responses(run, dataclasses.replace(sampled, greedy=True), 1))
    metrics |= {
        "eval/accuracy": correct.mean(),
        "eval/accuracy_greedy": likeliest.mean(),
        "eval/reward": (reward * is_kept).sum() / is_kept.sum().clamp(min=1),
        "eval/response_length": length.mean(),
        "eval/num": len(run.held_out),
    }
    for index, name in enumerate(run.mixture.names):
        if bool((task == index).any()):
            metrics[f"eval/accuracy/{name}"] = correct[task == index].mean()
    return {key: float(value) for key, value in metrics.items()}


def _responses(run: Run, params: SamplingParams, samples: int) -> list[RolloutGroup]:
    """Return this replica's responses with their scores."""
    topology = run.topology
    # Every replica must get as many prompts; the fillers are not counted.
    filled = run.held_out + [run.held_out[-1]] * (-len(run.held_out) % topology.replicas)
    groups = run.generator.generate(filled, samples, run.config.rollout.max_response_length, params, SEED)
    score(groups, run.mixture, topology, run.runtime.device)
    return groups


def _results(run: Run, groups: list[RolloutGroup]) -> tuple[torch.Tensor, ...]:
    """Return (correct 0 or 1, task number, length, reward, whether there is one), each [prompts * samples] fp64, over
    all replicas."""
    tasks, samples = run.mixture.names, len(groups[0].completions)
    rows = [
        (
            run.mixture.is_correct(group.prompt.item, score.reward),
            tasks.index(group.prompt.item.task),
            len(completion.token_ids),
            score.reward or 0.0,
            score.reward is not None,
        )
        for group in groups
        for score, completion in zip(group.scores, group.completions, strict=True)
    ]
    everyone = gather_rows(torch.tensor(rows, dtype=torch.float64, device=run.runtime.device), run.topology.dp_cp_group)
    return everyone[: len(run.held_out) * samples].unbind(1)
