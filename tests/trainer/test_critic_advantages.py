"""PPO's advantages end to end: two prompts with two responses each through packing, critic and estimator."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.backend.engine.microbatches import global_counts, microbatches
from gspo_megatron.backend.parallel import runtime
from gspo_megatron.backend.parallel import topology as topologies
from gspo_megatron.batch import Completion, Minibatch, PackedBatch, Prompt, RolloutGroup, Score, TaskItem
from gspo_megatron.config import AlgorithmConfig, CriticConfig, KlConfig, Layout, RolloutConfig, TrainConfig
from gspo_megatron.data.sequences import minibatch_indices, train_sequences
from gspo_megatron.trainer.advantages.critic import CriticAdvantages
from tests.backend.engine.test_critic import small_critic
from tests.backend.small import SINGLE, in_layouts
from tools.validation.ranks import spawn

LAYOUTS = {
    "PP2": Layout(1, 2, None, 1, 1), "DP2": SINGLE,
    "CP2": Layout(1, 1, None, 1, 1, context_parallel_size=2),
}  # fmt: skip
GAMMA, LAMBDA, KL = 0.9, 0.8, 0.1
ALGORITHM = AlgorithmConfig(
    name="ppo",
    num_minibatches=2,
    overlong_buffer=3,
    kl=KlConfig(coef=KL, estimator="k3", place="reward"),
    critic=CriticConfig(gamma=GAMMA, gae_lambda=LAMBDA, lr=1e-3, warmup_steps=0),
).resolved()
LENGTHS, REWARDS = [[5, 3], [1, 8]], [[1.0, 0.0], [-0.5, 2.0]]
# Eight tokens are allowed and the last three cost up to 1: the response of 8 loses 1, the others nothing (DAPO).
SHAPED = [1.0, 0.0, -0.5, 1.0]


def groups(dp_rank: int, dp_size: int) -> list[RolloutGroup]:
    """This replica's."""
    found = []
    for uid in range(dp_rank, 2, dp_size):
        prompt = Prompt(uid, TaskItem("t", "q", "a", {}), [5 + uid, 6, 7 + uid])
        answers = [Completion([20 + 7 * uid + i for i in range(n)], [-1.0] * n, False) for n in LENGTHS[uid]]
        found.append(RolloutGroup(prompt, answers, [Score(reward) for reward in REWARDS[uid]], ["", ""]))
    return found


def estimate(layout: Layout, whitened: bool) -> dict:
    """Two minibatches through fill and learn. Per response: what the estimator was given and what it made."""
    policy, critic = small_critic(layout)
    cut, device = policy.topology, policy.device
    chosen = dataclasses.replace(ALGORITHM.critic, whiten_advantages=whitened)
    config = TrainConfig(
        algorithm=dataclasses.replace(ALGORITHM, critic=chosen), rollout=RolloutConfig(max_response_length=8)
    )
    mine = groups(cut.dp_rank, cut.dp_size)
    sequences = train_sequences(mine)
    parts = minibatch_indices(mine, 2, (1, 1))
    minibatches = [Minibatch(part, microbatches([sequences[i] for i in part], 40, cut, device)) for part in parts]
    batches = [batch for minibatch in minibatches for batch in minibatch.batches]
    policy.fill_old_log_probs(batches)
    for batch in batches:
        if cut.is_last_stage:
            # Both are 0 at other context-parallel ranks' tokens.
            shift = 0.3 * torch.sin(batch.tokens.float()) * (batch.old_logprobs != 0)
            batch.ref_logprobs = batch.old_logprobs + shift
    estimator = CriticAdvantages(config, policy, critic)
    means = estimator.fill(mine, minibatches, 0)
    rows = {}
    names = ("values", "old_logprobs", "ref_logprobs", "advantages", "returns", "loss_mask")
    for part, minibatch in enumerate(minibatches if cut.is_last_stage else []):
        for batch, numbers in minibatch.numbered():
            for own in (batch.old_logprobs, batch.ref_logprobs):
                dist.all_reduce(own, group=cut.cp_group)
            for place, number in enumerate(numbers):
                span = slice(*batch.cu_seqlens[place : place + 2].tolist())
                found = {name: getattr(batch, name)[span].tolist() for name in names}
                rows[2 * cut.dp_rank + number] = found | {"part": part}
    metrics = [estimator.learn(m, global_counts(m.batches, cut)) for m in minibatches]
    return {"means": means.tolist(), "rows": rows, "metrics": metrics, "dp_rank": cut.dp_rank}


def two_ranks(rank: int, world_size: int) -> dict:
    return {
        "whitened": in_layouts(rank, world_size, LAYOUTS, estimate, True),
        "plain": in_layouts(rank, world_size, LAYOUTS, estimate, False),
        "context": context_parallel(rank),
    }


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return spawn(two_ranks, 2)


def by_hand(row: dict, reward: float) -> list[float]:
    """A_t = sum_l (gamma lambda)^l delta_{t+l} of one response, rewards = -KL * (k3 of old against ref), the response's
    own on top at the last token."""
    trained = [i for i, m in enumerate(row["loss_mask"]) if m]
    delta = [row["old_logprobs"][i] - row["ref_logprobs"][i] for i in trained]
    rewards = [-KL * (math.exp(-d) - 1 + d) for d in delta]
    rewards[-1] += reward
    values = [row["values"][i] for i in trained] + [0.0]
    errors = [r + GAMMA * values[i + 1] - values[i] for i, r in enumerate(rewards)]
    return [sum((GAMMA * LAMBDA) ** (k - t) * errors[k] for k in range(t, len(errors))) for t in range(len(errors))]


def of_trained(row: dict, name: str) -> list[float]:
    return [x for x, m in zip(row[name], row["loss_mask"], strict=True) if m]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["whitened", "plain"])
def test_advantages_and_returns(results, kind, layout):
    """Against plain loops; whitened over the 17 tokens of both replicas, with the sample standard deviation."""
    rows: dict = {}
    for by_rank in results:
        rows |= by_rank[kind][layout]["rows"]
    assert sorted(rows) == [0, 1, 2, 3]
    raw = {number: by_hand(row, SHAPED[number]) for number, row in rows.items()}
    assert [len(raw[number]) for number in range(4)] == [5, 3, 1, 8]
    for number, row in rows.items():
        wanted = [a + v for a, v in zip(raw[number], of_trained(row, "values"), strict=True)]
        assert of_trained(row, "returns") == pytest.approx(wanted, abs=2e-6)
    flat = torch.tensor([a for number in range(4) for a in raw[number]], dtype=torch.float64)
    mean, std = (float(flat.mean()), float(flat.std()) + 1e-6) if kind == "whitened" else (0.0, 1.0)
    means = []
    for number in range(4):
        expected = [(a - mean) / std for a in raw[number]]
        assert of_trained(rows[number], "advantages") == pytest.approx(expected, abs=1e-5)
        assert not any(a for a, m in zip(rows[number]["advantages"], rows[number]["loss_mask"], strict=True) if not m)
        means.append(sum(expected) / len(expected))
    for by_rank in results:  # in the order of responses, on every stage
        found = by_rank[kind][layout]
        mine = means if layout != "DP2" else means[2 * found["dp_rank"] : 2 * found["dp_rank"] + 2]
        assert found["means"] == pytest.approx(mine, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_cover_the_minibatches_so_far(results, layout):
    """After the first, its values are those at collection, so its loss and explained variance are known; after the
    second, the returns of all tokens. The same on both ranks."""
    rows: dict = {}
    for by_rank in results:
        rows |= by_rank["whitened"][layout]["rows"]
    first, last = results[0]["whitened"][layout]["metrics"]
    assert results[1]["whitened"][layout]["metrics"] == [first, last]
    values, returns = (
        torch.tensor([x for row in rows.values() if row["part"] == 0 for x in of_trained(row, name)]).double()
        for name in ("values", "returns")
    )
    errors = returns - values
    assert first["value/loss"] == pytest.approx(float(errors.square().mean() / 2), rel=1e-5)
    assert first["value/mean"] == pytest.approx(float(values.mean()), abs=1e-5)
    explained = 1 - float(errors.var(correction=0) / returns.var(correction=0))
    assert first["value/explained_variance"] == pytest.approx(explained, abs=1e-4)
    assert first["value/clip_fraction"] == 0
    everything = [x for row in rows.values() for x in of_trained(row, "returns")]
    assert last["value/return"] == pytest.approx(sum(everything) / 17, abs=1e-6)


def context_parallel(rank: int) -> dict:
    """Two ranks stand for context-parallel ones, and each knows the vectors at every other token alone."""
    runtime.init_process_group("cpu")
    cut = topologies.initialize_model_parallel(SINGLE, seed=1)
    cut = dataclasses.replace(cut, cp_size=2, cp_group=dist.group.WORLD)
    whole = torch.tensor([[0.0, 1, 2, 3], [0.0, -1, -2, -3], [0.0, -1.5, -1, -3.5]])
    own = torch.where(torch.arange(4) % 2 == rank, whole, 0.0)
    batch = PackedBatch(
        tokens=torch.zeros(4, dtype=torch.int64),
        position_ids=torch.arange(4),
        cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
        num_sequences=1,
        loss_mask=torch.tensor([0.0, 1, 1, 1]),
        advantages=torch.zeros(1),
        values=own[0],
        old_logprobs=own[1],
        ref_logprobs=own[2],
    )
    config = TrainConfig(algorithm=ALGORITHM)
    penalty = CriticAdvantages(config, SimpleNamespace(topology=cut), None)._prepare(batch)
    sampled = dataclasses.replace(batch, values=own[0], old_logprobs=whole[1])
    config = TrainConfig(algorithm=dataclasses.replace(ALGORITHM, old_logprobs="rollout"))
    other = CriticAdvantages(config, SimpleNamespace(topology=cut), None)._prepare(sampled)
    return {"values": batch.values.tolist(), "penalty": penalty.tolist(), "sampled": other.tolist()}


def test_context_parallel_ranks_complete_each_others_vectors(results):
    """old - ref = (0.5, -1, 0.5), k3(d) = exp(-d) - 1 + d. Log-probs as sampled are whole already on every rank."""
    expected = [0.0] + [KL * (math.exp(-d) - 1 + d) for d in (0.5, -1.0, 0.5)]
    for result in results:
        assert result["context"]["values"] == [0, 1, 2, 3]
        assert result["context"]["penalty"] == pytest.approx(expected, abs=1e-12)
        assert result["context"]["sampled"] == pytest.approx(expected, abs=1e-12)
