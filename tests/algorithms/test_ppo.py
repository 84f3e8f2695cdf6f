"""PPO's value loss and generalised advantage estimation, by hand and against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.algorithms.advantages import gae, last_tokens
from gspo_megatron.algorithms.ppo import value_loss


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_value_loss_by_hand():
    """c = 0.2, old values 0, M = 5 (one token is on another rank), terms t = max((V - R)^2, (clip(V) - R)^2):

    V 0.1, R 1: not bounded, t = 0.81, d/dV = (V - R) / M = -0.18
    V 0.5, R 1: bounded at 0.2, which is further from R: t = 0.64, no gradient, counted
    V 0.5, R 0: bounded at 0.2, but V itself is further: t = 0.25, pulled back with 0.5 / 5 = 0.1
    V -0.7, R -1: bounded at -0.2: t = 0.64, no gradient, counted
    a masked token with a large error: nothing. Loss = 2.34 / (2 * 5).
    """
    values = column(0.1, 0.5, 0.5, -0.7, 9.0).requires_grad_()
    old, returns, mask = torch.zeros(5), column(1, 1, 0, -1, -9), column(1, 1, 1, 1, 0)
    loss, clipped = value_loss(values, old, returns, mask, 0.2, 5)
    assert loss.item() == pytest.approx(0.234, abs=1e-15)
    assert clipped.item() == 2
    loss.backward()
    torch.testing.assert_close(values.grad, column(-0.18, 0, 0.1, 0, 0), rtol=0, atol=1e-15)


def test_the_bound_moves_with_the_old_value():
    """Old value 1, c = 0.2: V = 0.5 towards R = 0 is held at 0.8, (0.8)^2 / 2 = 0.32."""
    loss, clipped = value_loss(column(0.5), column(1), column(0), column(1), 0.2, 1)
    assert (loss.item(), clipped.item()) == (pytest.approx(0.32, abs=1e-15), 1)


def test_an_infinite_clip_is_half_the_squared_error():
    """(0.81 + 0.25 + 0.25 + 0.09) / 10."""
    values = column(0.1, 0.5, 0.5, -0.7).requires_grad_()
    loss, clipped = value_loss(values, torch.zeros(4), column(1, 1, 0, -1), torch.ones(4), math.inf, 5)
    assert (loss.item(), clipped.item()) == (pytest.approx(0.14, abs=1e-15), 0)
    loss.backward()
    torch.testing.assert_close(values.grad, column(-0.18, -0.1, 0.1, 0.06), rtol=0, atol=1e-15)


def test_value_loss_gradient_is_that_of_its_value():
    """Finite differences in fp64, on both sides of the bound and inside."""
    generator = torch.Generator().manual_seed(5)
    values, old, returns = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    mask = (torch.rand(40, generator=generator) < 0.8).double()
    clipped = value_loss(values, old, returns, mask, 0.4, 40)[1]
    assert 5 < float(clipped) < float(mask.sum()) - 5
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, mask, 0.4, 40)[0], values, eps=1e-7)


def test_gae_by_hand():
    """gamma = lambda = 1/2. Sequence 0: a prompt token, a, a gap, b, c; r = (1/2, 0, 2), V = (1, 3, -1):

    delta_c = 2 + 1        = 3,        A_c = 3,                      R_c = 2
    delta_b = -1/2 - 3     = -3.5,     A_b = -3.5 + 3/4   = -2.75,   R_b = 0.25
    delta_a = 1/2 + 3/2 - 1 = 1,       A_a = 1 - 2.75 / 4 = 0.3125,  R_a = 1.3125

    Sequence 1 has no trained token. Sequence 2: one, r = -1 and V = 4, so A = -5 and R = -1. Then padding. What stands
    at masked tokens (99) counts nowhere.
    """
    mask = column(0, 1, 0, 1, 1, 0, 0, 0, 1, 0)
    rewards = column(99, 0.5, 99, 0, 2, 99, 99, 99, -1, 99)
    values = column(99, 1, 99, 3, -1, 99, 99, 99, 4, 99)
    bounds = torch.tensor([0, 5, 7, 9, 10], dtype=torch.int32)
    advantages, returns = gae(rewards, values, mask, bounds, 3, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0, 0.3125, 0, -2.75, 3, 0, 0, 0, -5, 0]
    assert returns.tolist() == [0, 1.3125, 0, 0.25, 2, 0, 0, 0, -1, 0]


def test_without_discount_it_is_the_reward_to_go_less_the_value():
    """gamma = lambda = 1: the values between cancel. r = (1, 2, 4): to go 7, 6, 4."""
    values = column(0, 0.5, -3, 10)
    advantages, returns = gae(column(0, 1, 2, 4), values, column(0, 1, 1, 1), torch.tensor([0, 4]), 1, 1.0, 1.0)
    assert returns.tolist() == [0, 7, 6, 4]
    assert advantages.tolist() == [0, 6.5, 9, -6]


@st.composite
def sequences(draw) -> list[list[tuple[float, float, int]]]:
    """Up to four sequences of up to seven (reward, value, mask)."""
    token = st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.sampled_from([0, 1, 1]))
    return draw(st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=4))


@settings(max_examples=60, deadline=None)
@given(packed=sequences(), gamma=st.floats(0, 1), lam=st.floats(0, 1), padding=st.integers(0, 2))
def test_gae_equals_the_double_sum(packed, gamma, lam, padding):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} written out, over the trained tokens of each sequence."""
    expected = []
    for sequence in packed:
        trained = [(r, v) for r, v, m in sequence if m]
        after = [*(v for _, v in trained), 0.0][1:]
        deltas = [r + gamma * v_next - v for (r, v), v_next in zip(trained, after, strict=True)]
        sums = iter(
            math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
        )
        expected += [next(sums) if m else 0.0 for _, _, m in sequence]
    flat = [token for sequence in packed for token in sequence] + [(7.0, 7.0, 0)] * padding
    rewards, values, mask = (column(*numbers) for numbers in zip(*flat, strict=True))
    bounds = [0]
    for sequence in packed:
        bounds.append(bounds[-1] + len(sequence))
    bounds += [bounds[-1] + padding] * (padding > 0)
    advantages, returns = gae(rewards, values, mask, torch.tensor(bounds), len(packed), gamma, lam)
    torch.testing.assert_close(advantages, column(*expected, *[0.0] * padding), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, torch.where(mask > 0, advantages + values, 0.0), rtol=1e-12, atol=1e-12)


def test_the_last_trained_token_of_each_sequence():
    """Sequence 0 ends in a masked token, 1 has no trained one, 2 ends in one; then padding."""
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3])
    assert last_tokens(column(0, 1, 1, 0, 0, 0, 0, 1, 0), ids, 3).tolist() == [2, -1, 7]
