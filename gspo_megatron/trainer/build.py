"""A run is built from a resolved recipe: its folder and checkpoint, process groups, tokenizer and model."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from gspo_megatron.backend.checkpoint.files import NewerFormatError, verify
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime as runtimes
from gspo_megatron.backend.parallel import topology as topologies
from gspo_megatron.backend.parallel.collective_errors import together
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.runtime import Runtime
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.config import ResolvedConfig, TrainConfig
from gspo_megatron.data.prompts import PromptSource
from gspo_megatron.data.stops import find_stops
from gspo_megatron.data.tokenizer import build_tokenizer, load_tokenizer, size_of
from gspo_megatron.data.turns import check_histories
from gspo_megatron.errors import CheckpointError
from gspo_megatron.hf.load import load
from gspo_megatron.metrics.recipe_event import Event
from gspo_megatron.process import lifecycle
from gspo_megatron.process.folder_lock import Hold
from gspo_megatron.recipe.load import save_recipe
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.trainer import folders, resume
from gspo_megatron.trainer.changed import change_after, earlier_weights
from gspo_megatron.trainer.data_record import note_data
from gspo_megatron.trainer.epochs import Epochs
from gspo_megatron.trainer.folders import Plan
from gspo_megatron.trainer.header import described
from gspo_megatron.trainer.mixture import build_mixture
from gspo_megatron.trainer.offline import open_rollouts
from gspo_megatron.trainer.reporter import Reporter
from gspo_megatron.trainer.run import Run
from gspo_megatron.utils.small_files import unwritten

LOOK_AHEAD_SECONDS = 2.0  # all prompts of the example's 100 steps take four ranks less than one
FINISHED = "{} is finished. Give --resume never to train anew, or more steps or epochs to go on."


class AlreadyFinished(Exception):
    """Raised where a start has nothing left to do; its text says so. No error."""


def build_run(config: ResolvedConfig) -> Run:
    """Build process groups, data, model and run folder.

    Raises:
        AlreadyFinished: there is nothing left to do. On every rank.
    """
    runtime = runtimes.init_process_group(config.device)
    topology = topologies.initialize_model_parallel(config.parallel, config.seed)
    plan, hold = _plan(config, runtime)
    folder = plan.folder
    checkpoint, resumed, notes = _intact(plan)
    if runtime.is_main:
        resume.sweep(folder)
    if resumed and checkpoint:
        with together():
            notes += resume.restore_record(folder, checkpoint, resumed) if runtime.is_main else []
    mixture = build_mixture(config, topology.is_first_of_replica)
    if resumed and checkpoint:
        mixture.weights_were(earlier_weights(config, folder, checkpoint, resumed))
    tokenizer = _tokenizer(config, mixture, folder if resumed else None)
    limit = config.data.max_prompt_length
    prompts = PromptSource(mixture, tokenizer, "train", limit)
    notes += prompts.hold_to_limit(config.tasks, _row_lengths(prompts, runtime))
    epochs = Epochs.of(config, mixture)
    config = epochs.resolved(config) if epochs else config
    if config.algorithm.name != "dpo" and config.rollout.engine != "files":
        _look_ahead(prompts, config, resumed, runtime)
    shape = ModelShape.of(config.model, size_of(tokenizer))
    stops = find_stops(config, tokenizer, shape.vocab_size)
    check_histories(config, tokenizer, mixture)
    rollouts = open_rollouts(config, tokenizer, shape, resumed.prompts if resumed else 0, runtime)
    policy = build_policy(config, shape, topology, runtime)
    engine = MegatronEngine(policy)
    event = None
    with together():
        if resumed and checkpoint and runtime.is_main:
            event = change_after(config, folder, checkpoint, resumed)
        reporter = _open_folder(folder, config, tokenizer, runtime.is_main)
        notes += note_data(folder, mixture) if runtime.is_main else []
    run = Run(
        config=config,
        runtime=runtime,
        topology=topology,
        folder=folder,
        tokenizer=tokenizer,
        stops=stops,
        mixture=mixture,
        prompts=prompts,
        held_out=PromptSource(mixture, tokenizer, "eval", limit).fixed(config.data.num_eval_prompts),
        policy=policy,
        sampler=engine,
        weight_sync=engine,
        reporter=reporter,
        hold=hold,
        checkpoint=checkpoint,
        resumed=resumed,
        rollouts=rollouts,
        epochs=epochs,
    )
    _tell(run, shape, notes, event)
    return run


def _tell(run: Run, shape: ModelShape, notes: list[str], event: Event | None) -> None:
    """Print header and notes, and put the event into the record. A collective.

    Raises:
        MetricsError: the record cannot be written.
    """
    if run.runtime.is_main:
        run.reporter.header(described(run, shape))
        notes += [note for task in run.mixture.data.values() for note in task.notes()]
    for note in notes:
        run.reporter.note(note)
    with together():
        if event is not None:
            run.reporter.event(event)


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
    """Close files, give the folder back and leave the process groups."""
    run.reporter.close()
    run.mixture.close()
    lifecycle.before_leaving(None)
    if run.hold is not None:
        run.hold.close()
    leave_groups()


def leave_groups() -> None:
    """Leave the process groups."""
    topologies.destroy_model_parallel()
    runtimes.destroy_process_group()


def _plan(config: TrainConfig, runtime: Runtime) -> tuple[Plan, Hold | None]:
    """Return rank 0's plan on every rank, and rank 0's hold on the folder.

    Raises:
        AlreadyFinished: the run is over. On every rank.
    """
    chosen: list = [None]
    hold = None
    with together():
        if runtime.is_main:
            chosen[0], hold = folders.take(config)
            # However this process ends: what has made no step leaves nothing.
            lifecycle.before_leaving(lambda: folders.discard_if_empty(chosen[0].folder))
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0].is_finished:
        raise AlreadyFinished("\n".join([*chosen[0].notes, FINISHED.format(chosen[0].folder)]))
    return chosen[0], hold


def _row_lengths(prompts: PromptSource, runtime: Runtime) -> dict[tuple[str, int], int]:
    """Return the length of every prompt of data; the ranks share the work. A collective."""
    with together():
        mine = prompts.row_lengths(runtime.rank, runtime.world_size)
    return {key: length for part in gather_objects(mine) for key, length in part.items()}


def _look_ahead(prompts: PromptSource, config: TrainConfig, resumed: resume.Progress | None, runtime: Runtime) -> None:
    """Find a prompt that is too long before the model is built; the ranks share the work. A collective."""
    with together():
        prompts.look_ahead(to_come(config, resumed)[runtime.rank :: runtime.world_size], LOOK_AHEAD_SECONDS)


def to_come(config: TrainConfig, resumed: resume.Progress | None) -> range:
    """Return the prompts of the steps that are left."""
    first = resumed.prompts if resumed else 0
    left = config.steps - (resumed.step if resumed and resumed.phase == "rl" else 0)
    return range(first, first + max(left, 0) * config.rollout.num_prompts)


def _open_folder(folder: Path, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, is_main: bool) -> Reporter:
    """Write what a run folder has before the first step, on rank 0, and return the reporter.

    Raises:
        CheckpointError: a file cannot be written.
        MetricsError: the same, of the record.
    """
    try:
        if is_main:
            # A recipe that is read back from there goes on as any other does.
            save_recipe(
                replace(config, resume="auto" if config.resume == "change" else config.resume),
                folder / resume.CONFIG_FILE,
            )
            tokenizer.save_pretrained(folder / "tokenizer")
        return Reporter(folder, is_main, config)
    except OSError as error:
        remedy = "Make room or make it writable, or give another output_dir."
        raise CheckpointError(unwritten(error, folder, remedy)) from None


def _intact(plan: Plan) -> tuple[Path | None, resume.Progress | None, list[str]]:
    """Return the newest checkpoint whose files are as they were written, and what to tell the user. A collective."""
    notes = list(plan.notes)
    for path in plan.checkpoints:
        try:
            verify(path)
            progress = resume.Progress.of(path)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            notes.append(f"{error}. The checkpoint before it is tried")
            continue
        notes.append(f"goes on after {progress.phase} step {progress.step}, from {path}")
        return path, progress, notes
    if plan.checkpoints:
        found = "\n".join([*notes, f"no checkpoint of {plan.folder} is intact"])
        raise CheckpointError(f"{found}. Give --resume never for a new run.")
    return None, None, notes


def _tokenizer(config: TrainConfig, mixture: TaskMixture, resumed: Path | None) -> PreTrainedTokenizerBase:
    """Return the run's tokenizer. One that was trained on data is kept: the file may be another one by now."""
    has_data = any(task.data is not None for task in config.tasks.values())
    if has_data and resumed is not None and config.model.load_hf is None:
        return load_tokenizer(resumed / "tokenizer")
    return build_tokenizer(config, mixture)
