"""The noise floor: what is measured, what is said about it, and the exit status, with noise put in on purpose."""

import json
import math

import pytest

from gspo_megatron.cli import doctor
from gspo_megatron.config import Layout
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe.layout import resolve_layout
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.trainer.diagnostics import rows as diagnostics
from tools.validation.launching import PYTHON, ROOT, launched
from tools.validation.ranks import spawn

RECIPE = str(ROOT / "examples/recipes/moe_gspo.yaml")
SMALL = ["--max-tokens-per-microbatch", "100", "--rollout.group-size", "4"]
NOISE = 2e-3  # of log s, between any two passes

# Each pass of the training engine gets an offset of its own, as an engine that does not repeat would.
PROGRAM = f"""
import os, sys
from gspo_megatron.cli import main

if "RANK" in os.environ and "NOISE" in os.environ:
    import torch
    from gspo_megatron.backend import cpu_shim
    cpu_shim.install()
    from dataclasses import replace
    from gspo_megatron.backend.engine.logprob_head import LogProbHead
    exact = LogProbHead.__call__
    def noisy(self, micro, logits):
        found = exact(self, micro, logits)
        LogProbHead.calls = getattr(LogProbHead, "calls", 0) + 1
        return replace(found, logprobs=found.logprobs + {NOISE} * (LogProbHead.calls % 7))
    LogProbHead.__call__ = noisy

sys.exit(main.main())
"""


def rows(**rms: float | None) -> list[diagnostics.Row]:
    return [diagnostics.Row(key, "how", rms.get(key), rms.get(key)) for key in diagnostics.ROWS]


def diagnosis(old_logprobs: str = "recomputed", minibatches: int = 4, **rms: float | None) -> diagnostics.Diagnosis:
    config = load_recipe(["--algorithm.old-logprobs", old_logprobs, "--algorithm.num-minibatches", str(minibatches)])
    measured = diagnostics.NoiseFloor(rows(**rms), "one rank", "cpu", 4, 9.5)
    return diagnostics.diagnose(measured, None, config.resolved(Layout()))


@pytest.mark.parametrize(
    ("old_logprobs", "minibatches", "expected"),
    [
        ("recomputed", 4, ("a",)),
        ("recomputed", 1, ()),
        ("rollout", 4, ("e",)),
        ("first_minibatch", 4, ("a",)),
        ("first_minibatch", 1, ()),
    ],
)
def test_what_a_recipe_relies_on(old_logprobs, minibatches, expected):
    assert diagnosis(old_logprobs, minibatches, a=0.0, e=0.0).relied_on == expected


@pytest.mark.parametrize(
    ("old_logprobs", "rms", "healthy"),
    [
        ("recomputed", {"a": 0.9e-4, "e": 1.0}, True),  # (e) is for information
        ("recomputed", {"a": 1.1e-4}, False),  # epsilon is the smaller clip range, 3e-4
        ("recomputed", {"a": math.nan}, False),
        ("recomputed", {"e": 0.0}, False),  # not measured is not healthy
        ("rollout", {"a": 1.0, "e": 0.9e-4}, True),
        ("rollout", {"a": 0.0, "e": 1.1e-4}, False),
    ],
)
def test_the_verdict_is_about_the_rows_that_are_relied_on(old_logprobs, rms, healthy):
    assert diagnosis(old_logprobs, **rms).is_healthy == healthy


def test_advice_names_the_row_and_what_to_change():
    sentences = diagnosis("rollout", a=0.0, c=1.0, e=1.0, f=1.0).advice()
    assert [sentence[:3] for sentence in sentences] == ["(c)", "(e)", "(f)"]
    assert "(not used by this recipe)" in sentences[0] and "packing" in sentences[0]
    assert "(not used" not in sentences[1] and "recomputed" in sentences[1]
    assert "moe_router_dtype" in sentences[2]


def test_the_other_tensor_parallel_size():
    config = load_recipe([RECIPE])
    one, four = Layout(1, 1, None, 1, 1), Layout(2, 2, None, 2, 1)
    assert "NPROC=2" in diagnostics.tensor_counterpart(config, one, 1)
    assert diagnostics.tensor_counterpart(config, four, 4) == Layout(1, 2, None, 2, 1)
    assert diagnostics.tensor_counterpart(config, Layout(1, 2, 2, 1, 1), 2) == Layout(2, 1, None, 1, 1)
    assert "does not divide 3 ranks" in diagnostics.tensor_counterpart(config, one, 3)


def measured(rank: int, world_size: int) -> dict:
    """Two pipeline stages in fp32, then in bf16."""
    from gspo_megatron.backend.parallel import runtime
    from gspo_megatron.trainer.diagnostics import noise_floor

    runtime.destroy_process_group = lambda: None  # the ranks' process group is used twice
    floors = {}
    for dtype in ("fp32", "bf16"):
        config = load_recipe([RECIPE, *SMALL, "--model.params-dtype", dtype, "--model.moe-aux-loss-coeff", "0.01"])
        layout = resolve_layout(config, world_size, has_cuda=False)
        floors[dtype] = noise_floor.measure(config, layout, 4, None)
    return floors


def test_every_comparison_is_made_and_told_on_every_rank():
    ours, other = spawn(measured, 2)
    assert ours == other
    fp32, bf16 = ({row.key: row.rms for row in ours[dtype].rows} for dtype in ("fp32", "bf16"))
    assert list(fp32) == list("abcdef") and ours["fp32"].num_responses == 16
    assert fp32["a"] == bf16["a"] == 0.0  # on a CPU the ratio is 1 to the bit
    assert all(fp32[key] < 1e-6 for key in "bcde")
    assert 1e-7 > fp32["d"] > 0  # tensor parallelism does add in another order
    assert 0 < bf16["c"] and 0 < bf16["e"]
    assert all(value > 1e-4 for value in (fp32["f"], bf16["f"], bf16["d"]))
    # Weights rounded to bf16 are the same on both sides of (f) whatever the recipe's type, up to who sampled.
    assert 0.3 < fp32["f"] / bf16["f"] < 3


def test_noise_gives_advice_and_exit_status_1(tmp_path):
    """Two ranks that it starts itself; torchrun's own account of a status that is no failure is not shown."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [
        PYTHON,
        "program.py",
        "doctor",
        "--noise-floor",
        RECIPE,
        *SMALL,
        "--num-prompts",
        "2",
        "--json",
        "t.json",
    ]
    with launched(command, tmp_path, NPROC="2", NOISE="1", CUDA_VISIBLE_DEVICES="") as launch:
        assert launch.wait(120) == 1, launch.stderr
    assert launch.stdout.count("Too noisy: this recipe relies on (a)") == 1
    assert "(a) is above epsilon / 3:" in launch.stdout and "(b) is above epsilon / 3 (not used" in launch.stdout
    assert "Traceback" not in launch.stderr and "FAILED" not in launch.stderr, launch.stderr
    table = json.loads((tmp_path / "t.json").read_text())
    row = table["rows"][0]
    assert not table["healthy"] and row["relied_on"] and row["above_limit"] and row["rms"] > NOISE / 2


@pytest.mark.parametrize(("rms", "status"), [(0.0, 0), (1.1e-4, 1)])
def test_the_exit_status_is_the_verdict(rms, status, monkeypatch, capsys):
    from gspo_megatron.trainer.diagnostics import noise_floor

    floor = diagnostics.NoiseFloor(rows(a=rms, b=1.0), "one rank", "cpu", 4, 9.5)
    monkeypatch.setattr(noise_floor, "measure", lambda *_: floor)
    monkeypatch.setenv("RANK", "0")
    assert doctor.main(["--noise-floor", RECIPE, "--num-prompts", "1"]) == status
    printed = capsys.readouterr().out
    assert ("Healthy" in printed, "Too noisy" in printed) == (status == 0, status == 1)
    assert "not measured" in printed


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "--noise-floor = False"),
        (["--noise-floor", "nowhere.yaml"], "recipe = 'nowhere.yaml'"),
        (["--noise-floor", "--num-prompts", "0"], "--num-prompts = 0"),
        (
            ["--noise-floor", "--checkpoint", "."],
            "--checkpoint = '.': has no metadata.json, so it is no complete checkpoint",
        ),
        (["--noise-floor", "--json", "nowhere/x.json"], "--json = 'nowhere/x.json'"),
        (["--noise-floor", "--algorithm.name", "dpo"], "has no ratio"),
        (["--noise-floor", "--parallel.expert-model-parallel-size", "4", "--num-prompts", "6"], "Give a multiple of 4"),
    ],
)
def test_bad_input_is_told_before_any_rank_starts(argv, text, monkeypatch):
    monkeypatch.setattr(doctor, "become_ranks", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setenv("NPROC", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError) as error:
        doctor.main(argv)
    assert text in str(error.value)
