"""Faults of run folders in real trainings: a damaged record, several folders of one name, an end at a bad moment.

See scenarios.py.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from gspo_megatron.metrics.tracker import read_metrics
from tools.validation.faults.disks import SMALL, small_disk
from tools.validation.faults.scenarios import LONG, Whole, again, line_with, result, running, same

RUN = "runs/moe_gspo"


def damaged(folder: Path, whole: Whole, harm: Callable[[Path], None], says: str, goes_on: int) -> str:
    """A file of a killed run is harmed: it is named, and the run goes on after that step, as if undisturbed."""
    with running(folder, ("forward", 0, "rl", 4, 0)) as launch:
        assert launch.wait(LONG) == 1, launch.stderr
    assert (folder / RUN / "checkpoints/step_000003/manifest.json").is_file()
    harm(folder / RUN)
    with running(folder) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
        told, text = line_with(launch.stdout, says), launch.stdout
    assert f"goes on after rl step {goes_on}," in text, text[-3000:]
    same(result(folder), whole)
    assert text.count(says) == 1 and "Traceback" not in launch.stderr, text[-3000:]
    assert [path.name for path in (folder / "runs").iterdir()] == ["moe_gspo"]
    return told


def cut_record(run: Path) -> None:
    path = run / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 20)


def empty_record(run: Path) -> None:
    os.truncate(run / "metrics.jsonl", 0)


def spoil_samples(run: Path) -> None:
    """As a loss of power leaves it: a block of zeros in the middle."""
    path = run / "samples.jsonl"
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*content[:2], bytes(4096) + b"\n", *content[2:]]))


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def harm(run: Path) -> None:
        (run / name).write_bytes(content)

    return harm


def full_disk(folder: Path, whole: Whole) -> str:
    """The disk is full when a row is to be written: one message, no half line; with room the same command goes on.

    A checkpoint every other step, so that the rows of two steps come before one: more than the rest of a page. It is
    waited for, so that none is being written when the disk fills up.
    """
    extra = ("--checkpoint.interval", "2", "--checkpoint.no-asynchronous")
    with small_disk(folder / "runs", 4 * SMALL):
        with running(folder, ("full disk for the record", 0, "rl", 3, 0), extra=extra) as launch:
            assert launch.wait(LONG) == 1, launch.stderr
            told = line_with(launch.stderr, "metrics.jsonl: cannot be written")
        assert "No space left on device" in told and launch.stderr.count("error: ") == 1, launch.stderr
        assert (folder / RUN / "metrics.jsonl").read_bytes().endswith(b"}\n")
        assert [row["step"] for row in read_metrics(folder / RUN)][-1] in (2, 3)
        (folder / "runs/filler").unlink()
        with running(folder, extra=extra) as launch:
            assert launch.wait(LONG) == 0, launch.stderr
            line_with(launch.stdout, "goes on after rl step 2")
        same(result(folder), whole)
    return told


def killed_in_removal(folder: Path, whole: Whole) -> str:
    """What is left of the old checkpoint is no checkpoint, stands in nobody's way, and goes at the next start."""
    with running(folder, ("removal", 0, "rl", 4, 0)) as launch:
        assert launch.wait(LONG) == 1, launch.stderr
    halves = list((folder / RUN).rglob("*.unfinished"))
    assert len(halves) == 1, halves
    again(folder, whole)
    assert not list((folder / RUN).rglob("*.unfinished"))
    return f"nothing; {halves[0].name} is gone after the next start"


def killed_at_the_end(folder: Path, whole: Whole) -> str:
    """The same command makes what is missing, and no step; once more, it says that nothing is left to do."""
    extra = ("--save-hf",)
    with running(folder, ("charts", 0, "rl", 0, 0), extra=extra) as launch:
        assert launch.wait(LONG) == 1, launch.stderr
    run = folder / RUN
    assert (run / "hf/config.json").is_file() and not (run / "plots").exists()
    (run / "hf/model.safetensors").unlink()  # as if the kill had come earlier
    with running(folder, extra=extra) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
        told = line_with(launch.stdout, "goes on after rl step 5")
    same(result(folder), whole)
    assert (run / "plots/overview.png").is_file() and (run / "hf/model.safetensors").is_file()
    with running(folder, extra=extra) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
        line_with(launch.stdout, "runs/moe_gspo is finished. Give --resume never to train anew")
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["moe_gspo"]
    assert not list(run.rglob("*.replaced")) and not list(run.rglob("*.unfinished"))
    return told


def two_folders(folder: Path, whole: Whole) -> str:
    """moe_gspo was ended after three steps and moe_gspo-2 before its first: the same command goes on in moe_gspo."""
    for step, extra in ((4, ()), (1, ("--resume", "never"))):
        with running(folder, ("forward", 0, "rl", step, 0), extra=extra) as launch:
            assert launch.wait(LONG) == 1, launch.stderr
    before = _files(folder / "runs/moe_gspo-2")
    with running(folder) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
        told = line_with(launch.stdout, "goes on after rl step 3, from runs/moe_gspo/checkpoints")
    same(result(folder), whole)
    assert _files(folder / "runs/moe_gspo-2") == before
    return told


def _files(folder: Path) -> str:
    """Names and sizes, to tell whether anything was touched."""
    return subprocess.run(["ls", "-lR", "--time-style=full-iso", str(folder)], capture_output=True, text=True).stdout
