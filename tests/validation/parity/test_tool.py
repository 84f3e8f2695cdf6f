"""tools/validation/parity_matrix.py chooses cases, prints a row for each, and fails where it must."""

import sys

import pytest

from tools.validation import parity_matrix as tool
from tools.validation.parity.cases import matrix
from tools.validation.parity.run import Errors

GOOD = Errors(1e-8, 1e-7, 1e-7, 1e-7, 0, "w", 1.0)


@pytest.fixture
def run_tool(monkeypatch):
    """(arguments, errors of every case but those whose name has `missing`) -> exit status."""

    def call(arguments: str, errors: Errors = GOOD, missing: str = "nothing", account: str = "") -> int:
        def run_all(cases, console):
            return {c.name: errors for c in cases if missing not in c.name}, [account] if account else []

        monkeypatch.setattr(tool, "run_all", run_all)
        monkeypatch.setattr(tool.signal, "signal", lambda *args: None)
        monkeypatch.setattr(sys, "argv", ["parity_matrix.py", *arguments.split()])
        return tool.main()

    return call


def test_choice_and_list(run_tool, capsys):
    assert run_tool("--list --ranks 2 --dtype fp64 --only ^CP2") == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed and all(name.startswith("CP2 ") and "fp64" in name for name in listed)
    assert run_tool("--list") == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in matrix()]


def test_bad_input(run_tool, capsys):
    assert run_tool("--only (") == 2 and run_tool("--only no-such-layout") == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_status_and_markdown(run_tool, tmp_path, capsys):
    """fp64 cases break their limit with what fp32 allows; a case without a result fails too."""
    file = tmp_path / "docs" / "parity.md"
    assert run_tool(f"--dtype fp32 --markdown {file}") == 0
    rows = file.read_text().splitlines()
    assert len(rows) == 2 + sum(case.dtype == "fp32" for case in matrix())
    assert len({row.count("|") for row in rows}) == 1 and "1e-08" in rows[2]
    capsys.readouterr()
    assert run_tool("--dtype fp64 --ranks 1") == 1
    assert "gradient is off by 1.0e-07, limit 1e-11" in capsys.readouterr().err
    assert run_tool("--dtype fp32 --only ^TP4", missing="m5") == 1
    assert "did not run" in capsys.readouterr().err
    assert run_tool("--dtype bf16 --ranks 1", account="2 ranks ended with status 1") == 1
    assert run_tool("--dtype bf16 --ranks 1", errors=Errors(1, 1, 1, 1, 9, "w", 1.0)) == 0  # bf16 has no limit
