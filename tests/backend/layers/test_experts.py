"""Experts computed together: products against the formula, and a model's experts against Megatron's own."""

import torch

from gspo_megatron.backend.layers.experts import ExpertProducts, PackedExperts, SequentialMLP
from gspo_megatron.backend.parallel import topology
from tests.backend.small import SINGLE, small_policy
from tools.validation.ranks import spawn

COUNTS = [3, 0, 1, 4]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_products_and_their_gradients_are_those_of_each_expert():
    """Rows 0 to 2 by expert 0, row 3 by expert 2, rows 4 to 7 by expert 3; expert 1 has none, and no gradient."""
    x, weights = drawn(8, 5).requires_grad_(), [(drawn(4, 5) + e).requires_grad_() for e in range(4)]
    plain, copies = x.detach().clone().requires_grad_(), [w.detach().clone().requires_grad_() for w in weights]
    expected = torch.cat([rows @ w.t() for rows, w in zip(plain.split(COUNTS), copies, strict=True)])
    out = ExpertProducts.apply(x, COUNTS, *weights)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    upstream = drawn(8, 4)
    out.backward(upstream)
    expected.backward(upstream)
    assert torch.allclose(x.grad, plain.grad, rtol=0, atol=1e-13)
    assert weights[1].grad is None
    for e in (0, 2, 3):
        assert torch.allclose(weights[e].grad, copies[e].grad, rtol=0, atol=1e-13)


def test_a_rank_whose_experts_get_nothing_has_an_empty_output():
    x, weights = torch.empty(0, 5, requires_grad=True), [torch.ones(4, 5, requires_grad=True) for _ in range(2)]
    out = ExpertProducts.apply(x, [0, 0], *weights)
    out.sum().backward()
    assert out.shape == (0, 4) and x.grad.shape == (0, 5) and weights[0].grad is None


def both_ways(rank: int, world_size: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Of each MoE layer of a model: output and gradients by PackedExperts, and by Megatron's forward."""
    policy = small_policy(SINGLE, torch.float64)
    found = []
    for experts in [module for module in policy.models[0].modules() if isinstance(module, PackedExperts)]:
        number, width = experts.num_local_experts, experts.config.hidden_size
        counts = torch.tensor([5, 0, *[2] * (number - 2)])
        ways = []
        for forward in (PackedExperts.forward, SequentialMLP.forward):
            hidden, probs = drawn(int(counts.sum()), width).requires_grad_(), drawn(int(counts.sum())).requires_grad_()
            weights = list(experts.parameters())
            out, bias = forward(experts, hidden, counts, probs)
            assert bias is None
            grads = torch.autograd.grad(out.square().sum(), [hidden, probs, *weights], allow_unused=True)
            zeros = [torch.zeros_like(x) for x in (hidden, probs, *weights)]
            ways.append([out.detach(), *(z if g is None else g for z, g in zip(zeros, grads, strict=True))])
        found.append(tuple(ways))
    topology.destroy_model_parallel()
    return found


def test_a_model_s_experts_are_megatron_s():
    """Output and the gradients of tokens, probabilities and all weights, in fp64, with an expert that has no token."""
    found = spawn(both_ways, 1)[0]
    assert found
    for ours, theirs in found:
        assert all(
            float((a - b).abs().max()) < 1e-13 * max(1.0, float(b.abs().max()))
            for a, b in zip(ours, theirs, strict=True)
        )
