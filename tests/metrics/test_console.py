"""What is printed, with and without a terminal."""

import io
import math

import pytest

from gspo_megatron.metrics.console import Console

STEP = {
    "phase": "rl", "step": 3, "reward/mean": 0.4125, "ratio/std": 3.2e-4, "clip/seq_low": 0.125, "clip/seq_high": 0.5,
    "clip/token": 0.0625, "entropy": 0.75, "response/length": 12.25, "perf/tokens_per_second": 1234.4, "time/step": 8.0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_long_count_is_told_every_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    told = Console(stream, clock).counter("rewards", 500)
    for seconds, done in ((4.0, 10), (9.9, 20), (10.0, 30), (19.0, 40), (20.5, 50)):
        clock.now = 100.0 + seconds
        told(done)
    assert stream.getvalue() == "rewards: 30 of 500\nrewards: 50 of 500\n"


def rl_lines(rows: list[dict], total: int = 10, done: int = 0, seconds: float = 0.0) -> list[str]:
    """Printed for the rows after the phase began, without its legend."""
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, clock)
    console.phase("rl", total, done)
    legend = len(stream.getvalue())
    clock.now += seconds
    for row in rows:
        console.step(row)
    return stream.getvalue()[legend:].splitlines()


def test_one_line_a_step_with_values_under_their_titles() -> None:
    titles, line = rl_lines([STEP | {"eval/accuracy": 0.3125}], seconds=90.0)
    assert titles.split() == [
        "step",
        "reward",
        "held-out",
        "ratio-sd",
        "clip<%",
        "clip>%",
        "token%",
        "entropy",
        "length",
        "tok/s",
        "sec",
    ]
    # 3 steps in 90 s leave 7 x 30 s.
    assert line.split() == [
        "3",
        "0.412",
        "0.312",
        "3.2e-04",
        "12.5",
        "50.0",
        "6.2",
        "0.750",
        "12.2",
        "1234",
        "8.0",
        "0:03:30",
        "left",
    ]
    for title, value in zip(titles.split(), line.split(), strict=False):
        assert titles.index(title) + len(title) == line.index(value) + len(value)
    assert len(titles) <= 80


def test_absent_values_leave_the_columns_where_they_are() -> None:
    titles, first, second = rl_lines([{"phase": "rl", "step": 0, "eval/accuracy": 0.25}, STEP | {"entropy": math.nan}])
    assert first.split() == ["0", "-", "0.250", *"--------"]
    assert first.index("0.250") + 5 == titles.index("held-out") + len("held-out")
    assert second[titles.index("reward") + len("reward") :].split()[0] == "3.2e-04"  # held-out is blank
    assert "nan" in second


def test_time_left_counts_the_steps_of_this_process_only() -> None:
    (_, line) = rl_lines([STEP | {"step": 62}], total=100, done=60, seconds=20.0)
    assert line.endswith("  0:06:20 left")  # 38 x 10 s


def test_titles_return_after_a_page() -> None:
    lines = rl_lines([STEP | {"step": step} for step in range(1, 41)], total=40)
    assert len(lines) == 42
    assert [number for number, line in enumerate(lines) if "reward" in line] == [0, 31]


def test_warm_start_prints_a_twentieth_and_every_evaluation() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.phase("warm_start", 200)
    legend = len(stream.getvalue())
    for step in range(1, 201):
        row = {"phase": "warm_start", "step": step, "loss": 2.0, "time/step": 0.5}
        console.step(row | ({"eval/accuracy": 0.5} if step == 33 else {}))
    shown = [line.split()[0] for line in stream.getvalue()[legend:].splitlines()[1:]]
    assert shown == ["1", "10", "20", "30", "33", *[str(step) for step in range(40, 201, 10)]]


def test_dpo_shows_held_out_pairs_where_they_were_measured() -> None:
    """Of 100 steps every fifth is printed, and step 33 because it was evaluated; its neighbours leave those columns
    blank."""
    stream = io.StringIO()
    console = Console(stream)
    console.phase("dpo", 100)
    legend = len(stream.getvalue())
    for step in range(101):
        row = {
            "phase": "dpo",
            "step": step,
            "loss": 0.5,
            "dpo/margin": 0.25,
            "dpo/accuracy": 0.75,
            "dpo/chosen": -1.5,
            "dpo/rejected": -4.0,
            "grad_norm": 2.0,
            "time/step": 0.5,
        }
        console.step(row | ({"dpo/eval_margin": 0.125, "dpo/eval_accuracy": 0.625} if step == 33 else {}))
    titles, *lines = stream.getvalue()[legend:].splitlines()
    lines = [line for line in lines if "loss" not in line]
    assert [int(line.split()[0]) for line in lines] == [0, 1, *range(5, 31, 5), 33, *range(35, 101, 5)]
    assert len(titles) <= 80
    usual = ["0.5000", "0.250", "75.0", "-1.50", "-4.00"]
    by_step = {line.split()[0]: line.split()[1:] for line in lines}
    assert by_step["33"][:9] == [*usual, "0.125", "62.5", "2.00", "0.50"]
    assert by_step["35"][:7] == [*usual, "2.00", "0.50"]


def test_a_log_file_has_no_control_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Console(stream) as console:
        console.header({"run folder": "runs/[a]", "layout": "TP2"})
        console.phase("rl", 10)
        console.step(STEP)
        console.warn("loss is nan")
        console.note("done")
    text = stream.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert text.startswith("run folder  runs/[a]\nlayout      TP2\n")
    assert "\nwarning: loss is nan\ndone\n" in text
    assert "ratio-sd standard deviation" in text


def test_a_terminal_gets_bars_and_the_lines_above_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Console(stream) as console:
        console.header({"run folder": "runs/[a]"})
        console.phase("warm_start", 1)
        console.step({"phase": "warm_start", "step": 1, "loss": 2.0})
        console.phase("rl", 10)
        console.step(STEP)
    text = stream.getvalue()
    assert "runs/[a]" in text  # not taken for rich's markup
    assert "1/1 " in text and "3/10" in text and "elapsed" in text
    assert text.index("0.412") < text.rindex("3/10")
    assert text.endswith("\x1b[?25h")  # the cursor is back
    assert " left\n" not in text[: text.index("0.412")]


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Console(stream) as console:
        console.phase("rl", 10)
        console.step(STEP)
    assert "\x1b" not in stream.getvalue() and "0.412" in stream.getvalue()
    assert stream.getvalue().endswith(" left\n")  # as in a log file, in place of a bar


def test_row_of_another_phase_is_a_defect() -> None:
    console = Console(io.StringIO())
    with pytest.raises(ValueError, match="call phase"):
        console.step(STEP)
