"""Hand-written responses packed into LossInputs, and GSPO in plain Python to compare with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from gspo_megatron.algorithms.interface import ClipRange, GlobalCounts, LossInputs, LossOptions

WIDE = ClipRange(0.1, 0.2)  # low and high differ, so that swapping them shows
PAPER = ClipRange(3e-4, 4e-4)


@dataclass(frozen=True)
class Response:
    """One sequence, token by token: new and old log-probs, loss mask, and an advantage (or one a token)."""

    new: Sequence[float]
    old: Sequence[float]
    mask: Sequence[int]
    advantage: float | Sequence[float] = 1.0

    @property
    def length(self) -> int:
        """|y_i|."""
        return sum(self.mask)

    @property
    def per_token(self) -> list[float]:
        """The advantage of every token."""
        return [self.advantage] * len(self.new) if isinstance(self.advantage, float) else list(self.advantage)


EMPTY = Response([], [], [], 5.0)  # no token at all
MASKED = Response([-1.0, -2.0], [-3.0, -1.0], [0, 0], 5.0)  # a prompt whose response is empty


def with_ratio(ratio: float, advantage: float) -> Response:
    """A prompt token that must not count, and two trained tokens with d = ln(ratio) +- 0.3, so that s = ratio."""
    mean = math.log(ratio)
    old = [-0.5, -1.5, -0.25]
    return Response([6.5, old[1] + mean + 0.3, old[2] + mean - 0.3], old, [0, 1, 1], advantage)


def count(responses: Sequence[Response]) -> GlobalCounts:
    """Of a whole step; where nothing is trained 1 of each, as the trainer counts."""
    return GlobalCounts(max(1, sum(r.length > 0 for r in responses)), max(1, sum(r.length for r in responses)))


def pack(
    responses: Sequence[Response], padding: int = 0, counts: GlobalCounts | None = None, padding_mask: float = 0.0
) -> LossInputs:
    """One microbatch in fp64. Padding tokens form one more segment with d = 18 and entropy 9; others have entropy 0.5.

    `advantages` is [S], or [T] as soon as one response has an advantage a token.
    """

    def tokens(parts: list[Sequence[float]], pad: float) -> torch.Tensor:
        return torch.tensor([v for part in parts for v in part] + [pad] * padding, dtype=torch.float64)

    if all(isinstance(r.advantage, float) for r in responses):
        advantages = torch.tensor([r.advantage for r in responses], dtype=torch.float64)
    else:
        advantages = tokens([r.per_token for r in responses], 7.0)
    bounds = [0]
    for response in responses:
        bounds.append(bounds[-1] + len(response.new))
    return LossInputs(
        logprobs=tokens([r.new for r in responses], 9.0).requires_grad_(),
        entropy=tokens([[0.5] * len(r.new) for r in responses], 9.0),
        old_logprobs=tokens([r.old for r in responses], -9.0),
        loss_mask=tokens([r.mask for r in responses], padding_mask),
        cu_seqlens=torch.tensor(bounds + [bounds[-1] + padding] * (padding > 0), dtype=torch.int32),
        num_sequences=len(responses),
        advantages=advantages,
        counts=counts or count(responses),
    )


def gradient(loss: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
    """d loss / d logprobs, [T]."""
    return torch.autograd.grad(loss, inputs.logprobs)[0]


def losses_of_split(loss, responses: Sequence[Response], sizes: Sequence[int], clip: ClipRange):
    """(total loss, gradient of all tokens) with the responses cut into microbatches of these sizes."""
    total, gradients, start = 0.0, [], 0
    for size in sizes:
        inputs = pack(responses[start : start + size], padding=size, counts=count(responses))
        share = loss(inputs, options=LossOptions(clip)).loss
        total += share.item()
        gradients.append(gradient(share, inputs)[: inputs.logprobs.numel() - size])
        start += size
    assert start == len(responses)
    return total, torch.cat(gradients)


@dataclass(frozen=True)
class Reference:
    """What plain Python says; per-sequence lists have one entry a sequence."""

    loss: float
    scale: float  # sum of the absolute terms of the loss: rounding is relative to it
    gradient: list[float]  # one a token
    ratios: list[float]
    sum_log_ratio: list[float]
    low: list[int]
    high: list[int]
    margin: float  # the least distance of a counted ratio from a clip bound


def reference(responses: Sequence[Response], clip: ClipRange) -> Reference:
    """Equations 5 to 7 (13 and 14 where advantages differ by token) token by token, sums by math.fsum."""
    number = sum(r.length > 0 for r in responses)
    terms, gradients, ratios, sums, lows, highs, margin = [], [], [], [], [], [], math.inf
    for r in responses:
        sums.append(math.fsum(n - o for n, o, m in zip(r.new, r.old, r.mask, strict=True) if m))
        s = math.exp(sums[-1] / max(r.length, 1))
        ratios.append(s)
        bounded = min(max(s, 1 - clip.low), 1 + clip.high)
        low = high = 0
        for m, a in zip(r.mask, r.per_token, strict=True):
            below, above = s < 1 - clip.low and a < 0, s > 1 + clip.high and a > 0
            weight = m / (max(r.length, 1) * max(number, 1))
            terms.append(-weight * min(s * a, bounded * a))
            gradients.append(0.0 if below or above else -weight * s * a)
            low, high = low + (below and m), high + (above and m)
        lows.append(low)
        highs.append(high)
        if r.length:
            margin = min(margin, abs(s - 1 + clip.low), abs(s - 1 - clip.high))
    scale = math.fsum(abs(t) for t in terms)
    return Reference(math.fsum(terms), scale, gradients, ratios, sums, lows, highs, margin)


@st.composite
def ragged(draw: st.DrawFn, by_token: bool) -> list[Response]:
    """Up to five responses of 0 to 6 tokens: masks with gaps, log-ratios up to +-300, one advantage a token or all."""
    advantages = st.floats(-3, 3, width=32)
    responses = []
    for _ in range(draw(st.integers(1, 5))):
        length = draw(st.integers(0, 6))
        reach = draw(st.sampled_from([1e-3, 1.0, 300.0]))
        old = draw(st.lists(st.floats(-50, 0), min_size=length, max_size=length))
        move = draw(st.lists(st.floats(-reach, reach), min_size=length, max_size=length))
        mask = draw(st.lists(st.sampled_from([0, 1, 1]), min_size=length, max_size=length))
        advantage = draw(st.lists(advantages, min_size=length, max_size=length) if by_token else advantages)
        responses.append(Response([o + d for o, d in zip(old, move, strict=True)], old, mask, advantage))
    return responses


def assert_matches(outputs, inputs: LossInputs, expected: Reference) -> None:
    """Loss, gradient and table against the reference, to the rounding of fp64."""
    tokens = len(expected.gradient)
    assert abs(outputs.loss.item() - expected.loss) <= 1e-11 * expected.scale + 1e-15
    got = gradient(outputs.loss, inputs)
    want = torch.tensor(expected.gradient, dtype=torch.float64)
    torch.testing.assert_close(got[:tokens], want, rtol=1e-11, atol=1e-15)
    assert not got[tokens:].any()
    assert outputs.table.column("clipped_low_tokens").tolist() == expected.low
    assert outputs.table.column("clipped_high_tokens").tolist() == expected.high
    sums = torch.tensor(expected.sum_log_ratio, dtype=torch.float64)
    torch.testing.assert_close(outputs.table.column("sum_log_ratio"), sums, rtol=1e-12, atol=1e-12)
