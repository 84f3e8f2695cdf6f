"""From the policy's output to log-probs of the target tokens, and from those to what a loss is given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gspo_megatron.algorithms.interface import GlobalCounts, LossInputs, alone
from gspo_megatron.backend.engine.network import Microbatch
from gspo_megatron.backend.engine.targets import Targets
from gspo_megatron.backend.model.builder import PackedModel
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import PackedBatch
from gspo_megatron.ops.collectives import reduce_tables
from gspo_megatron.ops.linear_logprobs import linear_logprobs
from gspo_megatron.ops.vocab_logprobs import vocab_logprobs


@dataclass(frozen=True)
class TargetLogProbs:
    """Log-probs of one microbatch, indexed by the target token."""

    logprobs: torch.Tensor  # [T] fp32 (fp64 of an fp64 model), differentiable
    entropy: torch.Tensor  # [T]
    own: torch.Tensor | None  # [T] bool, the targets of this context-parallel rank; None: all


class LogProbHead:
    """The end of the last pipeline stage: logits, or hidden states in chunks, to log-probs at a temperature."""

    def __init__(self, model: PackedModel, topology: Topology, temperature: float, chunk_tokens: int):
        """
        Args:
            model: the last model chunk of this rank, unwrapped.
            temperature: divides the logits.
            chunk_tokens: tokens whose logits are held at once; 0: those of a whole microbatch.
        """
        self.model, self.temperature, self.chunk_tokens = model, temperature, chunk_tokens
        self.reduce = context_reducer(topology)
        self._group = topology.tp_group if topology.tp_size > 1 else None

    @contextmanager
    def hidden_states(self) -> Iterator[None]:
        """Inside, the last stage returns hidden states where the recipe wants log-probs made from them in chunks."""
        self.model.returns_hidden = bool(self.chunk_tokens)
        try:
            yield
        finally:
            self.model.returns_hidden = False

    def __call__(self, micro: Microbatch, output: torch.Tensor) -> TargetLogProbs:
        """Make log-probs of `output`: [rows, V / TP] logits, or [rows, H] hidden states."""
        targets = Targets.of(micro.batch, micro.plan)
        tokens = micro.batch.tokens[targets.index]
        if self.chunk_tokens:
            weight = self.model.head_weight()
            # Megatron's Float16Module gives the last stage's bf16 output as fp32; going back is exact.
            hidden = output.to(weight.dtype)
            logprobs, entropy = linear_logprobs(
                hidden, weight, tokens, self.temperature, self._group, self.chunk_tokens
            )
        else:
            logprobs, entropy = vocab_logprobs(output, tokens, self.temperature, self._group)
        return TargetLogProbs(targets.scatter(logprobs), targets.scatter(entropy), targets.own)

    def loss_inputs(self, batch: PackedBatch, new: TargetLogProbs, counts: GlobalCounts) -> LossInputs:
        """Collect what algorithms/ computes the loss of one microbatch from."""
        mask, lengths = batch.loss_mask, None
        if new.own is not None:
            ids = torch.repeat_interleave(torch.diff(batch.cu_seqlens[: batch.num_sequences + 1]).long())
            trained = (mask > 0).double()[: ids.numel()]
            lengths = trained.new_zeros(batch.num_sequences).index_add(0, ids, trained)
            mask = mask * new.own
        return LossInputs(
            logprobs=new.logprobs,
            entropy=new.entropy,
            old_logprobs=batch.old_logprobs if batch.old_logprobs is not None else new.logprobs.detach(),
            loss_mask=mask,
            cu_seqlens=batch.cu_seqlens,
            num_sequences=batch.num_sequences,
            advantages=batch.advantages,
            counts=counts,
            lengths=lengths,
            ref_logprobs=batch.ref_logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            reduce=self.reduce,
        )


def context_reducer(topology: Topology) -> Callable[..., torch.Tensor]:
    """Return LossInputs.reduce for this rank's context-parallel group."""
    if topology.cp_size == 1:
        return alone
    return lambda table, maximum=None: reduce_tables(table, topology.cp_group, maximum).wait()
