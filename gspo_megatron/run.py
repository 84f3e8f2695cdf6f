"""Everything one rank holds during a run, and the run folder that rank 0 writes."""

import dataclasses
import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gspo_megatron import recipe
from gspo_megatron.backend import batches
from gspo_megatron.backend import runtime as runtimes
from gspo_megatron.backend import topology as topologies
from gspo_megatron.backend.model import ModelShape
from gspo_megatron.backend.policy import Policy
from gspo_megatron.backend.reference import FrozenReference
from gspo_megatron.backend.runtime import Runtime
from gspo_megatron.backend.topology import Topology
from gspo_megatron.config import AlgorithmConfig, RolloutConfig, TrainConfig
from gspo_megatron.data.prompts import PromptSource
from gspo_megatron.data.tokenizer import train_tokenizer
from gspo_megatron.metrics.console import Console
from gspo_megatron.metrics.tracker import Tracker
from gspo_megatron.ops import library
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.types import PackedBatch, Prompt, TrainSequence

TOKENIZER_EXAMPLES_PER_TASK = 400


class Reporter:
    """Console, metrics.jsonl and TensorBoard on rank 0; nothing on the others."""

    def __init__(self, run_dir: Path, is_main: bool):
        self.console = Console() if is_main else None
        self.tracker = Tracker(run_dir, warn=self.console.warn) if is_main else None

    def phase(self, name: str, total: int) -> None:
        if self.console:
            self.console.phase(name, total)

    def row(self, row: dict) -> None:
        if self.console:
            self.tracker.log(row)
            self.console.step(row)

    def sample(self, row: dict) -> None:
        if self.tracker:
            self.tracker.sample(row)

    def note(self, text: str) -> None:
        if self.console:
            self.console.note(text)

    def warn(self, text: str) -> None:
        if self.console:
            self.console.warn(text)

    def close(self) -> None:
        if self.console:
            self.console.close()
            self.tracker.close()


@dataclass
class Run:
    """One training run as one rank sees it."""

    config: TrainConfig  # with the layout resolved
    runtime: Runtime
    topology: Topology
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    mixture: TaskMixture
    prompts: PromptSource  # fresh prompts for RL
    held_out: list[Prompt]
    policy: Policy
    engine: MegatronEngine
    reporter: Reporter
    reference: FrozenReference | None = None  # from the start of RL on, where the recipe compares with it

    def microbatches(self, sequences: list[TrainSequence], unit: int = 1) -> list[PackedBatch]:
        """This replica's share of one optimizer step, packed. A collective over data parallelism."""
        limit = self.config.max_tokens_per_microbatch
        return batches.microbatches(sequences, limit, self.topology, self.runtime.device, unit)

    def sampling_params(self) -> SamplingParams:
        """How rollouts and evaluations sample."""
        return sampling_params(self.config.rollout, self.tokenizer)


def sampling_params(rollout: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> SamplingParams:
    """A recipe's sampling; the tokenizer's end-of-text token stops a response."""
    stop = (tokenizer.eos_token_id,)
    return SamplingParams(rollout.max_response_length, stop, rollout.temperature, rollout.top_k, rollout.top_p)


def start(config: TrainConfig) -> Run:
    """Process groups, data, model and run folder. `config.parallel` must be resolved."""
    config = dataclasses.replace(config, algorithm=config.algorithm.resolved())
    runtime = runtimes.start(config.device)
    topology = topologies.start(config.parallel, config.seed)
    folder = _run_folder(config, runtime)
    mixture = TaskMixture(config.tasks, config.seed)
    tokenizer = build_tokenizer(config, mixture)
    limit = config.data.max_prompt_length
    shape = ModelShape.of(config.model, len(tokenizer))
    policy = Policy(config, shape, topology, runtime)
    if runtime.is_main:
        recipe.save(config, folder / "config.yaml")
        tokenizer.save_pretrained(folder / "tokenizer")
    run = Run(
        config=config, runtime=runtime, topology=topology, folder=folder, tokenizer=tokenizer, mixture=mixture,
        prompts=PromptSource(mixture, tokenizer, "train", limit),
        held_out=PromptSource(mixture, tokenizer, "eval", limit).fixed(config.data.num_eval_prompts),
        policy=policy, engine=MegatronEngine(policy), reporter=Reporter(folder, runtime.is_main),
    )  # fmt: skip
    if runtime.is_main:
        run.reporter.console.header(_describe(run, shape))
    return run


def stop(run: Run) -> None:
    """Close files and leave the process groups."""
    run.reporter.close()
    topologies.stop()
    runtimes.stop()


def _run_folder(config: TrainConfig, runtime: Runtime) -> Path:
    """output_dir/name, or name-2, name-3, ... where earlier runs have taken it; every rank gets rank 0's choice."""
    chosen: list = [None]
    if runtime.is_main:
        number, folder = 1, config.output_dir / config.name
        while folder.exists():
            number += 1
            folder = config.output_dir / f"{config.name}-{number}"
        folder.mkdir(parents=True)
        chosen = [str(folder)]
    dist.broadcast_object_list(chosen, src=0)
    return Path(chosen[0])


def build_tokenizer(config: TrainConfig, mixture: TaskMixture) -> PreTrainedTokenizerBase:
    """That of the folder to start from; else one trained on warm-start questions and answers, in every rank alike:
    that is cheaper than to wait for one."""
    if config.model.load_hf is not None:
        return AutoTokenizer.from_pretrained(config.model.load_hf)
    count = TOKENIZER_EXAMPLES_PER_TASK * len(mixture.names)
    items = [mixture.item("warm_start", index) for index in range(count)]
    return train_tokenizer([text for item in items for text in (item.question, item.answer)], config.data.vocab_size)


def _describe(run: Run, shape: ModelShape) -> dict[str, str]:
    """The header lines."""
    runtime, arch = run.runtime, shape.architecture
    experts = f"{arch.num_experts} experts (top-{arch.num_experts_per_tok})" if arch.num_experts else "dense"
    one = f"{shape.num_parameters() / 1e6:.1f} M parameters"
    accelerator = "CPU" if runtime.device.type == "cpu" else "GPU"
    return {
        "run folder": str(run.folder),
        "layout": f"{run.topology.describe()} = {runtime.world_size} ranks",
        "device": f"{accelerator} ({runtime.backend}), Python {sys.version.split()[0]}",
        "kernels": f"{runtime.kernels}; megatron-core {importlib.metadata.version('megatron-core')}",
        "sums by sequence": library.status()["sequence_partials"],
        "model": f"{arch.family}, {arch.num_hidden_layers} layers, {experts}, vocabulary {shape.vocab_size}, {one}, "
        f"{run.config.model.params_dtype}",
        "tasks": ", ".join(run.mixture.names),
        "algorithm": _describe_algorithm(run.config.algorithm),
    }


def _describe_algorithm(config: AlgorithmConfig) -> str:
    if config.name == "dpo":
        return f"dpo, {config.preference.loss} loss, beta {config.preference.beta:g}"
    kl = f", KL {config.kl.coef:g} ({config.kl.estimator}) in the {config.kl.place}" if config.kl.coef else ""
    return (
        f"{config.name}, clip {config.clip_ratio_low:g} / {config.clip_ratio_high:g}, {config.aggregation}{kl}, "
        f"{config.num_minibatches} minibatches a rollout"
    )
