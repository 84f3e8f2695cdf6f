"""The C++ kernels of the token surrogate against the formulas: every type, shape, instruction set and thread count."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.ops import sequence_ratio_reference as sequences
from gspo_megatron.ops import token_surrogate_reference as reference
from tests.ops.test_sequence_ratio import E64, FLOATS, LENGTHS, OPS, bounds, native, random_case, threads
from tests.ops.test_token_surrogate import column, results

INF = math.inf
pytestmark = native


def assert_cpp_equals_formulas(case, advantages, dual):
    """Each sum to 1e-12 of the sum of its terms' sizes, each gradient to 1e-12 of itself."""
    new, old, mask, cu, entropy = case
    inputs, clip = (new, old, mask, cu), (0.05, 0.1, dual)
    got = OPS.token_surrogate_forward(*inputs, entropy, advantages, *clip)
    want = reference.token_surrogate_forward(*inputs, entropy, advantages, *clip)
    size = cu.numel() - 1
    ids = sequences.sequence_ids(cu, new.numel())
    log_ratio = torch.where(mask > 0, new.double() - old.double(), 0.0)
    signed = advantages if advantages.numel() != size else torch.cat([advantages, column(0)])[ids]
    terms = reference.token_terms(log_ratio, torch.where(mask > 0, signed, 0.0).double(), *clip)[0].abs()
    scale = want[1].abs()
    scale[:, -1] = torch.zeros(size + 1, **E64).index_add(0, ids, terms)[:size]
    scale[:, 1] = torch.zeros(size + 1, **E64).index_add(0, ids, log_ratio.abs())[:size]
    # The reference forms expm1(d) - d. Infinity equals itself.
    allowed = 1e-12 * scale + 1e-14 * (1 + scale[:, :1])
    assert ((got[1] == want[1]) | ((got[1] - want[1]).abs() <= allowed)).all()
    assert torch.equal(got[0], got[1][:, -1]) and torch.equal(got[1][:, [0, 6, 7]], want[1][:, [0, 6, 7]])
    grad = torch.linspace(-2, 3, size, **E64)
    back = OPS.token_surrogate_backward(grad, *inputs, advantages, *clip)
    want = reference.token_surrogate_backward(grad, *inputs, advantages, *clip)
    rounding = max(1e-12, torch.finfo(new.dtype).eps)
    torch.testing.assert_close(back, want, rtol=rounding, atol=1e-30, equal_nan=True)  # 0 times infinity


@given(
    LENGTHS,
    st.integers(0, 99),
    st.sampled_from([0.01, 1.0, 30.0, 300.0]),
    st.sampled_from([0, 5]),
    st.sampled_from(FLOATS),
    st.sampled_from([INF, 1.2]),
)
@settings(max_examples=60, deadline=None)
def test_cpp_equals_the_reference(lengths, seed, spread, padding, dtype, dual):
    """Ragged shapes, masks with gaps, log-ratios up to several hundred, tokens of no sequence before and after."""
    new, old, mask, cu, entropy, by_sequence, by_token = random_case([3, *lengths], seed, dtype, spread, padding)
    if dtype == torch.float16:
        new = new.clamp(-600, 600)
    for advantages in (by_sequence[1:], by_token):
        assert_cpp_equals_formulas((new, old, mask, cu[1:], entropy), advantages, dual)


@pytest.mark.parametrize("new_dtype", FLOATS)
@pytest.mark.parametrize("old_dtype", FLOATS)
def test_every_pair_of_types_reads_every_number(new_dtype, old_dtype):
    """Subnormal, large and ordinary numbers, any mask, both types of advantages."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(333, generator=generator) * 10.0 ** torch.randint(-7, 2, (333,), generator=generator)
    cu = bounds(1, 7, 325)
    for mask_dtype, dtype in zip(sequences.MASKS, (torch.float32, torch.float64) * 2, strict=True):
        mask = (torch.arange(333) % 5 != 0).to(mask_dtype)
        case = (values.to(new_dtype), values.flip(0).to(old_dtype), mask, cu, values.to(old_dtype))
        assert_cpp_equals_formulas(case, values.roll(5).to(dtype), 3.0)
        assert_cpp_equals_formulas(case, values[:3].to(dtype), 3.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_are_rounded_as_torch_rounds(dtype):
    """At ratio 1 the slope is A itself, over 20 orders of magnitude: ties, subnormals and overflow of fp16 and bf16."""
    advantages = torch.cat([s * 2.0 ** torch.linspace(-40, 30, 5000, **E64) for s in (1, -1)])
    advantages[:3] = column(0.0, 1 + 2.0**-9, 1 + 2.0**-12)
    zero = torch.zeros(10000, dtype=dtype)
    got = OPS.token_surrogate_backward(
        column(1.5), zero, zero, torch.ones(10000), bounds(10000), advantages, 0.1, 0.1, INF
    )
    assert torch.equal(got, (1.5 * advantages).to(dtype))


@pytest.mark.parametrize("lengths", [[1_000_000], [16] * 9000, [1, 0, 300_000, 5, 70_001, 0]])
def test_the_bits_do_not_depend_on_threads_or_neighbours(lengths):
    new, old, mask, cu, entropy, _, by_token = random_case(lengths, 3)
    runs = []
    for number in (1, 2, 3):
        with threads(number):
            runs.append(results(new, old, mask, cu, entropy, by_token))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    which = max(range(len(lengths)), key=lengths.__getitem__)
    start, end = int(cu[which]), int(cu[which + 1])  # that sequence alone, at another alignment
    parts = [x[start:end].clone() for x in (new, old, mask, entropy, by_token)]
    parts[4] = parts[4] * (which + 1)
    alone = results(*parts[:3], bounds(end - start), parts[3], parts[4])
    assert torch.equal(alone[0][0, :8], runs[0][0][which, :8])
    if which == 0:
        assert torch.equal(alone[1], runs[0][1][start:end]) and alone[0][0, 8] == runs[0][0][0, 8]


def check_instruction_set() -> None:
    """Run in a process of its own: all types and both kinds of advantages with this process's instruction set."""
    for seed, dtype in enumerate(FLOATS):
        *case, by_sequence, by_token = random_case([1, 9, 0, 4097, 300], seed, dtype, 1.0, padding=3)
        assert_cpp_equals_formulas(tuple(case), by_sequence, 2.0)
        assert_cpp_equals_formulas(tuple(case), by_token, INF)
    print(OPS.instruction_set())


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512"])
def test_every_instruction_set_equals_the_reference(name):
    """The library chooses once a process; a machine without the set takes the widest it has."""
    code = "from tests.ops.test_token_surrogate_kernels import check_instruction_set; check_instruction_set()"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"GSPO_MEGATRON_ISA": name},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    widest = OPS.instruction_set() if "GSPO_MEGATRON_ISA" not in os.environ else name
    order = ["generic", "avx2", "avx512"]
    assert done.stdout.strip() == order[min(order.index(name), order.index(widest))]
