"""What a start prints first: where and on what it runs, and what it trains."""

import importlib.metadata
import sys

from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.config import ResolvedAlgorithm, TaskConfig, TrackingConfig
from gspo_megatron.ops import library
from gspo_megatron.tasks import walls
from gspo_megatron.tasks.reasoning_gym import EVAL_TASKS
from gspo_megatron.trainer.run import Run


def described(run: Run, shape: ModelShape) -> dict[str, str]:
    """Return the header's lines by their names."""
    runtime, arch, status = run.runtime, shape.architecture, library.status()
    experts = f"{arch.num_experts} experts (top-{arch.num_experts_per_tok})" if arch.num_experts else "dense"
    one = f"{shape.num_parameters() / 1e6:.1f} M parameters"
    accelerator = "CPU" if runtime.device.type == "cpu" else "GPU"
    return {
        "run folder": str(run.folder),
        "layout": f"{run.topology.describe()} = {runtime.world_size} ranks",
        "device": f"{accelerator} ({runtime.backend}), Python {sys.version.split()[0]}",
        "kernels": f"{runtime.kernels}; megatron-core {importlib.metadata.version('megatron-core')}",
        "sums by sequence": status["sequence_partials"],
        "collectives": status["publish"],
        "model": f"{arch.family}, {arch.num_hidden_layers} layers, {experts}, vocabulary {shape.vocab_size}, {one}, "
        f"{run.config.model.params_dtype}",
        "tasks": ", ".join(run.mixture.names),
        "trackers": _describe_trackers(run.config.tracking),
        "responses end at": run.stops.described(run.tokenizer),
        "scorers": _describe_scorers(run.config.tasks),
        "algorithm": _describe_algorithm(run.config.algorithm),
    } | ({"steps": run.epochs.described(run.config)} if run.epochs else {})


def _describe_scorers(tasks: dict[str, TaskConfig]) -> str:
    functions = [reward.function for task in tasks.values() for reward in task.reward]
    functions += [task.environment for task in tasks.values() if task.environment]
    if functions:
        return f"a process of their own: {', '.join(functions)}"
    evaluating = [name for name in tasks if name in EVAL_TASKS]
    if not evaluating:
        return "a process of their own; no response is evaluated"
    return f"a process of their own; responses to {', '.join(evaluating)} are evaluated, each behind {walls.describe()}"


def _describe_trackers(config: TrackingConfig) -> str:
    others = [f"W&B project {config.project}"] * config.wandb + [f"MLflow experiment {config.project}"] * config.mlflow
    return ", ".join(["TensorBoard", *others])


def _describe_algorithm(config: ResolvedAlgorithm) -> str:
    if config.name == "dpo":
        means = ", means over tokens" if config.preference.length_normalised else ""
        return f"dpo, {config.preference.loss} loss, beta {config.preference.beta:g}{means}"
    kl = f", KL {config.kl.coef:g} ({config.kl.estimator}) in the {config.kl.place}" if config.kl.coef else ""
    return (
        f"{config.name}, clip {config.clip_ratio_low:g} / {config.clip_ratio_high:g}, {config.aggregation}{kl}, "
        f"{config.num_minibatches} minibatches a rollout"
    )
