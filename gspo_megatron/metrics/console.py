"""A person watching a run sees a header, a legend, one line a step, and a progress bar below them.

In a terminal the bar stays at the bottom and everything printed by the process goes above it. Elsewhere (a log file,
a Slurm job) there are no control codes: plain lines, each with an estimate of the time left.

RL prints every step. The other phases' steps are short and many, so about LINES_OF_SHORT_STEPS of them are printed, and
every one with an evaluation; the bar counts all. Left out: colours for good and bad values, which depend on the task.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

LINES_OF_SHORT_STEPS = 20
SECONDS_A_COUNT = 10.0
LINES_A_PAGE = 30  # the column titles are repeated after this many lines


@dataclass(frozen=True)
class Column:
    """Describes one column of the step lines."""

    title: str
    width: int
    key: str
    form: str  # format specification of the value
    meaning: str  # for the legend; empty: explained with its neighbour
    percent: bool = False  # the metric is a share
    style: str = ""
    is_rare: bool = False  # measured now and then: blank where absent, and a step that has it is always printed


RL_COLUMNS = (
    Column("step", 5, "step", "d", ""),
    Column("reward", 7, "reward/mean", ".3f", "mean reward of the responses sampled in this step"),
    Column("held-out", 9, "eval/accuracy", ".3f", "accuracy on held-out prompts, where measured", style="bold green",
           is_rare=True),
    Column("ratio-sd", 9, "ratio/std", ".1e", "standard deviation over responses of the sequence ratio s"),
    Column("clip<%", 7, "clip/seq_low", ".1f", "responses that lost gradient below 1 - eps_low", True),
    Column("clip>%", 7, "clip/seq_high", ".1f", "the same, above 1 + eps_high", True),
    Column("token%", 7, "clip/token", ".1f", "both, as a share of response tokens", True),
    Column("entropy", 8, "entropy", ".3f", "of the next token, nats; near 0 the policy no longer explores"),
    Column("length", 7, "response/length", ".1f", "mean response, tokens"),
    Column("tok/s", 7, "perf/tokens_per_second", ".0f", "tokens a second"),
    Column("sec", 6, "time/step", ".1f", "seconds the step took"),
)  # fmt: skip
WARM_START_COLUMNS = (
    Column("step", 5, "step", "d", ""),
    Column("loss", 8, "loss", ".4f", "cross-entropy on the gold answers, nats a token"),
    Column("held-out", 9, "eval/accuracy", ".3f", "accuracy on held-out prompts, where measured", style="bold green",
           is_rare=True),
    Column("lr", 9, "lr", ".1e", "learning rate"),
    Column("grad", 8, "grad_norm", ".2f", "norm of the gradient before clipping"),
    Column("sec", 7, "time/step", ".2f", "seconds the step took"),
)  # fmt: skip
DPO_COLUMNS = (
    Column("step", 5, "step", "d", ""),
    Column("loss", 8, "loss", ".4f", "of the step's pairs; the sigmoid loss starts at log 2 = 0.6931"),
    Column("margin", 8, "dpo/margin", ".3f", "beta h, mean: how much more the policy prefers the chosen answer"),
    Column("right%", 7, "dpo/accuracy", ".1f", "pairs whose margin is above 0", True),
    Column("chosen", 8, "dpo/chosen", ".2f", "log-ratio of the chosen answer to the reference, mean"),
    Column("rejected", 9, "dpo/rejected", ".2f", "the same of the rejected answer"),
    Column("held-out", 9, "dpo/eval_margin", ".3f", "margin of held-out pairs, where measured, and how many are right",
           style="bold green", is_rare=True),
    Column("right%", 7, "dpo/eval_accuracy", ".1f", "", True, style="bold green", is_rare=True),
    Column("grad", 8, "grad_norm", ".2f", "norm of the gradient before clipping"),
    Column("sec", 7, "time/step", ".2f", "seconds the step took"),
)  # fmt: skip
COLUMNS = {"warm_start": WARM_START_COLUMNS, "rl": RL_COLUMNS, "dpo": DPO_COLUMNS}
PHASE_TITLES = {"warm_start": "warm start", "rl": "RL", "dpo": "DPO"}


@dataclass
class _Phase:
    name: str
    total: int
    first: int  # steps that were done before this process (a resumed run)
    began: float
    task: Any = None  # rich's id of the bar
    lines: int = 0


class Console:
    """Prints a run to `stream` (default: standard output). Rank 0 only. Close it, or the terminal keeps the bar."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._rich: RichConsole | None = None
        self._progress: Progress | None = None
        self._phase: _Phase | None = None
        # Asked of the stream itself: rich also believes FORCE_COLOR, and a log file must stay free of codes.
        if self._stream.isatty():
            rich = RichConsole(file=self._stream, highlight=False)
            self._rich = None if rich.is_dumb_terminal else rich

    def header(self, lines: dict[str, str]) -> None:
        """Say what is about to run: name and value a line (run folder, layout, device, kernels, model size, ...)."""
        width = max(map(len, lines), default=0)
        for name, value in lines.items():
            self._print((f"{name:<{width}}  ", "dim"), (value, ""))

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin one of COLUMNS' phases, of `total` steps, of which a resumed run has `done` behind it."""
        self._phase = _Phase(name, total, done, self._clock())
        self._legend(name, total)
        if self._rich is None:
            return
        if self._progress is None:
            self._progress = _progress_bar(self._rich)
            self._progress.start()
        self._phase.task = self._progress.add_task(f"{PHASE_TITLES[name]:<10}", total=total, completed=done)

    def step(self, row: dict[str, Any]) -> None:
        """Print one metric row of the phase begun last. A metric that is absent shows as "-", a rare one as blank."""
        phase, step = self._phase, row["step"]
        if phase is None or phase.name != row["phase"]:
            raise ValueError(f"a row of phase {row['phase']!r}: call phase({row['phase']!r}, total) before its steps")
        if self._progress is not None:
            self._progress.update(phase.task, completed=step)
        if phase.name != "rl" and not _is_shown(phase, row):
            return
        columns = COLUMNS[phase.name]
        if phase.lines % LINES_A_PAGE == 0:
            self._print(*[(f"{column.title:>{column.width}}", "bold") for column in columns])
        phase.lines += 1
        parts = [(_cell(column, row), column.style) for column in columns]
        self._print(*parts, (self._time_left(phase, step), "") if self._rich is None else ("", ""))

    def note(self, text: str) -> None:
        """Print a sentence on its own line, for example where a checkpoint was written."""
        self._print((text, "cyan"))

    def warn(self, text: str) -> None:
        """Print a sentence that the user should act on or know."""
        self._print((f"warning: {text}", "yellow"))

    def counter(self, what: str, total: int) -> Callable[[int], None]:
        """Return what prints "what: done of total" where that takes long, every SECONDS_A_COUNT."""
        last = self._clock()

        def told(done: int) -> None:
            nonlocal last
            if self._clock() - last >= SECONDS_A_COUNT:
                last = self._clock()
                self.note(f"{what}: {done} of {total}")

        return told

    def close(self) -> None:
        """Stop the bar and give the terminal back. May be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _legend(self, name: str, total: int) -> None:
        self._print()
        self._print((f"{PHASE_TITLES[name]}: {total} steps", "bold"))
        for column in COLUMNS[name]:
            if column.meaning:
                self._print((f"  {column.title:<9}", ""), (column.meaning, "dim"))
        self._print()

    def _time_left(self, phase: _Phase, step: int) -> str:
        """Estimate from the pace since the phase began; say nothing before the first step."""
        done = step - phase.first
        if done <= 0:
            return ""
        left = (self._clock() - phase.began) / done * max(0, phase.total - step)
        return f"  {timedelta(seconds=round(left))} left"

    def _print(self, *parts: tuple[str, str]) -> None:
        if self._rich is None:
            print("".join(text for text, _ in parts), file=self._stream, flush=True)
        else:
            # soft_wrap: a line wider than the terminal continues below instead of losing its end.
            self._rich.print(Text.assemble(*parts), soft_wrap=True)


def _is_shown(phase: _Phase, row: dict[str, Any]) -> bool:
    every = max(1, phase.total // LINES_OF_SHORT_STEPS)
    step = row["step"]
    measured = any(row.get(column.key) is not None for column in COLUMNS[phase.name] if column.is_rare)
    return step == 1 or step % every == 0 or step == phase.total or measured


def _cell(column: Column, row: dict[str, Any]) -> str:
    value = row.get(column.key)
    if value is None:
        text = "" if column.is_rare else "-"
    elif not math.isfinite(value):
        text = str(float(value))  # nan, inf
    else:
        text = format(100 * value if column.percent else value, column.form)
    return f"{text:>{column.width}}"


def _progress_bar(rich: RichConsole) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=rich,
        refresh_per_second=2,  # the bar runs beside a training that may have two cores
        speed_estimate_period=600,  # seconds; the default of 30 holds less than one step of a large model
    )
