"""Commands called from Python: what goes wrong is raised, and the interpreter lives on."""

import subprocess
import sys

import pytest

from gspo_megatron.cli import main
from gspo_megatron.errors import ConfigError, GspoError
from tools.validation.launching import ROOT


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["train", "nowhere.yaml"], ConfigError),
        (["train", "--steps", "-1"], ConfigError),
        (["train", "--stps", "1"], (ConfigError, SystemExit)),
        (["trian"], SystemExit),
        ([], SystemExit),
        (["train", "--help"], SystemExit),
        (["slurm", "nowhere.yaml", "--nodes", "1"], ConfigError),
        (["convert", "nowhere", "x"], GspoError),
        (["upcycle", "nowhere", "x"], GspoError),
        (["plot", "nowhere"], Exception),
        (["check-learning", "nowhere"], Exception),
    ],
)
def test_a_call_raises(argv, error, monkeypatch, tmp_path):
    """os._exit, as before, would end this very process."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        main.main(argv)


def test_a_call_does_not_become_torchrun(monkeypatch, tmp_path):
    """os.execv would replace this process by torchrun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    recipe = str(ROOT / "examples/recipes/moe_gspo.yaml")
    with pytest.raises(ConfigError, match="ranks = 1: a call from Python starts none.* Run gspo-megatron"):
        monkeypatch.setenv("NPROC", "1")
        main.main(["train", recipe, "--device", "cpu"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "start", [["-m", "gspo_megatron.cli"], ["-c", "from gspo_megatron.cli.main import main; main()"]]
)
def test_the_command_ends_with_one_message(start, tmp_path):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, *start, "train", "nowhere.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: recipe = 'nowhere.yaml': no such file")
    assert done.stderr.count("\n") == 1
