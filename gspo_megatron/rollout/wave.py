"""A wave is some requests whose responses move through the pipeline together, with all that is known of them so far.

Every stage keeps the same books, from the tokens that the last one sends. Rows are responses, those to one request next
to each other. Left out: the passes through the model and what ranks send each other (megatron_engine.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from gspo_megatron.backend.layers.attention import CachePlan, KeyValueCache, PackedPlan
from gspo_megatron.batch import Completion
from gspo_megatron.rollout.sampler import SampleRequest
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.routing.rollout_routes import RolloutRecorder, SequenceRoutes


@dataclass(frozen=True)
class Pass:
    """The tokens of one pass through a virtual stage."""

    tokens: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    plan: CachePlan
    wanted: torch.Tensor  # [n] int64, of the active rows: which of the T outputs gives their next token


@dataclass
class Wave:
    """Bookkeeping of some whole requests; width is the largest of their max_tokens."""

    prompts: list[torch.Tensor]  # [length] int64 each
    sizes: torch.Tensor  # [prompts] int64, responses to each
    prompt_lengths: torch.Tensor  # [rows] int64
    seeds: torch.Tensor  # [rows] int64
    limits: torch.Tensor  # [rows] int64, the most tokens of each
    caches: list[KeyValueCache]  # one a virtual stage
    recorder: RolloutRecorder | None  # of the routes of all virtual stages, where they are wanted
    tokens: torch.Tensor  # [rows, width] int64, written so far
    logprobs: torch.Tensor  # [rows, width] fp32, on the last stage only until the end
    lengths: torch.Tensor  # [rows] int64, response tokens so far
    active: torch.Tensor  # [n] int64, rows still being written
    newest: torch.Tensor  # [n] int64, their newest tokens
    ended: torch.Tensor  # [rows] bool, those that a stop token or a stop string has ended
    finished: bool = False  # on every replica that must step together

    @classmethod
    def of(
        cls, requests: Sequence[SampleRequest], device: torch.device, virtual_stages: int, wants_routes: bool
    ) -> "Wave":
        """Return the wave before its first pass."""
        width = max(request.max_tokens for request in requests)
        max_len = max(len(request.token_ids) + request.max_tokens for request in requests)
        sizes = torch.tensor([len(request.seeds) for request in requests], device=device)
        rows = int(sizes.sum())

        def by_row(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, device=device).repeat_interleave(sizes)

        return cls(
            prompts=[torch.tensor(request.token_ids, device=device) for request in requests],
            sizes=sizes,
            prompt_lengths=by_row([len(request.token_ids) for request in requests]),
            seeds=torch.tensor([seed for request in requests for seed in request.seeds], device=device),
            limits=by_row([request.max_tokens for request in requests]),
            caches=[KeyValueCache(rows, max_len, {}) for _ in range(virtual_stages)],
            recorder=RolloutRecorder(rows, max_len) if wants_routes else None,
            tokens=torch.zeros(rows, width, dtype=torch.int64, device=device),
            logprobs=torch.zeros(rows, width, dtype=torch.float32, device=device),
            lengths=torch.zeros(rows, dtype=torch.int64, device=device),
            active=torch.arange(rows, device=device),
            newest=torch.empty(0, dtype=torch.int64, device=device),
            ended=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def ends(self, tokens: torch.Tensor, iteration: int, params: SamplingParams) -> torch.Tensor:
        """Tell which active rows end with these tokens, [n] bool. tokens: [n] int64."""
        ended = torch.isin(tokens, torch.tensor(params.stop_token_ids, dtype=torch.int64, device=tokens.device))
        if params.stop_strings:
            written = torch.cat([self.tokens[self.active, :iteration], tokens.unsqueeze(1)], dim=1).tolist()
            by_text = [params.stop_strings.ends(row) for row in written]
            ended = ended | torch.tensor(by_text, dtype=torch.bool, device=tokens.device)
        return ended

    def append(
        self, tokens: torch.Tensor, ended: torch.Tensor, iteration: int, logprobs: torch.Tensor | None = None
    ) -> None:
        """Add one token to each active row, and drop the rows that end with it.

        Args:
            tokens: [n] int64.
            ended: [n] bool.
            logprobs: [n] fp32, on the last stage.
        """
        if not self.active.numel():
            return  # the wave goes on for other replicas, whose responses may be longer than its width
        self.tokens[self.active, iteration] = tokens
        if logprobs is not None:
            self.logprobs[self.active, iteration] = logprobs
        self.lengths[self.active] += 1
        self.ended[self.active] = ended
        alive = ~ended & (iteration + 1 < self.limits[self.active])
        if not bool(alive.all()):
            for cache in self.caches:
                cache.keep(alive.nonzero().squeeze(1))
        self.active, self.newest = self.active[alive], tokens[alive]

    def prefill(self, chunk: int) -> Pass:
        """Return all prompts, packed; each is computed once and cached for all its responses."""
        device = self.tokens.device
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        prompt = PackedPlan.from_cu_seqlens(cu_seqlens)
        positions = torch.cat([torch.arange(len(prompt), device=device) for prompt in self.prompts])
        # A prompt with fewer responses than another names its last row more than once, with the same values.
        number = torch.minimum(torch.arange(int(self.sizes.max()), device=device), self.sizes.unsqueeze(1) - 1)
        rows = (self.sizes.cumsum(0) - self.sizes).unsqueeze(1) + number  # [prompts, most responses]
        plan = CachePlan(
            qkv_format="sbhd",
            max_seqlen_q=prompt.max_len,
            max_seqlen_kv=prompt.max_len,
            cache=self.caches[chunk],
            num_tokens=positions.numel(),
            positions=positions,
            rows=rows.repeat_interleave(lengths, dim=0),
            prompt=prompt,
        )
        wanted = (cu_seqlens[1:].long() - 1).repeat_interleave(self.sizes)
        return Pass(torch.cat(self.prompts), positions, plan, wanted)

    def decode(self, chunk: int) -> Pass:
        """Return the newest token of every active row."""
        positions = self.prompt_lengths[self.active] + self.lengths[self.active] - 1
        count = positions.numel()
        plan = CachePlan(
            qkv_format="sbhd",
            max_seqlen_q=1,
            max_seqlen_kv=self.caches[chunk].max_len,
            cache=self.caches[chunk],
            num_tokens=count,
            positions=positions,
        )
        return Pass(self.newest, positions, plan, torch.arange(count, device=positions.device))

    def completions(self, routes: SequenceRoutes | None, version: int) -> list[list[Completion]]:
        """Return what was sampled, one list a request.

        Args:
            routes: of all rows, [L, rows, max_len, k], where they are wanted.
            version: of the weights.
        """
        rows = []
        books = (self.lengths, self.prompt_lengths, self.tokens, self.logprobs, self.ended)
        for row, (length, prompt, tokens, logprobs, ended) in enumerate(
            zip(*(book.tolist() for book in books), strict=True)
        ):
            taken = replace(routes, experts=routes.experts[:, row, : prompt + length].clone()) if routes else None
            rows.append(Completion(tokens[:length], logprobs[:length], not ended, taken, versions=(version,)))
        stops = self.sizes.cumsum(0).tolist()
        return [rows[stop - size : stop] for stop, size in zip(stops, self.sizes.tolist(), strict=True)]
