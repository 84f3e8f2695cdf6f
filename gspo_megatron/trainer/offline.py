"""Rollouts from files in place of generation, and the groups of a step written to a file (rollout.engine, path, save).

A step takes the next rollout.num_prompts groups of the files; where it is in them is the position of the prompt stream,
so a run goes on with the next group. A run's own files give the same steps again: on the layout that wrote them to the
bit, elsewhere up to rounding.

Left out: dynamic sampling, whose further rounds a file cannot give: a step's groups are taken as they are.
"""

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel.collective_errors import raise_if_any, together
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.runtime import Runtime
from gspo_megatron.batch import RolloutGroup
from gspo_megatron.config import ResolvedConfig
from gspo_megatron.data.tokenizer import vocabulary_hash
from gspo_megatron.errors import CheckpointError
from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.rollout.generation import join_context, text_of
from gspo_megatron.rollout.record_files import RecordFiles, check_together, step_file
from gspo_megatron.rollout.record_limits import Limits
from gspo_megatron.rollout.records import GroupRecord, Sampling, record_of
from gspo_megatron.rollout.scoring import score
from gspo_megatron.trainer.run import Run
from gspo_megatron.utils.small_files import replace, unwritten


def open_rollouts(
    config: ResolvedConfig, tokenizer: PreTrainedTokenizerBase, shape: ModelShape, start: int, runtime: Runtime
) -> RecordFiles | None:
    """Return the files of a recipe that has them, all of whose groups from number `start` on are good. A collective;
    the ranks share the work.

    Raises:
        ConfigError: on every rank, for a group that cannot be trained on.
    """
    path = config.rollout.path
    if path is None:
        return None
    with together():
        limits = Limits.of(config, shape.architecture, vocabulary_hash(tokenizer))
        files = RecordFiles(path, config.steps * config.rollout.num_prompts, limits)
        mine = files.judge(start, runtime.rank, runtime.world_size)
    check_together(group for part in gather_objects(mine) for group in part)
    return files


def read_groups(run: Run, files: RecordFiles, clock: StepClock) -> list[RolloutGroup]:
    """Return this replica's share of the step's groups with rewards; the stream goes on behind them. A collective."""
    size, topology = run.config.rollout.num_prompts, run.topology
    share = size // topology.replicas
    start, params = run.prompts.position + topology.dp_cp_rank * share, run.sampling_params()

    def group(record: GroupRecord) -> RolloutGroup:
        return record.group([text_of(one.token_ids, run.tokenizer, params) for one in record.responses])

    with clock.part("rollout"), together():
        groups = [group(record) for record in files.read(start, start + share)]
    run.prompts.position += size
    with clock.part("reward"):
        missing = [group for group in groups if not group.scores]
        told = run.reporter.scored(sum(len(group.completions) for group in missing)) if missing else lambda done: None
        score(missing, run.mixture, topology, run.runtime.device, told)
    return join_context(groups, topology)


def save_groups(run: Run, step: int, groups: list[RolloutGroup]) -> None:
    """Write the step's groups of all replicas where the recipe wants it. A collective over all ranks.

    Args:
        groups: this replica's, scored.

    Raises:
        CheckpointError: on every rank, because the file could not be written.
    """
    every = run.config.rollout.save
    if every == 0 or step % every:
        return
    error = None
    if 0 in dist.get_process_group_ranks(run.topology.dp_group):  # its ranks hold all groups, each its replica's
        lines = _lines(run, groups)
        everyone: list | None = [None] * run.topology.dp_size if run.runtime.is_main else None
        dist.gather_object(lines, everyone, dst=0, group=run.topology.dp_group)
        if everyone is not None:
            error = _written(run, step, b"".join(everyone))
    raise_if_any(error, run.runtime.device)


def _written(run: Run, step: int, content: bytes) -> CheckpointError | None:
    path = step_file(run.folder, step)
    try:
        path.parent.mkdir(exist_ok=True)
        replace(path, content)
    except OSError as error:
        remedy = "Make room or make it writable, or give rollout.save 0; then start the same command."
        return CheckpointError(unwritten(error, path, remedy))
    return None


def _lines(run: Run, groups: list[RolloutGroup]) -> bytes:
    rollout, tokenizer = run.config.rollout, vocabulary_hash(run.tokenizer)
    sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p, rollout.max_response_length)
    return b"".join(record_of(group, tokenizer, sampling).line() for group in groups)
