"""The small model and the fixed batch that backend tests share."""

from dataclasses import replace
from pathlib import Path

import torch

from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime, topology
from gspo_megatron.batch import PackedBatch
from gspo_megatron.config import Layout, TrainConfig

CONFIG_PATH = Path(__file__).parents[2] / "examples/models/qwen3_moe_tiny/config.json"
SINGLE = Layout(1, 1, None, 1, 1)
TP2_PP2_EP2 = Layout(2, 2, None, 2, 1)
VOCAB = 250


def small_config(layout: Layout, **changes) -> TrainConfig:
    return replace(TrainConfig(), parallel=layout, **changes)


def small_policy(layout: Layout, dtype: torch.dtype | None = None, **changes) -> Policy:
    """A Policy of the example model in this process group, weights three times the usual size so that routing and
    attention are far from uniform."""
    started = runtime.init_process_group("cpu")
    cut = topology.initialize_model_parallel(layout, seed=1)
    policy = Policy(small_config(layout, **changes), ModelShape.load(CONFIG_PATH, VOCAB), cut, started, dtype)
    with torch.no_grad():
        for model in policy.models:
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(3)
    policy.start_optimizer()
    return policy


def in_layouts(rank: int, world_size: int, layouts: dict[str, Layout], fn, *args) -> dict:
    """fn(layout, *args) in one layout after the other, on ranks that stay up: starting them is what costs."""
    results = {}
    for name, layout in layouts.items():
        results[name] = fn(layout, *args)
        topology.destroy_model_parallel()
    return results


def fixed_batches(advantage_seed: int = 7) -> list[PackedBatch]:
    """Four microbatches of unequal size: ragged sequences, one fully masked, masks with a gap."""
    generator = torch.Generator().manual_seed(advantage_seed)
    batches = []
    for lengths in ((7, 12, 3, 10), (20, 4), (5, 5, 5, 9, 2), (16, 14, 8)):
        total = sum(lengths)
        positions = torch.cat([torch.arange(n) for n in lengths])
        mask = (positions > 2).float()
        mask[positions == 6] = 0.0  # a gap, as between two turns
        batches.append(
            PackedBatch(
                tokens=torch.randint(0, VOCAB, (total,), generator=generator),
                position_ids=positions,
                cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
                num_sequences=len(lengths),
                loss_mask=mask,
                advantages=torch.randn(len(lengths), generator=generator),
            )
        )
    return batches


def padded(batch: PackedBatch, multiple: int) -> PackedBatch:
    """The same batch with every sequence filled up at its end to a multiple of so many tokens."""
    starts, lengths = batch.cu_seqlens[:-1].long(), torch.diff(batch.cu_seqlens).long()
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), (-(-lengths // multiple) * multiple).cumsum(0)])
    shift = (bounds[:-1] - starts).repeat_interleave(lengths)
    places = torch.arange(batch.num_tokens) + shift
    fields = {
        name: value.new_zeros(int(bounds[-1])).index_copy(0, places, value)
        for name in ("tokens", "loss_mask", "old_logprobs", "ref_logprobs", "rollout_logprobs")
        if (value := getattr(batch, name)) is not None
    }
    positions = torch.cat([torch.arange(n) for n in torch.diff(bounds)])
    return replace(batch, **fields, position_ids=positions, cu_seqlens=bounds.int())
