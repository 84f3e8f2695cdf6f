"""One name and one full shape for every parameter, whatever the layout.

A local parameter is a slice of a full one: its layer number is local to the stage, its expert number local to the
expert-parallel rank, one of its dimensions cut over tensor ranks. This file knows those three cuts, and uses them to
initialise (same weights in every layout) and to gather full weights or gradients (tests, checks).

Left out: Hugging Face names (models/table.py), and Megatron's checkpoints (they have sharding metadata of their own).
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.backend.layers import parameter_marks
from gspo_megatron.backend.layers.norms import AllHeadsRMSNorm
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.topology import Topology

# Cut dimension by Megatron's module name, the same in the local and the Transformer Engine spec.
CUT_DIM = {
    "word_embeddings": 0,
    "output_layer": 0,
    "linear_qkv": 0,
    "linear_proj": 1,
    "linear_fc1": 0,
    "linear_fc2": 1,
    "linear_q_proj": 0,
    "linear_q_down_proj": 0,
    "linear_q_up_proj": 0,
    "linear_kv_down_proj": 0,
    "linear_kv_up_proj": 0,
    "in_proj": 0,
    "conv1d": 0,
    "out_proj": 1,
}
CUT_VECTORS = ("softmax_offset", "A_log", "dt_bias")  # one number a head
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.(.*)$")
GROUPED_EXPERT = re.compile(r"experts\.(linear_fc[12])\.(weight|bias)(\d+)$")

BIAS = re.compile(r"\.bias\d*$")
INTO_RESIDUAL = ("linear_proj", "linear_fc2", "out_proj")
DECAY_RATES = (0.01, 16.0)  # exp(A_log), as transformers starts them


@dataclass(frozen=True)
class FullParameter:
    """A local parameter with its place in the full model."""

    name: str  # global: decoder.layers.<global>.…experts.<global>.linear_fc1.weight
    local: torch.nn.Parameter
    cut_dim: int | None  # None: every tensor rank holds it whole
    cuts: int  # tensor ranks it is cut over (1: not cut)
    cut_rank: int
    # How blocks share the cut dimension: a rank holds its piece of each. (1, 1) for a gated fc1: its piece of the gate,
    # then its piece of the up projection.
    shares: tuple[int, ...]

    @property
    def full_shape(self) -> tuple[int, ...]:
        shape = list(self.local.shape)
        if self.cut_dim is not None:
            shape[self.cut_dim] *= self.cuts
        return tuple(shape)

    def slice_of(self, full: torch.Tensor) -> torch.Tensor:
        """Return this rank's piece of a tensor of the full shape."""
        if self.cut_dim is None or self.cuts == 1:
            return full
        blocks = _blocks(full, self.cut_dim, self.shares)
        return torch.cat([b.chunk(self.cuts, dim=self.cut_dim)[self.cut_rank] for b in blocks], dim=self.cut_dim)

    def join(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Undo slice_of, from the pieces of all cut ranks in order."""
        return _join(pieces, self.cut_dim, self.shares)


def _join(pieces: list[torch.Tensor], cut_dim: int | None, shares: tuple[int, ...]) -> torch.Tensor:
    if cut_dim is None or len(pieces) == 1:
        return pieces[0]
    blocks = [_blocks(piece, cut_dim, shares) for piece in pieces]
    return torch.cat([b[i] for i in range(len(shares)) for b in blocks], dim=cut_dim)


def _blocks(tensor: torch.Tensor, dim: int, shares: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    size, whole = tensor.size(dim), sum(shares)
    return tensor.split([size * share // whole for share in shares], dim=dim)


def named(model: GPTModel, topology: Topology) -> Iterator[FullParameter]:
    """Yield every parameter of an unwrapped chunk (policy or critic), in Megatron's order.

    A tied output layer on the last stage appears under the embedding's name: it is the same parameter.
    """
    for name, parameter in model.named_parameters():
        is_expert = ".experts." in name
        module = next((m for m in CUT_DIM if f"{m}." in name), None)
        cuts = topology.etp_size if is_expert else topology.tp_size
        cut_rank = topology.etp_rank if is_expert else topology.tp_rank
        # q_layernorm and a layer norm fused into a linear layer are whole on every rank.
        own_dim = CUT_DIM[module] if module else None
        cut_dim = own_dim if parameter.dim() > 1 else None
        is_bias = parameter.dim() == 1 and BIAS.search(name) is not None
        if name.rpartition(".")[2] in CUT_VECTORS or (is_bias and own_dim == 0):
            cut_dim = 0
        if isinstance(model.get_submodule(name.rpartition(".")[0]), AllHeadsRMSNorm):
            cut_dim = 0
        full_name = _global_name(name, model, topology)
        cuts, shares = cuts if cut_dim is not None else 1, _shares(module, model.config)
        yield FullParameter(full_name, parameter, cut_dim, cuts, cut_rank, shares)


def _shares(module: str | None, config: TransformerConfig) -> tuple[int, ...]:
    if module == "linear_fc1":
        return (1, 1)
    if module not in ("in_proj", "conv1d"):
        return (1,)
    heads = config.linear_num_value_heads
    keys, values = config.linear_num_key_heads * config.linear_key_head_dim, heads * config.linear_value_head_dim
    return (keys, keys, values, values, heads, heads) if module == "in_proj" else (keys, keys, values)


def router_biases(model: GPTModel, topology: Topology) -> Iterator[FullParameter]:
    """Yield the corrections of sigmoid routers [experts] fp32: buffers that are frozen, but stored with the weights."""
    for name, module in model.named_modules():
        if isinstance(module, TopKRouter) and module.expert_bias is not None:
            module._maintain_float32_expert_bias()  # a model in bf16 has made it bf16
            full_name = _global_name(f"{name}.expert_bias", model, topology)
            yield FullParameter(full_name, module.expert_bias, None, 1, 0, (1,))


def _global_name(name: str, model: GPTModel, topology: Topology) -> str:
    if layer := LAYER.match(name):
        number = model.decoder.layers[int(layer.group(1))].layer_number - 1
        name = f"decoder.layers.{number}.{name[layer.end() :]}"
    first_expert = topology.ep_rank * (model.config.num_moe_experts or 0) // topology.ep_size
    if expert := EXPERT.search(name):
        name = f"{name[: expert.start()]}experts.{first_expert + int(expert.group(1))}.{expert.group(2)}"
    elif expert := GROUPED_EXPERT.search(name):
        linear, kind, number = expert.groups()
        name = f"{name[: expert.start()]}experts.{first_expert + int(number)}.{linear}.{kind}"
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"
    return name


def mark(model: GPTModel, topology: Topology) -> None:
    """Set what Megatron would set when it initialises: gradient norms, clipping and reduction rely on it."""
    for parameter in named(model, topology):
        local, is_expert = parameter.local, ".experts." in parameter.name
        if is_expert:
            # Megatron reduces experts over their own data-parallel group only if EP > 1; with EP 1 and expert tensor
            # size 1 under TP 2 it leaves the two replicas' gradients apart, silently.
            # It also takes an expert's output bias for one that all tensor ranks share, and would add up what are
            # other experts' gradients.
            parameter_marks.mark(local, allreduce=False, sequence_parallel=False)
        is_cut = parameter.cut_dim is not None
        if (local.dim() == 1 and not is_cut and not is_expert) or parameter.name.startswith("value_head."):
            continue
        # An expert that is whole on each tensor rank must be marked too, or only rank 0's experts count in the norm.
        dim = parameter.cut_dim if parameter.cut_dim is not None else -1
        parameter_marks.mark(local, tensor_model_parallel=is_cut or is_expert, partition_dim=dim, partition_stride=1)


@torch.no_grad()
def initialize(model: GPTModel, topology: Topology, seed: int, std: float) -> None:
    """Fill a chunk with weights that depend on (seed, global name) alone: normal with `std`, the two projections
    back into the residual stream with std / sqrt(2 * layers) as in GPT-2; norms multiply by 1, biases, sinks and a
    value head are 0. Linear attention's decay rates are drawn from DECAY_RATES, its steps begin at softplus(1)."""
    layers = model.config.num_layers
    for parameter in named(model, topology):
        local = parameter.local
        if parameter.name.startswith("value_head."):
            local.zero_()  # a value of 0 is the best guess of an untrained critic: advantages are then rewards to go
            continue
        if local.dim() == 1:
            local.fill_(_start(parameter.name, model.config.layernorm_zero_centered_gamma))
        if local.dim() == 1 and not parameter.name.endswith(".A_log"):
            continue
        digest = hashlib.sha256(f"{seed}/{parameter.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        if local.dim() == 1:
            full = torch.empty(parameter.full_shape).uniform_(*DECAY_RATES, generator=generator).log()
        else:
            into_residual = any(f"{name}." in parameter.name for name in INTO_RESIDUAL)
            scale = std / (2 * layers) ** 0.5 if into_residual else std
            full = torch.normal(0.0, scale, parameter.full_shape, generator=generator)
        local.copy_(parameter.slice_of(full))


def _start(name: str, is_zero_centred: bool) -> float:
    """What a vector begins with."""
    if name.endswith(".dt_bias"):
        return 1.0
    if name.endswith(("bias", "softmax_offset")):
        return 0.0
    return 0.0 if is_zero_centred and not name.endswith(".out_norm.weight") else 1.0


def gather_full(
    chunks: Sequence[GPTModel],
    topology: Topology,
    value: Callable[[torch.nn.Parameter], torch.Tensor] = lambda p: p.data,
) -> dict[str, torch.Tensor]:
    """Gather full tensors of all parameters, by global name, on every rank (small models only: tests and checks).

    Args:
        chunks: unwrapped chunks of this rank.
        value: what to gather of a local parameter, for example its main_grad.
    """
    mine = {}
    for chunk in chunks:
        for p in named(chunk, topology):
            mine[p.name] = (p.cut_rank, p.cut_dim, p.cuts, p.shares, value(p.local).detach().cpu().clone())
    everyone = gather_objects(mine)
    full = {}
    for name in sorted({n for pieces in everyone for n in pieces}):
        found = {pieces[name][0]: pieces[name] for pieces in everyone if name in pieces}
        _, cut_dim, cuts, shares, _ = next(iter(found.values()))
        pieces = [found[rank][4] for rank in (range(cuts) if cuts > 1 else [min(found)])]
        full[name] = _join(pieces, cut_dim, shares)
    return full


@torch.no_grad()
def load_full(chunks: Sequence[GPTModel], topology: Topology, full: dict[str, torch.Tensor]) -> None:
    """Fill the chunks from full tensors; every parameter must be there."""
    for chunk in chunks:
        for p in named(chunk, topology):
            p.local.copy_(p.slice_of(full[p.name]))
