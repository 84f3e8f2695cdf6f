"""Log-probs and entropy from hidden states and the LM head, against torch.log_softmax of full logits in fp64."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from gspo_megatron.ops import linear_logprobs as op
from gspo_megatron.ops.linear_logprobs import linear_logprobs
from tests.ops.test_vocab_logprobs import Count
from tools.validation.ranks import spawn

TOKENS, HIDDEN, VOCAB, TEMPERATURE = 20, 6, 36, 0.7


def batch(tokens=TOKENS, hidden_size=HIDDEN, vocab=VOCAB, dtype=torch.float64, seed=4, scale=1.0):
    """(hidden [T, H], weight [V, H], targets [T], weights of log-probs [T], of entropies [T]); some weights are 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator, dtype=torch.float64).to(dtype)
    weight = (scale * torch.randn(vocab, hidden_size, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    by_logprobs, by_entropy = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    by_logprobs[::3] = 0.0
    by_entropy[::2] = 0.0
    return hidden, weight, targets, by_logprobs, by_entropy


def reference(hidden, weight, targets, temperature):
    full = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, dim=-1)
    return full.gather(1, targets.unsqueeze(1)).squeeze(1), -(full.exp() * full).sum(-1)


def results(fn, hidden, weight, targets, by_logprobs, by_entropy, temperature=TEMPERATURE, **options):
    """[log-probs, entropy, gradient of hidden, of weight]; by_entropy None leaves the entropy out of the loss."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = fn(hidden, weight, targets, temperature, **options)
    loss = (logprobs * by_logprobs).sum()
    if by_entropy is not None:
        loss = loss + (entropy * by_entropy).sum()
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def blocks_of(size: int):
    """So many rows of the weight in a tile."""
    return mock.patch.dict(op.VOCAB_BLOCK, cpu=size)


def test_two_tokens_by_hand():
    """hidden 1, weight (0, ln 9): at temperature 2, p = (1, 3) / 4.

    d logp_1 / d hidden = (w_1 - sum p w) / 2 = ln 9 / 8; d logp_1 / d weight = (-1/8, 1/8).
    dH / d logits = (3/32 ln 3, -3/32 ln 3) (test_vocab_logprobs.py), so dH / d hidden = -3/32 ln 3 ln 9.
    """
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(9)]], dtype=torch.float64, requires_grad=True)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([1]), 2.0)
    close(logprobs.tolist(), [math.log(0.75)], 1e-15)
    close(entropy.tolist(), [math.log(4) - 0.75 * math.log(3)], 1e-15)
    by_hidden, by_weight = torch.autograd.grad(logprobs.sum(), (hidden, weight), retain_graph=True)
    close(by_hidden.item(), math.log(9) / 8, 1e-15)
    close(by_weight.flatten().tolist(), [-0.125, 0.125], 1e-15)
    close(torch.autograd.grad(entropy.sum(), hidden)[0].item(), -3 / 32 * math.log(3) * math.log(9), 1e-15)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 20),
    hidden_size=st.integers(1, 9),
    vocab=st.integers(1, 40),
    chunk=st.integers(1, 25),
    block=st.integers(1, 45),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    entropy=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_against_full_logits(tokens, hidden_size, vocab, chunk, block, temperature, entropy, seed):
    *inputs, by_entropy = batch(tokens, hidden_size, vocab, seed=seed)
    inputs.append(by_entropy if entropy else None)
    want = results(reference, *inputs, temperature)
    with blocks_of(block):
        got = results(linear_logprobs, *inputs, temperature, chunk_tokens=chunk)
    for actual, expected in zip(got, want, strict=True):
        close(actual, expected)


def test_gradient_against_finite_differences():
    hidden, weight, targets, *_ = batch(5, 3, 7)
    with blocks_of(3):
        assert torch.autograd.gradcheck(
            lambda x, w: linear_logprobs(x, w, targets, TEMPERATURE, chunk_tokens=2),
            (hidden.requires_grad_(), weight.requires_grad_()),
        )


@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_logit_that_overflows_to_minus_infinity_is_a_token_of_probability_0(block):
    """hidden 2, weight (0, the least fp32 number, ln 3 / 2): logits (0, -inf, ln 3), p = (1/4, 0, 3/4), in blocks of
    which one may be -inf altogether. H = ln 4 - 3/4 ln 3, dH / d logits = (3/16 ln 3, 0, -3/16 ln 3), d logp_2 / d
    logits = (-1/4, 0, 1/4); by weight times hidden, by hidden summed with the weight."""
    hidden = torch.full((1, 1), 2.0, requires_grad=True)
    least = torch.finfo(torch.float32).min
    weight = torch.tensor([[0.0], [least], [math.log(3) / 2]], requires_grad=True)
    with blocks_of(block):
        logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([2]))
        close(logprobs.tolist(), [math.log(0.75)], 1e-6)
        close(entropy.tolist(), [math.log(4) - 0.75 * math.log(3)], 1e-6)
        for value, part in ((logprobs, -0.25), (entropy, 3 / 16 * math.log(3))):
            by_hidden, by_weight = torch.autograd.grad(value.sum(), (hidden, weight), retain_graph=True)
            close(by_weight.flatten().tolist(), [2 * part, 0.0, -2 * part], 1e-6)
            close(by_hidden.item(), -part * math.log(3) / 2, 1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 20, 1000])
def test_chunk_size_changes_rounding_only(chunk):
    """fp32: log-probs of about -4 within eight steps of 2^-22 of those of one chunk."""
    inputs = [x.float() if x.is_floating_point() else x for x in batch()]
    whole = results(linear_logprobs, *inputs)
    with blocks_of(5):
        for actual, expected in zip(results(linear_logprobs, *inputs, chunk_tokens=chunk), whole, strict=True):
            assert actual.dtype == torch.float32
            close(actual, expected, 8 * 2.0**-22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_do_not_overflow(dtype):
    """Logits (1e4, -1e4, 0) in blocks of one: log-probs (0, -2e4, -1e4), entropy 0, and d logp / d logits is one-hot
    minus (1, 0, 0), so d logp / d hidden = logit of the target - 1e4."""
    hidden = torch.ones(3, 1, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype)
    with blocks_of(1):
        logprobs, entropy = linear_logprobs(hidden, weight, torch.arange(3))
        assert logprobs.tolist() == [0, -2e4, -1e4] and entropy.tolist() == [0, 0, 0]
        (grad,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
        assert grad.flatten().tolist() == [0, -2e4, -1e4]
        assert torch.autograd.grad(entropy.sum(), hidden)[0].flatten().tolist() == [0, 0, 0]


def test_bf16_inputs_give_fp32_logits():
    """Logits of about 20 (a bf16 step there is 1/8): log-probs within 1e-5 of fp64 logits of the same bf16 inputs.

    Gradients: bf16 with the error of a few roundings (2^-9 each) in norm.
    """
    inputs = batch(200, 64, 3000, torch.bfloat16, scale=0.8)
    with blocks_of(1000):
        got = results(linear_logprobs, *inputs, chunk_tokens=64)
    want = results(reference, *[x.double() if x.is_floating_point() else x for x in inputs])
    assert [x.dtype for x in got] == [torch.float32] * 2 + [torch.bfloat16] * 2
    close(got[0].double(), want[0], 1e-5)
    close(got[1].double(), want[1], 1e-4)
    for actual, expected in zip(got[2:], want[2:], strict=True):
        assert (actual.double() - expected).norm() < 2 * 2.0**-9 * expected.norm()


def test_only_what_is_asked_for_is_computed():
    """A frozen head or frozen hidden states, no gradient at all, and two backwards over one graph."""
    hidden, weight, targets, by_logprobs, by_entropy = batch()
    want = results(linear_logprobs, hidden, weight, targets, by_logprobs, by_entropy)
    for place in (0, 1):
        leaves = [hidden.clone(), weight.clone()]
        leaf = leaves[place].requires_grad_()
        logprobs, entropy = linear_logprobs(*leaves, targets, TEMPERATURE)
        loss = (logprobs * by_logprobs + entropy * by_entropy).sum()
        for _ in range(2):
            close(torch.autograd.grad(loss, leaf, retain_graph=True)[0], want[2 + place])
    logprobs, entropy = linear_logprobs(hidden, weight, targets, TEMPERATURE)
    assert not logprobs.requires_grad and not entropy.requires_grad


def test_tokens_without_gradient_are_skipped():
    """A token whose gradient is 0 costs no product: only one row reaches the products of the backward."""
    hidden, weight, targets, by_logprobs, _ = batch()
    by_logprobs = torch.zeros_like(by_logprobs)
    by_logprobs[11] = 2.0
    want = results(reference, hidden, weight, targets, by_logprobs, None)
    with mock.patch.object(op, "_add_product", wraps=op._add_product) as product:
        got = results(linear_logprobs, hidden, weight, targets, by_logprobs, None)
    assert [tuple(call.args[1].shape) for call in product.call_args_list] == [(1, VOCAB), (VOCAB, 1)]
    for actual, expected in zip(got, want, strict=True):
        close(actual, expected)


def peak(call) -> int:
    """Bytes allocated at the highest point of one call, from torch's profiler of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        keep = call()
    deltas = [(e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for _, delta in sorted(deltas):
        now += delta
        highest = max(highest, now)
    del keep
    return highest


def test_memory_does_not_hold_the_logits():
    """4096 tokens, 32768 vocabulary, bf16: the fp32 logits alone are 512 MiB; two tiles are 16 MiB, gradients 2."""
    hidden, weight, targets, *_ = batch(4096, 32, 32768, torch.bfloat16)

    def step():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = linear_logprobs(h, w, targets)
        return torch.autograd.grad((logprobs + 0.01 * entropy).sum(), (h, w))

    assert peak(lambda: hidden.float() @ weight.float().t()) > 512 * 2**20  # so the measure sees logits
    assert 16 * 2**20 < peak(step) < 48 * 2**20


def in_regions(rank, world_size):
    """{region: [log-probs, entropy, gradient of the hidden states this rank was given, of its shard, collectives]}.

    The hidden states go through Megatron's region, as on the last stage of a model.
    """
    from megatron.core import tensor_parallel

    from gspo_megatron.backend.parallel import topology
    from gspo_megatron.config import Layout

    cut = topology.initialize_model_parallel(Layout(world_size, 1, None, 1, 1), seed=1)
    hidden, weight, targets, by_logprobs, by_entropy = batch()
    regions = {
        "sequence": (tensor_parallel.gather_from_sequence_parallel_region, hidden.chunk(world_size)[rank]),
        "copy": (tensor_parallel.copy_to_tensor_model_parallel_region, hidden),
    }
    count, out = Count(), {}
    for name, (region, mine) in regions.items():
        leaf = mine.clone().unsqueeze(1).requires_grad_()  # [T, 1, H] as in Megatron
        shard = weight.chunk(world_size)[rank].clone().requires_grad_()
        whole = region(leaf).squeeze(1)
        count.take()
        with blocks_of(5):
            logprobs, entropy = linear_logprobs(whole, shard, targets, TEMPERATURE, cut.tp_group, chunk_tokens=7)
            calls = count.take()
            loss = (logprobs * by_logprobs + entropy * by_entropy).sum()
            by_hidden, by_shard = torch.autograd.grad(loss, (leaf, shard))
        out[name] = [logprobs.detach(), entropy.detach(), by_hidden.squeeze(1), by_shard, calls]
    topology.destroy_model_parallel()
    return out


@pytest.fixture(scope="module")
def ranks():
    return spawn(in_regions, 2)


@pytest.mark.parametrize("region", ["sequence", "copy"])
def test_two_ranks_with_megatrons_regions_equal_one_process(ranks, region):
    want = results(reference, *batch())
    for number, rank in enumerate(ranks):
        logprobs, entropy, by_hidden, by_shard, _ = rank[region]
        close(logprobs, want[0])
        close(entropy, want[1])
        close(by_hidden, want[2].chunk(2)[number] if region == "sequence" else want[2])
        close(by_shard, want[3].chunk(2)[number])
    assert all(torch.equal(a, b) for a, b in zip(ranks[0][region][:2], ranks[1][region][:2], strict=True))


def test_one_collective_of_four_numbers_a_token_for_all_chunks(ranks):
    for rank in ranks:
        assert rank["sequence"][4] == rank["copy"][4] == [("all_gather_into_tensor", 4 * TOKENS)]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": torch.zeros(4, 3, dtype=torch.float16)}, TypeError, r"hidden is torch.float16.*bf16, fp32 or fp64"),
        ({"weight": torch.zeros(5, 3, dtype=torch.bfloat16)}, TypeError, r"weight is torch.bfloat16.*convert"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, TypeError, r"targets are torch.int32.*targets.long\(\)"),
        ({"hidden": torch.zeros(4, 1, 3)}, ValueError, r"hidden has shape \(4, 1, 3\).*\[T, H\].*squeeze"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"weight has shape \(3, 5\).*H = 3.*not transposed"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight has shape \(0, 3\)"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, r"targets have shape \(5,\).*T = 4.*gather"),
        ({"temperature": 0.0}, ValueError, r"temperature is 0.0.*positive and finite.*1.0"),
        ({"temperature": math.nan}, ValueError, r"temperature is nan"),
        ({"chunk_tokens": 0}, ValueError, r"chunk_tokens is 0.*at least 1"),
    ],
)
def test_wrong_inputs_are_named(change, error, words):
    given = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=words):
        linear_logprobs(**(given | change))
