"""Log-probs and entropy over a vocabulary, whole and in shards, against torch.log_softmax in fp64."""

import math

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.ops.vocab_logprobs import combine, local_stats, vocab_logprobs
from tools.validation.ranks import spawn

TOKENS, VOCAB, TEMPERATURE = 24, 32, 0.7
COLLECTIVES = ["all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor", "all_to_all"]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [T, V] fp64, targets [T] over all shards, weights [T] that make the gradient uneven).

    The first three rows have a shard far above, a shard far below, and a target far below the others.
    """
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    logits[0, :8] += 1e4
    logits[1, 24:] -= 1e4
    logits[2, 5] = -1e4
    targets = (torch.arange(TOKENS) * 7 + 5) % VOCAB
    targets[2] = 5
    return logits, targets, torch.randn(TOKENS, generator=generator, dtype=torch.float64)


def reference(logits, targets, temperature):
    """(log-probs, entropy) from torch.log_softmax in fp64."""
    full = torch.log_softmax(logits.double() / temperature, dim=-1)
    return full.gather(1, targets.unsqueeze(1)).squeeze(1), -(full.exp() * full).sum(-1)


def reference_gradient(logits, targets, weights, temperature, output=0):
    """Of sum(weights * log-probs), or * entropy for output 1."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad((reference(leaf, targets, temperature)[output] * weights).sum(), leaf)[0]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_two_tokens_by_hand():
    """Logits (0, ln 9): at temperature 1 p = (1, 9) / 10; at 2 they are (0, ln 3), so p = (1, 3) / 4.

    Entropy = -sum p ln p. d logp_1 / d logits at temperature 2 = (-p_0, 1 - p_1) / 2 = (-1/8, 1/8).
    """
    logits = torch.tensor([[0.0, math.log(9)]] * 2, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1])
    for temperature, p in ((1.0, 0.1), (2.0, 0.25)):
        logprobs, entropy = vocab_logprobs(logits, targets, temperature)
        close(logprobs, torch.tensor([math.log(p), math.log(1 - p)], dtype=torch.float64), 1e-15)
        h = -p * math.log(p) - (1 - p) * math.log(1 - p)
        close(entropy, torch.tensor([h, h], dtype=torch.float64), 1e-15)
    (grad,) = torch.autograd.grad(logprobs[1], logits)
    close(grad, torch.tensor([[0, 0], [-0.125, 0.125]], dtype=torch.float64), 1e-15)


def test_uniform_logits_have_the_entropy_of_the_vocabulary():
    """ln V at any temperature, whatever constant is added."""
    logprobs, entropy = vocab_logprobs(torch.full((3, 50), -7.5, dtype=torch.float64), torch.tensor([0, 20, 49]), 0.3)
    close(entropy, torch.full((3,), math.log(50), dtype=torch.float64), 1e-14)
    close(logprobs, -entropy, 1e-14)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
def test_values_and_gradient_against_log_softmax(temperature):
    logits, targets, weights = batch()
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = vocab_logprobs(leaf, targets, temperature)
    want, want_entropy = reference(logits, targets, temperature)
    torch.testing.assert_close(logprobs, want, rtol=1e-13, atol=1e-13)
    close(entropy, want_entropy, 1e-12)
    assert torch.equal(leaf, logits)
    for output, value in enumerate((logprobs, entropy)):
        want_gradient = reference_gradient(logits, targets, weights, temperature, output)
        for _ in range(2):  # a second backward over the same graph finds what was saved unharmed
            (grad,) = torch.autograd.grad((value * weights).sum(), leaf, retain_graph=True)
            close(grad, want_gradient, 1e-13)


def test_gradient_against_finite_differences():
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3])
    assert torch.autograd.gradcheck(lambda x: vocab_logprobs(x, targets, TEMPERATURE), (logits,))
    assert torch.autograd.gradcheck(lambda x: vocab_logprobs(x, targets, TEMPERATURE)[1], (logits,))


def test_entropy_gradient_by_hand():
    """p = (1/4, 3/4) at temperature 2: H = ln 4 - 3/4 ln 3, log p + H = (-3/4 ln 3, 1/4 ln 3), so
    dH/dx = -p (log p + H) / 2 = (3/32 ln 3, -3/32 ln 3). A uniform p is the entropy's maximum: gradient 0."""
    logits = torch.tensor([[0.0, math.log(9)], [5.0, 5.0]], dtype=torch.float64, requires_grad=True)
    _, entropy = vocab_logprobs(logits, torch.tensor([0, 1]), 2.0)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    part = 3 / 32 * math.log(3)
    close(grad, torch.tensor([[part, -part], [0, 0]], dtype=torch.float64), 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_an_entropy_gradient_the_backward_is_the_plain_one(dtype):
    """The same bits as (1[j = target] - softmax_j) g / temperature written down here; and a zero gradient of the
    entropy, which is not the same as none, changes no value."""
    logits, targets, weights = (x.to(dtype) if x.is_floating_point() else x for x in batch())
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = vocab_logprobs(leaf, targets, TEMPERATURE)
    (grad,) = torch.autograd.grad(logprobs, leaf, weights, retain_graph=True)
    shifted = logits / TEMPERATURE
    exponentials = (shifted - shifted.amax(-1, keepdim=True)).exp()
    scale = (weights / TEMPERATURE).unsqueeze(-1)
    plain = exponentials * (1 / exponentials.sum(-1, keepdim=True)) * -scale
    plain.scatter_add_(-1, targets.unsqueeze(-1), scale)
    assert torch.equal(grad, plain)
    (with_zeros,) = torch.autograd.grad([logprobs, entropy], leaf, [weights, torch.zeros_like(entropy)])
    assert torch.equal(with_zeros, grad)


def test_entropy_gradient_is_finite_where_probabilities_underflow():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    logprobs, entropy = vocab_logprobs(logits, torch.tensor([1]))
    assert torch.autograd.grad(entropy.sum(), logits)[0].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_do_not_overflow(dtype):
    """(1e4, -1e4, 0): log-probs (0, -2e4, -1e4), entropy 0, gradient one-hot minus (1, 0, 0). Temperature 2 halves."""
    for temperature in (1.0, 2.0):
        logits = torch.tensor([[1e4, -1e4, 0.0]] * 3, dtype=dtype, requires_grad=True)
        logprobs, entropy = vocab_logprobs(logits, torch.arange(3), temperature)
        assert (logprobs * temperature).tolist() == [0, -2e4, -1e4] and entropy.tolist() == [0, 0, 0]
        (grad,) = torch.autograd.grad(logprobs.sum() * temperature, logits)
        assert grad.tolist() == [[0, 0, 0], [-1, 1, 0], [-1, 0, 1]]
    equal = torch.full((1, 4), -1e4, dtype=dtype)
    assert vocab_logprobs(equal, torch.tensor([2]))[0].item() == pytest.approx(-math.log(4), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_logit_of_minus_infinity_is_a_token_of_probability_0(dtype, temperature):
    """(0, -inf, ln 3) by temperature is p = (1/4, 0, 3/4): H = ln 4 - 3/4 ln 3, for p log p is 0 at p = 0.

    d logp_2 = (-1/4, 0, 1/4) / temperature, dH = (3/16 ln 3, 0, -3/16 ln 3) / temperature (above). An overflow to -inf
    within the operator (-3e38 less 3e38 in fp32) is the same.
    """
    far = -torch.inf if temperature == 1.0 else torch.finfo(dtype).min
    logits = temperature * torch.tensor([[0.0, far, math.log(3)]], dtype=dtype)
    logits.requires_grad_()
    logprobs, entropy = vocab_logprobs(logits, torch.tensor([2]), temperature)
    close(logprobs.double(), torch.tensor([math.log(0.75)], dtype=torch.float64), 1e-7)
    close(entropy.double(), torch.tensor([math.log(4) - 0.75 * math.log(3)], dtype=torch.float64), 1e-7)
    by_logprob, by_entropy = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (logprobs, entropy))
    part = 3 / 16 * math.log(3)
    close(by_logprob.double() * temperature, torch.tensor([[-0.25, 0, 0.25]], dtype=torch.float64), 1e-7)
    close(by_entropy.double() * temperature, torch.tensor([[part, 0, -part]], dtype=torch.float64), 1e-7)


def test_a_part_of_the_vocabulary_may_be_minus_infinity_altogether():
    """As a padded vocabulary is masked. Parts (0, ln 3) and (-inf, -inf), in either order, give the numbers of the
    first alone; all of a token's logits -inf, inf, or not a number give not-a-number, as torch.log_softmax does."""
    near = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    far = torch.full_like(near, -torch.inf)
    inside, place = torch.tensor([True]), torch.tensor([1])
    alone = local_stats(near.clone(), place, inside)[0]
    other, exponentials = local_stats(far, place, ~inside)
    assert exponentials.tolist() == [[0.0, 0.0]]
    for parts in ([alone, other], [other, alone]):
        together = combine(torch.stack(parts))
        assert together.tolist() == alone.tolist()
    for row in ([-torch.inf] * 2, [0.0, torch.nan], [0.0, torch.inf]):
        values = vocab_logprobs(torch.tensor([row]), torch.tensor([0]))
        assert all(bool(value.isnan().all()) for value in values)


def test_fp32_rounding_is_below_the_clip_range():
    """fp32 logits over 4096 tokens: every log-prob (about -9) within two fp32 steps of 2^-20 of the fp64 value."""
    generator = torch.Generator().manual_seed(8)
    logits = 2 * torch.randn(64, 4096, generator=generator)
    targets = torch.randint(0, 4096, (64,), generator=generator)
    logprobs, entropy = vocab_logprobs(logits, targets, TEMPERATURE)
    assert logprobs.dtype == entropy.dtype == torch.float32
    want, want_entropy = reference(logits, targets, TEMPERATURE)
    close(logprobs.double(), want, 2 * 2.0**-20)
    close(entropy.double(), want_entropy, 2e-5)
    assert abs((logprobs.double() - want).mean().item()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_refused(dtype):
    with pytest.raises(TypeError, match=f"{dtype}.*fp32 or fp64"):
        vocab_logprobs(torch.zeros(2, 4, dtype=dtype), torch.tensor([0, 1]))


class Count:
    """Wraps every collective that could run, and keeps (name, numbers sent) of each call."""

    def __init__(self):
        self.calls: list[tuple[str, int]] = []
        for name in COLLECTIVES:
            setattr(dist, name, self._wrap(name, getattr(dist, name)))

    def _wrap(self, name, collective):
        def counted(*args, **kwargs):
            sent = args[1] if name == "all_gather_into_tensor" else args[0]
            self.calls.append((name, sent.numel()))
            return collective(*args, **kwargs)

        return counted

    def take(self) -> list[tuple[str, int]]:
        calls, self.calls = self.calls, []
        return calls


def sharded(rank, world_size):
    """{tp: (log-probs, entropy, this shard's gradient, collectives of forward, of backward, the entropy's gradient)}
    for TP 2 and TP 4."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]  # in the second, a rank's place differs from its number
    logits, targets, weights = batch()
    results, count = {}, Count()
    for size, group in ((2, pairs[rank // 2]), (4, dist.group.WORLD)):
        place = rank % size
        shard = logits.chunk(size, dim=1)[place].clone().requires_grad_()
        logprobs, entropy = vocab_logprobs(shard, targets, TEMPERATURE, group)
        forward = count.take()
        (grad,) = torch.autograd.grad((logprobs * weights).sum(), shard, retain_graph=True)
        (entropy_grad,) = torch.autograd.grad((entropy * weights).sum(), shard)
        results[size] = (logprobs.detach(), entropy.detach(), grad, forward, count.take(), entropy_grad)
    return results


@pytest.fixture(scope="module")
def ranks():
    return spawn(sharded, 4)


@pytest.mark.parametrize("size", [2, 4])
def test_shards_give_the_values_of_the_whole(ranks, size):
    logits, targets, _ = batch()
    want, want_entropy = reference(logits, targets, TEMPERATURE)
    for rank in ranks:
        torch.testing.assert_close(rank[size][0], want, rtol=1e-13, atol=1e-12)
        close(rank[size][1], want_entropy)


@pytest.mark.parametrize("size", [2, 4])
def test_each_shard_gets_its_slice_of_the_gradient(ranks, size):
    logits, targets, weights = batch()
    for output, place in enumerate((2, 5)):
        slices = reference_gradient(logits, targets, weights, TEMPERATURE, output).chunk(size, dim=1)
        for number, rank in enumerate(ranks):
            close(rank[size][place], slices[number % size])


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_get_the_same_bits(ranks, size):
    for rank in ranks[1:]:
        assert torch.equal(rank[size][0], ranks[0][size][0]) and torch.equal(rank[size][1], ranks[0][size][1])


@pytest.mark.parametrize("size", [2, 4])
def test_one_collective_of_four_numbers_a_token(ranks, size):
    for rank in ranks:
        assert rank[size][3] == [("all_gather_into_tensor", 4 * TOKENS)] and rank[size][4] == []
