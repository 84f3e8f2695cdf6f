"""A run is built from a resolved recipe: its folder and checkpoint, process groups, tokenizer, model, and the
header."""

import importlib.metadata
import sys
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from gspo_megatron.backend.checkpoint.files import NewerFormatError, verify
from gspo_megatron.backend.checkpoint.sharded import read_progress
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime as runtimes
from gspo_megatron.backend.parallel import topology as topologies
from gspo_megatron.backend.parallel.collective_errors import raise_together
from gspo_megatron.backend.parallel.runtime import Runtime
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.config import ResolvedAlgorithm, ResolvedConfig, TrainConfig
from gspo_megatron.data.prompts import PromptSource
from gspo_megatron.data.stops import find_stops
from gspo_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from gspo_megatron.errors import CheckpointError
from gspo_megatron.hf.load import load
from gspo_megatron.ops import library
from gspo_megatron.recipe.load import save_recipe
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.tasks import walls
from gspo_megatron.tasks.isolation import ScoringProcess
from gspo_megatron.tasks.mixture import EVAL_TASKS, TaskMixture
from gspo_megatron.trainer import resume
from gspo_megatron.trainer.reporter import Reporter
from gspo_megatron.trainer.run import Run

TOKENIZER_EXAMPLES_PER_TASK = 400


def build_run(config: ResolvedConfig) -> Run:
    """Build process groups, data, model and run folder."""
    runtime = runtimes.init_process_group(config.device)
    topology = topologies.initialize_model_parallel(config.parallel, config.seed)
    plan, lock = _plan(config, runtime)
    folder = plan.folder
    checkpoint, resumed, notes = _intact(plan)
    if resumed and runtime.is_main:
        resume.cut_back(folder, resumed)
    scorers = ScoringProcess(config.faults)
    if topology.is_first_of_replica:
        scorers.start()  # it comes up while the model is built
    mixture = TaskMixture(config.tasks, config.seed, scorers)
    tokenizer = build_tokenizer(config, mixture)
    limit = config.data.max_prompt_length
    shape = ModelShape.of(config.model, len(tokenizer))
    stops = find_stops(config, tokenizer, shape.vocab_size)
    policy = build_policy(config, shape, topology, runtime)
    if runtime.is_main:
        save_recipe(config, folder / "config.yaml")
        tokenizer.save_pretrained(folder / "tokenizer")
    run = Run(
        config=config,
        runtime=runtime,
        topology=topology,
        folder=folder,
        tokenizer=tokenizer,
        stops=stops,
        mixture=mixture,
        prompts=PromptSource(mixture, tokenizer, "train", limit),
        held_out=PromptSource(mixture, tokenizer, "eval", limit).fixed(config.data.num_eval_prompts),
        policy=policy,
        engine=MegatronEngine(policy),
        reporter=Reporter(folder, runtime.is_main),
        lock=lock,
        checkpoint=checkpoint,
        resumed=resumed,
    )
    if runtime.is_main:
        run.reporter.header(_describe(run, shape))
    for note in notes:
        run.reporter.note(note)
    return run


def build_policy(
    config: ResolvedConfig, shape: ModelShape, topology: Topology, runtime: Runtime, dtype: torch.dtype | None = None
) -> Policy:
    """Return the policy with random weights, or with those of the folder that the recipe starts from.

    Args:
        dtype: overrides the recipe's params_dtype.
    """
    policy = Policy(config, shape, topology, runtime, dtype)
    if config.model.load_hf is not None:
        load(policy.models, topology, config.model.load_hf, shape.architecture, config.model.load_hf_drop_mtp)
    return policy


def close_run(run: Run) -> None:
    """Close files and leave the process groups."""
    run.reporter.close()
    topologies.destroy_model_parallel()
    runtimes.destroy_process_group()


def _plan(config: TrainConfig, runtime: Runtime) -> tuple[resume.Plan, TextIO | None]:
    """Return rank 0's plan on every rank, and rank 0's hold on the folder."""
    chosen: list = [None]
    error = lock = None
    if runtime.is_main:
        try:
            chosen = [resume.plan(config)]
            lock = resume.hold(chosen[0].folder)
        except CheckpointError as caught:
            error = caught
        except BlockingIOError:
            folder = chosen[0].folder
            error = CheckpointError(f"{folder}: another process began to train there at this moment. Start again.")
    raise_together(error)
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0], lock


def _intact(plan: resume.Plan) -> tuple[Path | None, resume.Progress | None, list[str]]:
    """Return the newest checkpoint whose files are as they were written, and what to tell the user. A collective."""
    notes = list(plan.notes)
    for path in plan.checkpoints:
        try:
            verify(path)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            notes.append(f"{error}. The checkpoint before it is tried")
            continue
        progress = resume.Progress(**read_progress(path))
        notes.append(f"goes on after {progress.phase} step {progress.step}, from {path}")
        return path, progress, notes
    if plan.checkpoints:
        found = "\n".join([*notes, f"no checkpoint of {plan.folder} is intact"])
        raise CheckpointError(f"{found}. Give --resume never for a new run.")
    return None, None, notes


def build_tokenizer(config: TrainConfig, mixture: TaskMixture) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the folder to start from; else train one on warm-start questions and answers, in every
    rank alike: that is cheaper than to wait for one."""
    if config.model.load_hf is not None:
        return load_tokenizer(config.model.load_hf)
    count = TOKENIZER_EXAMPLES_PER_TASK * len(mixture.names)
    items = [mixture.item("warm_start", index) for index in range(count)]
    return train_tokenizer([text for item in items for text in (item.question, item.answer)], config.data.vocab_size)


def _describe(run: Run, shape: ModelShape) -> dict[str, str]:
    """Return the header lines."""
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
        "responses end at": run.stops.described(run.tokenizer),
        "scorers": _describe_scorers(run.mixture.names),
        "algorithm": _describe_algorithm(run.config.algorithm),
    }


def _describe_scorers(tasks: list[str]) -> str:
    evaluating = [name for name in tasks if name in EVAL_TASKS]
    if not evaluating:
        return "a process of their own; no response is evaluated"
    return f"a process of their own; responses to {', '.join(evaluating)} are evaluated, each behind {walls.describe()}"


def _describe_algorithm(config: ResolvedAlgorithm) -> str:
    if config.name == "dpo":
        return f"dpo, {config.preference.loss} loss, beta {config.preference.beta:g}"
    kl = f", KL {config.kl.coef:g} ({config.kl.estimator}) in the {config.kl.place}" if config.kl.coef else ""
    return (
        f"{config.name}, clip {config.clip_ratio_low:g} / {config.clip_ratio_high:g}, {config.aggregation}{kl}, "
        f"{config.num_minibatches} minibatches a rollout"
    )
