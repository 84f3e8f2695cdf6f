"""Routes that generation records (R3): whose they are, that they are the same in every layout, and that training takes
them, or refuses those of another token."""

import pytest
import torch.distributed as dist

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.batch import RolloutGroup, TrainSequence
from gspo_megatron.config import AlgorithmConfig, Layout, ModelConfig, RoutingConfig
from gspo_megatron.data.packing import pack
from gspo_megatron.errors import TrainingError
from gspo_megatron.rollout.generation import join_context, request_of
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampling import SamplingParams
from tests.backend.small import SINGLE, TP2_PP2_EP2, in_layouts, small_policy
from tests.rollout.test_megatron_engine import GROUP, NEW, STOPS, prompts
from tools.validation.ranks import spawn

LAYERS = 4
LAYOUTS = {  # on four ranks
    "TP2xPP2-EP2": TP2_PP2_EP2,
    "PP2xVP2xDP2": Layout(1, 2, 2, 1, 1),
    "CP2xTP2-EP4": Layout(2, 1, None, 4, 1, context_parallel_size=2),
}


def replayed(layout: Layout) -> dict:
    """Generate, train one step along the rollout's routes, and try it with routes that are shifted by one token."""
    policy = small_policy(layout, model=ModelConfig(recompute=True), routing=RoutingConfig(replay="R3"))
    cut = policy.topology
    everything = prompts()
    share, place = len(everything) // cut.replicas, cut.dp_cp_rank
    mine = everything[place * share : (place + 1) * share]
    requests = [request_of(prompt, GROUP, NEW, seed=11) for prompt in mine]
    answers = MegatronEngine(policy).sample(requests, SamplingParams(STOPS))
    groups = join_context([RolloutGroup(p, list(c)) for p, c in zip(mine, answers, strict=True)], cut)

    def batches(shift: int) -> list:
        sequences = []
        for group in groups:
            for c in group.completions:
                routes = type(c.routes)(c.routes.layers, c.routes.experts.roll(shift, 1))
                sequences.append(
                    TrainSequence(
                        group.prompt.token_ids + c.token_ids,
                        len(group.prompt.token_ids),
                        rollout_logprobs=c.logprobs,
                        routes=routes,
                    )
                )
        count = cut.pp_size if cut.vp_size > 1 else 1
        return pack(sequences, 4096, cut.microbatch_multiple, count, sequence_multiple=cut.sequence_multiple)

    packed = batches(0)
    policy.fill_old_log_probs(packed)
    errors = []
    for batch in [batch for batch in packed if batch.old_logprobs is not None]:
        whole = batch.old_logprobs.clone()
        dist.all_reduce(whole, group=cut.cp_group)  # each rank has its own tokens', and 0 elsewhere
        errors.append(float(((whole - batch.rollout_logprobs) * batch.loss_mask).abs().max()))
    result = policy.update(packed, policy_loss(AlgorithmConfig()), global_counts(packed, cut))
    try:
        policy.fill_old_log_probs(batches(1))
        refused = "nothing was raised"
    except TrainingError as error:
        refused = str(error)
    recorded = {
        (group.prompt.uid, number, layer): (
            c.routes.experts[index].sort(1).values.tolist(),
            len(group.prompt.token_ids) + len(c.token_ids),
        )
        for group in groups
        for number, c in enumerate(group.completions)
        for index, layer in enumerate(c.routes.layers)
    }
    ratio = result.stats.table.column("sum_log_ratio").abs().max().item()
    return {"recorded": recorded, "errors": errors, "ratio": ratio, "refused": refused}


def one_rank(rank: int, world_size: int) -> dict:
    return in_layouts(rank, world_size, {"x": SINGLE}, replayed)["x"]


@pytest.fixture(scope="module")
def single() -> dict:
    return spawn(one_rank, 1)[0]


@pytest.fixture(scope="module")
def layouts() -> list[dict]:
    return spawn(in_layouts, 4, LAYOUTS, replayed, timeout=280)


def test_every_token_that_was_fed_has_its_routes(single):
    """All tokens of prompt and response in all layers, but for the last one, which nothing was sampled after."""
    assert len(single["recorded"]) == len(prompts()) * GROUP * LAYERS
    for experts, length in single["recorded"].values():
        assert len(experts) == length and experts[-1] == [-1, -1]
        assert all(0 <= low < high < 8 for low, high in experts[:-1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_routes_in_every_layout(single, layouts, name):
    """Joined over stages and replicas, they are the one rank's; what two ranks hold both is the same."""
    joined: dict = {}
    for rank in layouts:
        for key, value in rank[name]["recorded"].items():
            assert joined.setdefault(key, value) == value
    assert joined == single["recorded"]


def test_training_takes_them(single, layouts):
    """The old pass proves it; its log-probs are the rollout's to fp32 rounding, and an update at the same weights,
    along the same routes, has a ratio of exactly 1."""
    found = [single, *(rank[name] for rank in layouts for name in LAYOUTS)]
    assert max(error for each in found for error in each["errors"]) < 2e-5
    assert all(each["ratio"] == 0.0 for each in found)


def test_routes_of_the_token_before_are_refused(single, layouts):
    """On every rank, before they have trained anything."""
    for each in (single, *(rank[name] for rank in layouts for name in LAYOUTS)):
        assert "so the routes are shifted" in each["refused"], each["refused"]
