"""Everything one rank holds during a run, and the run folder that rank 0 writes."""

import dataclasses
import importlib.metadata
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gspo_megatron import process, recipe, resume, whereabouts
from gspo_megatron.backend import batches
from gspo_megatron.backend import runtime as runtimes
from gspo_megatron.backend import topology as topologies
from gspo_megatron.backend.agreement import raise_together
from gspo_megatron.backend.checkpoint import load, read_progress
from gspo_megatron.backend.checkpoint_files import verify
from gspo_megatron.backend.critic import Critic
from gspo_megatron.backend.model import ModelShape
from gspo_megatron.backend.network import Network
from gspo_megatron.backend.policy import Policy
from gspo_megatron.backend.reference import FrozenReference
from gspo_megatron.backend.runtime import Runtime
from gspo_megatron.backend.saver import Saver
from gspo_megatron.backend.topology import Topology
from gspo_megatron.config import AlgorithmConfig, RolloutConfig, TrainConfig
from gspo_megatron.data.prompts import PromptSource
from gspo_megatron.data.tokenizer import train_tokenizer
from gspo_megatron.errors import CheckpointError, StopRequested
from gspo_megatron.hf import export
from gspo_megatron.ops import library
from gspo_megatron.reporter import Reporter
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.tasks.isolation import ScoringProcess
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.types import PackedBatch, Prompt, TrainSequence

TOKENIZER_EXAMPLES_PER_TASK = 400


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
    lock: TextIO | None  # rank 0 holds the folder by it
    checkpoint: Path | None = None  # what this start goes on from
    resumed: resume.Progress | None = None  # how far that was
    reference: FrozenReference | None = None  # from the start of RL on, where the recipe compares with it
    saver: Saver = field(default_factory=Saver)

    @property
    def is_past_warm_start(self) -> bool:
        """The checkpoint that this start goes on from is of a later phase."""
        return self.resumed is not None and self.resumed.phase != "warm_start"

    def first_step(self, phase: str, critic: Critic | None = None) -> int:
        """Fill everything that trains in this phase from the checkpoint. A collective over all ranks.

        Called once the phase's fresh optimizers and reference exist. Returns the step to begin with: the one after the
        checkpoint's, or 0 where the phase starts anew.
        """
        if self.resumed is None or self.resumed.phase != phase:
            return 0
        load(self._networks(critic), self.checkpoint, self.reference)
        self.prompts.load_state_dict({"position": self.resumed.prompts})
        return self.resumed.step + 1

    def keep(self, phase: str, step: int, row: dict, critic: Critic | None = None) -> None:
        """Begin a checkpoint where the recipe wants one after this step, whose metric row is in the record already.

        A collective over all ranks.

        Raises:
            StopRequested: on every rank, once a checkpoint is written, because one of them was told to stop.
            CheckpointError: on every rank, because one of them could not write.
        """
        config = self.config.checkpoint
        self.publish_written()
        is_told = self._any(process.is_told_to_stop())
        is_last = phase != "warm_start" and step == self.config.steps
        must_stop = is_told and not is_last
        if not (is_last or must_stop) and (step == 0 or config.interval == 0 or step % config.interval):
            return
        with whereabouts.part("checkpoint"):
            self._publish()  # waits for the one before
            folder = self._begin_checkpoint(phase, step, row, critic)
            if is_last or must_stop or not config.asynchronous:
                self._publish()
        if must_stop:
            self.reporter.close()
            raise StopRequested(f"stopped as asked, after {phase} step {step}. The same command goes on from {folder}")

    def _begin_checkpoint(self, phase: str, step: int, row: dict, critic: Critic | None) -> Path:
        progress = resume.Progress(phase, step, self.prompts.position, row.get("eval/accuracy"))
        folder = self.folder / "checkpoints" / progress.folder
        dtype, (hf, companions) = self.policy.models[0].config.params_dtype, self.hf_files()
        self.saver.begin(self._networks(critic), folder, dataclasses.asdict(progress), self.reference,
                         lambda unfinished: export.write_side(unfinished, hf, companions, dtype))  # fmt: skip
        return folder

    def publish_written(self) -> None:
        """Make the checkpoint under way visible once all ranks have written it. A collective; nothing where none is."""
        if self.saver.is_begun and not self._any(self.saver.is_writing):
            self._publish()

    def _publish(self) -> None:
        """Make the checkpoint under way visible, if there is one, and remove what it makes superfluous."""
        config = self.config.checkpoint
        if self.saver.finish() and self.runtime.is_main:
            resume.prune(self.folder, config.keep_last, config.keep_every, config.keep_best)

    def hf_files(self) -> tuple[dict, list[Path]]:
        """The policy's Hugging Face config, and folders with its tokenizer and generation config."""
        hf, source = self.policy.shape.hf, self.config.model.load_hf
        if source is not None:
            return hf, [self.folder / "tokenizer", source]
        ids = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        return hf | ids, [self.folder / "tokenizer"]

    def _any(self, flag: bool) -> bool:
        """It is true on any rank. A collective: all must do the same after the same step."""
        on_any = torch.tensor([float(flag)], device=self.runtime.device)
        dist.all_reduce(on_any, op=dist.ReduceOp.MAX)
        return bool(on_any)

    def _networks(self, critic: Critic | None) -> dict[str, Network]:
        return {"": self.policy.network} | ({"critic.": critic.network} if critic else {})

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
    policy = Policy(config, shape, topology, runtime)
    if runtime.is_main:
        recipe.save(config, folder / "config.yaml")
        tokenizer.save_pretrained(folder / "tokenizer")
    run = Run(
        config=config, runtime=runtime, topology=topology, folder=folder, tokenizer=tokenizer, mixture=mixture,
        prompts=PromptSource(mixture, tokenizer, "train", limit),
        held_out=PromptSource(mixture, tokenizer, "eval", limit).fixed(config.data.num_eval_prompts),
        policy=policy, engine=MegatronEngine(policy), reporter=Reporter(folder, runtime.is_main), lock=lock,
        checkpoint=checkpoint, resumed=resumed,
    )  # fmt: skip
    if runtime.is_main:
        run.reporter.console.header(_describe(run, shape))
    for note in notes:
        run.reporter.note(note)
    return run


def stop(run: Run) -> None:
    """Close files and leave the process groups."""
    run.reporter.close()
    topologies.stop()
    runtimes.stop()


def _plan(config: TrainConfig, runtime: Runtime) -> tuple[resume.Plan, TextIO | None]:
    """Rank 0's plan on every rank, and rank 0's hold on the folder."""
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
    """The newest checkpoint whose files are as they were written, and what to tell the user. A collective."""
    notes = list(plan.notes)
    for path in plan.checkpoints:
        try:
            verify(path)
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
    """That of the folder to start from; else one trained on warm-start questions and answers, in every rank alike:
    that is cheaper than to wait for one."""
    if config.model.load_hf is not None:
        return AutoTokenizer.from_pretrained(config.model.load_hf)
    count = TOKENIZER_EXAMPLES_PER_TASK * len(mixture.names)
    items = [mixture.item("warm_start", index) for index in range(count)]
    return train_tokenizer([text for item in items for text in (item.question, item.answer)], config.data.vocab_size)


def _describe(run: Run, shape: ModelShape) -> dict[str, str]:
    """The header lines."""
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
