"""The proof of the tables: a tiny random model of each family, saved by transformers, into Megatron in a layout and out
again. Its tensors must come back bit for bit and its logits must be those of transformers.

tools/validation/conversion_matrix.py and the tests run the same cases. Left out: bf16 (tests/hf) and training.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from gspo_megatron.backend.engine.network import Network
from gspo_megatron.backend.model import builder as model_builder
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime as runtimes
from gspo_megatron.backend.parallel import topology as topologies
from gspo_megatron.batch import PackedBatch
from gspo_megatron.config import Layout, ModelConfig
from gspo_megatron.hf.export import export
from gspo_megatron.hf.load import load
from gspo_megatron.hf.safetensors import SafetensorsFolder

LIMIT = 2e-5  # of the largest difference between logits, fp32; the largest logit is about 3
LENGTHS = (7, 12, 3, 10)
VOCAB = 192
_SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "num_key_value_heads": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Its norm enlarges the rounding of heads that read nearly nothing, in transformers too: hence the larger epsilon.
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-4,
}
_GLM = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "intermediate_size": 40,
    "head_dim": 16,
}
_DEEPSEEK = {
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
_YARN_OSS = {
    "rope_type": "yarn",
    "rope_theta": 150.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# Every variant of a table's rows and of the config that changes the network.
TINY: dict[str, dict] = {
    "qwen3_moe": {"model_type": "qwen3_moe", "intermediate_size": 40, "head_dim": 16, "norm_topk_prob": True,
                  "mlp_only_layers": [1], "rope_theta": 1e6} | _EXPERTS,
    "qwen3_moe tied": {"model_type": "qwen3_moe", "intermediate_size": 40, "head_dim": 16,
                       "tie_word_embeddings": True} | _EXPERTS,
    "qwen3_next": {"model_type": "qwen3_next", "intermediate_size": 40, "head_dim": 16, "mlp_only_layers": [1],
                   "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
                   "shared_expert_intermediate_size": 32} | _DELTA_NET | _EXPERTS,
    "qwen2_moe": {"model_type": "qwen2_moe", "intermediate_size": 40, "shared_expert_intermediate_size": 32,
                  "decoder_sparse_step": 2} | _EXPERTS,
    "mixtral": {"model_type": "mixtral", "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"model_type": "olmoe", "intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2,
              "eos_token_id": 2},
    "glm4_moe": {"model_type": "glm4_moe", "n_group": 1, "topk_group": 1, "attention_bias": True} | _GLM,
    "glm4_moe groups": {"model_type": "glm4_moe", "n_group": 4, "topk_group": 2, "use_qk_norm": True} | _GLM,
    "deepseek_v2": {"model_type": "deepseek_v2", "num_key_value_heads": 4, "q_lora_rank": None, "n_routed_experts": 8,
                    "num_experts_per_tok": 4} | _DEEPSEEK,
    "deepseek_v2 groups": {"model_type": "deepseek_v2", "num_key_value_heads": 4, "q_lora_rank": 32,
                           "n_routed_experts": 8, "num_experts_per_tok": 4, "topk_method": "group_limited_greedy",
                           "n_group": 4, "topk_group": 2} | _DEEPSEEK,
    "deepseek_v3": {"model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 32, "n_routed_experts": 8,
                    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0,
                    "rope_parameters": _YARN} | _DEEPSEEK,
    "gpt_oss": {"model_type": "gpt_oss", "intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2,
                "head_dim": 16, "sliding_window": 5, "swiglu_limit": 0.5, "rope_parameters": _YARN_OSS},
    "qwen3": {"model_type": "qwen3", "intermediate_size": 40, "head_dim": 16, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "intermediate_size": 40},
    "llama 3": {"model_type": "llama", "intermediate_size": 40, "rope_parameters": _LLAMA3},
}  # fmt: skip
TINY = {name: _SIZES | config for name, config in TINY.items()}

LAYOUTS: dict[str, Layout] = {
    "TP1": Layout(1, 1, None, 1, 1),
    "TP2": Layout(2, 1, None, 1, 1),
    "PP2": Layout(1, 2, None, 1, 1),
    "PP2 (1 + 3)": Layout(1, 2, None, 1, 1, num_layers_in_first_pipeline_stage=1),
    "EP2": Layout(1, 1, None, 2, 1),
    "TP2 PP2 EP2": Layout(2, 2, None, 2, 1),
    "PP2 VP2 EP2": Layout(1, 2, 2, 2, 1),
    "TP2 ETP2": Layout(2, 1, None, 1, 2),
}


@dataclass(frozen=True)
class Outcome:
    """Of one model in one layout."""

    tensors: int
    differing: tuple[str, ...]  # names that are missing, too many, or not the same to the bit
    logits: float  # largest difference to transformers' logits

    @property
    def is_good(self) -> bool:
        return not self.differing and self.logits <= LIMIT


def write_model(folder: Path, config: dict, is_stacked: bool = False, dtype: torch.dtype = torch.float32) -> None:
    """Save a random model by transformers, with its logits of `sequences()` in logits.pt."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = config["model_type"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
    ).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            # Away from 0.02, ones and zeros, so that no norm, bias, route or head can be taken for another.
            if "inv_freq" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            # Linear attention: queries, keys and values that are not next to 0, and a memory that lasts.
            if name.endswith("conv1d.weight"):
                tensor.mul_(5)
            elif name.endswith("A_log"):
                tensor.sub_(3)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    with torch.no_grad():
        logits = torch.cat([model(tokens[None]).logits[0] for tokens in sequences()])
    model.save_pretrained(folder, save_original_format=not is_stacked)
    torch.save(logits, folder / "logits.pt")


def sequences() -> list[torch.Tensor]:
    """Token ids of a few sequences of unequal length."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in LENGTHS]


def round_trip(
    source: Path,
    layout: Layout,
    is_stacked: bool = False,
    params_dtype: Literal["fp32", "bf16"] = "fp32",
    keep: bool = False,
) -> Outcome:
    """Load a folder of `write_model`, compute its logits, export it and compare. A collective over all ranks.

    A dense model takes a layout without its expert sizes, and experts with biases are not cut. `keep` leaves the export
    beside the source, as NAME.out.
    """
    runtime = runtimes.init_process_group("cpu")
    shape = ModelShape.of_folder(source)
    if not shape.architecture.num_experts:
        layout = replace(layout, expert_model_parallel_size=1, expert_tensor_parallel_size=1)
    if shape.architecture.linear_bias:
        layout = replace(layout, expert_tensor_parallel_size=1)
    topology = topologies.initialize_model_parallel(layout, seed=1)
    model = ModelConfig(params_dtype=params_dtype)
    chunks = model_builder.build(shape, model, topology, runtime, None, use_distributed_optimizer=False)
    network = Network(chunks, topology)
    load(network.models, topology, source, shape.architecture)
    target = source.with_name(source.name + (".out" if keep else ".compared"))
    export(network.models, topology, target, shape.hf, shape.architecture, is_stacked=is_stacked)
    outcome: list[Any] = [None]
    error = logits_error(network, torch.load(source / "logits.pt"))
    if runtime.is_main:
        differing = tuple(sorted(differences(source, target)))
        outcome = [Outcome(len(SafetensorsFolder(source).names), differing, error)]
        if not keep:
            shutil.rmtree(target)
    dist.broadcast_object_list(outcome, src=0)
    topologies.destroy_model_parallel()
    return outcome[0]


def differences(source: Path, target: Path) -> set[str]:
    """Names of tensors that only one folder has, or that differ in type, shape or a bit."""
    a, b = SafetensorsFolder(source), SafetensorsFolder(target)
    found = a.names ^ b.names
    for name in a.names & b.names:
        if a.dtype(name) != b.dtype(name) or not torch.equal(a.whole(name), b.whole(name)):
            found.add(name)
    return found


def logits_error(network: Network, expected: torch.Tensor) -> float:
    """Largest difference between logits of `sequences()` and transformers' [tokens, V], over all ranks."""
    tokens = torch.cat(sequences())
    batch = PackedBatch(
        tokens=tokens,
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS]),
        cu_seqlens=torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32),
        num_sequences=len(LENGTHS),
        loss_mask=torch.ones(len(tokens)),
        advantages=torch.zeros(len(LENGTHS)),
    )
    topology, worst = network.topology, torch.zeros(1)

    def compare(micro: object, output: torch.Tensor, non_loss_data: bool = False) -> None:
        mine = expected.chunk(topology.tp_size, dim=1)[topology.tp_rank]
        worst.fill_(float((output - mine.to(output.dtype)).abs().max()))

    with torch.no_grad():
        network.run([batch] * topology.pp_size, compare, forward_only=True)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def main(folder: Path) -> None:
    """One rank of tools/validation/conversion_matrix.py: every model of the folder in every layout, a line of JSON
    each."""
    started = runtimes.init_process_group("cpu")
    with (folder / "results.jsonl").open("a") as lines:
        for name in TINY:
            for label, layout in LAYOUTS.items():
                outcome = round_trip(folder / name, layout)
                if started.is_main:
                    row = {"model": name, "layout": label} | asdict(outcome)
                    print(json.dumps(row), file=lines, flush=True)
    dist.barrier()  # a rank that leaves early closes connections which others still read from
    runtimes.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
