"""One optimizer step gives the same loss, ratios and gradient in every layout."""

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.backend.layers.attention import PackedPlan
from gspo_megatron.backend.model import parameters
from gspo_megatron.batch import PackedBatch
from gspo_megatron.config import AlgorithmConfig, Layout, ModelConfig
from tests.backend.small import SINGLE, TP2_PP2_EP2, fixed_batches, in_layouts, padded, small_policy
from tools.validation.ranks import spawn

PLAIN, RECOMPUTE = ModelConfig(), ModelConfig(recompute=True)
CHUNKED = ModelConfig(logprob_chunk_tokens=7)  # of microbatches of 24 to 38 tokens
CASES = {  # on four ranks; what the sizes leave over is data parallelism
    "TP2xPP2-EP2": (TP2_PP2_EP2, PLAIN),
    "TP2xPP2-EP2-recompute": (TP2_PP2_EP2, RECOMPUTE),
    "TP2xPP2-EP2-logits-in-chunks": (TP2_PP2_EP2, CHUNKED),
    "TP2xDP2-experts-replicated": (Layout(2, 1, None, 1, 1), PLAIN),
    "PP2xVP2xDP2-EP2-recompute": (Layout(1, 2, 2, 2, 1), RECOMPUTE),
    "DP4-EP4": (Layout(1, 1, None, 4, 1), PLAIN),
    "PP2-1+3xDP2-EP2-recompute": (Layout(1, 2, None, 2, 1, num_layers_in_first_pipeline_stage=1), RECOMPUTE),
    "TP2xPP2-ETP2": (Layout(2, 2, None, 1, 2), PLAIN),
    "DP4-EP2-ETP2": (Layout(1, 1, None, 2, 2), PLAIN),
    "PP2xDP2-ETP2-recompute": (Layout(1, 2, None, 1, 2), RECOMPUTE),
    "CP2xTP2-ETP4": (Layout(2, 1, None, 1, 4, context_parallel_size=2), PLAIN),
    "DP4-EP2-distributed-optimizer": (Layout(1, 1, None, 2, 1, use_distributed_optimizer=True), PLAIN),
    "CP2xTP2-EP2": (Layout(2, 1, None, 2, 1, context_parallel_size=2), PLAIN),
    "CP2xPP2xVP2-EP2-recompute": (Layout(1, 2, 2, 2, 1, context_parallel_size=2), RECOMPUTE),
    "CP4-EP4": (Layout(1, 1, None, 4, 1, context_parallel_size=4), PLAIN),
    "CP2xDP2-distributed-optimizer": (
        Layout(1, 1, None, 1, 1, use_distributed_optimizer=True, context_parallel_size=2),
        PLAIN,
    ),
}
FP64_CASES = {"CP2xTP2-EP2": CASES["CP2xTP2-EP2"]}
ONE = {"one": (SINGLE, PLAIN)}


def one_rank(rank: int, world_size: int) -> dict:
    """All that one rank is asked for: the reference, the same step by GSPO-token, and both sides of the fp64 check."""
    reference = in_layouts(rank, world_size, ONE, step, None, "gspo", False)["one"]
    old = reference["old"]
    return {
        "reference": reference,
        "token": in_layouts(rank, world_size, ONE, step, old, "gspo_token", False)["one"],
        "fp64": in_layouts(rank, world_size, ONE, step, old, "gspo", True)["one"],
        "plain": in_layouts(rank, world_size, ONE, plain_step, old)["one"],
    }


def four_ranks(rank: int, world_size: int, old: list) -> dict:
    """The step in every layout, and by some in fp64."""
    exact = in_layouts(rank, world_size, FP64_CASES, step, old, "gspo", True)
    return {"fp32": in_layouts(rank, world_size, CASES, step, old, "gspo", False), "fp64": exact}


def perturbation(batch: PackedBatch, generator: torch.Generator) -> torch.Tensor:
    """[T]: noise by token, and a shift by sequence that moves its ratio beyond the clip range."""
    lengths = torch.diff(batch.cu_seqlens).long()
    shift = 1e-3 * torch.randn(batch.num_sequences, generator=generator)
    return 2e-3 * torch.randn(batch.num_tokens, generator=generator) + shift.repeat_interleave(lengths)


def step(case: tuple, old: list | None, algorithm: str, fp64: bool) -> dict:
    """One update on this rank's share of the fixed batches.

    `old`: perturbed old log-probs of all batches; None: computed here and returned, so that all layouts get the same.
    """
    layout, model = case
    policy = small_policy(layout, torch.float64 if fp64 else None, model=model)
    cut = policy.topology
    batches = fixed_batches()[cut.dp_rank :: cut.dp_size]
    if old is None:
        policy.fill_old_log_probs(batches)
        generator = torch.Generator().manual_seed(3)
        old = [b.old_logprobs + perturbation(b, generator) for b in batches]
    for batch, logprobs in zip(batches, old[cut.dp_rank :: cut.dp_size], strict=True):
        batch.old_logprobs = logprobs
    batches = [padded(batch, cut.sequence_multiple) for batch in batches]
    counts = global_counts(batches, policy.topology)
    for part in policy.optimizer.chained_optimizers:
        part.config.clip_grad = 0.0  # Megatron scales main_grad in place when it clips
    result = policy.update(batches, policy_loss(AlgorithmConfig(name=algorithm)), counts)
    loss = torch.tensor(result.stats.loss, dtype=torch.float64)
    dist.all_reduce(loss, group=cut.dp_group)
    gradient = parameters.gather_full(policy.models, cut, lambda p: p.main_grad)
    weights = parameters.gather_full(policy.models, cut)
    table = result.stats.table
    return {
        "loss": float(loss),
        "old": old,
        "counts": counts,
        "grad_norm": result.grad_norm,
        "ratio": (table.column("sum_log_ratio") / table.column("num_tokens").clamp(min=1)).exp(),
        "table": table.values,
        "dp_rank": cut.dp_rank,
        "gradient": gradient if dist.get_rank() == 0 else None,
        "weights": weights if dist.get_rank() == 0 else None,
        "lr": result.learning_rate,
    }


@pytest.fixture(scope="module")
def single() -> dict:
    return spawn(one_rank, 1)[0]


@pytest.fixture(scope="module")
def reference(single) -> dict:
    return single["reference"]


@pytest.fixture(scope="module")
def layouts(reference) -> list[dict]:
    """By rank: the step's result in each layout."""
    return spawn(four_ranks, 4, reference["old"], timeout=280)


def gradient_error(ours: dict, reference: dict) -> float:
    """Norm of the difference over the norm, all parameters together."""
    assert set(ours) == set(reference)
    difference = sum((ours[name] - value).double().square().sum() for name, value in reference.items())
    return float((difference / sum(value.double().square().sum() for value in reference.values())).sqrt())


def moved_apart(ours: dict, reference: dict) -> float:
    """Share of weights that Adam's first step left more than a tenth of the learning rate apart.

    That step moves each weight by the learning rate times the sign of its gradient, so it is where a gradient is of the
    size of rounding that layouts may differ."""
    apart = [(ours["weights"][n] - w).abs() > 0.1 * reference["lr"] for n, w in reference["weights"].items()]
    return float(torch.cat([x.flatten() for x in apart]).double().mean())


def rows_by_batch(results: list[dict], key: str, dp_size: int) -> torch.Tensor:
    """Per-sequence rows of all replicas, back in the order of the fixed batches."""
    sizes = [b.num_sequences for b in fixed_batches()]
    by_rank = {r["dp_rank"]: r[key] for r in results}
    parts: list = [None] * len(sizes)
    for rank, rows in by_rank.items():
        mine = list(range(rank, len(sizes), dp_size))
        for index, part in zip(mine, rows.split([sizes[i] for i in mine]), strict=True):
            parts[index] = part
    return torch.cat(parts)


def initial_weights(layout: Layout) -> dict:
    policy = small_policy(layout)
    return parameters.gather_full(policy.models, policy.topology)


def test_reference_is_not_trivial(reference):
    """s differs from 1 and clips on both sides; 14 sequences, one of them (length 3, mask 0) without a trained token,
    and one of length 2; so 12 count."""
    assert float((reference["ratio"] - 1).abs().max()) > 4e-4
    lows, highs = reference["table"][:, -2], reference["table"][:, -1]
    assert lows.max() > 0 and highs.max() > 0
    assert reference["counts"].num_sequences == 12
    assert abs(reference["loss"]) > 0.01
    start = spawn(in_layouts, 1, {"one": SINGLE}, initial_weights)[0]["one"]
    moved = torch.cat([(w - start[n]).flatten() for n, w in reference["weights"].items()])
    assert float((moved.abs() > 0.5 * reference["lr"]).double().mean()) > 0.5  # the step did change the weights


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_rank(reference, layouts, name):
    """Loss to 1e-6 of mean |A|, ratios and gradient to 1e-5: the limits that fp32 leaves room for."""
    results = [by_layout["fp32"][name] for by_layout in layouts]
    advantages = torch.cat([b.advantages for b in fixed_batches()])
    assert results[0]["counts"] == reference["counts"]
    assert abs(results[0]["loss"] - reference["loss"]) < 1e-6 * float(advantages.abs().mean())
    dp_size = len({r["dp_rank"] for r in results})
    ratio = rows_by_batch(results, "ratio", dp_size)
    assert float((ratio - reference["ratio"]).abs().max()) < 1e-5
    if not CASES[name][0].use_distributed_optimizer:  # there each rank has only its part of the sum
        assert gradient_error(results[0]["gradient"], reference["gradient"]) < 1e-5
    assert moved_apart(results[0], reference) < 1e-3
    assert results[0]["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    for result in results:  # every stage and tensor rank of a replica holds the last stage's table
        same = next(r for r in results if r["dp_rank"] == result["dp_rank"])
        assert torch.equal(result["table"], same["table"])


def test_gspo_token_is_gspo_in_megatron_too(single):
    """With one advantage a sequence the two algorithms are the same step."""
    token, reference = single["token"], single["reference"]
    assert token["loss"] == pytest.approx(reference["loss"], abs=1e-9)
    assert gradient_error(token["gradient"], reference["gradient"]) < 1e-6
    assert torch.equal(token["table"][:, -2:], reference["table"][:, -2:])


def plain_step(case: tuple, old: list) -> dict:
    """The same step by the formula, in fp64, on logits of the model: no schedule, no DDP, no packed loss."""
    policy = small_policy(case[0], torch.float64)
    model, objective, count = policy.models[0], 0.0, 0
    for batch, old_logprobs in zip(fixed_batches(), old, strict=True):
        bounds = batch.cu_seqlens.tolist()
        for sequence, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            tokens, mask = batch.tokens[start:stop], batch.loss_mask[start + 1 : stop].double()
            if mask.sum() == 0:
                continue
            plan = PackedPlan.from_cu_seqlens(torch.tensor([0, stop - start], dtype=torch.int32))
            logits = model(tokens[None], torch.arange(stop - start)[None], None, packed_seq_params=plan)
            logprobs = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0]
            difference = (logprobs - old_logprobs[start + 1 : stop].double()) * mask
            s = (difference.sum() / mask.sum()).exp()
            a = batch.advantages[sequence].double()
            objective = objective + torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a)
            count += 1
    loss = -objective / count
    loss.backward()
    gradient = {p.name: p.local.main_grad for p in parameters.named(model, policy.topology)}
    return {"loss": float(loss.detach()), "gradient": {name: value.clone() for name, value in gradient.items()}}


def test_fp64_step_equals_the_plain_formula(single):
    """Both in fp64: the packed, scheduled, DDP-scaled step is the textbook loss and gradient to 1e-11."""
    ours, plain = single["fp64"], single["plain"]
    assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-11)
    assert gradient_error(ours["gradient"], plain["gradient"]) < 1e-11


@pytest.mark.parametrize("name", FP64_CASES)
def test_layout_equals_one_rank_in_fp64(single, layouts, name):
    """Where rounding hides nothing: loss, ratios and gradient to 1e-11."""
    results, reference = [by_rank["fp64"][name] for by_rank in layouts], single["fp64"]
    assert results[0]["loss"] == pytest.approx(reference["loss"], abs=1e-11)
    assert gradient_error(results[0]["gradient"], reference["gradient"]) < 1e-11
    ratio = rows_by_batch(results, "ratio", len({r["dp_rank"] for r in results}))
    assert float((ratio - reference["ratio"]).abs().max()) < 1e-11


def ratio_without_noise(case: tuple[Layout, ModelConfig]) -> float:
    """Largest |log-ratio| of any token in an update that follows old log-probs at the same weights."""
    layout, model = case
    policy = small_policy(layout, model=model)
    batches = [padded(batch, policy.topology.sequence_multiple) for batch in fixed_batches()]
    policy.fill_old_log_probs(batches)
    counts = global_counts(batches, policy.topology)
    result = policy.update(batches, policy_loss(AlgorithmConfig()), counts)
    return float(result.stats.table.column("max_abs_log_ratio").max())


def test_ratio_is_exactly_1_at_unchanged_weights():
    """Old and new log-probs come from the same packing, kernels and routes, so not even the last bit differs, in fp32
    and in bf16 alike; anything else would be noise beside a clip range of 3e-4."""
    shared = CASES["CP2xTP2-EP2"][0]
    bf16, chunked = ModelConfig(params_dtype="bf16"), ModelConfig(params_dtype="bf16", logprob_chunk_tokens=7)
    cases = {
        "fp32": (TP2_PP2_EP2, PLAIN),
        "bf16": (TP2_PP2_EP2, bf16),
        "bf16-CP2": (shared, bf16),
        "bf16-logits-in-chunks": (TP2_PP2_EP2, chunked),
    }
    noise = spawn(in_layouts, 4, cases, ratio_without_noise)[0]
    assert noise == dict.fromkeys(cases, 0.0)
