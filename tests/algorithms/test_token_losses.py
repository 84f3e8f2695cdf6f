"""GRPO, Dr. GRPO, DAPO and PPO: losses and gradients by hand, against a plain double loop, and by gradcheck."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gspo_megatron.algorithms import LOSSES, policy_loss
from gspo_megatron.algorithms.dapo import overlong_penalty
from gspo_megatron.algorithms.interface import ClipRange, GlobalCounts, LossInputs, LossOptions
from gspo_megatron.config import AlgorithmConfig
from tests.algorithms.packed import EMPTY, MASKED, Response, count, gradient, pack, ragged

CLIP = ClipRange(0.2, 0.28)
E64 = {"dtype": torch.float64}
# Ratios 1.1 and 1.5 with A = 2, then 0.5, 0.9 and 1.5 with A = -1; a masked prompt token before each.
FIRST = Response([9.0, math.log(1.1), math.log(1.5)], [0.0] * 3, [0, 1, 1], 2.0)
SECOND = Response([9.0, math.log(0.5), math.log(0.9), math.log(1.5)], [0.0] * 4, [0, 1, 1, 1], -1.0)
# Objectives by token with clip 0.2 / 0.28: 1.1 * 2 = 2.2 and 1.28 * 2 = 2.56 (clipped above); then 0.8 * -1 (clipped
# below: min(-0.5, -0.8)), -0.9, -1.5 (min(-1.5, -1.28)). Sums 4.76 and -3.2. Slopes r A where not clipped.
SUMS, LENGTHS = (4.76, -3.2), (2, 3)
SLOPES = [0, 2.2, 0, 0, 0, -0.9, -1.5]


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-14) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, **E64), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("sequence_mean", (1 / 4, 1 / 6)),  # 1 / (N |y_i|), N = 2
        ("token_mean", (1 / 5, 1 / 5)),  # 1 / M, M = 5
        ("constant_length", (1 / 16, 1 / 16)),  # 1 / (N L), L = 8
        ("length_proportional", (1 / 2, 1 / 2)),  # 1 / N
    ],
)
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "ppo"])
def test_each_aggregation_by_hand(name, aggregation, weights):
    """-(w_1 4.76 - w_2 3.2), and -w_i times the slope of each token. Masked and empty responses change nothing."""
    inputs = pack([FIRST, MASKED, SECOND, EMPTY], padding=2)
    out = LOSSES[name](inputs, LossOptions(CLIP, aggregation=aggregation, constant_length=8))
    expected = -(weights[0] * SUMS[0] + weights[1] * SUMS[1])
    assert out.loss.item() == pytest.approx(expected, abs=1e-14) and out.value.item() == out.loss.item()
    slopes = [-weights[0] * s for s in SLOPES[:3]] + [0, 0] + [-weights[1] * s for s in SLOPES[3:]] + [0, 0]
    close(gradient(out.loss, inputs), slopes)
    assert out.table.column("clipped_low_tokens").tolist() == [0, 0, 1, 0]
    assert out.table.column("clipped_high_tokens").tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # With clip 0.2 above as well the second token gives 1.2 * 2 = 2.4: sums 4.6 and -3.2.
        ("grpo", -(4.6 / 4 - 3.2 / 6)),
        ("dr_grpo", -(4.6 - 3.2) / (2 * 8)),
        ("ppo", -(4.6 - 3.2) / 5 - 0.001 * 0.5),  # its entropy bonus: every token has 0.5
        ("dapo", -(4.76 - 3.2) / 5),
    ],
)
def test_defaults_are_the_papers(name, expected):
    inputs = pack([FIRST, SECOND])
    inputs = dataclasses.replace(inputs, ref_logprobs=inputs.logprobs.detach())  # at the reference the KL term is 0
    out = policy_loss(AlgorithmConfig(name=name), max_response_length=8)(inputs)
    assert out.value.item() == pytest.approx(expected, abs=1e-14)


def test_kl_estimators_by_hand():
    """delta = logp - ref = (0.5, -0.25): k1 their sum 0.25; k2 (0.25 + 0.0625) / 2; k3 exp(-d) - 1 + d.

    d k1 = 1, d k2 = delta, d k3 = 1 - exp(-delta) by token. With A = 0 the loss is 0.3 times their mean over 2 tokens.
    """
    response = Response([7.0, -1.0, -2.0], [7.0, -1.0, -2.0], [0, 1, 1], 0.0)
    ref = torch.tensor([math.nan, -1.5, -1.75], **E64)  # what stands at a masked token is not looked at
    delta = (0.5, -0.25)
    by_hand = {
        "k1": (0.25, (1.0, 1.0)),
        "k2": (0.15625, delta),
        "k3": (sum(math.exp(-d) - 1 + d for d in delta), tuple(1 - math.exp(-d) for d in delta)),
    }
    for name, (total, slopes) in by_hand.items():
        inputs = dataclasses.replace(pack([response]), ref_logprobs=ref)
        out = LOSSES["grpo"](inputs, LossOptions(CLIP, kl_coef=0.3, kl_estimator=name))
        assert out.value.item() == pytest.approx(0.3 * total / 2, abs=1e-15)
        close(gradient(out.loss, inputs), [0, *(0.15 * s for s in slopes)])
        assert out.table.column("sum_ref_kl").item() == pytest.approx(total, abs=1e-15)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "grpo"])
def test_entropy_bonus_reaches_the_entropy(name):
    """-0.1 sum_t m H_t / |y|: the gradient is -0.05 on each of two trained tokens, and the KL column stays 0."""
    inputs = pack([Response([-1.0] * 3, [-1.0] * 3, [0, 1, 1], 0.0)])
    entropy = torch.tensor([5.0, 0.25, 0.75], **E64, requires_grad=True)
    out = LOSSES[name](dataclasses.replace(inputs, entropy=entropy), LossOptions(CLIP, entropy_coef=0.1))
    assert out.value.item() == pytest.approx(-0.05, abs=1e-15)
    close(torch.autograd.grad(out.loss, entropy)[0], [0, -0.05, -0.05])


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "grpo"])
def test_dual_clip_bounds_a_large_ratio_of_a_bad_response(name):
    """A = -2, every ratio 5, dual 3: the objective is 3 * -2 instead of 5 * -2, without gradient; A = +2 is clipped at
    1.28 as before; at ratio 2.5 < 3 nothing changes: 2.5 * -2."""
    rows = [(5.0, -2.0, -6.0, 0.0), (5.0, 2.0, 2.56, 0.0), (2.5, -2.0, -5.0, -5.0)]
    for ratio, advantage, objective, slope in rows:
        inputs = pack([Response([math.log(ratio)] * 2, [0.0] * 2, [1, 1], advantage)])
        out = LOSSES[name](inputs, LossOptions(ClipRange(0.2, 0.28, 3.0)))
        assert out.value.item() == pytest.approx(-objective, abs=1e-13)
        close(gradient(out.loss, inputs), [-slope / 2] * 2, 1e-13)
        assert out.table.column("clipped_high_tokens").item() == (2 if slope == 0 else 0)


def test_overlong_penalty_by_hand():
    """Limit 20, buffer 8: nothing up to 12; at 14 a quarter; at 20 and beyond the factor 0.5 in full."""
    lengths = torch.tensor([1, 12, 14, 16, 20, 30])
    close(overlong_penalty(lengths, 20, 8, 0.5), [0, 0, -0.125, -0.25, -0.5, -0.5])
    assert not overlong_penalty(lengths, 20, 0, 0.5).any()


def double_loop(responses: list[Response], options: LossOptions) -> tuple[float, float, list[float]]:
    """(loss, sum of absolute terms, gradient by token) of the token surrogate in plain Python."""
    counts, clip = count(responses), options.clip
    terms, slopes = [], []
    for r in responses:
        weight = {
            "sequence_mean": 1 / (max(counts.num_sequences, 1) * max(r.length, 1)),
            "token_mean": 1 / max(counts.num_tokens, 1),
        }[options.aggregation]
        for new, old, m, a in zip(r.new, r.old, r.mask, r.per_token, strict=True):
            ratio = math.exp(new - old) if m else 1.0
            low, high = ratio < 1 - clip.low and a < 0, ratio > 1 + clip.high and a > 0
            over = ratio > clip.dual and a < 0
            bounded = 1 - clip.low if low else 1 + clip.high if high else clip.dual if over else ratio
            terms.append(-m * weight * bounded * a if a else 0.0)
            slopes.append(0.0 if low or high or over or not m else -weight * ratio * a)
    return math.fsum(terms), math.fsum(map(abs, terms)), slopes


@settings(max_examples=80, deadline=None)
@given(
    responses=st.booleans().flatmap(ragged),
    aggregation=st.sampled_from(["sequence_mean", "token_mean"]),
    dual=st.sampled_from([math.inf, 3.0]),
    padding=st.integers(0, 2),
)
def test_any_ragged_batch_equals_a_double_loop(responses, aggregation, dual, padding):
    """Log-ratios up to +-300, masks with gaps, empty responses, one advantage a response or a token."""
    options = LossOptions(ClipRange(0.2, 0.28, dual), aggregation=aggregation)
    expected, scale, slopes = double_loop(responses, options)
    inputs = pack(responses, padding)
    by_token = not all(isinstance(r.advantage, float) for r in responses)
    assume(inputs.has_token_advantages == by_token)  # [S] and [T] are told apart by their length alone
    out = LOSSES["dapo"](inputs, options)
    assert abs(out.loss.item() - expected) <= 1e-11 * scale + 1e-15
    got = gradient(out.loss, inputs)
    torch.testing.assert_close(got[: len(slopes)], torch.tensor(slopes, **E64), rtol=1e-11, atol=1e-15)
    assert not got[len(slopes) :].any()


FULL = LossOptions(
    ClipRange(0.2, 0.3, 2.5), kl_coef=0.1, entropy_coef=0.05, mismatch="token_truncated", mismatch_threshold=1.5
)


def random_inputs(seed: int, by_token: bool) -> LossInputs:
    """Two sequences of 4 and 6 tokens with ratios on both sides of every bound, and all optional fields."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(10, generator=generator, **E64)

    old = normal(1.0) - 2
    return LossInputs(
        logprobs=(old + normal(0.5)).requires_grad_(),
        entropy=normal(1.0).requires_grad_(),
        old_logprobs=old,
        loss_mask=torch.tensor([0, 1, 1, 1, 0, 1, 0, 1, 1, 1.0]),
        cu_seqlens=torch.tensor([0, 4, 10], dtype=torch.int32),
        num_sequences=2,
        advantages=normal(1.0) if by_token else normal(1.0)[:2],
        counts=GlobalCounts(2, 7),
        ref_logprobs=old + normal(0.3),
        rollout_logprobs=old + normal(0.4),
    )


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant_length", "length_proportional"])
@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "dapo", "gspo", "gspo_token"])
def test_gradcheck_with_every_option(name, aggregation):
    """Log-probs and entropy, with KL, entropy bonus, dual clip and mismatch weights on, in fp64."""
    # With weights or advantages by token GSPO-token's gradient is, on purpose, not the derivative of its value.
    mismatch = "sequence_truncated" if name.startswith("gspo") else "token_truncated"
    for seed, estimator in enumerate(("k1", "k2", "k3")):
        inputs = random_inputs(seed, by_token=name == "ppo")
        options = dataclasses.replace(
            FULL, aggregation=aggregation, kl_estimator=estimator, constant_length=9, mismatch=mismatch
        )

        def value(logprobs, entropy, inputs=inputs, options=options):
            return LOSSES[name](dataclasses.replace(inputs, logprobs=logprobs, entropy=entropy), options).loss

        assert torch.autograd.gradcheck(value, (inputs.logprobs, inputs.entropy), eps=1e-6, atol=1e-8)


def by_ranks(name: str, inputs: LossInputs, options: LossOptions, owner: torch.Tensor) -> tuple:
    """The loss on two context-parallel ranks that own the tokens with owner 0 and 1: (values, gradient, tables).

    Collectives are played by two passes: the first records each rank's tables, the second hands out their sums.
    """
    recorded: list[list[torch.Tensor]] = [[], []]
    lengths = inputs.sum_by_sequence(torch.ones(inputs.loss_mask.numel()))

    def run(rank: int, reduce) -> tuple:
        logprobs = inputs.logprobs.detach().clone().requires_grad_()
        mine = dataclasses.replace(
            inputs, logprobs=logprobs, loss_mask=inputs.loss_mask * (owner == rank), lengths=lengths, reduce=reduce
        )
        out = LOSSES[name](mine, options)
        return out.value, gradient(out.loss, mine), out.table.values

    def summed(maximum, parts):
        total = parts[0] + parts[1]
        if maximum is not None:
            total[:, maximum] = torch.maximum(parts[0], parts[1])[:, maximum]
        return total

    calls = 1 + (options.mismatch.startswith("sequence"))  # the sequence weight needs a sum of its own first
    for call in range(calls):
        for rank in (0, 1):
            done = iter(range(call))

            def reduce(table, maximum=None, rank=rank, done=done, call=call):
                step = next(done, None)
                if step is None:
                    if len(recorded[rank]) == call:
                        recorded[rank].append(table.detach())
                    return table
                return summed(maximum, [recorded[0][step], recorded[1][step]])

            run(rank, reduce)
    results = []
    for rank in (0, 1):
        steps = iter(range(calls))
        results.append(
            run(
                rank,
                lambda table, maximum=None, steps=steps: summed(
                    maximum, [recorded[k][step] for k in (0, 1)] if (step := next(steps)) is not None else []
                ),
            )
        )
    values, gradients, tables = zip(*results, strict=True)
    return values, gradients[0] + gradients[1], tables


@pytest.mark.parametrize("mismatch", ["none", "token_masked", "sequence_truncated"])
@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "dapo", "gspo", "gspo_token"])
def test_tokens_of_a_sequence_on_two_ranks(name, mismatch):
    """Every rank reports the whole value and table; the ranks' gradients add up to the whole one."""
    inputs = random_inputs(5, by_token=name in ("ppo", "gspo_token"))
    options = dataclasses.replace(FULL, mismatch=mismatch)
    whole = LOSSES[name](inputs, options)
    owner = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0, 0, 1])
    values, slopes, tables = by_ranks(name, inputs, options, owner)
    torch.testing.assert_close(slopes, gradient(whole.loss, inputs), rtol=1e-12, atol=1e-14)
    for value, table in zip(values, tables, strict=True):
        assert value.item() == pytest.approx(whole.value.item(), abs=1e-13)
        torch.testing.assert_close(table, whole.table.values, rtol=1e-12, atol=1e-13)


def test_a_ratio_of_infinity_is_clipped_and_not_multiplied_by_zero():
    """exp(800) overflows: with A > 0 it is clipped; with A = 0 it has no weight. Neither may become not-a-number."""
    inputs = pack([Response([800.0], [0.0], [1], 1.0), Response([800.0], [0.0], [1], 0.0)])
    out = LOSSES["grpo"](inputs, LossOptions(CLIP))
    assert out.loss.item() == pytest.approx(-1.28 / 2, abs=1e-15)
    assert gradient(out.loss, inputs).tolist() == [0.0, 0.0]


def test_ratios_on_a_bound_keep_their_gradient():
    """exp(0) = 1 with clip 0 / 0 is on both bounds exactly, which the property test above cannot meet by chance."""
    for advantage in (1.0, -1.0):
        inputs = pack([Response([-1.0], [-1.0], [1], advantage)])
        out = LOSSES["grpo"](inputs, LossOptions(ClipRange(0.0, 0.0)))
        assert gradient(out.loss, inputs).item() == -advantage
