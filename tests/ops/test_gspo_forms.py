"""tools/benchmarks/gspo_forms.py: each form that the benchmark compares with is the GSPO loss, with its gradient."""

import pytest
import torch

from gspo_megatron.ops.sequence_ratio import gspo_surrogate, sequence_partials
from tools.benchmarks import gspo_forms as forms

LENGTHS = [5, 1, 9, 3, 7, 4]
PADDED = [forms.padded, forms.same_outputs, forms.trl, forms.verl, forms.nemo_rl]


def case():
    """fp64, every sequence with a trained token, ratios to both sides of the bounds."""
    generator = torch.Generator().manual_seed(4)
    old = -3 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)
    new = old + 1e-3 * torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)
    mask = (torch.rand(sum(LENGTHS), generator=generator) > 0.3).double()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    mask[bounds[:-1].long()] = 1
    advantages = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    return new.requires_grad_(), old, mask, advantages, bounds


def expected(new, old, mask, advantages, bounds):
    table = sequence_partials(new, old, mask, bounds)
    loss, ratios, clipped = gspo_surrogate(new, table, advantages, mask, bounds, forms.LOW, forms.HIGH, len(LENGTHS))
    assert (clipped.sum(0) > 0).all() and clipped.sum() < mask.sum()  # the bounds matter, and not everywhere
    return loss.detach(), torch.autograd.grad(loss, new)[0], table, ratios, clipped


@pytest.mark.parametrize("form", [*PADDED, forms.packed, forms.slime], ids=lambda form: form.__name__)
def test_each_form_is_the_same_loss(form):
    new, old, mask, advantages, bounds = case()
    loss, gradient, *_ = expected(new, old, mask, advantages, bounds)
    inputs = [new, old, mask]
    if form in PADDED:
        inputs = [torch.nn.utils.rnn.pad_sequence(list(x.split(LENGTHS)), batch_first=True) for x in inputs]
    more = {forms.packed: [torch.repeat_interleave(torch.tensor(LENGTHS))], forms.slime: [LENGTHS]}
    result = form(*inputs, advantages, *more.get(form, []))
    got = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(got.detach(), loss, rtol=1e-7, atol=1e-9)  # verl adds 1e-8 to the count
    torch.testing.assert_close(torch.autograd.grad(got, new)[0], gradient, rtol=1e-7, atol=1e-9)


def test_the_form_with_the_same_outputs():
    new, old, mask, advantages, bounds = case()
    *_, table, ratios, clipped = expected(new, old, mask, advantages, bounds)
    inputs = [torch.nn.utils.rnn.pad_sequence(list(x.split(LENGTHS)), batch_first=True) for x in (new, old, mask)]
    _, tokens, total, spread, ratio, counts = forms.same_outputs(*inputs, advantages)
    torch.testing.assert_close(torch.stack([tokens, total, *spread]).T, table[:, :5], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(ratio, ratios, rtol=1e-12, atol=0)
    assert torch.equal(counts.T, clipped)
