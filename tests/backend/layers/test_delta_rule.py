"""The gated delta rule and its convolution by value: against the formula token by token, over borders of chunks and
sequences. That the layer is transformers' is tested in hf/test_round_trip.py, its gradient in hf/test_training.py, its
cache in test_ways_through_attention.py."""

import pytest
import torch

from gspo_megatron.backend.layers import delta_rule


def tokens(length: int, seed: int = 0) -> list[torch.Tensor]:
    """query, key, value, log_decay, rate of 2 sequences with 3 heads, fp64."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, length, 3, d, generator=generator, dtype=torch.float64) for d in (4, 4, 5))
    log_decay, rate = torch.rand(2, 2, length, 3, generator=generator, dtype=torch.float64)
    return [query, delta_rule.unit(key), value, -0.2 * log_decay, rate]


def by_token(given: list[torch.Tensor], memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula with plain loops over sequences, tokens and heads."""
    outputs, memory = torch.zeros_like(given[2]), memory.clone()
    for n in range(2):
        for t in range(given[0].size(1)):
            for h in range(3):
                query, key, value, log_decay, rate = (x[n, t, h] for x in given)
                kept = log_decay.exp() * memory[n, h]
                memory[n, h] = kept + torch.outer(key, rate * (value - kept.t() @ key))
                outputs[n, t, h] = memory[n, h].t() @ query
    return outputs, memory


@pytest.mark.parametrize("length", [1, 3, 8, 21], ids=lambda n: f"{n} tokens in chunks of 8")
def test_chunks_are_the_formula(monkeypatch, length):
    """fp64, from a memory that is not empty: outputs and the memory at the end to 1e-12."""
    monkeypatch.setattr(delta_rule, "CHUNK", 8)
    memory = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = tokens(length)
    for ours, expected in zip(delta_rule.chunked(*given, memory), by_token(given, memory), strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-12)


def test_steps_go_on_where_chunks_ended():
    given, memory = tokens(7), torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    whole, last = delta_rule.chunked(*given, memory)
    _, memory = delta_rule.chunked(*(x[:, :5] for x in given), memory)
    for t in (5, 6):
        out, memory = delta_rule.step(*(x[:, t] for x in given), memory)
        assert torch.allclose(out, whole[:, t], rtol=0, atol=1e-12)
    assert torch.allclose(memory, last, rtol=0, atol=1e-12)


def test_tokens_of_rate_and_log_decay_0_leave_the_memory_alone():
    given = tokens(4)
    padded = [torch.cat([x, torch.zeros_like(x)], 1) for x in given]
    memory = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    assert torch.allclose(delta_rule.chunked(*given, memory)[1], delta_rule.chunked(*padded, memory)[1], atol=1e-14)


def test_strong_decay_does_not_overflow():
    """exp of the sum of 64 log-decays of -20 is 0, of the opposite sign infinite: nothing of it may come out."""
    query, key, value, log_decay, rate = (x.float() for x in tokens(70))
    log_decay = torch.full_like(log_decay, -20).requires_grad_()
    out, _ = delta_rule.chunked(query, key, value, log_decay, rate, torch.zeros(2, 3, 4, 5))
    out.sum().backward()
    assert out.isfinite().all() and log_decay.grad.isfinite().all()


def test_the_convolution_looks_back_and_not_ahead():
    """Kernel 1, 10, 100 on 1, 2, 3 behind a 5: 50 + 100, 5 + 10 + 200, 1 + 20 + 300."""
    x, before = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1), torch.tensor([0.0, 5.0]).view(1, 2, 1)
    out, joined = delta_rule.causal_convolution(x, torch.tensor([[1.0, 10.0, 100.0]]), before)
    assert out.flatten().tolist() == [150.0, 215.0, 321.0]  # SiLU leaves them as they are, to fp32's precision
    assert joined.flatten().tolist() == [0, 5, 1, 2, 3]
