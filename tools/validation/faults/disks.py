"""Faults of disks and files in real trainings: full, damaged, half-deleted. See scenarios.py."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.validation.faults.scenarios import LONG, Whole, again, line_with, result, running, same

SMALL = 64 << 20  # bytes; a checkpoint of the training has 18 MB, and two are kept


class CannotMount(Exception):
    """Only root may mount a small disk."""


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A tmpfs of `size` bytes at `place`."""
    place.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        raise CannotMount(mounted.stderr.decode().strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def no_room(folder: Path, whole: Whole) -> str:
    """The disk cannot hold another checkpoint: said before a byte is written. With room, the same command goes on."""
    with small_disk(folder / "runs", SMALL):
        with running(folder) as launch:
            assert launch.wait(LONG) == 1, launch.stderr
            told = line_with(launch.stderr, "a checkpoint takes")
        intact_and_whole(folder)
        subprocess.run(["mount", "-o", f"remount,size={4 * SMALL}", str(folder / "runs")], check=True)
        again(folder, whole)
    return told


def full_disk(folder: Path, whole: Whole) -> str:
    """The disk fills up while a checkpoint is written: all ranks say so, the half one is removed."""
    with small_disk(folder / "runs", 4 * SMALL):
        with running(folder, ("full disk", 0, "rl", 3, 0)) as launch:
            assert launch.wait(LONG) == 1, launch.stderr
            told = line_with(launch.stderr, "No space left on device")
        (folder / "runs/filler").unlink()
        intact_and_whole(folder)
        again(folder, whole)
    return told


def intact_and_whole(folder: Path) -> None:
    """There is a checkpoint, and no half one beside it."""
    found = [path.name for path in (folder / "runs/moe_gspo/checkpoints").iterdir()]
    assert found and not [name for name in found if "unfinished" in name], found


def spoiled(folder: Path, whole: Whole, harm: Callable[[Path], list[Path]]) -> str:
    """A killed run's newest checkpoint is harmed: a harmed file is named, and the run goes on from the one before."""
    with running(folder, ("forward", 0, "rl", 4, 0)) as launch:
        assert launch.wait(LONG) == 1, launch.stderr
    checkpoints = sorted((folder / "runs/moe_gspo/checkpoints").glob("step_*"))
    assert [path.name for path in checkpoints] == ["step_000002", "step_000003"]
    victims = [f"{path.parent.name}/{path.name}:" for path in harm(checkpoints[-1])]
    with running(folder) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
        text = " ".join(launch.stdout.split())
    assert "goes on after rl step 2" in text, text[-3000:]
    same(result(folder), whole)
    places = [text.index(victim) for victim in victims if victim in text]
    assert places, f"none of {victims} is named:\n{text[-3000:]}"
    return text[places[0] :]


def flip(folder: Path) -> list[Path]:
    """One bit."""
    victim = sorted(folder.glob("*.distcp"))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return [victim]


def truncate(folder: Path) -> list[Path]:
    victim = sorted(folder.glob("*.distcp"))[-1]
    os.truncate(victim, victim.stat().st_size // 2)
    return [victim]


def half_delete(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.distcp"))
    lost = files[: len(files) // 2]
    for file in lost:
        file.unlink()
    return lost


def corrupt_line(folder: Path) -> str:
    """A line of a data file that is cut off: named before any process group starts."""
    folder.mkdir(parents=True)
    good = '{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}\n'
    (folder / "pairs.jsonl").write_text(2 * good + good[:30] + "\n" + 8 * good)
    extra = ("--algorithm.name", "dpo", "--algorithm.preference.path", "pairs.jsonl", "--algorithm.entropy-coef", "0",
             "--algorithm.preference.batch-size", "2")  # fmt: skip
    with running(folder, extra=extra) as launch:
        assert launch.wait(LONG) == 1
        told = line_with(launch.stderr, "pairs.jsonl, line 3")
    assert not (folder / "runs").exists()
    return told
