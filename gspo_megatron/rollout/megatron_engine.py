"""Generation on the training model itself: same shards, same ranks, a key/value cache in each stage.

Context-parallel ranks are replicas like data-parallel ones: each has prompts of its own, whole sequences and no shared
attention. The responses of a replica are cut into `pipeline size` waves. Every stage walks through (iteration, virtual
stage, wave) in the same order, so while one wave is in the last stage the next is in the first. The last stage samples
and sends the tokens back to all stages; each drops finished responses from its cache by itself, so a finished response
costs nothing. Hidden states and tokens are all that travels: no rank ever holds another's weights.

Where experts span replicas, a replica that has finished goes on with one padding row, because its experts are needed by
the others.

Left out: servers (vLLM), continuous batching over steps, prefix caching beyond the responses of one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.layers.attention import CachePlan, KeyValueCache, PackedPlan
from gspo_megatron.backend.parallel.collective_errors import raise_if_any
from gspo_megatron.batch import Completion, Prompt
from gspo_megatron.errors import TrainingError
from gspo_megatron.process import progress
from gspo_megatron.rollout.sampling import SamplingParams, sample
from gspo_megatron.routing.rollout_routes import RolloutRecorder, SequenceRoutes


@dataclass
class _Wave:
    """Some whole groups of responses that move through the pipeline together. Bookkeeping is the same on all stages."""

    prompts: list[torch.Tensor]  # [length] int64 each
    group_size: int
    uniform: torch.Tensor  # [rows, max_tokens] fp64
    caches: list[KeyValueCache]  # one a virtual stage
    recorder: RolloutRecorder | None  # of the routes of all virtual stages, where they are wanted
    tokens: torch.Tensor  # [rows, max_tokens] int64, written so far
    logprobs: torch.Tensor  # [rows, max_tokens] fp32, on the last stage only until the end
    lengths: torch.Tensor  # [rows] int64, response tokens so far
    active: torch.Tensor  # [n] int64, rows still being written
    newest: torch.Tensor  # [n] int64, their newest tokens
    limits: torch.Tensor  # [rows] int64, the most tokens of each
    ended: torch.Tensor  # [rows] bool, those that a stop token or a stop string has ended
    finished: bool = False  # on every replica that must step together

    def ends(self, tokens: torch.Tensor, iteration: int, params: SamplingParams) -> torch.Tensor:
        """Tell which active rows end with these tokens, [n] bool. tokens: [n] int64."""
        ended = torch.isin(tokens, torch.tensor(params.stop_token_ids, dtype=torch.int64, device=tokens.device))
        if params.stop_strings:
            written = torch.cat([self.tokens[self.active, :iteration], tokens.unsqueeze(1)], dim=1).tolist()
            by_text = [params.stop_strings.ends(row) for row in written]
            ended = ended | torch.tensor(by_text, dtype=torch.bool, device=tokens.device)
        return ended

    def append(self, tokens: torch.Tensor, ended: torch.Tensor, iteration: int) -> None:
        """Add one token to each active row, and drop the rows that end with it. tokens: [n] int64, ended: [n] bool."""
        self.tokens[self.active, iteration] = tokens
        self.lengths[self.active] += 1
        self.ended[self.active] = ended
        alive = ~ended & (iteration + 1 < self.limits[self.active])
        if not bool(alive.all()):
            for cache in self.caches:
                cache.keep(alive.nonzero().squeeze(1))
        self.active, self.newest = self.active[alive], tokens[alive]


class MegatronEngine:
    """Samples from a Policy. All ranks of a replica call generate() with the same prompts and get the same answer."""

    def __init__(self, policy: Policy):
        self.policy, self.topology, self.device = policy, policy.topology, policy.runtime.device
        config = policy.models[0].config
        self.hidden_size, self.dtype = config.hidden_size, config.params_dtype
        self._error: TrainingError | None = None  # of this call, on a last stage
        self._sends: list[tuple] = []  # (work, tensor): the tensor must live until it is sent

    @torch.no_grad()
    def generate(
        self,
        prompts: list[Prompt],
        group_size: int,
        params: SamplingParams,
        uniform: torch.Tensor,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Sample `group_size` responses to each prompt.

        Args:
            prompts: this replica's, as many on every replica.
            uniform: [len(prompts) * group_size, params.max_tokens] fp64, responses of a prompt next to each other.
            limits: most tokens of each response, 1 to params.max_tokens, which all replicas have in common.

        Returns:
            One list of completions a prompt, the same on every rank of the replica.

        Raises:
            TrainingError: a model's logits are no distribution; on every rank of every replica.
        """
        for model in self.policy.models:
            model.eval()
        waves = self._waves(prompts, group_size, params, uniform, limits or [params.max_tokens] * len(uniform))
        for iteration in range(params.max_tokens):
            progress.detail(f"token {iteration + 1}")
            for chunk in range(len(self.policy.models)):
                for wave in [wave for wave in waves if not wave.finished]:
                    if chunk == 0 and iteration > 0 and not self.topology.is_last_stage:
                        self._receive_tokens(wave, iteration - 1)
                        if wave.finished:
                            continue
                    logits = self._forward(wave, chunk, first=iteration == 0)
                    if logits is not None:
                        self._sample(wave, logits, iteration, params)
        for wave in [wave for wave in waves if not wave.finished and not self.topology.is_last_stage]:
            self._receive_tokens(wave, params.max_tokens - 1)
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
        error, self._error = self._error, None
        raise_if_any(error, self.device)
        return self._completions(waves)

    def _waves(
        self,
        prompts: list[Prompt],
        size: int,
        params: SamplingParams,
        uniform: torch.Tensor,
        limits: Sequence[int],
    ) -> list[_Wave]:
        """As many waves as stages (fewer where there are fewer prompts), of nearly equal numbers of prompts."""
        count = min(self.topology.pp_size, len(prompts))
        bounds = [len(prompts) * i // count for i in range(count + 1)]
        waves = []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            tokens = [torch.tensor(p.token_ids, device=self.device) for p in prompts[start:stop]]
            rows, max_len = len(tokens) * size, max(len(t) for t in tokens) + params.max_tokens
            recorder = RolloutRecorder(rows, max_len) if self.policy.routing.wants_rollout_routes else None
            shape = (rows, params.max_tokens)
            mine = slice(start * size, stop * size)
            waves.append(
                _Wave(
                    tokens,
                    size,
                    uniform[mine],
                    [KeyValueCache(rows, max_len, {}) for _ in self.policy.models],
                    recorder,
                    torch.zeros(shape, dtype=torch.int64, device=self.device),
                    torch.zeros(shape, dtype=torch.float32, device=self.device),
                    torch.zeros(rows, dtype=torch.int64, device=self.device),
                    torch.arange(rows, device=self.device),
                    torch.empty(0, dtype=torch.int64, device=self.device),
                    torch.tensor(limits[mine], device=self.device),
                    torch.zeros(rows, dtype=torch.bool, device=self.device),
                )
            )
        return waves

    def _forward(self, wave: _Wave, chunk: int, first: bool) -> torch.Tensor | None:
        """One pass of one virtual stage. The last one returns logits [n, V] of the rows that need a token."""
        tokens, positions, plan, wanted = self._prefill(wave, chunk) if first else self._decode(wave, chunk)
        topology, model = self.topology, self.policy.models[chunk]
        # Sequence parallelism cuts the tokens over tensor ranks; a replica without tokens still runs its experts.
        padding = -(-max(tokens.numel(), 1) // topology.tp_size) * topology.tp_size - tokens.numel()
        if wave.recorder:
            rows = wave.active.unsqueeze(1) if plan.rows is None else plan.rows
            share = (tokens.numel() + padding) // topology.tp_size
            mine = slice(topology.tp_rank * share, (topology.tp_rank + 1) * share)
            plan.trace = wave.recorder.at(rows[mine], positions[mine])
        tokens, positions = F.pad(tokens, (0, padding)), F.pad(positions, (0, padding))
        if not model.pre_process:
            hidden = torch.empty(
                tokens.numel() // topology.tp_size, 1, self.hidden_size, dtype=self.dtype, device=self.device
            )
            dist.recv(hidden, self._neighbour(-1), group=self._hidden_group(topology.is_first_stage))
            model.set_input_tensor(hidden)
        out = model(tokens.unsqueeze(0), positions.unsqueeze(0), None, packed_seq_params=plan)
        if not model.post_process:
            self._send(out.contiguous(), self._neighbour(1), self._hidden_group(topology.is_last_stage))
            return None
        return self._gather_vocabulary(out[wanted])

    def _prefill(self, wave: _Wave, chunk: int) -> tuple[torch.Tensor, torch.Tensor, CachePlan, torch.Tensor]:
        """All prompts of the wave, packed; each is computed once and cached for all its responses."""
        lengths = torch.tensor([len(p) for p in wave.prompts], device=self.device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        prompt = PackedPlan.from_cu_seqlens(cu_seqlens)
        positions = torch.cat([torch.arange(len(p), device=self.device) for p in wave.prompts])
        owner = torch.repeat_interleave(torch.arange(len(wave.prompts), device=self.device), lengths)
        rows = owner.unsqueeze(1) * wave.group_size + torch.arange(wave.group_size, device=self.device)
        plan = CachePlan(
            qkv_format="sbhd",
            max_seqlen_q=prompt.max_len,
            max_seqlen_kv=prompt.max_len,
            cache=wave.caches[chunk],
            num_tokens=positions.numel(),
            positions=positions,
            rows=rows,
            prompt=prompt,
        )
        wanted = (cu_seqlens[1:].long() - 1).repeat_interleave(wave.group_size)
        return torch.cat(wave.prompts), positions, plan, wanted

    def _decode(self, wave: _Wave, chunk: int) -> tuple[torch.Tensor, torch.Tensor, CachePlan, torch.Tensor]:
        """One token of every active row."""
        prompt_lengths = torch.tensor([len(p) for p in wave.prompts], device=self.device)
        positions = prompt_lengths[wave.active // wave.group_size] + wave.lengths[wave.active] - 1
        n = positions.numel()
        plan = CachePlan(
            qkv_format="sbhd",
            max_seqlen_q=1,
            max_seqlen_kv=wave.caches[chunk].max_len,
            cache=wave.caches[chunk],
            num_tokens=n,
            positions=positions,
        )
        return wave.newest, positions, plan, torch.arange(n, device=self.device)

    def _sample(self, wave: _Wave, logits: torch.Tensor, iteration: int, params: SamplingParams) -> None:
        """On the last stage: choose tokens, tell the other stages, and agree on whether the wave goes on."""
        rows = wave.active
        try:
            tokens, logprobs = sample(logits, wave.uniform[rows.cpu(), iteration], params)
            ended = wave.ends(tokens, iteration, params)
        except TrainingError as error:
            self._error = self._error or error
            # The other stages and replicas wait for tokens: the wave ends at this one, and `generate` raises.
            tokens, logprobs = torch.zeros_like(rows), wave.logprobs[rows, iteration]
            ended = torch.ones_like(rows, dtype=torch.bool)
        wave.logprobs[rows, iteration] = logprobs
        wave.append(tokens, ended, iteration)
        remaining = torch.tensor([wave.active.numel()], device=self.device)
        if self.topology.experts_span_replicas:
            dist.all_reduce(remaining, op=dist.ReduceOp.MAX, group=self.topology.dp_cp_group)
        wave.finished = int(remaining) == 0
        message = torch.cat([tokens, ended.long(), remaining])
        for rank in self.topology.stage_ranks[:-1]:
            self._send(message, rank, self.topology.feedback_group)

    def _receive_tokens(self, wave: _Wave, iteration: int) -> None:
        count = wave.active.numel()
        message = torch.empty(2 * count + 1, dtype=torch.int64, device=self.device)
        dist.recv(message, self.topology.stage_ranks[-1], group=self.topology.feedback_group)
        wave.append(message[:count], message[count:-1].bool(), iteration)
        wave.finished = int(message[-1]) == 0

    def _gather_vocabulary(self, shard: torch.Tensor) -> torch.Tensor:
        """[n, V/TP] -> [n, V], the same bits on every tensor rank, so that all of them draw the same token."""
        size = self.topology.tp_size
        if size == 1:
            return shard
        gathered = shard.new_empty(size * shard.size(0), shard.size(1))
        dist.all_gather_into_tensor(gathered, shard.contiguous(), group=self.topology.tp_group)
        return gathered.view(size, *shard.shape).transpose(0, 1).flatten(1)

    def _neighbour(self, step: int) -> int:
        return self.topology.stage_ranks[(self.topology.pp_rank + step) % self.topology.pp_size]

    def _hidden_group(self, wraps: bool) -> dist.ProcessGroup:
        """Where hidden states travel. NCCL serves a communicator's transfers in the order of the calls, so with virtual
        stages the way back from the last stage to the first needs another: else both ends wait in a send."""
        return self.topology.feedback_group if wraps else self.topology.pp_group

    def _send(self, tensor: torch.Tensor, rank: int, group: dist.ProcessGroup) -> None:
        self._sends = [(work, sent) for work, sent in self._sends if not work.is_completed()]
        self._sends.append((dist.isend(tensor, rank, group=group), tensor))

    def _routes(self, wave: _Wave, recorder: RolloutRecorder) -> SequenceRoutes:
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

    def _completions(self, waves: list[_Wave]) -> list[list[Completion]]:
        answers = []
        for wave in waves:
            if self.topology.pp_size > 1:
                dist.broadcast(wave.logprobs, self.topology.stage_ranks[-1], group=self.topology.feedback_group)
            lengths, tokens, logprobs = wave.lengths.tolist(), wave.tokens.tolist(), wave.logprobs.tolist()
            ended = wave.ended.tolist()
            routes = self._routes(wave, wave.recorder) if wave.recorder else None
            rows = []
            for row, length in enumerate(lengths):
                taken = None
                if routes:
                    end = len(wave.prompts[row // wave.group_size]) + length
                    taken = replace(routes, experts=routes.experts[:, row, :end].clone())
                rows.append(Completion(tokens[row][:length], logprobs[row][:length], not ended[row], taken))
            answers += [rows[i : i + wave.group_size] for i in range(0, len(rows), wave.group_size)]
        return answers
