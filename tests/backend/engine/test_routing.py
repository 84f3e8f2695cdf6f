"""Routing statistics against a recount by hand, and replay: taken by the right layer and token, or refused.

fp64, so that layouts differ by far less than two experts' scores do.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.engine.router_hooks import TopKRouter
from gspo_megatron.backend.model import parameters
from gspo_megatron.batch import PackedBatch, SequenceTable
from gspo_megatron.config import AlgorithmConfig, KlConfig, Layout, ModelConfig, OptimizerConfig, RoutingConfig
from gspo_megatron.errors import TrainingError
from gspo_megatron.metrics.routing import change_beside_ratio
from gspo_megatron.routing.statistics import routing_metrics
from tests.backend.small import SINGLE, TP2_PP2_EP2, VOCAB, in_layouts, padded, small_policy
from tools.validation.ranks import spawn

RECOMPUTE = ModelConfig(recompute=True)
FAST = OptimizerConfig(lr=0.02, warmup_steps=0)  # moves routes within one update
LAYOUTS = {  # on four ranks
    "TP2xPP2-EP2": (TP2_PP2_EP2, ModelConfig()),
    "TP2xPP2-EP2-recompute": (TP2_PP2_EP2, RECOMPUTE),
    "PP2xVP2xDP2-EP2-recompute": (Layout(1, 2, 2, 2, 1), RECOMPUTE),
    "CP2xTP2-EP2": (Layout(2, 1, None, 2, 1, context_parallel_size=2), ModelConfig()),
    "CP2xPP2-recompute": (Layout(1, 2, None, 1, 1, context_parallel_size=2), RECOMPUTE),
}
LENGTHS = ((7, 12, 3), (20, 4, 6), (5, 9, 6), (16, 14, 8))  # every replica gets as many sequences
MINIBATCHES = 3


def even_batches() -> list[PackedBatch]:
    """Four microbatches of three ragged sequences; prompts of two tokens, a gap in the mask, one token never real."""
    generator = torch.Generator().manual_seed(11)
    batches = []
    for lengths in LENGTHS:
        total, positions = sum(lengths), torch.cat([torch.arange(n) for n in lengths])
        mask = (positions > 1).float()
        mask[positions == 5] = 0.0
        batches.append(
            PackedBatch(
                tokens=torch.randint(0, VOCAB, (total,), generator=generator),
                position_ids=positions,
                cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
                num_sequences=3,
                loss_mask=mask,
                advantages=torch.randn(3, generator=generator),
            )
        )
    return batches


def routers(policy: Policy) -> list[TopKRouter]:
    return [m for model in policy.models for m in model.modules() if isinstance(m, TopKRouter)]


class Maps:
    """What routers give, by plain forward hooks: layer -> every [R, E] bool in the order of the calls."""

    def __init__(self, policy: Policy):
        self.seen: dict[int, list[torch.Tensor]] = {}
        self._hooks = [r.register_forward_hook(self._keep) for r in routers(policy)]

    def _keep(self, router: TopKRouter, inputs: tuple, output: tuple) -> None:
        self.seen.setdefault(router.layer_number, []).append(output[1].clone())

    def stop(self) -> dict[int, list[torch.Tensor]]:
        for hook in self._hooks:
            hook.remove()
        return self.seen


def start(case: tuple, replay: str = "none") -> tuple[Policy, list[PackedBatch]]:
    layout, model = case
    policy = small_policy(layout, torch.float64, model=model, optimizer=FAST, routing=RoutingConfig(replay=replay))
    for part in policy.optimizer.chained_optimizers:
        part.config.clip_grad = 0.0  # Megatron scales main_grad in place when it clips, and refuses fp64
    cut = policy.topology
    mine = even_batches()[cut.dp_rank :: cut.dp_size]
    return policy, [padded(batch, cut.sequence_multiple) for batch in mine]


def update(policy: Policy, batches: list[PackedBatch], minibatch: int):
    counts = global_counts(batches, policy.topology)
    loss = policy_loss(AlgorithmConfig(name="grpo", kl=KlConfig(coef=0.0)))  # there is no reference
    return policy.update(batches, loss, counts, 1, minibatch)


def counted(case: tuple) -> dict:
    """Three updates on the same batches; what take() gives, and the metrics."""
    policy, batches = start(case)
    policy.fill_old_log_probs(batches)
    for minibatch in range(MINIBATCHES):
        update(policy, batches, minibatch)
    taken = policy.routing.take()
    return {"taken": taken, "metrics": routing_metrics(taken, policy.routing.topk)}


def recounted(case: tuple) -> list[dict]:
    """The same on one rank, by loops over tokens and plain sets of experts, from passes of one microbatch each."""
    policy, batches = start(case)

    def sets() -> list[dict[int, list[frozenset]]]:
        found = []
        for batch in batches:
            maps = Maps(policy)
            policy.log_probs([batch])
            found.append(
                {
                    layer: [frozenset(row.nonzero().flatten().tolist()) for row in seen[0]]
                    for layer, seen in maps.stop().items()
                }
            )
        return found

    policy.fill_old_log_probs(batches)
    old, result = sets(), []
    for minibatch in range(MINIBATCHES):
        new = sets()
        update(policy, batches, minibatch)
        layers = {layer: {"tokens": 0, "changed_tokens": 0, "changed_experts": 0} for layer in old[0]}
        load = torch.zeros(4, 8, dtype=torch.float64)
        sequences = []
        for batch, before, after in zip(batches, old, new, strict=True):
            for begin, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
                sequences.append([0, 0])
                for token in range(begin, end):
                    for layer, count in layers.items():
                        ours, theirs = after[layer][token], before[layer][token]
                        for expert in ours:
                            load[layer - 1, expert] += 1
                        if token + 1 == end or not batch.loss_mask[token + 1]:
                            continue
                        count["tokens"] += 1
                        count["changed_tokens"] += ours != theirs
                        count["changed_experts"] += len(ours - theirs)
                        sequences[-1][0] += ours != theirs
                        sequences[-1][1] += 1
        result.append({"layers": layers, "load": load, "sequences": sequences})
    return result


def one_rank(rank: int, world_size: int) -> dict:
    case = {"one": (SINGLE, ModelConfig())}
    return {
        "counted": in_layouts(rank, world_size, case, counted)["one"],
        "recounted": in_layouts(rank, world_size, case, recounted)["one"],
        "replayed": in_layouts(rank, world_size, case, replayed)["one"],
        "refused": in_layouts(rank, world_size, case, refused)["one"],
    }


def four_ranks(rank: int, world_size: int) -> dict:
    return {
        "counted": in_layouts(rank, world_size, LAYOUTS, counted),
        "replayed": in_layouts(rank, world_size, LAYOUTS, replayed),
        "refused": in_layouts(rank, world_size, {"shifted": LAYOUTS["TP2xPP2-EP2-recompute"]}, refused)["shifted"],
    }


def replayed(case: tuple) -> dict:
    """Two updates with R2. Before the second, old log-probs are made anew along and without the old routes."""
    policy, batches = start(case, "R2")
    policy.fill_old_log_probs(batches)
    same = policy.log_probs_along_old_routes(batches)
    old = {
        layer: [trace[layer].long() for trace in (b.old_routes.experts for b in batches)]
        for layer in batches[0].old_routes.experts
    }
    first = update(policy, batches, 0)
    free = policy.log_probs(batches)
    maps = Maps(policy)
    update(policy, batches, 1)
    astray = 0
    for layer, seen in maps.stop().items():
        # Each microbatch has its own number of tokens, which tells whose map it is, whatever the order.
        by_size = {
            chosen.size(0): torch.zeros(chosen.size(0), 8, dtype=torch.bool).scatter(1, chosen, True)
            for chosen in old[layer]
        }
        astray += sum(not torch.equal(found, by_size[found.size(0)]) for found in seen)
    last = policy.topology.is_last_stage
    gradient = parameters.gather_full(policy.models, policy.topology, lambda p: p.main_grad)
    return {
        "same": all(torch.equal(a, b.old_logprobs) for a, b in zip(same, batches, strict=True)) if last else True,
        "moved": float((free[0] - batches[0].old_logprobs).abs().max()) if last else None,
        "first_ratio": first.stats.table.column("sum_log_ratio").abs().max().item(),
        "calls": sorted(len(seen) for seen in maps.seen.values()),
        "astray": astray,
        "changed": routing_metrics(policy.routing.take(), policy.routing.topk)["route/changed_experts"],
        "gradient": gradient if dist.get_rank() == 0 else None,
    }


def rolled_tokens(batch: PackedBatch) -> None:
    routes = batch.old_routes
    tokens = replace(routes.tokens, identity=routes.tokens.identity.roll(1))
    batch.old_routes = replace(routes, tokens=tokens, experts={k: v.roll(1, 0) for k, v in routes.experts.items()})


def rolled_experts(batch: PackedBatch) -> None:
    routes = batch.old_routes
    batch.old_routes = replace(routes, experts={layer: e.roll(1, 0) for layer, e in routes.experts.items()})


def rolled_layers(batch: PackedBatch) -> None:
    routes = batch.old_routes
    batch.old_routes = replace(routes, experts={layer + 1: e for layer, e in routes.experts.items()})


def swapped_layers(batch: PackedBatch) -> None:
    routes = batch.old_routes
    numbers = list(routes.experts)
    swapped = dict(zip(numbers, reversed(list(routes.experts.values())), strict=True))
    batch.old_routes = replace(routes, experts=swapped)


def cut_short(batch: PackedBatch) -> None:
    routes = batch.old_routes
    tokens = replace(routes.tokens, identity=routes.tokens.identity[1:])
    batch.old_routes = replace(routes, tokens=tokens, experts={k: v[1:] for k, v in routes.experts.items()})


SPOILED = {f.__name__: f for f in (rolled_tokens, rolled_experts, rolled_layers, swapped_layers, cut_short)}


def refused(case: tuple) -> dict[str, str]:
    """The message on this rank where ONE rank's routes of one microbatch are spoiled."""
    policy, _ = start(case, "R2")
    messages = {}
    for name, spoil in SPOILED.items():
        batches = [padded(b, 1) for b in even_batches()]
        policy.fill_old_log_probs(batches)
        if dist.get_rank() == dist.get_world_size() - 1:
            spoil(batches[1])
        try:
            update(policy, batches, 0)
            messages[name] = "nothing was raised"
        except TrainingError as error:
            messages[name] = str(error)
    return messages


@pytest.fixture(scope="module")
def single() -> dict:
    return spawn(one_rank, 1)[0]


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return spawn(four_ranks, 4, timeout=280)


def test_counts_equal_a_recount(single):
    """Token by token, by sets. Routes do change, not in all layers alike, and not before the first update."""
    taken, recount = single["counted"]["taken"], single["recounted"]
    assert len(taken) == MINIBATCHES
    for minibatch, expected in zip(taken, recount, strict=True):
        for layer, count in expected["layers"].items():
            for name, value in count.items():
                assert minibatch.column(name)[layer - 1] == value, (layer, name)
            assert minibatch.column("compared")[layer - 1] == count["tokens"]
        assert torch.equal(minibatch.load, expected["load"])
        assert minibatch.sequences.flatten(0, 1).tolist() == expected["sequences"]
    assert taken[0].column("changed_tokens").sum() == 0 < taken[1].column("changed_tokens").sum()
    assert len({float(x) for x in taken[2].column("changed_experts")}) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_counts_the_same(single, ranks, layout):
    """By layer, by sequence and by expert; entropies by value. The padding of context parallelism is real to routers,
    so there the load is higher, and nothing else. Every rank has the same."""
    for rank in ranks:
        ours = rank["counted"][layout]
        for minibatch, expected in zip(ours["taken"], single["counted"]["taken"], strict=True):
            assert torch.equal(minibatch.layers[:, :4], expected.layers[:, :4])
            torch.testing.assert_close(minibatch.layers, expected.layers, rtol=1e-9, atol=0)
            if layout.startswith("CP"):
                assert (minibatch.load >= expected.load).all() and minibatch.load.sum() > expected.load.sum()
            else:
                assert torch.equal(minibatch.load, expected.load)
            # Replicas hold every other microbatch of three sequences: [2, 6, 2] against [1, 12, 2].
            replicas = minibatch.sequences.size(0)
            theirs = expected.sequences.view(4 // replicas, replicas, 3, 2).transpose(0, 1).reshape(replicas, -1, 2)
            assert torch.equal(minibatch.sequences, theirs)
        assert ours["metrics"]["route/changed_experts"] == single["counted"]["metrics"]["route/changed_experts"]


def test_metrics_by_hand(single):
    """From the recount: shares of the second and third minibatch together; the one-update share is the second's."""
    metrics, recount = single["counted"]["metrics"], single["recounted"]

    def total(minibatches: list[dict], name: str) -> int:
        return sum(layer[name] for each in minibatches for layer in each["layers"].values())

    later = recount[1:]
    tokens = total(later, "tokens")
    assert metrics["route/changed_tokens"] == pytest.approx(total(later, "changed_tokens") / tokens, rel=1e-12)
    assert metrics["route/changed_experts"] == pytest.approx(total(later, "changed_experts") / tokens / 2, rel=1e-12)
    one = total(recount[1:2], "changed_experts") / total(recount[1:2], "tokens") / 2
    assert metrics["route/changed_experts_one_update"] == pytest.approx(one, rel=1e-12)
    assert metrics["route/by_minibatch/changed_experts"][0] == pytest.approx(one, rel=1e-12)
    assert 0 < metrics["route/entropy"] < torch.tensor(8.0).log()


def test_change_beside_the_ratio_by_hand():
    """Shares 0, 1/2, 1/4, 1/2 beside |mean log-ratio| 0, 2, 1, 2: proportional, so the correlation is 1. The second and
    fourth are clipped: mean share 1/2; the others 1/8. The fifth has no trained token."""
    sequences = torch.tensor([[0, 8], [4, 8], [2, 8], [2, 4], [0, 0]], dtype=torch.float64)
    table = torch.zeros(5, 10, dtype=torch.float64)
    table[:, 0] = torch.tensor([2, 2, 2, 1, 0])
    table[:, 1] = torch.tensor([0, 4, -2, -2, 0])
    table[1, 8] = table[3, 9] = 1
    assert change_beside_ratio(sequences, SequenceTable(table)) == pytest.approx(
        {"route/changed_clipped": 0.5, "route/changed_unclipped": 0.125, "route/change_ratio_correlation": 1.0}
    )


def everyone(single: dict, ranks: list[dict]) -> list[tuple[str, dict]]:
    return [("one", single["replayed"])] + [(name, rank["replayed"][name]) for rank in ranks for name in LAYOUTS]


def test_replay_at_the_same_weights_changes_no_bit(single, ranks):
    """Log-probs along old routes are the old ones to the bit, and the first update's ratio is exactly 1."""
    for name, found in everyone(single, ranks):
        assert found["same"], name
        assert found["first_ratio"] == 0.0, name


def test_replayed_routes_are_those_of_the_old_policy(single, ranks):
    """Seen from outside, by hooks on the routers: no call of the second update took another route, forward or
    recomputed, although free routing would have: the weights have moved, and the statistics say by how much."""
    for name, found in everyone(single, ranks):
        assert found["astray"] == 0, name
        assert found["changed"] > 0.01, name
        passes = (2 if "recompute" in name else 1) * (2 if "DP2" in name else 4)
        assert set(found["calls"]) == {passes}, name


def test_replay_gives_the_same_gradient_in_every_layout(single, ranks):
    expected = single["replayed"]["gradient"]
    for name in LAYOUTS:
        ours = ranks[0]["replayed"][name]["gradient"]
        assert set(ours) == set(expected)
        gap = sum((ours[key] - value).square().sum() for key, value in expected.items())
        size = sum(value.square().sum() for value in expected.values())
        assert float((gap / size).sqrt()) < 1e-9, name


@pytest.mark.parametrize("spoiled", SPOILED)
def test_routes_of_other_tokens_are_refused_on_every_rank(single, ranks, spoiled):
    """One rank's routes of one microbatch are wrong: all ranks raise the same, and none hangs."""
    words = {
        "rolled_tokens": "are shifted or of another batch",
        "rolled_experts": "so the routes are shifted",
        "rolled_layers": "the routes to replay are of layers",
        "swapped_layers": "so the routes are shifted",
        "cut_short": "tokens on this rank and the routes to replay are of",
    }
    for found in (single["refused"], *(rank["refused"] for rank in ranks)):
        assert words[spoiled] in found[spoiled], found[spoiled]
    assert len({rank["refused"][spoiled] for rank in ranks}) == 1
