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
    rows = [
        {"step": step, "eval/accuracy": value, "time/step": 1.0 + step / 100, "time/update": 0.5}
        for step, value in accuracies.items()
    ]
    return RunResult(spec, {**asdict(spec), "status": status, "start": f"weights{seed}", "seconds": 60.0}, rows)


def study(noise: float = 1.0, grpo_noise: float = 0.3, **outcomes: float) -> list[RunResult]:
    """By arm, at the lower of two learning rates; at the higher one everything collapses. NOISE times `noise` is in
    gspo's seeds and times `grpo_noise` in grpo_R2's: it is in the differences."""
    spread = {"gspo": noise, "grpo_R2": grpo_noise}
    runs = [
        run(arm, 2e-4, seed, outcome + spread.get(arm, 0.0) * NOISE[seed - 1])
        for arm, outcome in outcomes.items()
        for seed in SEEDS
    ]
    return runs + [run(arm, 1e-3, seed, 0.1) for arm in outcomes for seed in SEEDS]


SAME = {"gspo": 0.7, "gspo_R2": 0.7, "grpo": 0.6, "grpo_R2": 0.6}
NO_SUPPORT = "which does not support the claim that GSPO, unlike GRPO, can do without it"


@pytest.mark.parametrize(
    ("outcomes", "words"),
    [
        (SAME, ["So replay mattered to neither here, " + NO_SUPPORT, "GRPO did as well without it there, too"]),
        (
            SAME | {"grpo_noise": 8},
            [
                "As far as was seen, replay mattered to neither here, " + NO_SUPPORT,
                "that it does not help is not shown either",
            ],
        ),
        (SAME | {"grpo_R2": 0.7}, ["did as well here", "Replay does help GRPO", "That supports the claim"]),
        (SAME | {"grpo": 0.7}, ["did as well here", "Replay harms GRPO there", "does not support the claim"]),
        (SAME | {"grpo": 0.1, "grpo_R2": 0.1}, ["both its arms collapsed in every seed", "As far as was seen"]),
        (SAME | {"gspo": 0.6}, ["GSPO did worse", "That contradicts the claim"]),
        (SAME | {"gspo": 0.8}, ["GSPO did better"]),
        (SAME | {"noise": 8}, ["Not shown: whether GSPO does as well", "the interval is wider than the margin"]),
        (SAME | {"gspo": 0.1}, ["nothing is shown about replay"]),
    ],
)
def test_the_verdict_follows_the_rules(outcomes, words):
    """NOISE has mean 0 and the deviation sqrt(0.00025 / 4) = 0.0079, so with t of 0.95 at 4 degrees of freedom, 2.132
    (tables), the 90% interval is 2.132 * 0.0079 / sqrt(5) = 0.0075 to either side: inside the margin of 0.05 at a
    difference of 0. Eight times the noise makes that 0.060, which is outside."""
    verdict = find(study(**outcomes)).conclusion[0]
    assert all(each in verdict for each in words), verdict
    assert sum(each in verdict for each in ("supports the claim", "mattered to neither", "contradicts the claim")) <= 1


def test_help_where_gspo_was_not_compared_is_no_support():
    """R2 helps GRPO in another setting, and GSPO is known to do without it in this one only. With GSPO's arms alike
    there, it is."""
    helped = [
        run(arm, 3e-4, seed, outcome + 0.1 * NOISE[seed - 1] * (arm == "grpo"), "experts_32")
        for arm, outcome in (("grpo", 0.4), ("grpo_R2", 0.6))
        for seed in SEEDS
    ]
    verdict = find(study(**SAME) + helped).conclusion[0]
    assert "Replay does help GRPO" in verdict and "does not support the claim yet" in verdict
    alike = [run(arm, 3e-4, seed, 0.6, "experts_32") for arm in ("gspo", "gspo_R2") for seed in SEEDS]
    assert "That supports the claim" in find(study(**SAME) + helped + alike).conclusion[0]


def test_what_the_intervals_for_grpo_allow():
    """Differences 0, 0.1, 0.2 of three seeds: mean 0.1, deviation 0.1. t at 2 degrees of freedom is 2.920 for 90%, and
    for 95% over the two settings together (97.5% each, 0.9875 below) 6.205 (tables): 0.1 +- 0.169 and 0.1 +- 0.358. So
    no help is shown, and one of up to 0.458 not excluded; the other setting collapsed with and without."""
    runs = [run("grpo", 4e-4, seed, 0.5) for seed in (1, 2, 3)]
    runs += [run("grpo_R2", 4e-4, seed, 0.5 + 0.1 * (seed - 1)) for seed in (1, 2, 3)]
    runs += [run(arm, 4e-4, seed, 0.1, "layers_8") for arm in ("grpo", "grpo_R2") for seed in (1, 2, 3)]
    found = find(runs)
    wide, floor = found.assay
    assert (wide.equivalence.low, wide.equivalence.high) == pytest.approx((-0.0686, 0.2686), abs=1e-4)
    assert (wide.difference.low, wide.difference.high) == pytest.approx((-0.2582, 0.4582), abs=1e-3)
    assert (wide.reading, wide.collapsed, floor.reading, floor.collapsed) == ("open", (0, 0), "floor", (3, 3))
    told = " ".join(found.conclusion)
    assert "not shown to help GRPO in any of 2" in told and "main 0.0004 +0.46" in told
    assert "shows nothing of replay, in layers_8 0.0004" in told


def test_one_row_is_chosen_beforehand_and_the_others_share_their_looks():
    """At the deciding learning rate 95% is 95%; the two others have 97.5% each, t of 0.9875 at 4 degrees of freedom
    3.495 (tables). NOISE gives 0.0035355 a unit of t."""
    middle = [
        run(arm, 4e-4, seed, (0.1 if seed == 1 else 0.6) + (NOISE[seed - 1] if arm == "gspo" else 0.0))
        for arm in SAME
        for seed in SEEDS
    ]
    rows = find(study(**SAME) + middle).equivalence
    assert [(row.lr, row.decides) for row in rows] == [(2e-4, True), (4e-4, False), (1e-3, False)]
    assert rows[0].difference.high == pytest.approx(2.776445 * 0.0035355, rel=1e-4)
    assert rows[1].difference.high == pytest.approx(3.495 * 0.0035355, rel=1e-3)


def test_where_arms_break():
    """0.1 of 0.5 is a collapse, and so is a run whose numbers were not finite; one such seed is enough."""
    results = study(**SAME)
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
    one = [
        r
        for seed, (free, replayed) in zip(SEEDS, helped, strict=True)
        for r in (run("grpo", 2e-4, seed, 0.6 + free), run("grpo_R2", 2e-4, seed, 0.6 + replayed))
    ]
    harder = [name for name in plan.SETTINGS if name != "main"]
    more = [run(arm, 4e-4, seed, 0.6, name) for name in harder for arm in ("grpo", "grpo_R2") for seed in SEEDS]
    assert [c.reading for c in find(one).assay] == ["more"]
    assert find(one + more).assay[0].reading == "open"


def write(folder: Path, results: list[RunResult]) -> None:
    (folder / "data").mkdir(parents=True)
    for each in results:
        lines = "".join(json.dumps(line) + "\n" for line in (each.about, *each.rows))
        (folder / "data" / f"{each.spec.name}.jsonl").write_text(lines)


def test_a_report_says_what_was_found(tmp_path):
    """The HTML needs nothing beside it; the Markdown has the same words, and plots beside it."""
    results = study(**SAME)
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
