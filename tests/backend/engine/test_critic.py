"""The critic's values, loss and gradient are the same in every layout and equal the plain formula; it learns."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.backend.checkpoint import saver, sharded
from gspo_megatron.backend.engine.critic import Critic
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.layers.attention import PackedPlan
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.config import AlgorithmConfig, CriticConfig, Layout
from gspo_megatron.errors import TrainingError
from tests.backend.engine.test_policy import gradient_error
from tests.backend.small import CONFIG_PATH, SINGLE, TP2_PP2_EP2, VOCAB, fixed_batches, in_layouts, small_policy
from tools.validation.ranks import spawn

CASES = {  # on four ranks; what the sizes leave over is data parallelism
    "TP2xPP2-EP2": (TP2_PP2_EP2, False),
    "TP2xDP2": (Layout(2, 1, None, 1, 1), False),
    "PP2xDP2-tied": (Layout(1, 2, None, 1, 1), True),
    "PP2xVP2xDP2-EP2": (Layout(1, 2, 2, 2, 1), False),
}
CLIP, LR = 0.2, 1e-3


def small_critic(layout: Layout, dtype: torch.dtype | None = None, tied: bool = False) -> tuple[Policy, Critic]:
    """(policy, critic) of the example model. The critic has the policy's trunk, and a head that is not 0, so that
    gradients reach every layer. `tied`: as if the policy's output layer were its embedding; the critic must not care.
    """
    algorithm = AlgorithmConfig(name="ppo", critic=CriticConfig(lr=LR, warmup_steps=0, clip_value=CLIP)).resolved()
    policy = small_policy(layout, dtype, algorithm=algorithm)
    shape = ModelShape.load(CONFIG_PATH, VOCAB)
    shape = replace(shape, hf=shape.hf | {"tie_word_embeddings": tied})
    critic = Critic(policy.config, shape, policy.topology, policy.runtime, dtype)
    critic.start_from(policy)
    for model in critic.models:
        for name, parameter in model.named_parameters():
            if name.startswith("value_head."):
                assert not parameter.any()
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
                parameter.data.copy_(0.1 * drawn)
    critic.start_optimizer()
    for part in critic.optimizer.chained_optimizers:
        part.config.clip_grad = 0.0  # Megatron scales main_grad in place when it clips
    return policy, critic


def targets(values: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(old values, returns) [T] of each batch: within and beyond the clip on both sides of the values."""
    generator = torch.Generator().manual_seed(11)
    return [
        (
            v + 0.3 * torch.randn(v.shape, generator=generator).to(v.dtype),
            torch.randn(v.shape, generator=generator).to(v.dtype),
        )
        for v in values
    ]


def step(case: tuple, wanted: list | None, dtype: torch.dtype | None = None, folder: Path | None = None) -> dict:
    """Values, then one update on this rank's share of the fixed batches.

    `wanted`: old values and returns of all batches; None: made here, from this layout's values, and returned.
    """
    layout, tied = case
    policy, critic = small_critic(layout, dtype, tied)
    cut = critic.topology
    names = trunk_names(policy, critic)
    batches = fixed_batches()[cut.dp_rank :: cut.dp_size]
    critic.fill_values(batches)
    values = [b.values for b in batches]
    if wanted is None:
        wanted = targets(values)
    for batch, (old, returns) in zip(batches, wanted[cut.dp_rank :: cut.dp_size], strict=True):
        batch.values, batch.returns = old, returns
    statistics = critic.update(batches, global_counts(batches, cut))
    gradient = parameters.gather_full(critic.models, cut, lambda p: p.main_grad)
    weights = None
    if folder is not None and layout is TP2_PP2_EP2:
        saver.save({"": critic.network}, folder)
        weights = parameters.gather_full(critic.models, cut)
    return {
        "values": values,
        "wanted": wanted,
        "statistics": statistics,
        "names": names,
        "weights": weights,
        "gradient": gradient if dist.get_rank() == 0 else None,
        "dp_rank": cut.dp_rank,
        "dp_size": cut.dp_size,
        "is_last": cut.is_last_stage,
    }


def trunk_names(policy: Policy, critic: Critic) -> dict[str, bool]:
    """Of this rank's parameters, by name: policy and critic have it, with the same bits."""
    pairs = list(zip(policy.models, critic.models, strict=True))
    names = {}
    for model, other in [*pairs, *((b, a) for a, b in pairs)]:
        theirs = dict(other.named_parameters())
        names |= {n: n in theirs and torch.equal(p, theirs[n]) for n, p in model.named_parameters()}
    return names


def one_rank(rank: int, world_size: int) -> dict:
    one = {"one": (SINGLE, False)}
    reference = in_layouts(rank, world_size, one, step, None)["one"]
    wanted = reference["wanted"]
    return {
        "reference": reference,
        "fp64": in_layouts(rank, world_size, one, step, wanted, torch.float64)["one"],
        "plain": in_layouts(rank, world_size, one, plain_step, wanted)["one"],
    }


def four_ranks(rank: int, world_size: int, wanted: list, folder: Path) -> dict:
    """The step in each layout, what the first of them saved loaded in another, and a few steps of learning."""
    results = in_layouts(rank, world_size, CASES, step, wanted, None, folder)
    results["learned"] = in_layouts(rank, world_size, {"x": CASES["PP2xDP2-tied"]}, learn)["x"]
    results["loaded"] = in_layouts(rank, world_size, {"x": CASES["PP2xVP2xDP2-EP2"]}, load, folder)["x"]
    return results


def load(case: tuple, folder: Path) -> dict:
    _, critic = small_critic(case[0])
    sharded.load_weights(critic.network, folder)
    return parameters.gather_full(critic.models, critic.topology)


@pytest.fixture(scope="module")
def single() -> dict:
    return spawn(one_rank, 1)[0]


@pytest.fixture(scope="module")
def layouts(single, tmp_path_factory) -> list[dict]:
    """By rank."""
    folder = tmp_path_factory.mktemp("critic") / "step_000001"
    return spawn(four_ranks, 4, single["reference"]["wanted"], folder, timeout=280)


def test_reference_is_not_trivial(single):
    """Values of the size of the returns, some clipped on both sides of 0, and a gradient for every kind of weight."""
    reference = single["reference"]
    values = torch.cat(reference["values"])
    assert 0.3 < float(values.std()) < 3
    statistics = reference["statistics"]
    assert 5 < statistics.clipped < statistics.tokens - 5
    for batch, found in zip(fixed_batches(), reference["values"], strict=True):
        assert not found[batch.position_ids == 0].any()  # the first token of a sequence is not chosen
        assert found[batch.position_ids > 0].all()
    assert all(bool(g.any()) for name, g in reference["gradient"].items() if ".experts." not in name)


def test_the_trunk_starts_as_the_policys(single, layouts):
    """All of its weights but the head are the policy's, on every rank, and none is missing but the output layer."""
    heads = {"value_head.weight", "value_head.bias", "output_layer.weight"}
    assert {name for name, same in single["reference"]["names"].items() if not same} == heads
    for result in [by_layout[name] for by_layout in layouts for name in CASES]:
        assert {name for name, same in result["names"].items() if not same} == (heads if result["is_last"] else set())
        assert len(result["names"]) > 10


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_rank(single, layouts, name):
    """Values to 1e-5, loss to 1e-6, gradient to 1e-5 of its norm: the limits that fp32 leaves room for."""
    reference, results = single["reference"], [by_layout[name] for by_layout in layouts]
    for result in results:
        mine = reference["values"][result["dp_rank"] :: result["dp_size"]]
        for found, expected in zip(result["values"], mine, strict=True):
            if result["is_last"]:
                assert float((found - expected).abs().max()) < 1e-5
            else:
                assert found is None
        assert result["statistics"] == results[0]["statistics"]  # on every stage, tensor rank and replica
    found, expected = results[0]["statistics"], reference["statistics"]
    assert abs(found.loss - expected.loss) < 1e-6
    assert (found.tokens, found.clipped) == (expected.tokens, expected.clipped)
    assert found.value == pytest.approx(expected.value, abs=1e-4)
    assert found.squared_error == pytest.approx(expected.squared_error, rel=1e-5)
    assert gradient_error(results[0]["gradient"], reference["gradient"]) < 1e-5


def test_weights_load_under_another_layout(layouts):
    saved, loaded = layouts[0]["TP2xPP2-EP2"]["weights"], layouts[0]["loaded"]
    assert set(saved) == set(loaded)
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())


def plain_step(case: tuple, wanted: list) -> dict:
    """The same loss by the formula, in fp64, one sequence after the other: no schedule, no DDP, no packing."""
    _, critic = small_critic(case[0], torch.float64)
    model, total, count = critic.models[0], 0.0, 0
    for batch, (old, returns) in zip(fixed_batches(), wanted, strict=True):
        bounds = batch.cu_seqlens.tolist()
        for start, stop in zip(bounds, bounds[1:], strict=False):
            plan = PackedPlan.from_cu_seqlens(torch.tensor([0, stop - start], dtype=torch.int32))
            tokens, positions = batch.tokens[start:stop], torch.arange(stop - start)
            values = model(tokens[None], positions[None], None, packed_seq_params=plan)
            for t in range(start + 1, stop):
                if batch.loss_mask[t]:
                    value, before, wish = values[t - start - 1], old[t].double(), returns[t].double()
                    held = value.clamp(before - CLIP, before + CLIP)
                    total = total + torch.maximum((value - wish) ** 2, (held - wish) ** 2)
                    count += 1
    loss = total / (2 * count)
    loss.backward()
    gradient = {p.name: p.local.main_grad.clone() for p in parameters.named(model, critic.topology)}
    return {"loss": float(loss.detach()), "gradient": gradient}


def test_fp64_step_equals_the_plain_formula(single):
    ours, plain = single["fp64"], single["plain"]
    assert ours["statistics"].loss == pytest.approx(plain["loss"], abs=1e-11)
    assert gradient_error(ours["gradient"], plain["gradient"]) < 1e-11


def learn(case: tuple) -> dict:
    """Value losses of steps on fixed returns; old values are taken anew before each, as rollouts do. Then one of the
    two replicas has a return that is not a number."""
    _, critic = small_critic(case[0])
    batches = fixed_batches()[critic.topology.dp_rank :: critic.topology.dp_size]
    for batch in batches:
        batch.returns = batch.tokens.double().mul(1.7).sin().float()
    losses = []
    for _ in range(15):
        critic.fill_values(batches)
        losses.append(critic.update(batches, global_counts(batches, critic.topology)).loss)
    before = [p.detach().clone() for model in critic.models for p in model.parameters()]
    if critic.topology.dp_rank == 0:
        batches[0].returns[5] = torch.nan
    counts = global_counts(batches, critic.topology)
    skipped = [critic.update(batches, counts) for _ in range(critic.config.faults.max_skipped_updates)]
    assert skipped == [None] * 3
    with pytest.raises(TrainingError) as caught:
        critic.update(batches, counts)
    after = [p for model in critic.models for p in model.parameters()]
    kept = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return {"losses": losses, "message": str(caught.value), "kept": kept}


def test_the_critic_learns_fixed_returns(layouts):
    """15 steps bring the loss down to a fifth, though values move at most CLIP in each."""
    losses = layouts[0]["learned"]["losses"]
    assert all(by_layout["learned"]["losses"] == losses for by_layout in layouts)
    assert losses[0] > 0.3
    assert losses[-1] < 0.2 * losses[0]


def test_a_return_that_is_not_a_number_stops_every_rank(layouts):
    """Also the replica and the stage that do not see it, at the fourth time; weights stay."""
    for by_layout in layouts:
        assert "the critic's gradient norm is nan" in by_layout["learned"]["message"]
        assert "mean return nan" in by_layout["learned"]["message"]
        assert by_layout["learned"]["kept"]
