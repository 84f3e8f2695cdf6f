"""Generation on the training model itself: same shards, same ranks, a key/value cache in each stage.

Context-parallel ranks are replicas like data-parallel ones: each has prompts of its own, whole sequences and no shared
attention. The responses of a replica are cut into `pipeline size` waves. Every stage walks through (iteration, virtual
stage, wave) in the same order, so while one wave is in the last stage the next is in the first. The last stage samples
and sends the tokens back to all stages; each drops finished responses from its cache by itself, so a finished response
costs nothing. Hidden states and tokens are all that travels: no rank ever holds another's weights.

Where experts span replicas, a replica that has finished goes on without tokens, because its experts are needed by the
others.

Left out: servers (vLLM), continuous batching over steps, prefix caching beyond the responses of one request.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.model.generation import forward_of
from gspo_megatron.backend.parallel.collective_errors import raise_if_any
from gspo_megatron.backend.parallel.shares import gathered
from gspo_megatron.batch import Completion
from gspo_megatron.errors import TrainingError
from gspo_megatron.process import progress
from gspo_megatron.rollout import random_numbers, sampling
from gspo_megatron.rollout.sampler import SampleRequest
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.rollout.wave import Wave
from gspo_megatron.routing.rollout_routes import RolloutRecorder, SequenceRoutes


class MegatronEngine:
    """This engine is the Sampler on the training model, and its own WeightSync, which has nothing to bring."""

    def __init__(self, policy: Policy):
        self.policy, self.topology, self.device = policy, policy.topology, policy.runtime.device
        config = policy.models[0].config
        self.hidden_size, self.dtype = config.hidden_size, config.params_dtype
        self.forwards = [forward_of(model, self.topology) for model in policy.models]
        self.version = 0
        self._error: TrainingError | None = None  # of this call, on a last stage
        self._sends: list[tuple] = []  # (work, tensor): the tensor must live until it is sent

    def sync(self, version: int) -> dict[str, float]:
        """Note the version; the weights are the policy's own. See WeightSync."""
        self.version = version
        return {}

    @torch.no_grad()
    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[list[Completion]]:
        """Sample the responses to each request. See Sampler."""
        for model in self.policy.models:
            model.eval()
        waves = self._waves(requests)
        for iteration in itertools.count():
            if all(wave.finished for wave in waves):
                break
            progress.detail(f"token {iteration + 1}")
            for chunk in range(len(self.policy.models)):
                for wave in [wave for wave in waves if not wave.finished]:
                    if chunk == 0 and iteration > 0 and not self.topology.is_last_stage:
                        self._receive_tokens(wave, iteration - 1)
                        if wave.finished:
                            continue
                    logits = self._forward(wave, chunk, first=iteration == 0)
                    if logits is not None:
                        self._choose(wave, logits, iteration, params)
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
        error, self._error = self._error, None
        raise_if_any(error, self.device)
        return [answer for wave in waves for answer in self._completions(wave)]

    def _waves(self, requests: Sequence[SampleRequest]) -> list[Wave]:
        """As many waves as stages (fewer where there are fewer requests), of nearly equal numbers of requests."""
        count = min(self.topology.pp_size, len(requests))
        bounds = [len(requests) * i // count for i in range(count + 1)]
        chunks, wants_routes = len(self.policy.models), self.policy.routing.wants_rollout_routes
        return [
            Wave.of(requests[start:stop], self.device, chunks, wants_routes)
            for start, stop in zip(bounds, bounds[1:], strict=False)
        ]

    def _forward(self, wave: Wave, chunk: int, first: bool) -> torch.Tensor | None:
        """One pass of one virtual stage. The last one returns logits [n, V] of the rows that need a token."""
        step = wave.prefill(chunk) if first else wave.decode(chunk)
        plan, forward, model = step.plan, self.forwards[chunk], self.policy.models[chunk]
        mine = forward.begin(plan)
        if wave.recorder:
            rows = wave.active.unsqueeze(1) if plan.rows is None else plan.rows
            plan.trace = wave.recorder.at(rows[mine], step.positions[mine])
        hidden = None
        if not model.pre_process:
            hidden = torch.empty(forward.num_rows(plan), self.hidden_size, dtype=self.dtype, device=self.device)
            dist.recv(hidden, self._neighbour(-1), group=self._hidden_group(self.topology.is_first_stage))
        out = forward(step.tokens, step.positions, plan, hidden)
        if not model.post_process:
            self._send(out.contiguous(), self._neighbour(1), self._hidden_group(self.topology.is_last_stage))
            return None
        return self._gather_vocabulary(forward.logits(out, step.wanted))

    def _choose(self, wave: Wave, logits: torch.Tensor, iteration: int, params: SamplingParams) -> None:
        """On the last stage: choose tokens, tell the other stages, and agree on whether the wave goes on."""
        rows = wave.active
        try:
            numbers = random_numbers.uniforms(wave.seeds[rows], iteration)
            tokens, logprobs = sampling.sample(logits, numbers, params)
            ended = wave.ends(tokens, iteration, params)
        except TrainingError as error:
            self._error = self._error or error
            # The other stages and replicas wait for tokens: the wave ends at this one, and `sample` raises.
            tokens, logprobs = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.float32)
            ended = torch.ones_like(rows, dtype=torch.bool)
        wave.append(tokens, ended, iteration, logprobs)
        remaining = torch.tensor([wave.active.numel()], device=self.device)
        if self.topology.experts_span_replicas:
            dist.all_reduce(remaining, op=dist.ReduceOp.MAX, group=self.topology.dp_cp_group)
        wave.finished = int(remaining) == 0
        message = torch.cat([tokens, ended.long(), remaining])
        for rank in self.topology.stage_ranks[:-1]:
            self._send(message, rank, self.topology.feedback_group)

    def _receive_tokens(self, wave: Wave, iteration: int) -> None:
        count = wave.active.numel()
        message = torch.empty(2 * count + 1, dtype=torch.int64, device=self.device)
        dist.recv(message, self.topology.stage_ranks[-1], group=self.topology.feedback_group)
        wave.append(message[:count], message[count:-1].bool(), iteration)
        wave.finished = int(message[-1]) == 0

    def _gather_vocabulary(self, shard: torch.Tensor) -> torch.Tensor:
        """[n, V/TP] -> [n, V], the same bits on every tensor rank, so that all of them draw the same token."""
        by_rank = gathered(shard, self.topology).view(self.topology.tp_size, *shard.shape)
        return by_rank.transpose(0, 1).flatten(1)

    def _neighbour(self, step: int) -> int:
        return self.topology.stage_ranks[(self.topology.pp_rank + step) % self.topology.pp_size]

    def _hidden_group(self, wraps: bool) -> dist.ProcessGroup:
        """Where hidden states travel. NCCL serves a communicator's transfers in the order of the calls, so with virtual
        stages the way back from the last stage to the first needs another: else both ends wait in a send."""
        return self.topology.feedback_group if wraps else self.topology.pp_group

    def _send(self, tensor: torch.Tensor, rank: int, group: dist.ProcessGroup) -> None:
        self._sends = [(work, sent) for work, sent in self._sends if not work.is_completed()]
        self._sends.append((dist.isend(tensor, rank, group=group), tensor))

    def _routes(self, wave: Wave, recorder: RolloutRecorder) -> SequenceRoutes:
        """Of all rows of the wave, [L, rows, max_len, k]. Each tensor rank has recorded its slice of every pass."""
        layers = tuple(sorted(recorder.experts))
        if not layers:  # a stage of dense layers
            return SequenceRoutes((), torch.empty(0, wave.tokens.size(0), wave.caches[0].max_len, 0))
        experts = torch.stack([recorder.experts[layer] for layer in layers])
        if self.topology.tp_size > 1:
            whole = experts.int()  # collectives have no int16
            dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=self.topology.tp_group)
            experts = whole.to(experts.dtype)
        return SequenceRoutes(layers, experts.cpu())

    def _completions(self, wave: Wave) -> list[list[Completion]]:
        if self.topology.pp_size > 1:
            dist.broadcast(wave.logprobs, self.topology.stage_ranks[-1], group=self.topology.feedback_group)
        routes = self._routes(wave, wave.recorder) if wave.recorder else None
        return wave.completions(routes, self.version)
