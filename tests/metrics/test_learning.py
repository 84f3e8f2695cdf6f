"""The verdict on learning, against numbers worked out by hand from the run of conftest.py."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.errors import GspoError
from gspo_megatron.metrics.learning import (
    failures,
    markdown_table,
    standard_error,
    summarise,
    summarise_all,
    wilson_interval,
)

REPOSITORY = Path(__file__).parents[2]


def test_report_by_hand(write_learning_run) -> None:
    report = summarise(write_learning_run())
    assert (report.seed, report.control, report.steps_done, report.steps_planned) == (7, False, 8, 8)
    assert (report.start, report.final, report.best, report.rise) == (0.25, 0.375, 0.5, 0.125)
    assert report.start_error == pytest.approx(0.0625)  # sqrt(0.25 * 0.75 / 48) = sqrt(1/256)
    assert report.warm_gain == pytest.approx(0.05)  # 0.25 at step 60 minus 0.20 at step 40 = two thirds
    # Quarters of 8 steps are 2 long: (0.1 + 0.2) / 2 and (0.7 + 0.8) / 2; step 0 has no reward.
    assert (report.reward_first, report.reward_last) == (pytest.approx(0.15), pytest.approx(0.75))
    assert report.warm_minutes == pytest.approx(4.0)  # 60 x 3 s + 6 x 10 s
    assert report.rl_minutes == pytest.approx(5.0)  # 8 x 30 s + 12 s + 48 s


def test_last_third_where_no_evaluation_falls_on_it(write_run) -> None:
    evaluations = [(25, 0.1), (50, 0.2), (75, 0.3), (100, 0.4)]  # two thirds of 100 is 66.7: the one at 50
    warm = [{"phase": "warm_start", "step": step, "eval/accuracy": value} for step, value in evaluations]
    rl = [{"phase": "rl", "step": step, "eval/accuracy": 0.4} for step in (0, 1)]
    assert summarise(write_run(warm + rl)).warm_gain == pytest.approx(0.2)
    late = summarise(write_run(warm[2:] + rl, name="late"))  # all later than two thirds: the first
    assert late.warm_gain == pytest.approx(0.1)
    alone = summarise(write_run(warm[3:] + rl, name="alone"))
    assert alone.warm_gain is None and alone.start_error is None and alone.reward_first is None


def test_quarters_of_the_reward_leave_out_what_is_null(write_run) -> None:
    rewards = [None, *range(1, 13), None]  # 12 values: quarters of 3
    rows: list[dict] = [{"phase": "rl", "step": step, "reward/mean": value} for step, value in enumerate(rewards)]
    rows[0] |= {"eval/accuracy": 0.0}
    rows[-1] |= {"eval/accuracy": 1.0}
    report = summarise(write_run(rows))
    assert (report.reward_first, report.reward_last) == (2.0, 11.0)


def test_a_reward_that_does_not_rise_fails_but_a_control_may(write_run) -> None:
    rewards = [0.8, 0.8, 0.7, 0.7]  # quarters of one step: 0.8 to 0.7
    rows: list[dict] = [{"phase": "rl", "step": i + 1, "reward/mean": value} for i, value in enumerate(rewards)]
    rows = [{"phase": "rl", "step": 0, "eval/accuracy": 0.1}, *rows]
    rows[-1]["eval/accuracy"] = 0.9
    report = summarise(write_run(rows))
    (sentence,) = failures(report)
    assert sentence.endswith("mean reward fell from 0.800 in the first quarter to 0.700 in the last")
    assert failures(dataclasses.replace(report, control=True, final=0.1)) == []


def test_rise_that_equals_the_criterion_passes(write_learning_run) -> None:
    report = summarise(write_learning_run(final=0.35))  # 0.35 - 0.25 is 0.09999999999999998
    assert failures(report, min_rise=0.10) == []
    (sentence,) = failures(report, min_rise=0.11)
    assert sentence.endswith("rise 0.100 (0.250 to 0.350) is below 0.110")


def test_control_is_held_to_its_own_criterion(write_learning_run) -> None:
    fallen = summarise(write_learning_run(final=0.1, shuffled=True, name="fallen"))
    assert failures(fallen) == []
    risen = summarise(write_learning_run(final=0.375, shuffled=True, name="risen"))
    assert failures(risen, max_control_rise=0.125) == []
    (sentence,) = failures(risen, max_control_rise=0.05)
    assert sentence.endswith("control rose by 0.125 (0.250 to 0.375), more than 0.050")


def test_unfinished_run_fails_even_where_it_has_risen(write_learning_run) -> None:
    (sentence,) = failures(summarise(write_learning_run(final=0.9, planned=100)))
    assert sentence.endswith("stopped at RL step 8 of 100")


@pytest.mark.parametrize(
    ("steps", "says"), [([], r"metrics\.jsonl: has no row"), ([4, 8], "eval/accuracy"), ([0], "eval/accuracy")]
)
def test_run_without_start_or_end_is_bad_input(write_run, steps: list[int], says: str) -> None:
    rows = [{"phase": "rl", "step": step, "eval/accuracy": 0.5} for step in steps]
    with pytest.raises(GspoError, match=says):
        summarise(write_run(rows))


def test_runs_and_controls_cannot_be_exchanged(write_learning_run) -> None:
    run, control = write_learning_run(name="run"), write_learning_run(shuffled=True, name="control")
    assert [report.control for report in summarise_all([run], [control])] == [False, True]
    with pytest.raises(GspoError, match="shuffle_advantages = True"):
        summarise_all([control])
    with pytest.raises(GspoError, match="shuffle_advantages = False"):
        summarise_all([run], [run])


def test_binomial_statistics() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    # z = 2, n = 4, p = 0.5: centre (0.5 + 0.5) / 2 = 0.5, half 2/2 * sqrt(1/16 + 1/16) = sqrt(1/8)
    assert wilson_interval(0.5, 4, z=2.0) == pytest.approx((0.5 - 0.125**0.5, 0.5 + 0.125**0.5))
    # p = 0: (0, z^2 / (n + z^2)) = (0, 4/8)
    assert wilson_interval(0.0, 4, z=2.0) == pytest.approx((0.0, 0.5))


def test_table_has_equal_columns_and_the_numbers(write_learning_run) -> None:
    report = summarise(write_learning_run())
    lines = markdown_table([report], ["FAIL"]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[1:] == [
        "7",
        "0.250",
        "0.062",
        "+0.050",
        "0.375",
        "0.500",
        "+0.125",
        "0.250 to 0.625",
        "0.150",
        "0.750",
        "9.0 (4.0 + 5.0)",
        "FAIL",
    ]


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gspo_megatron.cli", "check-learning", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env={"PYTHONPATH": "."}, capture_output=True, text=True, timeout=60)


def test_exit_status_of_the_tool(write_learning_run, tmp_path: Path) -> None:
    good, control = write_learning_run(final=0.5, name="good"), write_learning_run(0.25, True, name="control")
    passed = run_tool(good, "--control", control)
    assert passed.returncode == 0 and passed.stdout.count(" pass |") == 2
    failed = run_tool(good, "--min-rise", "0.3")
    assert failed.returncode == 1 and "rise 0.250 (0.250 to 0.500) is below 0.300" in failed.stderr
    absent = run_tool(tmp_path / "absent")
    assert absent.returncode == 2 and "no such file" in absent.stderr
