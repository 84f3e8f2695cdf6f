"""The report of the routing-replay study has its tables and pictures in order."""

import dataclasses
from pathlib import Path

from gspo_megatron.study import document, figures, plan
from gspo_megatron.study.document import Document, Section
from gspo_megatron.study.findings import Cell, Comparison, Findings, find
from gspo_megatron.study.results import RunResult, load
from gspo_megatron.study.wording import READINGS, say

TITLE = "Do I need routing replay?"
SETTING_COLUMNS = [
    "arm",
    "setting",
    "learning rate",
    "ranks",
    "seeds",
    "accuracy before",
    "accuracy after (95%)",
    "collapsed",
    "s a step",
]


def write(folder: Path) -> str:
    """Write the report of what data there are. Returns a line for people."""
    results = load(folder)
    if not results:
        return f"{folder}: no finished run yet, so no report"
    findings = find(results)
    said = findings.conclusion
    document.write(
        Document(TITLE, _summary(results), said, _sections(findings), figures.draw(results, findings), findings), folder
    )
    return f"{folder / 'report.html'}: {len(results)} runs. {said[0]}"


def _summary(results: list[RunResult]) -> str:
    hours = sum(run.about["seconds"] for run in results) / 3600
    said = say("summary", runs=len(results), seeds=len({run.spec.seed for run in results}), hours=hours)
    added = sum(plan.was_added(run.spec) for run in results)
    return f"{said} {say('added', added=added, first=len(results) - added)}" if added else said


def _sections(findings: Findings) -> list[Section]:
    main = [c for c in findings.cells if c.setting == "main" and c.ranks == 1]
    others = [c for c in findings.cells if c not in main]
    edge = say("edge", outcome_from=plan.OUTCOME_FROM, collapse=plan.COLLAPSE)
    settings = "; ".join(f"{name}: {setting.about}" for name, setting in plan.SETTINGS.items())
    curves = ["edge", "accuracy_by_step", "accuracy_by_time", "reward_by_step"]
    limits = [say("scale"), say("engines"), say("seeds")] + ([say("starts")] if findings.starts_differ else [])
    return [
        Section("Where each arm breaks", [edge], SETTING_COLUMNS, [_row(cell) for cell in main], curves),
        Section(
            "Does replay change what GSPO reaches?",
            [say("equivalence", margin=plan.EQUIVALENCE_MARGIN)],
            *_comparisons(findings.equivalence),
            ["gspo_without_replay"],
        ),
        Section("GSPO against GRPO, both without replay", [say("superiority")], *_comparisons(findings.superiority)),
        Section("Does replay help GRPO anywhere?", [say("assay")], *_comparisons(findings.assay), ["grpo_with_replay"]),
        Section(
            "Other algorithms, more updates a batch, other models, four ranks",
            [say("others", settings=settings), _minibatches(findings)],
            SETTING_COLUMNS[:-1],
            [_row(cell)[:-1] for cell in others],
        ),
        Section("Four ranks against one", [say("layouts")], *_comparisons(findings.layouts)),
        Section("What routing does", [say("routing")], *_routing(main), ["routing_change"]),
        Section("What the ratio's spread comes from", [say("spread")], *_spread(main), ["ratio_spread", "clipping"]),
        Section("What replay costs", [_cost(findings)]),
        Section("What is not shown", limits),
    ]


def _row(cell: Cell) -> list[str]:
    found = cell.outcome
    spread = "" if found.count == 1 else f" [{found.low:.3f}, {found.high:.3f}]"
    return [
        cell.arm,
        cell.setting,
        f"{cell.lr:g}",
        str(cell.ranks),
        str(found.count),
        f"{cell.start:.3f}",
        f"{found.mean:.3f}{spread}",
        f"{cell.collapsed} of {found.count}",
        f"{cell.seconds:.2f}",
    ]


def _comparisons(comparisons: list[Comparison]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            f"{each.ours} − {each.theirs}" + (" *" if each.decides else ""),
            each.setting,
            f"{each.lr:g}",
            f"{each.collapsed[0]}, {each.collapsed[1]} of {each.equivalence.count}",
            str(each.equivalence),
            f"[{each.difference.low:+.3f}, {each.difference.high:+.3f}]",
            READINGS[each.reading],
        ]
        for each in comparisons
    ]
    return ["difference", "setting", "learning rate", "collapsed", "accuracy (90%)", "95%", "reads"], rows


def _routing(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    keys = {
        "route/changed_experts_one_update": "one update",
        "route/changed_tokens": "sets, all updates",
        "route/changed_clipped": "sets, clipped",
        "route/changed_unclipped": "sets, not clipped",
        "route/change_ratio_correlation": "correlation",
        "route/entropy": "router entropy",
        "route/load_imbalance": "load, max / mean",
    }
    forms = {"correlation": "{:.2f}", "router entropy": "{:.2f}", "load, max / mean": "{:.1f}"}
    return _metrics(cells, keys, forms, "{:.1%}")


def _spread(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    keys = {
        "ratio_parts/sequence_total": "whole",
        "ratio_parts/sequence_weights": "weights",
        "ratio_parts/sequence_routes": "routes",
        "ratio_parts/token_total": "tokens: whole",
        "ratio_parts/token_routes": "tokens: routes",
    }
    columns, rows = _metrics([_rooted(cell) for cell in cells], keys, {}, "{:.1e}")
    floors = [cell.metrics.get("ratio/noise_floor") for cell in cells]
    return [*columns, "noise floor"], [
        [*row, "" if f is None else f"{f:.0e}"] for row, f in zip(rows, floors, strict=True)
    ]


def _rooted(cell: Cell) -> Cell:
    """Standard deviations in place of mean variances."""
    return dataclasses.replace(cell, metrics={k: max(v, 0.0) ** 0.5 for k, v in cell.metrics.items()})


def _metrics(
    cells: list[Cell], keys: dict[str, str], forms: dict[str, str], form: str
) -> tuple[list[str], list[list[str]]]:
    rows = []
    for cell in cells:
        values = [(name, cell.metrics.get(key)) for key, name in keys.items()]
        told = ["" if value is None else forms.get(name, form).format(value) for name, value in values]
        rows.append([cell.arm, f"{cell.lr:g}", *told])
    return ["arm", "learning rate", *keys.values()], rows


def _minibatches(findings: Findings) -> str:
    told = [f"{arm} {count or 'none of them'}" for arm, count in findings.stable_minibatches.items()]
    return say("minibatches", lr=plan.OTHER_LEARNING_RATE, told=", ".join(told))


def _cost(findings: Findings) -> str:
    told = ", ".join(f"{arm} x{ratio:.2f}" for arm, ratio in findings.replay_time.items())
    return say("cost", told=told or "no pair of runs yet")
