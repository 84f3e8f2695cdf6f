"""tools/validation/ratio_accuracy.py: what it measures in a small setting, and that its verdict can fail."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.validation import ratio_accuracy as tool
from tools.validation.ranks import spawn

ROOT = Path(__file__).parents[2]
SMALL = ["--sequences", "24", "--tokens", "96", "--hidden", "32", "--vocabulary", "512", "--seed", "3"]


def small_run(rank: int, world_size: int) -> tuple:
    """(rows, true log s of the parts, exit status with a limit that rounding alone breaks)."""
    rows, truths = tool.measure(tool.parser().parse_args(SMALL))
    return rows, truths, tool.main([*SMALL, "--max-rms", "1e-12"])


@pytest.fixture(scope="module")
def run() -> tuple:
    return spawn(small_run, 1)[0]


def named(rows: list[tool.Row], words: str) -> tool.Row:
    (row,) = [row for row in rows if words in row.name]
    return row


def test_our_heads_pass(run):
    rows, _, _ = run
    assert [row.name for row in rows if row.ours] == ["ours: linear_logprobs", "ours: vocab_logprobs, fp32 logits"]
    assert all(row.rms < 1e-6 and row.changed == 0 for row in rows if row.ours)
    assert tool.verdict(rows, 1e-6) == []


def test_rounded_logits_change_decisions_and_would_fail(run):
    """bf16 logits, through our code or Megatron's, are far beyond the limits; fp16 has an eighth of their rounding."""
    rows, _, _ = run
    rounded = named(rows, "vocab_logprobs, logits rounded to bf16")
    assert rounded.rms > 1e-4 and rounded.changed > 0
    for name in ("Megatron cross-entropy, bf16", "Megatron fused cross-entropy, bf16"):
        assert named(rows, name).rms == pytest.approx(rounded.rms, rel=1e-2)
        assert named(rows, name.replace("bf16", "fp32")).rms < 1e-6
    assert named(rows, "fp16").rms == pytest.approx(rounded.rms / 8, rel=0.5)
    failures = tool.verdict([dataclasses.replace(rounded, ours=True)], 1e-6)
    assert len(failures) == 2 and f"{rounded.changed} of 24 clip decisions changed" in failures[0]


def test_the_body_is_reported_apart(run):
    """fp32 weights and sums are near fp64; bf16 is not; neither is held to a limit."""
    rows, truths, _ = run
    fp32, bf16 = named(rows, "fp32 body"), named(rows, "bf16 body")
    assert fp32.part == bf16.part == "body" and not fp32.ours and not bf16.ours
    assert fp32.rms < 1e-6 and bf16.rms > 1e-4
    assert all((tool.decisions(truth) != 0).any() for truth in truths.values())


def test_exit_status_tells_a_failure(run):
    assert run[2] == 1


def test_verdict_names_each_limit_that_is_broken():
    good = tool.Row("head", "x", 1e-7, 1e-7, 0, 64, ours=True)
    assert tool.verdict([good, dataclasses.replace(good, rms=1.0, changed=9, ours=False)], 1e-6) == []
    for change, words in (({"changed": 1}, "1 of 64"), ({"rms": 2e-6}, "2.0e-06"), ({"rms": float("nan")}, "nan")):
        (sentence,) = tool.verdict([dataclasses.replace(good, **change)], 1e-6)
        assert words in sentence


def test_decisions_and_errors_by_hand():
    """Ratios 0.9996, 1, 1.0005 lie below, inside and above; moved by 2e-4 the first and the last come inside."""
    truth = torch.tensor([0.9996, 1.0, 1.0005], dtype=torch.float64).log()
    assert tool.decisions(truth).tolist() == [-1, 0, 1]
    row = tool.compare("head", "x", truth + torch.tensor([2e-4, 0.0, -2e-4], dtype=torch.float64), truth)
    assert row.changed == 2 and row.largest == pytest.approx(2e-4)
    assert row.rms == pytest.approx(2e-4 * (2 / 3) ** 0.5)


def test_help_and_a_table_from_the_command_line():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/validation/ratio_accuracy.py"), *SMALL],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for words in ("ours: linear_logprobs", "bf16 body, our head", "0 of 24", "head: true log s"):
        assert words in done.stdout
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0
