"""mbridge as an oracle of our tables: what it makes of Megatron's tensors is what we make of them, to the bit.

Its own models need Transformer Engine. So the tensors are those of our model (loaded at TP2 x PP2 x EP2 and gathered),
under Transformer Engine's names, and it converts each. Runs where the package mbridge is installed.
"""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime, topology
from gspo_megatron.config import Layout, ModelConfig, TrainConfig
from gspo_megatron.hf.safetensors import SafetensorsFolder
from gspo_megatron.trainer.build import build_policy
from tests.backend.small import TP2_PP2_EP2, in_layouts
from tools.validation.ranks import spawn
from tools.validation.round_trip import TINY, write_model

pytestmark = pytest.mark.oracle
MODELS = {family: TINY[family] for family in ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe")}
MODELS["qwen3_moe"] = MODELS["qwen3_moe"] | {"mlp_only_layers": []}  # it knows of no dense layers there
NORMS = {  # ours, and Transformer Engine's, which keeps them in the linear layer behind them
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}


def te_name(name: str, is_latent: bool, is_moe: bool) -> str:
    """Transformer Engine's name of a tensor of the layer that `name` is in."""
    name = re.sub(r"experts\.(\d+)\.(linear_fc[12])\.weight$", r"experts.\2.weight\1", name)
    if is_latent:
        for ours, theirs in NORMS.items():
            name = name.replace(ours, theirs)
    else:
        name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    return name if is_moe else name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def converted(layout: Layout, folder: Path, family: str) -> dict[str, torch.Tensor]:
    """{published name: tensor} by mbridge, of the weights that our loader put into this layout."""
    import mbridge  # noqa: F401  after Megatron's CPU shim; fills the registry
    from mbridge.core.bridge import _MODEL_REGISTRY

    started, cut = runtime.init_process_group("cpu"), topology.initialize_model_parallel(layout, seed=1)
    shape = ModelShape.of_folder(folder)
    arch = shape.architecture
    policy = build_policy(TrainConfig(parallel=layout, model=ModelConfig(load_hf=folder)), shape, cut, started)
    full = parameters.gather_full(policy.models, cut)
    config = AutoConfig.for_model(**MODELS[family])
    # transformers 5 has moved rope_theta, and Mixtral's config leaves head_dim to be computed; mbridge wants both.
    config.rope_theta = arch.rope_theta
    if arch.latent is None:
        config.head_dim = arch.head_dim
    kind = _MODEL_REGISTRY[family]  # its class; from_config would also make a TransformerConfig of its own, and fails
    bridge = type("Oracle", (kind,), {"_build_config": lambda self: policy.models[0].config})(config)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in full.items():
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        is_moe = bool(layer and arch.moe_layers[int(layer.group(1))])
        names, tensors = bridge._weight_to_hf_format(te_name(name, arch.latent is not None, is_moe), tensor)
        found |= dict(zip(names, tensors, strict=True))
    return found


def differing(rank: int, world_size: int, folder: Path) -> dict[str, list[str]]:
    """By family: tensors that mbridge does not give, gives too many of, or gives with other bits."""
    answers = {}
    for family in MODELS:
        theirs = in_layouts(rank, world_size, {"x": TP2_PP2_EP2}, converted, folder / family, family)["x"]
        published = SafetensorsFolder(folder / family)
        wanted = {name for name in published.names if not name.endswith("e_score_correction_bias")}  # a buffer
        same = {n for n in wanted & theirs.keys() if torch.equal(theirs[n], published.whole(n))}
        answers[family] = sorted(wanted ^ theirs.keys() | wanted - same)
    return answers


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[str]]:
    pytest.importorskip("mbridge", reason="the oracle is not installed: pip install mbridge==0.15.1 einops")
    folder = tmp_path_factory.mktemp("mbridge")
    for family, config in MODELS.items():
        write_model(folder / family, config)
    return spawn(differing, 4, folder, timeout=280)[0]


@pytest.mark.parametrize("family", MODELS)
def test_mbridge_exports_the_same_bytes(found, family):
    assert found[family] == []
