"""The verdicts, from made-up outcomes: every rule of plan.py, and that a report says what was found."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from gspo_megatron.study import plan, report
from gspo_megatron.study.findings import find
from gspo_megatron.study.plan import RunSpec
from gspo_megatron.study.results import RunResult, load

SEEDS = range(1, 6)
NOISE = (-0.01, 0.0, 0.01, 0.005, -0.005)  # by seed


def run(arm: str, lr: float, seed: int, outcome: float, setting: str = "main", status: str = "finished") -> RunResult:
    """Starts at 0.5; evaluated at 0, 30, 40 and 50, of which the last two are the outcome."""
    spec = RunSpec(arm, setting, lr, seed)
    accuracies = {0: 0.5, 30: 0.9, 40: outcome - 0.02, 50: outcome + 0.02}
    rows = [{"step": step, "eval/accuracy": value, "time/step": 1.0 + step / 100, "time/update": 0.5}
            for step, value in accuracies.items()]  # fmt: skip
    return RunResult(spec, {**asdict(spec), "status": status, "start": f"weights{seed}", "seconds": 60.0}, rows)


def study(**outcomes: float) -> list[RunResult]:
    """By arm, at the lower of two learning rates; at the higher one everything collapses."""
    runs = [run(arm, 2e-4, seed, outcome + (NOISE[seed - 1] if arm == "gspo" else 0.0))
            for arm, outcome in outcomes.items() for seed in SEEDS]  # fmt: skip
    return runs + [run(arm, 1e-3, seed, 0.1) for arm in outcomes for seed in SEEDS]


@pytest.mark.parametrize(
    ("outcomes", "words"),
    [
        ({"gspo": 0.7, "gspo_R2": 0.7, "grpo": 0.6, "grpo_R2": 0.6}, "replay mattered to neither"),
        ({"gspo": 0.7, "gspo_R2": 0.7, "grpo": 0.5, "grpo_R2": 0.6}, "That supports the claim"),
        ({"gspo": 0.6, "gspo_R2": 0.7, "grpo": 0.5, "grpo_R2": 0.6}, "That contradicts the claim"),
        ({"gspo": 0.8, "gspo_R2": 0.7, "grpo": 0.6, "grpo_R2": 0.6}, "GSPO did better without routing replay"),
        ({"gspo": 0.65, "gspo_R2": 0.7, "grpo": 0.6, "grpo_R2": 0.6}, "Not shown"),
    ],
)
def test_the_verdict_follows_the_rules(outcomes, words):
    """The margin is 0.05, and noise of 0.01 makes intervals of about that width around the difference."""
    results = study(**outcomes)
    noise = {seed: NOISE[seed - 1] for seed in SEEDS}
    results = [run(r.spec.arm, r.spec.lr, r.spec.seed, r.outcome + (0.3 * noise[r.spec.seed] if "grpo_R2" == r.spec.arm
               and r.spec.lr == 2e-4 else 0.0)) for r in results]  # fmt: skip
    assert words in find(results).conclusion[0]


def test_where_arms_break():
    """0.1 of 0.5 is a collapse, and so is a run whose numbers were not finite; one such seed is enough."""
    results = study(gspo=0.7, gspo_R2=0.7, grpo=0.6, grpo_R2=0.6)
    results[0] = run("gspo", 2e-4, 1, 0.7, status="not finite")
    found = find(results)
    assert found.stable_lr == {"gspo": None, "gspo_R2": 2e-4, "grpo": 2e-4, "grpo_R2": 2e-4}
    cell = next(c for c in found.cells if c.arm == "gspo" and c.lr == 2e-4)
    assert cell.collapsed == 1 and cell.start == 0.5
    assert "There is no learning rate at which both GSPO arms are stable" in found.conclusion[0]


def test_a_rate_above_a_collapse_is_not_stable():
    """One seed collapses at the lower rate and none at the higher one: the arm is stable at neither."""
    runs = [run("grpo", lr, seed, 0.1 if (lr, seed) == (2e-4, 1) else 0.6) for lr in (2e-4, 4e-4) for seed in SEEDS]
    assert find(runs).stable_lr["grpo"] is None


def test_the_outcome_is_of_the_end():
    """0.9 at step 30 of 50 is not after 60% of the steps."""
    assert run("gspo", 2e-4, 1, 0.7).outcome == pytest.approx(0.7)


def test_several_looks_need_more():
    """One setting in which R2 helps GRPO by chance: at 95% alone it would count, among five looks it does not."""
    helped = [(0.0, 0.02), (0.0, 0.05), (0.0, 0.08), (0.0, 0.03), (0.0, 0.1)]
    one = [r for seed, (free, replayed) in zip(SEEDS, helped, strict=True)
           for r in (run("grpo", 2e-4, seed, 0.6 + free), run("grpo_R2", 2e-4, seed, 0.6 + replayed))]  # fmt: skip
    harder = [name for name in plan.SETTINGS if name != "main"]
    more = [run(arm, 4e-4, seed, 0.6, name) for name in harder for arm in ("grpo", "grpo_R2") for seed in SEEDS]
    assert [c.difference.above_zero for c in find(one).assay] == [True]
    assert not any(c.difference.above_zero for c in find(one + more).assay)


def write(folder: Path, results: list[RunResult]) -> None:
    (folder / "data").mkdir(parents=True)
    for each in results:
        lines = "".join(json.dumps(line) + "\n" for line in (each.about, *each.rows))
        (folder / "data" / f"{each.spec.name}.jsonl").write_text(lines)


def test_a_report_says_what_was_found(tmp_path):
    """The HTML needs nothing beside it; the Markdown has the same words, and plots beside it."""
    results = study(gspo=0.7, gspo_R2=0.7, grpo=0.6, grpo_R2=0.6)
    write(tmp_path, results)
    assert len(load(tmp_path)) == len(results)
    assert "40 runs" in report.write(tmp_path)
    html, plain = (tmp_path / "report.html").read_text(), (tmp_path / "README.md").read_text()
    verdict = find(results).conclusion[0]
    assert verdict in plain and verdict in html and 'src="data:image/png;base64,' in html and "http" not in html
    for text in (html, plain):
        assert "5 of 5" in text and "What is not shown" in text
    assert "| gspo | main | 0.001 | 1 | 5 | 0.500 | 0.100" in plain
    assert (tmp_path / "plots" / "edge.png").stat().st_size > 5000
    assert json.loads((tmp_path / "findings.json").read_text())["stable_lr"]["gspo"] == 2e-4


def test_an_empty_folder_has_no_report(tmp_path):
    assert "no finished run yet" in report.write(tmp_path)


def test_the_plan_is_what_was_promised():
    """Every main arm at every learning rate with every seed, and as many seeds again at the lowest; others with three;
    four ranks; GRPO's two arms nearer to the edge of a harder setting; no name twice."""
    specs = plan.routing_replay(5)
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names)
    for arm in plan.MAIN_ARMS:
        for lr in plan.LEARNING_RATES:
            count = 10 if lr == 2e-4 else 5
            assert sum((s.arm, s.setting, s.lr, s.ranks) == (arm, "main", lr, 1) for s in specs) == count
    for arm in ("gspo_token", "dapo"):
        assert sum((s.arm, s.setting) == (arm, "main") for s in specs) == 3
    assert sum(s.ranks == 4 for s in specs) == 3
    added = [(s.arm, s.seed) for s in specs if (s.setting, s.lr) == ("experts_32", 3e-4)]
    assert sorted(added) == [(arm, seed) for arm in ("grpo", "grpo_R2") for seed in range(1, 6)]
