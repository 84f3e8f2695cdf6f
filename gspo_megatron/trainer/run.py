"""A Run is everything one rank holds during a run, and writes checkpoints of it. build.py makes it."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from gspo_megatron.backend.checkpoint.saver import Saver
from gspo_megatron.backend.checkpoint.sharded import load
from gspo_megatron.backend.engine.critic import Critic, networks
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.engine.reference import FrozenReference
from gspo_megatron.backend.parallel.collective_errors import raise_together
from gspo_megatron.backend.parallel.runtime import Runtime
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import Prompt
from gspo_megatron.config import ResolvedConfig, RolloutConfig
from gspo_megatron.data.prompts import PromptSource
from gspo_megatron.data.stops import Stops
from gspo_megatron.errors import StopRequested
from gspo_megatron.hf import export
from gspo_megatron.process import lifecycle, progress
from gspo_megatron.process.folder_lock import Hold
from gspo_megatron.rollout.generation import Generator
from gspo_megatron.rollout.record_files import RecordFiles
from gspo_megatron.rollout.sampler import Sampler, WeightSync
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.rollout.stop_strings import StopStrings
from gspo_megatron.tasks.environments import Environments
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.trainer import resume
from gspo_megatron.trainer.collapse import CollapseWatch
from gspo_megatron.trainer.epochs import Epochs
from gspo_megatron.trainer.reporter import Reporter

SECONDS_OF_A_STOP = 2.0  # for each tracker: who told the run to stop ends it soon, and its exit status must be told


@dataclass
class Run:
    """This is one training run as one rank sees it."""

    config: ResolvedConfig
    runtime: Runtime
    topology: Topology
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    stops: Stops
    mixture: TaskMixture
    prompts: PromptSource  # fresh prompts for RL
    held_out: list[Prompt]
    policy: Policy
    sampler: Sampler
    weight_sync: WeightSync  # for the sampler
    reporter: Reporter
    hold: Hold | None  # rank 0 has the folder by it
    checkpoint: Path | None = None  # what this start goes on from
    resumed: resume.Progress | None = None  # how far that was
    reference: FrozenReference | None = None  # from the start of RL on, where the recipe compares with it
    rollouts: RecordFiles | None = None  # where the recipe has them from files
    epochs: Epochs | None = None  # where the recipe says num_epochs; config.steps is made of it
    saver: Saver = field(default_factory=Saver)

    @cached_property
    def collapse(self) -> CollapseWatch:
        """Return what tells of a collapse, once a start."""
        return CollapseWatch(self.config.faults, self.policy.shape.architecture)

    @cached_property
    def environments(self) -> Environments | None:
        """Return what answers responses turn by turn, if a task has that."""
        runners = self.mixture.environments
        return Environments(runners, self.config.data.max_prompt_length) if runners else None

    @property
    def generator(self) -> Generator:
        """Return what makes responses to prompts."""
        return Generator(self.sampler, self.topology, self.runtime.device, self.tokenizer, self.environments)

    @property
    def is_past_warm_start(self) -> bool:
        """The checkpoint that this start goes on from is of a later phase."""
        return self.resumed is not None and self.resumed.phase != "warm_start"

    @property
    def frozen_reference(self) -> FrozenReference:
        """Return the reference of a phase that cannot do without. Raise RuntimeError where none was made."""
        if self.reference is None:
            raise RuntimeError("the run has no reference: its phase makes one from the policy as it finds it")
        return self.reference

    def restore(self, phase: str, critic: Critic | None = None) -> int:
        """Fill everything that trains in this phase from the checkpoint. A collective over all ranks.

        Called once the phase's fresh optimizers and reference exist. Returns the step to begin with: the one after the
        checkpoint's, or 0 where the phase starts anew.
        """
        if self.resumed is None or self.resumed.phase != phase:
            return 0
        assert self.checkpoint is not None  # build.py gives both or neither
        load(networks(self.policy, critic), self.checkpoint, self.reference)
        self.prompts.load_state_dict({"position": self.resumed.prompts})
        return self.resumed.step + 1

    def maybe_save(self, phase: str, step: int, row: dict, critic: Critic | None = None) -> None:
        """Begin a checkpoint where the recipe wants one after this step, whose metric row is in the record already.

        A collective over all ranks.

        Raises:
            StopRequested: on every rank, once a checkpoint is written, because one of them was told to stop.
            CheckpointError: on every rank, because one of them could not write.
            MetricsError: on every rank, because the row could not be written.
        """
        config = self.config.checkpoint
        self.finish_written()
        state = self._most(2 if self.reporter.error else int(lifecycle.is_told_to_stop()))
        if state == 2:
            raise_together(self.reporter.error)
        is_told = state == 1
        is_last = phase != "warm_start" and step == self.config.steps
        must_stop = is_told and not is_last
        if not (is_last or must_stop) and (step == 0 or config.interval == 0 or step % config.interval):
            return
        with progress.part("checkpoint"):
            self._finish()  # waits for the one before
            folder = self._begin_checkpoint(phase, step, row, critic)
            if is_last or must_stop or not config.asynchronous:
                self._finish()
        if must_stop:
            self.reporter.close(SECONDS_OF_A_STOP)
            raise StopRequested(f"stopped as asked, after {phase} step {step}. The same command goes on from {folder}")

    def _begin_checkpoint(self, phase: str, step: int, row: dict, critic: Critic | None) -> Path:
        progress = resume.Progress(phase, step, self.prompts.position, row.get("eval/accuracy"))
        folder = self.folder / "checkpoints" / progress.folder
        dtype, (hf, companions) = self.policy.models[0].config.params_dtype, self.hf_files()

        def add(unfinished: Path) -> None:
            export.write_side(unfinished, hf, companions, dtype)
            resume.carry(self.folder, unfinished)

        self.saver.begin(
            networks(self.policy, critic),
            folder,
            dataclasses.asdict(progress),
            self.reference,
            add,
        )
        return folder

    def finish_written(self) -> None:
        """Make the checkpoint under way visible once all ranks have written it. A collective; nothing where none is."""
        if self.saver.is_begun and not self._most(int(self.saver.is_writing)):
            self._finish()

    def _finish(self) -> None:
        """Make the checkpoint under way visible, if there is one, and remove what it makes superfluous."""
        config = self.config.checkpoint
        if self.saver.finish() and self.runtime.is_main:
            resume.prune(self.folder, config.keep_last, config.keep_every, config.keep_best)

    def hf_files(self) -> tuple[dict, list[Path]]:
        """Return the policy's Hugging Face config, and folders with its tokenizer and generation config."""
        hf, source = self.policy.shape.hf, self.config.model.load_hf
        if source is not None:
            return hf, [self.folder / "tokenizer", source]
        ids = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        return hf | ids, [self.folder / "tokenizer"]

    def _most(self, number: int) -> int:
        """Return the largest of all ranks' numbers. A collective: all must do the same after the same step."""
        largest = torch.tensor([number], device=self.runtime.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def sampling_params(self) -> SamplingParams:
        """Return how rollouts and evaluations sample."""
        return sampling_params(self.config.rollout, self.stops, self.tokenizer)


def sampling_params(rollout: RolloutConfig, stops: Stops, tokenizer: PreTrainedTokenizerBase) -> SamplingParams:
    """Return a recipe's sampling."""
    return SamplingParams(
        stops.token_ids,
        rollout.temperature,
        rollout.top_k,
        rollout.top_p,
        stop_strings=StopStrings(stops.strings, tokenizer) if stops.strings else None,
    )
