"""DPO's loss and gradient by hand; `old` of a Response is the reference here."""

import math
from dataclasses import replace

import pytest
import torch

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.algorithms.dpo import dpo_loss
from gspo_megatron.algorithms.interface import GlobalCounts, LossInputs, LossOptions, LossOutputs
from gspo_megatron.config import AlgorithmConfig, PreferenceConfig
from tests.algorithms.packed import PAPER, Response, gradient
from tests.algorithms.packed import pack as pack_responses
from tests.algorithms.test_token_losses import by_ranks, random_inputs

CHOSEN = Response([-9.0, -0.7, -1.8], [0.0, -1.0, -2.0], [0, 1, 1])  # log-ratios 0.3 + 0.2 = 0.5
REJECTED = Response([-9.0, -3.4, -7.0, -0.9], [0.0, -3.0, 0.0, -1.0], [0, 1, 0, 1])  # -0.4 + 0.1 = -0.3
BETTER = Response([-9.0, -4.0], [0.0, -2.0], [0, 1])  # -2
WORSE = Response([-9.0, -1.0], [0.0, -1.5], [0, 1])  # 0.5
SIGMOID = LossOptions(PAPER, beta=0.5)
IPO = replace(SIGMOID, preference_loss="ipo")
NORMALISED = replace(IPO, length_normalised=True)


def pack(responses: list[Response], padding: int = 0, counts: GlobalCounts | None = None) -> LossInputs:
    """Neither old log-probs nor advantages may be looked at."""
    inputs = pack_responses(responses, padding, counts)
    nothing = torch.full_like(inputs.old_logprobs, torch.nan)
    return replace(
        inputs,
        ref_logprobs=inputs.old_logprobs,
        old_logprobs=nothing,
        advantages=torch.full((len(responses),), torch.nan),
    )


def check(out: LossOutputs, inputs: LossInputs, loss: float, slopes: list[float]) -> None:
    assert out.loss.dtype == torch.float64
    assert out.loss.item() == pytest.approx(loss, abs=1e-14) and out.value.item() == out.loss.item()
    assert gradient(out.loss, inputs).tolist() == pytest.approx(slopes, abs=1e-14)


def test_sigmoid_by_hand():
    """One pair, h = 0.5 - (-0.3) = 0.8, beta h = 0.4: L = -log sigmoid(0.4) = log(1 + e^-0.4).

    dL/dh = -beta sigmoid(-beta h) = -0.5 / (1 + e^0.4), and dh/dlogp is 1 at trained tokens of the chosen answer, -1 at
    those of the rejected, 0 elsewhere.
    """
    inputs = pack([CHOSEN, REJECTED], padding=2)
    g = 0.5 / (1 + math.exp(0.4))
    check(dpo_loss(inputs, SIGMOID), inputs, math.log1p(math.exp(-0.4)), [0, -g, -g, 0, g, 0, g, 0, 0])


def test_ipo_by_hand():
    """L = (h - 1 / (2 beta))^2 = (0.8 - 1)^2 = 0.04, dL/dh = 2 (0.8 - 1) = -0.4."""
    inputs = pack([CHOSEN, REJECTED], padding=2)
    check(dpo_loss(inputs, IPO), inputs, 0.04, [0, -0.4, -0.4, 0, 0.4, 0, 0.4, 0, 0])


@pytest.mark.parametrize(
    ("loss", "value", "slope"),
    [("sigmoid", math.log1p(math.exp(-1.125)), -0.5 / (1 + math.exp(1.125))), ("ipo", 1.5625, 2.5)],
)
def test_length_normalised_by_hand(loss, value, slope):
    """Means 0.5 / 2 = 0.25 of the chosen answer and -2 / 1 = -2 of the rejected one: h = 2.25 where the sums have 2.5.

    sigmoid: log(1 + e^-(0.5 * 2.25)), slope by h -0.5 / (1 + e^1.125). ipo: (2.25 - 1)^2, slope 2 * 1.25. A chosen
    token has half of the slope, the rejected one all of it with the other sign. The table keeps the sums.
    """
    inputs = pack([CHOSEN, BETTER], padding=2)
    options = replace(SIGMOID, preference_loss=loss, length_normalised=True)
    out = dpo_loss(inputs, options)
    check(out, inputs, value, [0, slope / 2, slope / 2, 0, -slope, 0, 0])
    assert out.table.column("sum_log_ratio").tolist() == pytest.approx([0.5, -2.0], abs=1e-14)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_length_normalised_over_two_ranks(loss):
    """Tokens of one sequence on two context-parallel ranks: each divides by the whole length, and gradients add up."""
    inputs = random_inputs(5, by_token=False)
    options = replace(SIGMOID, preference_loss=loss, length_normalised=True)
    whole = dpo_loss(inputs, options)
    values, slopes, tables = by_ranks("dpo", inputs, options, torch.tensor([0, 1, 0, 1, 0, 1, 1, 0, 0, 1]))
    torch.testing.assert_close(slopes, gradient(whole.loss, inputs), rtol=1e-12, atol=1e-14)
    for value, table in zip(values, tables, strict=True):
        assert value.item() == pytest.approx(whole.value.item(), abs=1e-13)
        torch.testing.assert_close(table, whole.table.values, rtol=1e-12, atol=1e-13)


def test_at_the_reference_the_loss_is_log_2():
    """h = 0: L = log 2 whatever beta is, and the slope is beta / 2; ipo's is 1 / (4 beta^2), slope -1 / beta."""
    same = [replace(r, new=r.old) for r in (CHOSEN, REJECTED)]
    inputs = pack(same)
    check(dpo_loss(inputs, SIGMOID), inputs, math.log(2), [0, -0.25, -0.25, 0, 0.25, 0, 0.25])
    inputs = pack(same)
    check(dpo_loss(inputs, IPO), inputs, 1.0, [0, -2, -2, 0, 2, 0, 2])


@pytest.mark.parametrize("options", [SIGMOID, IPO])
def test_a_swapped_pair_is_the_opposite_preference(options):
    """h changes its sign: 0.8 becomes -0.8. -log sigmoid(x) = x + -log sigmoid(-x) makes the difference beta h = 0.4;
    for ipo it is (h + 1)^2 - (h - 1)^2 = 4 h = 3.2."""
    there, back = (dpo_loss(pack(pair), options).loss.item() for pair in ([CHOSEN, REJECTED], [REJECTED, CHOSEN]))
    assert back - there == pytest.approx(0.4 if options is SIGMOID else 3.2, abs=1e-14)


@pytest.mark.parametrize("options", [SIGMOID, IPO])
def test_any_split_into_microbatches_gives_the_same_step(options):
    """Denominators are those of the step, 4 sequences or 2 pairs; each microbatch's own mean would double every share.
    Padding differs, and h of the second pair is -2.5."""
    responses = [CHOSEN, REJECTED, BETTER, WORSE]
    whole = pack(responses)
    expected = dpo_loss(whole, options)
    counts = GlobalCounts(4, 6)
    parts = [pack(responses[:2], 1, counts), pack(responses[2:], 3, counts)]
    shares = [dpo_loss(part, options) for part in parts]
    h = torch.tensor([0.8, -2.5], dtype=torch.float64)
    by_pair = -torch.nn.functional.logsigmoid(h / 2) if options is SIGMOID else (h - 1).square()
    assert [share.loss.item() for share in shares] == pytest.approx((by_pair / 2).tolist(), abs=1e-14)
    assert expected.loss.item() == pytest.approx(by_pair.mean().item(), abs=1e-14)
    slopes = [gradient(s.loss, p)[: -(1, 3)[i]] for i, (s, p) in enumerate(zip(shares, parts, strict=True))]
    torch.testing.assert_close(torch.cat(slopes), gradient(expected.loss, whole), rtol=0, atol=1e-15)


@pytest.mark.parametrize("options", [SIGMOID, IPO, NORMALISED])
def test_gradient_against_finite_differences(options):
    inputs = pack([CHOSEN, REJECTED, BETTER, WORSE], padding=1)
    value = lambda logprobs: dpo_loss(replace(inputs, logprobs=logprobs), options).loss  # noqa: E731
    assert torch.autograd.gradcheck(value, (inputs.logprobs,))


def test_the_table_holds_the_log_ratios_to_the_reference():
    table = dpo_loss(pack([CHOSEN, REJECTED]), SIGMOID).table
    assert table.column("sum_log_ratio").tolist() == pytest.approx([0.5, -0.3], abs=1e-14)
    assert table.column("num_tokens").tolist() == [2, 2]
    assert not table.column("clipped_low_tokens").any() and not table.column("clipped_high_tokens").any()


def test_sums_are_fp64_from_fp32_log_probs():
    """Chosen 2^24 + 1 + 1, rejected 2^24: h = 2, which fp32 sums would round to 0. L = (2 - 1)^2 = 1, slope 2."""
    pair = [Response([2.0**24, 1.0, 1.0], [0.0] * 3, [1, 1, 1]), Response([2.0**24], [0.0], [1])]
    inputs = pack(pair)
    inputs = replace(
        inputs, logprobs=inputs.logprobs.detach().float().requires_grad_(), ref_logprobs=inputs.ref_logprobs.float()
    )
    out = dpo_loss(inputs, IPO)
    assert out.loss.item() == 1.0
    slopes = gradient(out.loss, inputs)
    assert slopes.dtype == torch.float32 and slopes.tolist() == [2, 2, 2, -2]


def test_a_recipe_names_loss_and_beta():
    """beta 0.5, ipo: 0.04 as above; beta 0.1, sigmoid, the defaults: log(1 + e^-0.08)."""
    inputs = pack([CHOSEN, REJECTED])
    ipo = AlgorithmConfig("dpo", preference=PreferenceConfig(beta=0.5, loss="ipo"))
    assert policy_loss(ipo)(inputs).loss.item() == pytest.approx(0.04, abs=1e-14)
    assert policy_loss(AlgorithmConfig("dpo"))(inputs).loss.item() == pytest.approx(math.log1p(math.exp(-0.08)))
