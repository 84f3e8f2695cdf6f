"""The trainer as an object: scored groups of responses in, an updated policy out, on every rank of a torchrun.

    trainer = GspoTrainer("recipe.yaml", model="HF folder")
    metrics = trainer.step(groups)

rl.py is its first user: what that samples is already shared out, so it calls `learn`. Other systems hand their groups
to `step`, on one rank or on several (spread.py). Nothing here ends the process: what goes wrong is raised, on every
rank.

Left out: generation, rewards and evaluation, which the caller has; and sharing out a batch without every rank seeing
all of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.checkpoint import saver, sharded
from gspo_megatron.backend.engine.critic import Critic, networks
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.engine.reference import FrozenReference
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime as runtimes
from gspo_megatron.backend.parallel import topology as topologies
from gspo_megatron.batch import Minibatch, RolloutGroup, TrainSequence, UpdateResult
from gspo_megatron.config import ResolvedConfig, TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.data.sequences import minibatch_indices, train_sequences
from gspo_megatron.errors import CheckpointError
from gspo_megatron.hf import export
from gspo_megatron.metrics.clock import StepClock
from gspo_megatron.metrics.reduce import update_metrics
from gspo_megatron.metrics.rollout import group_metrics
from gspo_megatron.recipe.check import needs_whole_pass, uses_transformer_engine
from gspo_megatron.recipe.layout import check_latent, check_layout, resolve_layout
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.trainer import spread
from gspo_megatron.trainer.advantages.critic import CriticAdvantages
from gspo_megatron.trainer.advantages.estimator import AdvantageEstimator, GroupAdvantages
from gspo_megatron.trainer.build import build_policy


@dataclass(frozen=True)
class Learned:
    """What came of one batch, on this rank."""

    sequences: list[TrainSequence]
    minibatches: list[Minibatch]
    advantages: torch.Tensor  # [responses] fp64, in the order of the groups
    results: list[UpdateResult]  # one a minibatch
    metrics: dict[str, float]  # the estimator's own


class GspoTrainer:
    """A policy with its optimizer, what gives its advantages, and the frozen reference where the recipe has one.

    The reference, and PPO's critic, start from the policy as it is when the trainer is made.
    """

    def __init__(self, recipe: TrainConfig | Path | str, model: Path | str | None = None, policy: Policy | None = None):
        """Make a trainer. A collective over all ranks of the torchrun (one rank needs none).

        Args:
            recipe: a recipe, or the path of one.
            model: Hugging Face folder to start from, in place of the recipe's model.load_hf.
            policy: one that is there already; then the recipe is the policy's.

        Raises:
            ConfigError: the recipe, the layout or the folder cannot be used.
        """
        self.policy = policy or policy_of(recipe, model)
        self.version = 0  # number of batches that the weights have learned from
        self.policy.start_optimizer()
        self.reference = FrozenReference(self.policy.models) if self.config.algorithm.kl.coef else None
        self.estimator = make_estimator(self.policy)

    @property
    def config(self) -> ResolvedConfig:
        """Return the recipe, with the layout of these ranks."""
        return self.policy.config

    def step(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Learn from scored groups, and return the step's metrics, the same on every rank. A collective.

        Groups may differ in size; one with a negative uid gets its place in the batch for one. The recipe's
        algorithm.num_minibatches optimizer steps are taken; who is in which does not depend on the layout.

        Args:
            groups: those that this rank hands over, for example all on rank 0 and none elsewhere.

        Raises:
            RolloutError: no rank has a group, all ranks hand over the same ones, a group is without scores, has tokens
                or a length that the model has not, or lacks log-probs that the recipe needs. On every rank.
        """
        step = self.version + 1
        shared = spread.share(groups, self.policy, step)
        learned = self.learn(shared.groups, step, step_seed(self.config, step), shared.parts)
        number = sum(len(group.completions) for group in shared.own)
        group, tasks = self.policy.topology.dp_group, sorted(shared.tasks)
        metrics = update_metrics(learned.results, group) | learned.metrics
        return metrics | group_metrics(shared.own, learned.advantages[:number], tasks, group, self.policy.device)

    def learn(
        self,
        groups: Sequence[RolloutGroup],
        step: int,
        seed: int,
        parts: list[list[int]] | None = None,
        clock: StepClock | None = None,
    ) -> Learned:
        """Take the optimizer steps of one batch that is shared out already. A collective over all ranks.

        Args:
            groups: of this replica.
            step: number of the batch, from 1.
            seed: of what an estimator draws.
            parts: this replica's responses, by number, of each minibatch, none of them empty; None: dealt out evenly.
            clock: parts of the time are noted there.
        """
        config, policy, groups = self.config, self.policy, list(groups)
        sequences = train_sequences(groups, config.algorithm.mask_truncated_completions)
        if parts is None:
            parts = minibatch_indices(groups, config.algorithm.num_minibatches, (config.seed, step))
        minibatches = [Minibatch(part, policy.microbatches([sequences[i] for i in part])) for part in parts]
        with _timed(clock, "old_logprobs"):
            self._fill_log_probs(minibatches)
        advantages = self.estimator.fill(groups, minibatches, seed)
        results: list[UpdateResult] = []
        learned: dict[str, float] = {}
        with _timed(clock, "update"):
            loss = policy_loss(config.algorithm, config.rollout.max_response_length)
            for number, minibatch in enumerate(minibatches):
                counts = global_counts(minibatch.batches, policy.topology)
                results.append(policy.update(minibatch.batches, loss, counts, step, number))
                learned |= self.estimator.learn(minibatch, counts)
        self.version = step
        return Learned(sequences, minibatches, advantages, results, learned)

    def log_probs(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Return log p of each token of each response at the recipe's temperature, on every rank. A collective.

        Args:
            sequences: (prompt, response) as token ids, those that this rank hands over; the answers of all ranks'
                sequences are returned, in the order of the ranks.

        Raises:
            RolloutError: a token or a length that the model has not. On every rank.
        """
        return spread.log_probs(self.policy, sequences)

    def weights(self, is_stacked: bool = False) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield each tensor under its Hugging Face name: whole on rank 0, None elsewhere. A collective, which every
        rank goes through to its end; one tensor is in memory at a time. Copy what is to outlive the next step.

        Args:
            is_stacked: all experts of a layer in one tensor, as transformers' models hold them; else as files do.
        """
        policy = self.policy
        return export.tensors(policy.models, policy.topology, policy.shape.architecture, is_stacked)

    def save(self, folder: Path | str) -> None:
        """Write weights, optimizer, critic and reference as a checkpoint. A collective over all ranks.

        Raises:
            CheckpointError: it cannot be written. On every rank.
        """
        saver.save(
            networks(self.policy, self.estimator.critic), Path(folder), {"version": self.version}, self.reference
        )

    def load(self, folder: Path | str) -> None:
        """Go on from a checkpoint of `save`, of any layout. A collective over all ranks.

        Raises:
            CheckpointError: there is none, or one of another kind. On every rank.
        """
        version = sharded.read_progress(Path(folder)).get("version")
        if not isinstance(version, int):
            raise CheckpointError(f"{folder}: is no checkpoint of a GspoTrainer. Give a folder that its save() wrote.")
        sharded.load(networks(self.policy, self.estimator.critic), Path(folder), self.reference)
        self.version = version

    def close(self) -> None:
        """Leave the process groups."""
        topologies.destroy_model_parallel()
        runtimes.destroy_process_group()

    def _fill_log_probs(self, minibatches: list[Minibatch]) -> None:
        """Fill in old log-probs as the recipe chooses them (algorithm.old_logprobs), and the reference's."""
        choice = self.config.algorithm.old_logprobs
        batches = [batch for minibatch in minibatches for batch in minibatch.batches]
        if choice == "rollout":
            for batch in batches:
                batch.old_logprobs = batch.rollout_logprobs
        else:
            skipped = 0 if needs_whole_pass(self.config) else len(minibatches[0].batches)
            if batches[skipped:]:
                self.policy.fill_old_log_probs(batches[skipped:])
        if self.reference:
            with self.reference.in_place():
                self.policy.fill_ref_log_probs(batches)


def policy_of(recipe: TrainConfig | Path | str, model: Path | str | None) -> Policy:
    """Return the policy of a recipe on the ranks of this torchrun, without data or a run folder. A collective.

    Args:
        recipe: a recipe, or the path of one.
        model: Hugging Face folder to start from, in place of the recipe's.

    Raises:
        ConfigError: it cannot be used.
    """
    config = recipe if isinstance(recipe, TrainConfig) else load_recipe([str(recipe)])
    if model is not None:
        config = replace(config, model=replace(config.model, load_hf=Path(model)))
    require(config.algorithm.name != "dpo", "algorithm.name", "dpo", "learns from pairs, not from groups", "Give gspo.")
    epochs = config.num_epochs
    require(epochs is None, "num_epochs", epochs, "counts rows of data, which a trainer does not read", "Give steps.")
    require(
        config.model.load_hf is not None,
        "model.load_hf",
        None,
        "a trainer without data starts from a Hugging Face folder",
        "Give model=, or model.load_hf in the recipe.",
    )
    runtime = runtimes.init_process_group(config.device)
    layout = resolve_layout(config, runtime.world_size, has_cuda=runtime.device.type == "cuda")
    architecture = check_layout(config.model, layout, runtime.world_size)
    check_latent(architecture, uses_transformer_engine(config, has_gpu=runtime.device.type == "cuda"))
    resolved = config.resolved(layout)
    topology = topologies.initialize_model_parallel(layout, config.seed)
    shape = ModelShape.of(config.model, 0)
    return build_policy(resolved, shape, topology, runtime)


def make_estimator(policy: Policy) -> AdvantageEstimator:
    """PPO's advantages come from a critic, which starts from the policy as RL finds it; all others' from groups."""
    if policy.config.algorithm.name != "ppo":
        return GroupAdvantages(policy.config, policy)
    critic = Critic(policy.config, policy.shape, policy.topology, policy.runtime)
    critic.start_from(policy)
    critic.start_optimizer()
    return CriticAdvantages(policy.config, policy, critic)


def step_seed(config: TrainConfig, step: int) -> int:
    """Return the seed of a step's samples: another one for every (seed, step), the same in every layout."""
    return config.seed * 1_000_003 + step


def _timed(clock: StepClock | None, name: str) -> AbstractContextManager:
    return clock.part(name) if clock else nullcontext()
