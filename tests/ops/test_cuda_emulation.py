"""The CUDA kernels' index arithmetic, sums and conversions, run on the CPU under sanitizers.

The program is csrc/tests/cuda_emulation.cpp. What only a GPU has is not tested here: shuffles, races, launches.
tools/gpu_check.py is for those.
"""

import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from gspo_megatron.ops import sequence_ratio_reference as reference
from gspo_megatron.ops import token_surrogate_reference as surrogate
from tests.ops.test_sequence_ratio import E64, bounds, random_case

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++, so the CUDA kernels' emulation is not built")
SCALARS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8]  # in the order of csrc/scalars.h


def build(folder: Path, csrc: Path = CSRC, sanitize: bool = True) -> Path:
    program = folder / "emulation"
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize else ["-O0"]
    command = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags, "-o", program]
    subprocess.run([*command, csrc / "tests" / "cuda_emulation.cpp"], check=True, capture_output=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulation"))


def scalar(x: torch.Tensor | None) -> int:
    return -1 if x is None else SCALARS.index(torch.uint8 if x.dtype == torch.bool else x.dtype)


def raw(x: torch.Tensor | None) -> bytes:
    return b"" if x is None else x.contiguous().view(torch.uint8).numpy().tobytes()


def emulate(program, case, advantages, dtype=torch.float64, order=0, shift=0, dual=math.inf):
    """(table [S, 6 or 10], loss [1], ratios [S], clipped [S, 2], slopes [S, 2], gradient [T]; then of the token
    surrogate, with 1.5, 3, 4.5, ... as the gradient of its objectives: table [S, 9], objective [S], gradient [T])."""
    new, old, mask, cu, entropy = case
    tokens, size = new.numel(), cu.numel() - 1
    by_token = advantages.numel() != size
    types = [scalar(x) for x in (new, old, mask, entropy, advantages)] + [SCALARS.index(dtype)]
    header = struct.pack("<11q5d", tokens, size, order, *types, by_token, shift, 0.95, 1.1, dual, 3.0, 1.5)
    data = header + b"".join(raw(x) for x in (cu, new, old, mask, entropy, advantages))
    done = subprocess.run([program], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    sums = [(size, 10 if by_token else 6), (1,), (size,), (size, 2), (size, 2)]
    out, at = [], 0
    for shape in (*sums, None, (size, 9), (size,), None):
        count, kind = (tokens, dtype) if shape is None else (math.prod(shape), torch.float64)
        end = at + count * kind.itemsize
        out.append(torch.frombuffer(bytearray(done.stdout[at:end] or b" " * 8), dtype=kind)[:count].view(shape or -1))
        at = end
    assert at == len(done.stdout)
    return tuple(out)


def check_surrogate(got, new, old, mask, cu, entropy, advantages, dual):
    """The last three of `emulate` against the plain formulas."""
    clip = (1 - 0.95, 1.1 - 1, dual)
    objective, table = surrogate.token_surrogate_forward(new, old, mask, cu, entropy, advantages, *clip)
    torch.testing.assert_close(got[6:8], (table, objective), rtol=1e-11, atol=1e-11)
    grad = 1.5 * torch.arange(1, cu.numel(), **E64)
    back = surrogate.token_surrogate_backward(grad, new.double(), old, mask, cu, advantages, *clip)
    torch.testing.assert_close(got[8], back, rtol=1e-12, atol=1e-14)


def check(program, lengths, seed=0, spread=0.3, padding=0, lead=0, **options):
    """Both kinds of advantages against the plain formulas; `lead` tokens come before the first sequence."""
    *tokens, entropy, by_sequence, by_token = random_case([lead, *lengths], seed, spread=spread, padding=padding)
    new, old, mask, cu = *tokens[:3], tokens[3][1:]
    for advantages in (by_sequence[1:], by_token):
        token = advantages if advantages.numel() != len(lengths) else None
        dual = options.get("dual", math.inf)
        got = emulate(program, (new, old, mask, cu, entropy), advantages, **options)
        table = reference.sequence_partials(new, old, mask, cu, entropy, token)
        torch.testing.assert_close(got[0], table, rtol=1e-11, atol=1e-11)
        want = reference.gspo_forward(new, got[0], advantages, mask, cu, 1 - 0.95, 1.1 - 1, 3.0, dual)
        torch.testing.assert_close(got[1:5], (want[0].view(1), *want[1:]), rtol=1e-12, atol=1e-12)
        scale = torch.tensor(1.5, **E64)
        back = reference.gspo_backward(scale, got[4], token, mask, cu, 3.0, torch.float64)
        torch.testing.assert_close(got[5], back, rtol=1e-12, atol=1e-14)
        check_surrogate(got, new, old, mask, cu, entropy, advantages, dual)


SHAPES = [
    [],
    [0],
    [1],
    [0, 0, 3, 0],
    [7, 8, 9, 1, 33],
    [1023, 1024, 1025],
    [4095, 4097, 4096, 1],
    [5, 12289, 0, 8192, 3, 4096 * 3 + 1],
    [16] * 300,
    [0] * 200 + [9000] + [0] * 200,
]


@pytest.mark.parametrize("lengths", SHAPES, ids=lambda x: str(x)[:24])
def test_ragged_sequences(program, lengths):
    check(program, lengths)
    check(program, lengths, seed=1, padding=5, lead=3, order=7, shift=1, dual=1.2)


def test_a_million_tokens_in_many_blocks(program):
    check(program, [3, 1_000_001, 70_000], padding=2, order=3)


def test_no_bit_depends_on_order_or_alignment(program):
    """Blocks and threads shuffled, wide accesses replaced by single ones, and other sequences before."""
    lengths = [5, 12289, 0, 8192, 3]
    new, old, mask, cu, entropy, _, by_token = random_case(lengths, 4)
    case = (new, old, mask, cu, entropy)
    first = emulate(program, case, by_token)
    for options in ({"order": 1}, {"order": 2, "shift": 1}, {"shift": 3}):
        assert all(torch.equal(a, b) for a, b in zip(first, emulate(program, case, by_token, **options), strict=True))
    alone = emulate(
        program, (new[5:12294], old[5:12294], mask[5:12294], bounds(12289), entropy[5:12294]), by_token[5:12294]
    )
    assert torch.equal(alone[0][0], first[0][1]) and torch.equal(alone[6][0], first[6][1])
    assert torch.equal(alone[8] * 2, first[8][5:12294])


@pytest.mark.parametrize("dtype", SCALARS[:4])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_every_type_is_read_and_written_exactly(program, dtype, mask_dtype):
    """Numbers over all magnitudes, infinity and not-a-number at masked tokens; gradients round as torch rounds."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(333, generator=generator) * 10.0 ** torch.randint(-7, 1, (333,), generator=generator)
    new, old = values.to(dtype), values.flip(0).to(dtype)
    mask = (torch.arange(333) % 5 != 0).to(mask_dtype)
    new[0], new[5] = math.nan, math.inf
    advantages = torch.cat([s * 2.0 ** torch.linspace(-40, 14, 166, **E64) for s in (1, -1)] + [torch.ones(1, **E64)])
    cu = bounds(1, 7, 325)
    got = emulate(program, (new, old, mask, cu, old), advantages, dtype=dtype)
    want = reference.sequence_partials(new, old, mask, cu, old, advantages)
    torch.testing.assert_close(got[0], want, rtol=1e-12, atol=1e-12)
    back = reference.gspo_backward(torch.tensor(1.5, **E64), got[4], advantages, mask, cu, 3.0, dtype)
    assert torch.equal(got[5].view(torch.uint8), back.view(torch.uint8))  # the sign of zero too
    grad, clip = 1.5 * torch.arange(1, 4, **E64), (1 - 0.95, 1.1 - 1, math.inf)
    want = surrogate.token_surrogate_forward(new, old, mask, cu, old, advantages, *clip)[1]
    torch.testing.assert_close(got[6], want, rtol=1e-12, atol=1e-12)
    back = surrogate.token_surrogate_backward(grad, new, old, mask, cu, advantages, *clip)
    torch.testing.assert_close(got[8], back, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).smallest_normal)


def test_rounding_to_half_precision(program):
    """Every pair of neighbouring halves: the middle between them and one step to either side of it."""
    for dtype in (torch.float16, torch.bfloat16):
        halves = torch.arange(0x7C00 if dtype == torch.float16 else 0x7F80).to(torch.int16).view(dtype).float()
        middle = (halves[:-1] + halves[1:]) / 2
        wanted = torch.cat([middle, middle.nextafter(halves[1:]), middle.nextafter(halves[:-1]), -middle]).double()
        size = wanted.numel()
        zero = torch.zeros(size)
        # Ratio 1 over `size` tokens and one advantage a token: the gradient is A 1.5 / 3 / size, scaled back here.
        advantages = wanted * -2.0 * size
        got = emulate(program, (zero, zero, torch.ones(size), bounds(size), None), advantages, dtype=dtype)
        exact = emulate(program, (zero, zero, torch.ones(size), bounds(size), None), advantages)[5]
        assert torch.equal(got[5], exact.to(dtype))


def test_small_and_large_log_ratios(program):
    d = torch.tensor([1e-12, -1e-6, 1e-3, 0.2499, -0.25, 0.2501, 5.0, -40.0, 700.0, -800.0], **E64)
    got = emulate(program, (d, torch.zeros(10, **E64), torch.ones(10), bounds(*[1] * 10), None), torch.ones(10, **E64))[
        0
    ]
    series = sum(d**k / math.factorial(k) for k in range(2, 20))
    want = torch.where(d.abs() < 1, series, d.expm1() - d)
    torch.testing.assert_close(got[:, 3], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cu", [[-5, 4, 90], [0, 60, 40, 90], [0, 50, 900], [900, -900, 7], [2**31 - 1, -(2**31), 9]])
def test_wrong_boundaries_stay_in_range_and_show(program, cu):
    """They cannot raise, since the host never sees them: every access is in range all the same, and the loss is NaN."""
    new, old, mask, _, entropy, _, by_token = random_case([90], 5)
    for advantages in (by_token, torch.ones(len(cu) - 1)):
        got = emulate(program, (new, old, mask, torch.tensor(cu).int(), entropy), advantages)
        assert got[1].isnan().all() and got[7].isnan().any()


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("sequence_ratio.h", "return block_start / kBlockTokens;", "return block_start / (2 * kBlockTokens);"),
        ("cuda/blocks.h", "divide_up(line - origin, kBlockTokens)", "(line - origin) / kBlockTokens"),
        ("cuda/blocks.h", "kSpan = kThreads * kGroup", "kSpan = kThreads * kGroup - 1"),
        ("cuda/token_blocks.h", "if (t >= at.start && group.mask[i] > 0)", "if (group.mask[i] > 0)"),
        ("cuda/blocks.h", "token < 0 ? 0 : least(token, p.num_tokens)", "token"),
    ],
)
def test_a_mistake_is_found(tmp_path, file, right, wrong):
    """A wrong block size, rounding, stride or clamp: the emulation stops, or its numbers differ."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    text = (tmp_path / "csrc" / file).read_text()
    assert text.count(right) == 1
    (tmp_path / "csrc" / file).write_text(text.replace(right, wrong))
    broken = build(tmp_path, tmp_path / "csrc", sanitize=False)  # builds faster; the program checks too
    with pytest.raises(AssertionError):
        check(broken, [5, 12289, 0, 8192, 3], padding=5)
        new, old, mask, _, entropy, _, _ = random_case([90], 5)
        emulate(broken, (new, old, mask, bounds(900), entropy), torch.ones(1))
