"""The example script in each way that people start it, with bad input, with --help and with the smallest real training.

Left out: several nodes, and GPUs (ranks see none here, so that the same launches mean the same everywhere).
"""

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from gspo_megatron.cli import train
from gspo_megatron.cli.launch import OF_A_RUN
from gspo_megatron.cli.launch import TORCHRUN as TORCHRUN_PROGRAM
from gspo_megatron.errors import ConfigError
from tools.validation.launching import LIMIT, PYTHON, ROOT, TORCHRUN, launched

SCRIPT = ROOT / "examples/train_moe_gspo.sh"
SMALLEST = [
    "--steps", "0", "--warm-start.steps", "2", "--warm-start.num-examples", "32", "--warm-start.batch-size", "16",
    "--data.num-eval-prompts", "16", "--output-dir", "runs",
]  # fmt: skip
FORMS = {
    "torchrun": [*TORCHRUN, "--nproc-per-node", "2", str(SCRIPT)],
    "torchrun, one rank": [*TORCHRUN, str(SCRIPT)],
    "torchrun --no-python": [*TORCHRUN, "--no-python", "--nproc-per-node", "2", str(SCRIPT)],
    "bash": ["bash", str(SCRIPT)],
    "gspo-megatron": [str(Path(PYTHON).with_name("gspo-megatron")), "train"],
}
BAD_INPUT = {
    "value": (["--steps", "-1"], "steps = -1: must be 0 or more"),
    "type": (["--steps", "many"], "parsing --steps"),
    "name": (["--stepz", "1"], "--stepz"),
    "layout": (["--parallel.tensor-model-parallel-size", "3"], "tensor 3 x pipeline 1 = 3 does not divide"),
    "model": (["--model.hf-config", "nowhere.json"], "model.hf_config = 'nowhere.json'"),
}
OUTPUT = {  # output_dir or name, and what is said of it
    "a file": (["--output-dir", "file"], "/file is a file"),
    "below a file": (["--output-dir", "file/runs"], "/file is a file"),
    "a dangling link": (["--output-dir", "link"], "/link is a link to nowhere"),
    "not writable": (["--output-dir", "/sys/runs"], "nothing can be written in /sys ("),
    "a long part": (["--output-dir", "x" * 300], "output_dir = "),
    "a long name": (["--name", "x" * 300], "name = "),
    "a long path": (["--output-dir", "/".join(20 * ["x" * 199])], "bytes, of 4096"),
}
# What needs the model's shape or several parts of the recipe; four ranks.
MISFITS = {
    "layers over stages": (["--parallel.pipeline-model-parallel-size", "4",
                            "--parallel.virtual-pipeline-model-parallel-size", "2"], "num_hidden_layers 4"),
    "heads over tensor ranks": (["--parallel.tensor-model-parallel-size", "4"], "num_key_value_heads 2"),
    "experts over ranks": (["--model.hf-config", "odd.json", "--parallel.expert-model-parallel-size", "4"],
                           "num_experts 6"),
    "experts x stages over ranks": (["--parallel.expert-model-parallel-size", "8"], "does not divide 4 ranks"),
    "prompts over replicas": (["--parallel.tensor-model-parallel-size", "1", "--rollout.num-prompts", "6"],
                              "rollout.num_prompts = 6"),
    "minibatches": (["--algorithm.num-minibatches", "7"], "algorithm.num_minibatches = 7"),
    "context": (["--data.max-prompt-length", "250"], "max_position_embeddings 256"),
    "group of one": (["--rollout.group-size", "1"], "rollout.group_size = 1"),
    "capacity factor": (["--model.moe-expert-capacity-factor", "1.0"], "model.moe_expert_capacity_factor = 1.0"),
    "task option": (["--tasks.spell-backward.options.min-word-len", "-3"], "tasks.spell_backward"),
}  # fmt: skip
# The script looks for its interpreter itself: the tests' own, wherever that is.
ENV = {"VIRTUAL_ENV": str(Path(PYTHON).parents[1]), "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("form", ["bash", "gspo-megatron"])
@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_bad_input_exits_2_before_any_rank_starts(tmp_path, form, mistake):
    argv, text = BAD_INPUT[mistake]
    with launched([*FORMS[form], *argv], tmp_path, **ENV) as launch:
        assert launch.wait(LIMIT) == 2
    assert launch.stdout == ""
    assert launch.stderr.count(text) == 1
    assert "Traceback" not in launch.stderr and "torchrun" not in launch.stderr


@pytest.mark.parametrize("mistake", OUTPUT)
def test_an_output_folder_that_cannot_be_is_told_before_any_rank_starts(tmp_path, monkeypatch, capfd, mistake):
    """In this process: become_ranks would be called next, and is not."""
    argv, text = OUTPUT[mistake]
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "become_ranks", lambda *args: pytest.fail("the ranks are started"))
    with pytest.raises(ConfigError) as caught:
        train.main([*argv, "--device", "cpu"])
    assert text in str(caught.value) and str(caught.value).count("\n") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]  # nothing is left


@pytest.mark.parametrize("mistake", MISFITS)
def test_a_recipe_that_does_not_fit_is_told_before_any_rank_starts(tmp_path, mistake):
    argv, text = MISFITS[mistake]
    shape = json.loads((ROOT / "examples/models/qwen3_moe_tiny/config.json").read_text())
    (tmp_path / "odd.json").write_text(json.dumps(shape | {"num_experts": 6}))
    with launched([*FORMS["bash"], *argv], tmp_path, NPROC="4", **ENV) as launch:
        assert launch.wait(30) == 2
    assert launch.stderr.count("error:") == 1 and text in launch.stderr, launch.stderr
    assert "Traceback" not in launch.stderr


@pytest.mark.parametrize("form", ["torchrun", "torchrun, one rank", "torchrun --no-python"])
@pytest.mark.parametrize("mistake", ["value", "name"])
def test_bad_input_under_torchrun_is_told_once(tmp_path, form, mistake):
    argv, text = BAD_INPUT[mistake]
    with launched([*FORMS[form], *argv], tmp_path, **ENV) as launch:
        # On a busy machine torchrun itself may take ten seconds to start. Its status is 1 whatever its ranks' are.
        assert launch.wait(30) == 1
    assert launch.stderr.count(text) == 1
    # torchrun's trace of its own follows; ours would name the package.
    assert "gspo_megatron/" not in launch.stderr.replace(str(ROOT), "")


@pytest.mark.parametrize("form", ["torchrun", "torchrun --no-python", "bash"])
def test_help_is_printed_once(tmp_path, form):
    with launched([*FORMS[form], "--help"], tmp_path, **ENV) as launch:
        assert launch.wait(30) == 0, launch.stderr
    assert launch.stdout.count("usage:") == 1
    assert "--optimizer.lr FLOAT" in launch.stdout
    assert launch.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form != "gspo-megatron"])
def test_the_smallest_training_runs(tmp_path, form):
    with launched([*FORMS[form], *SMALLEST], tmp_path, NPROC="2", **ENV) as launch:
        assert launch.wait(240) == 0, launch.stderr
    assert len(list(tmp_path.glob("runs/*/config.yaml"))) == 1
    assert list(tmp_path.glob("runs/*/metrics.jsonl"))


def test_the_script_is_executable_and_shell_and_python():
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    for shell in ("sh", "bash", "dash"):
        if shutil.which(shell):
            subprocess.run([shell, "-n", str(SCRIPT)], check=True)
    compile(SCRIPT.read_text(), str(SCRIPT), "exec")


def test_the_script_finds_the_interpreter_of_its_checkout(tmp_path):
    """Nothing is activated: .venv beside the script comes before python3, an activated environment before both."""
    checkout = tmp_path / "a checkout"
    places = {".venv": checkout / ".venv", "active": tmp_path / "active", "path": tmp_path / "path"}
    (checkout / "examples").mkdir(parents=True)
    shutil.copy(SCRIPT, checkout / "examples")
    for name, place in places.items():
        (place / "bin").mkdir(parents=True)
        for program in ("python", "python3"):
            (place / "bin" / program).write_text(f'#!/bin/sh\necho "{name}:$2"\n')
            (place / "bin" / program).chmod(0o755)
    path = f"{places['path'] / 'bin'}:{os.environ['PATH']}"

    def found(**env: str) -> str:
        command = ["bash", "a checkout/examples/train_moe_gspo.sh", "--steps", "1"]
        return subprocess.run(command, cwd=tmp_path, env={"PATH": path} | env, capture_output=True, text=True).stdout

    assert found(VIRTUAL_ENV=str(places["active"])) == "active:--steps\n"
    assert found() == ".venv:--steps\n"
    assert found(VIRTUAL_ENV=str(tmp_path / "deleted")) == ".venv:--steps\n"
    shutil.rmtree(places[".venv"])
    assert found() == "path:--steps\n"


def test_nproc_must_be_a_number(tmp_path):
    with launched(FORMS["bash"], tmp_path, NPROC="two", **ENV) as launch:
        assert launch.wait(LIMIT) == 2
    assert launch.stderr.startswith("error: NPROC = 'two'")


def test_an_unknown_command_shows_the_usage(tmp_path):
    with launched([*FORMS["gspo-megatron"][:-1], "trian"], tmp_path) as launch:
        assert launch.wait(LIMIT) == 2
    assert launch.stderr.startswith("error: unknown command 'trian'\nusage: gspo-megatron train")


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_do_not_count(monkeypatch, visible):
    from gspo_megatron.cli.launch import gpu_count

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_count() == 0


RANK = """
import os, sys
sys.exit(int(os.environ["STATUS"]) if os.environ["RANK"] == "1" else 0)
"""


@pytest.mark.parametrize(("status", "seen", "is_quiet"), [(2, 2, True), (85, 85, True), (1, 1, False), (0, 0, True)])
def test_a_status_that_was_explained_is_passed_on_without_an_account(tmp_path, status, seen, is_quiet):
    (tmp_path / "rank.py").write_text(RANK)
    program = TORCHRUN_PROGRAM.format(quiet=OF_A_RUN)
    command = [PYTHON, "-c", program, "--nproc-per-node", "2", str(tmp_path / "rank.py")]
    with launched(command, tmp_path, STATUS=str(status)) as launch:
        assert launch.wait(60) == seen
    assert (launch.stderr == "") == is_quiet, launch.stderr
    assert ("ChildFailedError" in launch.stderr) != is_quiet


def test_a_prompt_that_is_too_long_ends_the_start_with_one_message_and_leaves_nothing(tmp_path):
    """Found in the ranks, where the tokenizer is: status 2, one line, no account of torchrun's, and no run folder."""
    argv = ["--data.max-prompt-length", "5", "--output-dir", "runs", "--device", "cpu"]
    with launched([*FORMS["gspo-megatron"], *argv], tmp_path, NPROC="2", **ENV) as launch:
        assert launch.wait(120) == 2
    said = [line for line in launch.stderr.splitlines() if "warning" not in line.lower()]
    assert len(said) == 1 and said[0].startswith("error: data.max_prompt_length = 5: a prompt of tasks."), launch.stderr
    assert list((tmp_path / "runs").iterdir()) == []
