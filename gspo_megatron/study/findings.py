"""What a routing-replay study found: tables, tests by the rules of plan.py, and a conclusion in words.

The comparison that decides is made at the largest learning rate at which neither of its two arms collapses in any seed,
which is where replay should help if it does. Everything else is shown beside it.
"""

import dataclasses
import itertools
import statistics
from dataclasses import dataclass

from gspo_megatron.metrics.record import series
from gspo_megatron.study import plan
from gspo_megatron.study.inference import Interval, interval, paired
from gspo_megatron.study.results import RunResult, of
from gspo_megatron.study.wording import say


@dataclass(frozen=True)
class Cell:
    """An arm at one learning rate in one setting."""

    arm: str
    setting: str
    lr: float
    ranks: int
    outcome: Interval  # over seeds
    start: float
    collapsed: int  # seeds
    metrics: dict[str, float]  # means over steps and seeds
    seconds: float  # median of a step, over steps and seeds


@dataclass(frozen=True)
class Comparison:
    """Two arms, paired by seed: the first's outcome minus the second's."""

    ours: str
    theirs: str
    setting: str
    lr: float
    difference: Interval
    decides: bool = False


@dataclass(frozen=True)
class Findings:
    """Everything the report shows."""

    cells: list[Cell]
    stable_lr: dict[str, float | None]  # arm -> largest learning rate at which, and below which, no seed collapsed
    stable_minibatches: dict[str, int | None]  # arm -> most updates a rollout batch likewise
    equivalence: list[Comparison]  # gspo - gspo_R2, 90%
    superiority: list[Comparison]  # gspo - grpo, 95%
    assay: list[Comparison]  # grpo_R2 - grpo, 95% over all of them together
    layouts: list[Comparison]  # four ranks - one rank
    replay_time: dict[str, float]  # algorithm -> step time with R2 / without, medians at equal settings
    starts_differ: bool  # runs of one seed that did not begin from the same weights
    conclusion: list[str]


METRICS = (
    "route/changed_experts_one_update", "route/changed_tokens", "route/changed_clipped", "route/changed_unclipped",
    "route/change_ratio_correlation", "route/entropy", "route/load_imbalance", "clip/seq_low", "clip/seq_high",
    "clip/token", "ratio/std", "ratio/noise_floor", "ratio_parts/sequence_total", "ratio_parts/sequence_weights",
    "ratio_parts/sequence_routes", "ratio_parts/token_total", "ratio_parts/token_weights", "ratio_parts/token_routes",
    "response/length", "time/old_logprobs", "time/update",
)  # fmt: skip


def find(results: list[RunResult]) -> Findings:
    """Judge all runs there are; arms that are missing are left out of the tables."""
    cells = _cells(results)
    main = [cell for cell in cells if cell.setting == "main" and cell.ranks == 1]
    rates = sorted({cell.lr for cell in main if cell.arm in plan.MAIN_ARMS})
    stable = {arm: _largest_stable(main, arm) for arm in plan.MAIN_ARMS}
    equivalence = _compare(results, "gspo", "gspo_R2", rates, 0.9, stable)
    superiority = _compare(results, "gspo", "grpo", rates, plan.CONFIDENCE, stable)
    assay = _assay(results, cells)
    layouts = [_comparison(results, "gspo", "gspo", "main", lr, plan.CONFIDENCE, ranks=4) for lr in rates]
    findings = Findings(
        cells=cells, stable_lr=stable, stable_minibatches=_stable_minibatches(cells), equivalence=equivalence,
        superiority=superiority, assay=assay, layouts=[each for each in layouts if each],
        replay_time=_replay_time(results), starts_differ=_starts_differ(results), conclusion=[],
    )  # fmt: skip
    findings.conclusion.extend(conclude(findings))
    return findings


def _cells(results: list[RunResult]) -> list[Cell]:
    keys = sorted({(r.spec.setting, r.spec.ranks, r.spec.arm, r.spec.lr) for r in results},
                  key=lambda k: (list(plan.SETTINGS).index(k[0]), k[1], list(plan.ARMS).index(k[2]), k[3]))  # fmt: skip
    cells = []
    for setting, ranks, arm, lr in keys:
        runs = list(of(results, arm, setting, lr, ranks).values())
        means = {key: [m for run in runs if (m := run.mean(key)) is not None] for key in METRICS}
        times = [seconds for run in runs for seconds in series(run.rows, "time/step")[1]]
        cells.append(Cell(
            arm, setting, lr, ranks, interval([run.outcome for run in runs], plan.CONFIDENCE),
            sum(run.start for run in runs) / len(runs), sum(run.collapsed for run in runs),
            {key: sum(values) / len(values) for key, values in means.items() if values}, statistics.median(times),
        ))  # fmt: skip
    return cells


def _largest_stable(cells: list[Cell], arm: str) -> float | None:
    return _last_before_collapse([(cell.lr, cell.collapsed) for cell in cells if cell.arm == arm])


def _last_before_collapse(levels: list[tuple[float, int]]) -> float | None:
    """Of (level, collapsed seeds): the largest level at which, and below which, no seed collapsed."""
    stable = itertools.takewhile(lambda level: level[1] == 0, sorted(levels))
    return max((level for level, _ in stable), default=None)


def _stable_minibatches(cells: list[Cell]) -> dict[str, int | None]:
    counts = {"main": 4, "minibatches_8": 8, "minibatches_16": 16}
    found: dict[str, int | None] = {}
    for arm in plan.MAIN_ARMS:
        mine = [c for c in cells if c.arm == arm and c.setting in counts and c.lr == plan.OTHER_LEARNING_RATE
                and c.ranks == 1]  # fmt: skip
        found[arm] = _last_before_collapse([(counts[cell.setting], cell.collapsed) for cell in mine])
    return found


def _comparison(results, ours: str, theirs: str, setting: str, lr: float, confidence: float, decides: bool = False,
                ranks: int = 1) -> Comparison | None:  # fmt: skip
    first, second = of(results, ours, setting, lr, ranks), of(results, theirs, setting, lr)
    difference = paired(
        {seed: run.outcome for seed, run in first.items()},
        {seed: run.outcome for seed, run in second.items()},
        confidence,
    )
    return None if difference is None else Comparison(ours, theirs, setting, lr, difference, decides)


def _compare(results, ours: str, theirs: str, rates: list[float], confidence: float, stable: dict) -> list[Comparison]:
    common = None if None in (stable[ours], stable[theirs]) else min(stable[ours], stable[theirs])
    found = [_comparison(results, ours, theirs, "main", lr, confidence, lr == common) for lr in rates]
    return [each for each in found if each]


def _assay(results: list[RunResult], cells: list[Cell]) -> list[Comparison]:
    """Each at a confidence that makes it 95% for all of them together (Bonferroni)."""
    pairs = [(c.setting, c.lr) for c in cells if c.arm == "grpo_R2" and c.ranks == 1]
    confidence = 1 - (1 - plan.CONFIDENCE) / max(len(pairs), 1)
    found = [_comparison(results, "grpo_R2", "grpo", setting, lr, confidence) for setting, lr in pairs]
    return [each for each in found if each]


def _replay_time(results: list[RunResult]) -> dict[str, float]:
    """Over pairs of runs that differ in replay alone and both lived: median of the ratios of their median steps."""
    found: dict[str, list[float]] = {}
    runs = {run.spec: run for run in results if run.spec.setting == "main" and not run.collapsed}
    for spec, replayed in runs.items():
        arm = spec.arm.removesuffix("_R2")
        free = runs.get(dataclasses.replace(spec, arm=arm))
        if arm != spec.arm and free:
            found.setdefault(arm, []).append(_median(replayed, "time/update") / _median(free, "time/update"))
    return {arm: statistics.median(ratios) for arm, ratios in found.items()}


def _median(run: RunResult, key: str) -> float:
    return statistics.median(series(run.rows, key)[1])


def _starts_differ(results: list[RunResult]) -> bool:
    digests: dict = {}
    for run in results:
        digests.setdefault(run.spec.start, set()).add(run.about["start"])
    return any(len(found) > 1 for found in digests.values())


def conclude(findings: Findings) -> list[str]:
    """The verdict first, then what it rests on; a sentence or two each."""
    deciding = next((each for each in findings.equivalence if each.decides), None)
    helps = [each for each in findings.assay if each.difference.above_zero]
    sentences = [say(_kind(deciding) + (" helps" if helps else ""))]
    if deciding:
        found = deciding.difference
        sentences.append(
            say("deciding", lr=deciding.lr, found=found, count=found.count, margin=plan.EQUIVALENCE_MARGIN)
        )
    rates = [(arm, findings.stable_lr[arm]) for arm in plan.MAIN_ARMS]
    told = ", ".join(f"{arm} at none" if rate is None else f"{arm} up to {rate:g}" for arm, rate in rates)
    return [
        *sentences,
        say("stable", told=told),
        _against_grpo(findings.superiority),
        _assay_told(findings.assay, helps),
    ]


def _kind(deciding: Comparison | None) -> str:
    if deciding is None:
        return "none"
    found, margin = deciding.difference, plan.EQUIVALENCE_MARGIN
    if found.within(margin):
        return "same"
    if found.below_zero and found.mean < -margin:
        return "worse"
    return "better" if found.above_zero and found.mean > margin else "open"


def _against_grpo(comparisons: list[Comparison]) -> str:
    deciding = next((each for each in comparisons if each.decides), None)
    if deciding is None:
        return say("no common rate")
    found = deciding.difference
    verdict = "neither is shown to be better"
    if found.above_zero or found.below_zero:
        verdict = "GSPO is better" if found.above_zero else "GRPO is better"
    return say("against grpo", lr=deciding.lr, found=found, count=found.count, verdict=verdict)


def _assay_told(comparisons: list[Comparison], helps: list[Comparison]) -> str:
    where = "; ".join(f"{each.setting} at {each.lr:g}: {each.difference}" for each in helps)
    return say("help" if helps else "no help", number=len(helps), count=len(comparisons), where=where)
