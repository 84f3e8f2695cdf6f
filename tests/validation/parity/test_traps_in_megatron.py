"""Each fault that a training backend can make in a layout is put in, and the parity check must see it.

The faults of the mathematics alone are in test_traps.py.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.algorithms.interface import GlobalCounts, alone
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.parallel import topology
from gspo_megatron.batch import PackedBatch
from tools.validation.parity import fixture, formula, run
from tools.validation.parity.cases import BY_NAME, Case
from tools.validation.ranks import spawn


def microbatch_means(policy: Policy, batches: list[PackedBatch]) -> None:
    """Each microbatch divides by its own number of sequences, and microbatches and replicas count the same."""
    original = policy.head.loss_inputs

    def with_own_counts(batch, *args):
        inputs = original(batch, *args)
        own = int((inputs.token_lengths > 0).sum()) * len(batches) * policy.topology.dp_size
        return replace(inputs, counts=GlobalCounts(max(own, 1), inputs.counts.num_tokens))

    policy.head.loss_inputs = with_own_counts


def table_summed_over_tensor_ranks(policy: Policy, batches: list[PackedBatch]) -> None:
    """Every tensor rank holds whole log-probs, so a sum over them counts each token twice."""

    def reduce(table: torch.Tensor, maximum: int | None = None) -> torch.Tensor:
        table = table.clone()
        dist.all_reduce(table, group=policy.topology.tp_group)
        return table

    policy.head.reduce = reduce


def context_ranks_alone(policy: Policy, batches: list[PackedBatch]) -> None:
    """Each context-parallel rank takes the mean of its own tokens for the sequence's."""
    policy.head.reduce = alone


def scaled_by_context_size(policy: Policy, batches: list[PackedBatch]) -> None:
    """The factor that Megatron's two-valued losses already have, once more."""
    original = policy.network.step
    size = policy.topology.cp_size
    policy.network.step = lambda given, loss_fn, *rest, **more: original(
        given, lambda *args: loss_fn(*args) * size, *rest, **more
    )


def norms_of_one_tensor_rank(policy: Policy, batches: list[PackedBatch]) -> None:
    """Under sequence parallelism each rank's norms see their own rows only; unmarked, their gradients stay apart."""
    for model in policy.models:
        for parameter in model.parameters():
            parameter.sequence_parallel = False


def batched_sends_of_virtual_stages(policy: Policy, batches: list[PackedBatch]) -> None:
    """Two stages: previous and next rank are the same, and batched sends meet the wrong receives."""
    for model in policy.models:
        model.config.overlap_p2p_comm, model.config.batch_p2p_comm = False, True


def unscaled_temperature(policy: Policy, batches: list[PackedBatch]) -> None:
    """Log-probs of the plain logits, where the rollouts were sampled at another temperature."""
    policy.head.temperature = 1.0


def even(number: int, parts: int) -> list[range]:
    """fixture.split into equal parts."""
    return [range(number * k // parts, number * (k + 1) // parts) for k in range(parts)]


TRAPS = {  # name -> (case, what is put in, a word of the account that must come)
    "microbatch means": (Case(BY_NAME["DP2"]), microbatch_means, "loss"),
    "table summed over TP": (Case(BY_NAME["TP2"]), table_summed_over_tensor_ranks, "gradient"),
    "context ranks alone": (Case(BY_NAME["CP2"]), context_ranks_alone, "ratio"),
    "scaled by CP": (Case(BY_NAME["CP2"]), scaled_by_context_size, "gradient"),
    "norms of one tensor rank": (Case(BY_NAME["TP2"]), norms_of_one_tensor_rank, "gradient"),
    "batched sends": (
        Case(BY_NAME["PP2 VP2"], microbatches=4, padded=True), batched_sends_of_virtual_stages, "gradient",
    ),
    "unscaled temperature": (Case(BY_NAME["CP2"], temperature=0.7), unscaled_temperature, "ratio"),
}  # fmt: skip


def truths(rank: int, world_size: int) -> dict:
    return run.truths([case for case, _, _ in TRAPS.values()])


def trapped(rank: int, world_size: int, found: dict) -> dict[str, tuple[list[str], run.Errors]]:
    """The account of each trap, and under "" what is found where nothing is put in."""
    results = {}
    split = fixture.split
    for name, (case, change, _) in TRAPS.items():
        # Microbatches of one size: with others, mixed-up sends end in an error about shapes.
        fixture.split = even if case.layout.virtual else split
        errors = run.run_case(case, found[run.truth_key(case)], change)
        results[name] = errors.failures(case.dtype), errors
    plain = Case(BY_NAME["TP2"])
    errors = run.run_case(plain, found[run.truth_key(plain)], lambda policy, batches: None)
    return results | {"": (errors.failures("fp32"), errors)}


@pytest.fixture(scope="module")
def accounts() -> dict[str, tuple[list[str], run.Errors]]:
    return spawn(trapped, 2, spawn(truths, 1)[0], timeout=280)[0]


@pytest.mark.parametrize("name", TRAPS)
def test_the_matrix_sees(accounts, name):
    sentences, _ = accounts[name]
    assert any(sentence.startswith(TRAPS[name][2]) for sentence in sentences), sentences


def test_nothing_is_seen_where_nothing_is_put_in(accounts):
    assert accounts[""][0] == []


def test_sizes_of_the_faults(accounts):
    """A gradient twice too large is off by 1; a length counted twice halves each token's part."""
    assert accounts["scaled by CP"][1].gradient == pytest.approx(1.0, abs=1e-5)
    assert accounts["scaled by CP"][1].loss < 1e-6  # why the loss alone shows nothing
    assert accounts["table summed over TP"][1].gradient == pytest.approx(0.5, abs=1e-5)


def narrow_routing(rank: int, world_size: int) -> tuple[float, str]:
    """Two experts of layer 0 with the same router weights: whose token it is, rounding decides."""
    cut = topology.initialize_model_parallel(BY_NAME["one rank"].parallel, seed=1)
    policy = run.build_policy(Case(BY_NAME["one rank"], dtype="fp64"), cut)
    weights = {p.name: p.local for p in parameters.named(policy.models[0], cut)}
    router = weights["decoder.layers.0.mlp.router.weight"]
    with torch.no_grad():
        router[1] = router[0]
    found = formula.truth(policy, fixture.rollouts(), "gspo")
    try:
        formula.check_fixture(found, formula.RULES["gspo"])
    except AssertionError as error:
        return found.routing_margin, str(error)
    return found.routing_margin, ""


def test_a_fixture_whose_routes_rounding_decides_is_refused():
    margin, account = spawn(narrow_routing, 1)[0]
    assert margin < 1e-12 and "a route is decided by" in account
