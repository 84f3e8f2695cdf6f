"""A small MoE with fixed weights, and one fixed batch of rollouts with every awkward shape that real ones have.

Ragged responses of 1 to 60 tokens and one of none, prompts of 1 to 8, one response without a trained token, turns of
others inside, before and behind trained tokens, groups of unequal size, one of a single response and one whose rewards
are all equal. For DPO, as many pairs of the same kind (a pair without a trained token on one side is no pair).

Left out: rollout log-probs and the corrections by them; a response beyond the model's context.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gspo_megatron.algorithms.advantages import group_advantages
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import PackedBatch, TrainSequence
from gspo_megatron.data.packing import pack

VOCAB = 64
MAX_RESPONSE = 60
PADDED_LENGTH = 72  # longest prompt + response is 68; a multiple of 2 CP for CP up to 4
SEED = 9  # of weights and tokens; chosen so that formula.check_fixture holds

# Response lengths of each group.
GROUPS = ((60, 1, 17, 0, 33, 5), (9,), (2, 41, 12, 24), (7, 1, 28, 3, 15, 50, 4), (11, 6, 19), (22, 1, 8))
EQUAL_REWARDS = 4  # the group whose responses all get the same reward
MASKED = 15  # a length; the response that has it is not trained on at all
PAIRS = ((30, 7), (1, 12), (60, 44), (3, 3), (18, 25), (9, 1), (40, 2), (5, 16), (1, 1), (27, 21), (13, 35), (8, 52))

HF_CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "decoder_sparse_step": 1,
    "mlp_only_layers": [1],  # a dense layer, so that PP4 has a stage without experts
    "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "initializer_range": 0.15,  # routing, attention and log-probs far from uniform
}  # fmt: skip


def model_shape(tied: bool) -> ModelShape:
    return ModelShape(HF_CONFIG | {"tie_word_embeddings": tied}, VOCAB)


@torch.no_grad()
def vary_norms(models: Sequence[torch.nn.Module], topology: Topology) -> None:
    """Norm weights off 1, each by its name and the same in every layout: among ones, a mixed-up norm would not show."""
    for model in models:
        for parameter in parameters.named(model, topology):
            if parameter.local.dim() == 1:
                digest = hashlib.sha256(f"{SEED}/{parameter.name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                parameter.local.copy_(1 + 0.2 * torch.randn(parameter.full_shape, generator=generator))


@dataclass(frozen=True)
class Rollouts:
    """N sequences with what each algorithm needs of them; per-token lists have one tensor a sequence, of its tokens."""

    sequences: list[TrainSequence]  # advantage: normalised within the group
    centred: list[float]  # reward - group mean, not divided by the standard deviation (Dr. GRPO)
    token_advantages: list[torch.Tensor]  # fp32
    old_noise: dict[str, list[torch.Tensor]]  # old - new log-probs, "sequence" or "token" (see NOISE)
    ref_noise: list[torch.Tensor]  # reference - new log-probs


# (shift of a whole sequence, noise by token): of the size of the clip range of sequence ratios, and of token ratios.
NOISE = {"sequence": (1e-3, 2e-3), "token": (0.05, 0.25)}


def rollouts(pairs: bool = False) -> Rollouts:
    """The grouped responses, or the preference pairs (sequences 2p and 2p + 1)."""
    generator = torch.Generator().manual_seed(SEED + pairs)
    groups = PAIRS if pairs else GROUPS
    rewards = torch.rand(sum(len(g) for g in groups), generator=generator).mul(8).round() / 8
    group_ids = torch.tensor([i for i, group in enumerate(groups) for _ in group])
    if not pairs:
        rewards[group_ids == EQUAL_REWARDS] = 0.7
    advantages = group_advantages(rewards, group_ids)
    centred = group_advantages(rewards, group_ids, normalize_by_std=False)
    sequences = []
    for i, length in enumerate(n for group in groups for n in group):
        prompt = int(torch.randint(1, 9, (), generator=generator)) if length else 1
        tokens = torch.randint(0, VOCAB, (prompt + length,), generator=generator).tolist()
        mask = [0] * length if length == MASKED and not pairs else turns(length, i)
        sequences.append(
            TrainSequence(tokens, prompt, float(advantages[i]), float(rewards[i]), int(group_ids[i]), loss_mask=mask)
        )

    def by_token(scale: float, shift: float = 0.0) -> list[torch.Tensor]:
        return [
            scale * torch.randn(len(s.token_ids), generator=generator) + shift * torch.randn((), generator=generator)
            for s in sequences
        ]

    return Rollouts(
        sequences,
        centred.tolist(),
        by_token(1.0, 1.0),
        {name: by_token(noise, shift) for name, (shift, noise) in NOISE.items()},
        by_token(0.3),
    )


def turns(length: int, index: int) -> list[int]:
    """Loss mask of one response: short ones are trained whole, longer ones have turns of others in different places."""
    mask = [1] * length
    if length >= 12:
        start = (0, 4, length - 3)[index % 3]
        mask[start : start + 3] = [0] * 3
        mask[length // 2] = 0
    return mask


def split(number: int, parts: int) -> list[range]:
    """0 to number - 1 in `parts` neighbourhoods of growing size, none empty."""
    weights = parts * (parts + 1) / 2
    bounds = [0]
    for k in range(1, parts + 1):
        share = round(number * (k * (k + 1) / 2) / weights)
        bounds.append(min(max(share, bounds[-1] + 1), number - (parts - k)))
    return [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def packed(
    items: Rollouts, advantages: str, topology: Topology, microbatches: int, padded: bool, unit: int = 1
) -> list[tuple[PackedBatch, list[int]]]:
    """This replica's microbatches, each with the numbers of its sequences in `items`.

    Args:
        advantages: "group", "centred" or "token" ([T]).
        padded: every sequence filled up to PADDED_LENGTH.
        unit: so many neighbours stay together (2 for pairs).
    """
    units = range(topology.dp_rank, len(items.sequences) // unit, topology.dp_size)
    found = []
    for part in split(len(units), microbatches):
        numbers = [units[k] * unit + j for k in part for j in range(unit)]
        chosen = [items.sequences[i] for i in numbers]
        if advantages == "centred":
            chosen = [replace(s, advantage=items.centred[i]) for s, i in zip(chosen, numbers, strict=True)]
        multiple = PADDED_LENGTH if padded else topology.sequence_multiple
        (batch,) = pack(chosen, 10**6, topology.microbatch_multiple, 1, unit, multiple)
        if advantages == "token":
            batch.advantages = place(batch, [items.token_advantages[i] for i in numbers])
        found.append((batch, numbers))
    return found


def place(batch: PackedBatch, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Per-token numbers of each sequence at its tokens of the packed batch, [T]; 0 at padding."""
    out = values[0].new_zeros(batch.num_tokens)
    for start, of_sequence in zip(batch.cu_seqlens.tolist(), values, strict=False):
        out[start : start + of_sequence.numel()] = of_sequence
    return out
