"""What a routing-replay study found becomes tables, tests by the rules of plan.py, and a conclusion in words.

The comparison that decides is made at the largest learning rate at which neither of its two arms collapses in any seed,
which is where replay should help if it does. Everything else is shown beside it, at intervals that are wider by the
number of looks. Every comparison is read by the same rule (inference.read): no interval, no claim.
"""

import dataclasses
import itertools
import statistics
from dataclasses import dataclass
from typing import TypeVar

from gspo_megatron.metrics.record import series
from gspo_megatron.study import plan
from gspo_megatron.study.inference import Interval, interval, paired, read, together
from gspo_megatron.study.results import RunResult, of
from gspo_megatron.study.wording import READINGS, say

Level = TypeVar("Level", int, float)


@dataclass(frozen=True)
class Cell:
    """Describes an arm at one learning rate in one setting."""

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
    """Pairs two arms by seed: the first's outcome minus the second's."""

    ours: str
    theirs: str
    setting: str
    lr: float
    collapsed: tuple[int, int]  # seeds of each
    equivalence: Interval  # 90%
    difference: Interval  # 95%, of the row that decides; of the others for all of them together
    decides: bool
    reading: str  # a key of wording.READINGS


@dataclass(frozen=True)
class Findings:
    """The findings are everything that the report shows."""

    cells: list[Cell]
    stable_lr: dict[str, float | None]  # arm -> largest learning rate at which, and below which, no seed collapsed
    stable_minibatches: dict[str, int | None]  # arm -> most updates a rollout batch likewise
    equivalence: list[Comparison]  # gspo - gspo_R2
    superiority: list[Comparison]  # gspo - grpo
    assay: list[Comparison]  # grpo_R2 - grpo; none decides
    layouts: list[Comparison]  # gspo on four ranks - on one
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
    at_rates = [("main", lr) for lr in rates]
    where = {arm: [(c.setting, c.lr) for c in cells if c.arm == arm and c.ranks == 1] for arm in plan.MAIN_ARMS}
    findings = Findings(
        cells=cells,
        stable_lr=stable,
        stable_minibatches=_stable_minibatches(cells),
        equivalence=_compare(results, "gspo", "gspo_R2", where["gspo_R2"], _common(stable, "gspo", "gspo_R2")),
        superiority=_compare(results, "gspo", "grpo", at_rates, _common(stable, "gspo", "grpo")),
        assay=_compare(results, "grpo_R2", "grpo", where["grpo_R2"]),
        layouts=_compare(results, "gspo", "gspo", at_rates, ranks=4),
        replay_time=_replay_time(results),
        starts_differ=_starts_differ(results),
        conclusion=[],
    )
    findings.conclusion.extend(conclude(findings))
    return findings


def _cells(results: list[RunResult]) -> list[Cell]:
    keys = sorted(
        {(r.spec.setting, r.spec.ranks, r.spec.arm, r.spec.lr) for r in results},
        key=lambda k: (list(plan.SETTINGS).index(k[0]), k[1], list(plan.ARMS).index(k[2]), k[3]),
    )
    cells = []
    for setting, ranks, arm, lr in keys:
        runs = list(of(results, arm, setting, lr, ranks).values())
        means = {key: [m for run in runs if (m := run.mean(key)) is not None] for key in METRICS}
        times = [seconds for run in runs for seconds in series(run.rows, "time/step")[1]]
        cells.append(
            Cell(
                arm,
                setting,
                lr,
                ranks,
                interval([run.outcome for run in runs], plan.CONFIDENCE).cut(0, 1),
                sum(run.start for run in runs) / len(runs),
                sum(run.collapsed for run in runs),
                {key: sum(values) / len(values) for key, values in means.items() if values},
                statistics.median(times),
            )
        )
    return cells


def _largest_stable(cells: list[Cell], arm: str) -> float | None:
    return _last_before_collapse([(cell.lr, cell.collapsed) for cell in cells if cell.arm == arm])


def _last_before_collapse(levels: list[tuple[Level, int]]) -> Level | None:
    """Return the largest level, of (level, collapsed seeds), at which, and below which, no seed collapsed."""
    stable = itertools.takewhile(lambda level: level[1] == 0, sorted(levels))
    return max((level for level, _ in stable), default=None)


def _stable_minibatches(cells: list[Cell]) -> dict[str, int | None]:
    counts = {"main": 4, "minibatches_8": 8, "minibatches_16": 16}
    found: dict[str, int | None] = {}
    for arm in plan.MAIN_ARMS:
        mine = [
            c
            for c in cells
            if c.arm == arm and c.setting in counts and c.lr == plan.OTHER_LEARNING_RATE and c.ranks == 1
        ]
        found[arm] = _last_before_collapse([(counts[cell.setting], cell.collapsed) for cell in mine])
    return found


def _common(stable: dict[str, float | None], ours: str, theirs: str) -> float | None:
    """The largest learning rate that both are stable at."""
    first, second = stable[ours], stable[theirs]
    return None if first is None or second is None else min(first, second)


def _compare(
    results: list[RunResult],
    ours: str,
    theirs: str,
    places: list[tuple[str, float]],
    deciding: float | None = None,
    ranks: int = 1,
) -> list[Comparison]:
    """Compare in each (setting, learning rate) that has both.

    Args:
        deciding: the learning rate of the main setting's row that was chosen beforehand, which is one look; the others
            share theirs.
        ranks: of `ours`.
    """
    pairs = [
        (setting, lr, of(results, ours, setting, lr, ranks), of(results, theirs, setting, lr)) for setting, lr in places
    ]
    pairs = [pair for pair in pairs if pair[2].keys() & pair[3].keys()]
    name = ours if ranks == 1 else f"{ours} on {ranks} ranks"
    others = sum((setting, lr) != ("main", deciding) for setting, lr, _, _ in pairs)
    found = []
    for setting, lr, first, second in pairs:
        decides = (setting, lr) == ("main", deciding)
        seeds = first.keys() & second.keys()
        one, two = ({seed: runs[seed].outcome for seed in seeds} for runs in (first, second))
        collapsed = (sum(first[seed].collapsed for seed in seeds), sum(second[seed].collapsed for seed in seeds))
        wide = plan.CONFIDENCE if decides else together(plan.CONFIDENCE, others)
        equivalence, difference = paired(one, two, plan.EQUIVALENCE_CONFIDENCE), paired(one, two, wide)
        assert equivalence is not None and difference is not None  # these pairs have seeds in common
        reading = read(equivalence, difference, plan.EQUIVALENCE_MARGIN, sum(collapsed) == 2 * len(seeds))
        found.append(Comparison(name, theirs, setting, lr, collapsed, equivalence, difference, decides, reading))
    return found


def _replay_time(results: list[RunResult]) -> dict[str, float]:
    """Return the median of the ratios of median steps, over pairs of runs that differ in replay alone and both
    lived."""
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
    """Say the verdict first, then what it rests on; a sentence or two each."""
    deciding = next((each for each in findings.equivalence if each.decides), None)
    rates = [(arm, findings.stable_lr[arm]) for arm in plan.MAIN_ARMS]
    told = ", ".join(f"{arm} at none" if rate is None else f"{arm} up to {rate:g}" for arm, rate in rates)
    return [
        _verdict(deciding, findings.equivalence, findings.assay),
        *_gspo_told(deciding, findings.equivalence),
        *_assay_told(findings.assay),
        say("stable", told=told),
        _against_grpo(findings.superiority),
    ]


def _verdict(deciding: Comparison | None, equivalence: list[Comparison], assay: list[Comparison]) -> str:
    """What GSPO's row that decides shows; then of GRPO whether replay helps it anywhere, or else what the row in the
    same place shows; then what both mean for the claim."""
    if deciding is None:
        return say("gspo none")
    at = {_place(each): each.reading for each in assay}
    helped = [place for place, reading in at.items() if reading == "more"]
    grpo = "more" if helped else at.get(_place(deciding), "open")
    claim = None
    if deciding.reading == "same":
        there = any(_place(each) in helped and each.reading == "same" for each in equivalence)
        claim = {"more": "supported" if there else "not there", "same": "neither", "less": "no support"}.get(
            grpo, "neither seen"
        )
    said = [say(f"gspo {deciding.reading}", lr=deciding.lr), say(f"grpo {grpo}")]
    return " ".join(said + ([say(claim)] if claim else []))


def _place(comparison: Comparison) -> tuple[str, float]:
    return comparison.setting, comparison.lr


def _gspo_told(deciding: Comparison | None, comparisons: list[Comparison]) -> list[str]:
    if deciding is None:
        return []
    found = deciding.equivalence
    said = [say("deciding", lr=deciding.lr, found=found, count=found.count, margin=plan.EQUIVALENCE_MARGIN)]
    others = [f"{each.setting} {each.lr:g} {READINGS[each.reading]}" for each in comparisons if not each.decides]
    if others:
        said.append(say("gspo elsewhere", told=", ".join(others)))
    return said


def _against_grpo(comparisons: list[Comparison]) -> str:
    deciding = next((each for each in comparisons if each.decides), None)
    if deciding is None:
        return say("no common rate")
    found = deciding.difference
    verdict = "neither is shown to be better"
    if found.above_zero or found.below_zero:
        verdict = "GSPO is better" if found.above_zero else "GRPO is better"
    return say("against grpo", lr=deciding.lr, found=found, count=found.count, verdict=verdict)


def _assay_told(comparisons: list[Comparison]) -> list[str]:
    """Tell help and harm that are shown, and what is not excluded of the rest."""
    by_reading: dict[str, list[Comparison]] = {name: [] for name in READINGS}
    for each in comparisons:
        by_reading[each.reading].append(each)
    count = len(comparisons)
    if not count:
        return []
    helps, harms = by_reading["more"], by_reading["less"]
    said = [say("help" if helps else "no help", number=len(helps), count=count, where=_places(helps, "difference"))]
    if harms:
        said.append(say("harm", where=_places(harms, "difference")))
    if by_reading["same"]:
        same = _places(by_reading["same"], "equivalence")
        said.append(say("help excluded", margin=plan.EQUIVALENCE_MARGIN, where=same))
    if by_reading["open"]:
        where = ", ".join(f"{each.setting} {each.lr:g} {each.difference.high:+.2f}" for each in by_reading["open"])
        said.append(say("help open", margin=plan.EQUIVALENCE_MARGIN, where=where))
    if by_reading["floor"]:
        said.append(say("help floor", where=", ".join(f"{each.setting} {each.lr:g}" for each in by_reading["floor"])))
    return said


def _places(comparisons: list[Comparison], interval: str) -> str:
    return "; ".join(f"{each.setting} at {each.lr:g}: {getattr(each, interval)}" for each in comparisons)
