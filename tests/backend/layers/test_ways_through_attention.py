"""Generation is the packed forward in every family and layout: latent attention, windows and sinks, linear attention,
norms of all heads together, shared experts with and without a gate, groups of experts, a router's bias. (Linear
attention not under context parallelism.) That it is transformers' network is tested in hf/test_round_trip.py, its
gradient in hf/test_training.py."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.model.generation import ModuleForward
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime, topology
from gspo_megatron.batch import Completion, Prompt, RolloutGroup, TrainSequence
from gspo_megatron.config import Layout, TrainConfig
from gspo_megatron.data.packing import pack
from gspo_megatron.rollout.generation import join_context, request_of
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampler import SampleRequest
from gspo_megatron.rollout.sampling import SamplingParams
from tests.backend.small import SINGLE, TP2_PP2_EP2, in_layouts
from tools.validation.ranks import spawn
from tools.validation.round_trip import TINY, VOCAB

GROUP, NEW = 3, 10
PARAMS = SamplingParams(tuple(range(0, VOCAB, 12)))
FAMILIES = (
    "deepseek_v3",
    "gpt_oss",
    "qwen3_next",
    "qwen3_moe tied",
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "glm4_moe groups",
    "llama 3",
)
# Experts over the tensor ranks of a replica, over several replicas, whole on every tensor rank, and cut themselves.
LAYOUTS = {
    "TP2xPP2-EP2": TP2_PP2_EP2,
    "CP2xTP2-EP4": Layout(2, 1, None, 4, 1, context_parallel_size=2),
    "TP2xDP2": Layout(2, 1, None, 1, 1),
    "TP2xDP2-EP2xETP2": Layout(2, 1, None, 2, 2),
}


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    lengths = (4, 9, 1, 6)
    return [Prompt(i, None, torch.randint(0, VOCAB, (n,), generator=generator).tolist()) for i, n in enumerate(lengths)]


# Two tensor ranks of one replica then hold experts together with different other replicas.
STRADDLING = Layout(2, 1, None, 3, 1)
SHAPES = TINY | {"six experts": TINY["qwen3_moe"] | {"num_experts": 6}}


def generate_six(layout: Layout) -> dict:
    started, cut = runtime.init_process_group("cpu"), topology.initialize_model_parallel(layout, seed=1)
    return of_family("six experts", layout, cut, started)


def generate(layout: Layout) -> dict:
    """By family: samples of a tiny model, and how far the rollout's log-probs are from the packed forward's."""
    started, cut = runtime.init_process_group("cpu"), topology.initialize_model_parallel(layout, seed=1)
    return {family: of_family(family, layout, cut, started) for family in FAMILIES if is_possible(family, layout)}


def is_possible(family: str, layout: Layout) -> bool:
    if family == "llama 3":
        return layout.expert_model_parallel_size == 1
    if family == "gpt_oss" and layout.expert_tensor_parallel_size > 1:
        return False
    return family != "qwen3_next" or layout.context_parallel_size in (None, 1)


def of_family(family: str, layout: Layout, cut: topology.Topology, started: runtime.Runtime) -> dict:
    policy = Policy(replace(TrainConfig(), parallel=layout), ModelShape(SHAPES[family], VOCAB), cut, started)
    with torch.no_grad():
        for model in policy.models:
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)  # attention and routing far from uniform
                elif name.endswith("softmax_offset"):
                    parameter.fill_(1.0)
                elif name.endswith("conv1d.weight"):
                    parameter.mul_(25)
                elif name.endswith("A_log"):
                    parameter.sub_(3)  # a memory that lasts
            for name, buffer in model.named_buffers():
                if name.endswith("expert_bias"):
                    buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel()))
    everything = prompts()
    share, place = len(everything) // cut.replicas, cut.dp_cp_rank
    mine = everything[place * share : (place + 1) * share]
    requests = [request_of(prompt, GROUP, NEW, seed=11) for prompt in mine]
    answers = MegatronEngine(policy).sample(requests, PARAMS)
    groups = join_context([RolloutGroup(p, list(c)) for p, c in zip(mine, answers, strict=True)], cut)
    sequences = [
        TrainSequence(g.prompt.token_ids + c.token_ids, len(g.prompt.token_ids), rollout_logprobs=c.logprobs)
        for g in groups
        for c in g.completions
    ]
    batches = pack(sequences, 4096, cut.microbatch_multiple, sequence_multiple=cut.sequence_multiple)
    policy.fill_old_log_probs(batches)
    errors = []
    for batch in [batch for batch in batches if batch.old_logprobs is not None]:
        dist.all_reduce(batch.old_logprobs, group=cut.cp_group)  # each rank has its own tokens', and 0 elsewhere
        errors.append(float(((batch.old_logprobs - batch.rollout_logprobs) * batch.loss_mask).abs().max()))
    samples = {g.prompt.uid: [c.token_ids for c in g.completions] for g in groups}
    return {"samples": samples, "errors": errors, "by modules": through_modules(policy, requests, answers)}


def through_modules(policy: Policy, requests: list[SampleRequest], plain: list[list[Completion]]) -> float:
    """Furthest that plain functions are from Megatron's modules, in the log-probs of samples that must be the same."""
    engine = MegatronEngine(policy)
    engine.forwards = [ModuleForward(model, policy.topology) for model in policy.models]
    pairs = [
        pair
        for one, other in zip(plain, engine.sample(requests, PARAMS), strict=True)
        for pair in zip(one, other, strict=True)
    ]
    assert all(one.token_ids == other.token_ids for one, other in pairs)
    return max(float((torch.tensor(a.logprobs) - torch.tensor(b.logprobs)).abs().max()) for a, b in pairs)


def one_rank(rank: int, world_size: int) -> dict:
    return in_layouts(rank, world_size, {"x": SINGLE}, generate)["x"]


@pytest.fixture(scope="module")
def single() -> dict:
    return spawn(one_rank, 1)[0]


@pytest.fixture(scope="module")
def layouts() -> list[dict]:
    return spawn(in_layouts, 4, LAYOUTS, generate, timeout=280)  # 31 models


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_is_the_packed_forward(single, family):
    assert len({len(tokens) for group in single[family]["samples"].values() for tokens in group}) > 1
    assert single[family]["errors"] and max(single[family]["errors"]) < 2e-5
    assert single[family]["by modules"] < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_same_samples_in_every_layout(single, layouts, name, family):
    if not is_possible(family, LAYOUTS[name]):
        pytest.skip("refused (test_check.py): no experts, experts with biases cut, or linear attention cut by tokens")
    alone = single[family]["samples"]
    ranks = [rank[name][family] for rank in layouts]
    for rank in ranks:
        assert rank["samples"] == {uid: alone[uid] for uid in rank["samples"]}
    assert max(error for rank in ranks for error in rank["errors"]) < 2e-5
    assert max(rank["by modules"] for rank in ranks) < 2e-5


def test_same_samples_where_tensor_ranks_straddle_groups_of_experts():
    """Three replicas, whose prompts differ in length, so that each would cut its tokens into other shares."""
    (alone,) = spawn(in_layouts, 1, {"x": SINGLE}, generate_six)
    for rank in spawn(in_layouts, 6, {"x": STRADDLING}, generate_six):
        found = rank["x"]["samples"]
        assert found == {uid: alone["x"]["samples"][uid] for uid in found} and max(rank["x"]["errors"]) < 2e-5
