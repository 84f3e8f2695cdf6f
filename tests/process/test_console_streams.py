"""A command's console goes away, in each way that consoles do; the command goes on to its end."""

import os
import subprocess
import sys

import pytest

from tools.validation.launching import ROOT

BODY = """
import sys, warnings
from pathlib import Path
from gspo_megatron.metrics.console import Console
from gspo_megatron.process import lifecycle
with lifecycle.guard():
    console = Console()
    console.header({"run folder": "runs/x"})
    opened = open("opened", "w")
    for line in range(3000):
        console.note(f"line {line} " + 60 * "-")
        print("an error", file=sys.stderr)
    sys.stdout.flush()
    opened.write("its own")
    opened.close()
    Path("done").touch()
sys.exit(0)
"""
# What the shell does to the command ("$@"). 3000 lines are more than a pipe holds.
CONSOLES = {
    "the reader of stdout leaves": '"$@" 2>err | head -n 1; exit ${PIPESTATUS[0]}',
    "the reader of both leaves": '"$@" 2>&1 | head -n 1; exit ${PIPESTATUS[0]}',
    "the reader of stderr leaves": '{ "$@" 2>&1 >out | head -n 1; exit ${PIPESTATUS[0]}; }',
    "nobody reads": '"$@" 2>err | true; exit ${PIPESTATUS[0]}',
    "stdout is closed": '"$@" >&- 2>err',
    "both are closed": '"$@" >&- 2>&-',
    "all three are closed": '"$@" <&- >&- 2>&-',
    "the log's disk is full": '"$@" >/dev/full 2>/dev/full',
}


@pytest.mark.parametrize(("name", "unbuffered"), [*((name, "") for name in CONSOLES), ("nobody reads", "1")])
def test_a_command_outlives_its_console(tmp_path, name, unbuffered):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = ["bash", "-c", CONSOLES[name], "bash", sys.executable, "-c", BODY]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").exists()
    assert (tmp_path / "opened").read_text() == "its own"  # nothing that was printed
    told = done.stderr + (tmp_path / "err").read_text() if (tmp_path / "err").exists() else done.stderr
    assert "Traceback" not in told and "lost the connection" not in told and "Exception ignored" not in told


def test_a_defect_is_told_where_somebody_reads(tmp_path):
    """The reader of stdout is gone, that of stderr is not."""
    body = BODY.replace('Path("done").touch()', 'raise KeyError("mine")').replace(
        'print("an error", file=sys.stderr)', "0"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", '"$@" | head -n 1; exit ${PIPESTATUS[0]}', "bash", sys.executable, "-c", body]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("rank 0 failed:\nTraceback") and done.stderr.count("KeyError: 'mine'") == 1


@pytest.mark.parametrize(("ranks", "is_echo"), [("1", False), ("2", True)])
def test_a_lost_connection_takes_two_ranks(tmp_path, ranks, is_echo):
    """A rank alone has none to lose: what broke is something else, and is shown."""
    body = """
from gspo_megatron.process import lifecycle
with lifecycle.guard():
    raise RuntimeError("Connection reset by peer")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": ranks}
    done = subprocess.run([sys.executable, "-c", body], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert ("lost the connection to another rank" in done.stderr) == is_echo
    assert ("Traceback" in done.stderr) != is_echo
