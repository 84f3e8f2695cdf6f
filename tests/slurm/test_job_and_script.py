"""gspo-megatron slurm: the script, and what is refused before it waits in a queue. tests/slurm runs the script."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from gspo_megatron.cli import slurm
from gspo_megatron.errors import ConfigError
from gspo_megatron.slurm.job import seconds
from tools.validation.launching import ROOT

RECIPE = str(ROOT / "examples/recipes/moe_gspo.yaml")


def written(tmp_path, monkeypatch, *options: str) -> str:
    monkeypatch.chdir(tmp_path)
    assert slurm.main([RECIPE, "--nodes", "2", *options]) == 0
    return (tmp_path / "moe_gspo.sbatch").read_text()


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_example_is_what_the_command_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    target = tmp_path / "train.sbatch"
    logs = ROOT / "logs"
    were_there = logs.exists()
    assert (
        slurm.main(
            ["examples/recipes/moe_gspo.yaml", "--nodes", "2", "--python", ".venv/bin/python", "--output", str(target)]
        )
        == 0
    )
    if not were_there:
        logs.rmdir()
    assert target.read_text() == (ROOT / "examples/slurm/train.sbatch").read_text(), (
        "examples/slurm/train.sbatch is out of date: write it again by `gspo-megatron slurm "
        "examples/recipes/moe_gspo.yaml --nodes 2 --python .venv/bin/python --output examples/slurm/train.sbatch "
        "--overwrite`"
    )


@pytest.mark.parametrize("name", ["train", "convert"])
def test_bash_reads_the_examples(name):
    subprocess.run(["bash", "-n", ROOT / f"examples/slurm/{name}.sbatch"], check=True)


def test_a_script_asks_for_what_it_was_told(tmp_path, monkeypatch, capsys):
    script = written(
        tmp_path,
        monkeypatch,
        "--ranks-per-node",
        "4",
        "--partition",
        "a100",
        "--time",
        "1-12:00:00",
        "--grace",
        "600",
        "--cpus-per-rank",
        "6",
        "--sbatch",
        "account=mine",
        "exclusive",
        "--max-restarts",
        "1",
        "--steps",
        "7",
        "--parallel.expert-model-parallel-size",
        "4",
    )
    assert directives(script) == [
        "--job-name=moe_gspo",
        "--partition=a100",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--cpus-per-task=24",
        "--account=mine",
        "--exclusive",
        "--time=1-12:00:00",
        "--requeue",
        "--signal=USR1@600",
        "--open-mode=append",
        "--output=logs/%x-%j.log",
    ]
    assert "--nproc-per-node 4 " in script and "--max-restarts 1 " in script
    assert f"train {RECIPE} --steps 7 --parallel.expert-model-parallel-size 4\n" in script
    told = capsys.readouterr().out
    assert "2 nodes x 4 ranks (GPU, NCCL)" in told and "TP1 PP1 EP4 CP1 DP8" in told
    assert "submit it with: sbatch moe_gspo.sbatch" in told
    assert (tmp_path / "logs").is_dir()


def test_a_seed_a_job(tmp_path, monkeypatch):
    script = written(tmp_path, monkeypatch, "--array", "1-3", "--device", "cpu", "--ranks-per-node", "2")
    assert "--array=1-3" in directives(script) and not [line for line in directives(script) if "gpu" in line]
    assert '--name "moe_gspo-seed$SLURM_ARRAY_TASK_ID" --seed "$SLURM_ARRAY_TASK_ID"\n' in script


def test_words_for_the_shell_are_quoted(tmp_path, monkeypatch):
    script = written(tmp_path, monkeypatch, "--output-dir", "my runs/$USER", "--ranks-per-node", "2")
    assert "--output-dir 'my runs/$USER'\n" in script


def test_a_script_is_not_overwritten_unasked(tmp_path, monkeypatch):
    first = written(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="exists already.*--overwrite"):
        slurm.main([RECIPE, "--nodes", "4"])
    assert (tmp_path / "moe_gspo.sbatch").read_text() == first
    assert slurm.main([RECIPE, "--nodes", "4", "--overwrite"]) == 0
    assert "--nodes=4" in directives((tmp_path / "moe_gspo.sbatch").read_text())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--nodes", "0"], "--nodes = 0: must be above 0"),
        (["--nodes", "2", "--time", "24h"], "--time = '24h': is no time limit"),
        (["--nodes", "2", "--time", "1-12:00"], "--time = '1-12:00': is no time limit"),
        (["--nodes", "2", "--time", "5:00"], "leaves no time to train"),
        (["--nodes", "2", "--resume", "never"], "could not go on after a requeue"),
        (["--nodes", "2", "--logs", "../else"], "folder below the current one"),
        (["--nodes", "2", "--array", "one"], "is no list of seeds"),
        (["--nodes", "2", "--output", "no/such/folder.sbatch"], "its folder does not exist"),
        (["--nodes", "1", "--ranks-per-node", "3", "--parallel.tensor-model-parallel-size", "2"], "3"),
    ],
)
def test_refused(tmp_path, monkeypatch, options, message):
    """Each message names the option, and nothing is written. Three ranks cannot be pairs of tensor parallelism."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as caught:
        slurm.main([RECIPE, *options])
    print(caught.value)
    assert not list(tmp_path.glob("*.sbatch"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--output", "folder", "--overwrite"], "--output = 'folder': is no file"),
        (["--output", "/dev/null", "--overwrite"], "--output = '/dev/null': is no file"),
        (["--logs", "file"], "--logs = 'file': cannot be made (File exists)"),
        (["--logs", "file/below"], "--logs = 'file/below': cannot be made (Not a directory)"),
        (["--submit"], "--submit = True: there is no sbatch here"),
    ],
)
def test_what_cannot_be_written_or_submitted_is_one_message(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        slurm.main([RECIPE, "--nodes", "2", *options])
    assert message in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"folder", "file", "logs"}
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_no_half_of_a_script(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = written(tmp_path, monkeypatch)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"--output = 'moe_gspo.sbatch': cannot be written \(No space left"):
        slurm.main([RECIPE, "--nodes", "4", "--overwrite"])
    assert (tmp_path / "moe_gspo.sbatch").read_text() == before and not list(tmp_path.glob("*.new"))


def test_tensor_parallelism_across_nodes_is_warned_about(tmp_path, monkeypatch, capsys):
    written(
        tmp_path,
        monkeypatch,
        "--ranks-per-node",
        "2",
        "--parallel.tensor-model-parallel-size",
        "2",
        "--parallel.context-parallel-size",
        "2",
    )
    assert "tensor and context parallelism over 4 ranks cross nodes of 2" in capsys.readouterr().err


def test_seconds_of_a_limit():
    """[days-][hours:]minutes:seconds, as sbatch(1) says."""
    found = [seconds(text) for text in ("10:30", "01:00:00", "1-02:03:04")]
    assert found == [10 * 60 + 30, 3600, 86400 + 2 * 3600 + 3 * 60 + 4]


def test_convert_sbatch_says_how_it_is_used(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "examples/slurm/convert.sbatch", "only one"],
        capture_output=True,
        text=True,
        env={"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2 and "SOURCE TARGET" in done.stderr


def test_the_submit_option_calls_sbatch(tmp_path, monkeypatch):
    """Its exit status is the command's."""
    fake = Path(tmp_path / "bin/sbatch")
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" > submitted\nexit 7\n')
    fake.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    assert slurm.main([RECIPE, "--nodes", "2", "--submit"]) == 7
    assert (tmp_path / "submitted").read_text() == f"{tmp_path / 'moe_gspo.sbatch'}\n"


INJECTIONS = (
    "x\ntouch PWNED\n#",
    "x\r\ntouch PWNED",
    "$(touch PWNED)",
    "`touch PWNED`",
    "x;touch PWNED;",
    'x" && touch PWNED #',
    "x' && touch PWNED #",
    "x\u2028touch PWNED",
    "x\x0btouch PWNED",
    "x\x00y",
)
FIELDS = ("--name", "--partition", "--time", "--array", "--sbatch", "--logs")


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("field", FIELDS)
def test_no_value_writes_a_command_into_the_script(tmp_path, monkeypatch, field, text):
    """What is not plain is refused, with a message of one line and before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        slurm.main([RECIPE, "--nodes", "2", field, text])
    assert str(caught.value).startswith(f"{field if field != '--name' else 'name'} = ")
    assert str(caught.value).isprintable() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("field", ["recipe", "--python", "--output-dir", "--model.hf-config"])
def test_a_path_in_the_script_is_quoted_or_refused(tmp_path, monkeypatch, field, text):
    """bash, with programs that do nothing, reads each word as it was given."""
    monkeypatch.chdir(tmp_path)
    recipe = Path(RECIPE).read_text()
    options = [RECIPE, "--nodes", "2", "--ranks-per-node", "1", "--device", "cpu", "--output", "job.sbatch"]
    if field == "recipe":
        if not text.isprintable():
            return  # tests/config/test_names.py
        options[0] = text.replace("/", "_")
        Path(options[0]).write_text(recipe)
    elif field == "--model.hf-config":
        options += [field, str(ROOT / "examples/models/qwen3_moe_tiny/config.json") + text]
    else:
        options += [field, text]
    try:
        slurm.main(options)
    except ConfigError as error:
        assert str(error).isprintable() and not Path("job.sbatch").exists()
        return
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("srun", "scontrol", "timeout"):
        (tools / name).write_text('#!/bin/bash\n[ "$1" = show ] && echo here || printf "%s\\n" "$@" >> words\n')
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7",
                   "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "2"}  # fmt: skip
    subprocess.run(["bash", "job.sbatch"], env=environment, check=True, capture_output=True)
    assert (options[0] if field == "recipe" else text) in (tmp_path / "words").read_text().splitlines()
    assert not (tmp_path / "PWNED").exists()


def test_the_recipes_own_name_is_checked_too(tmp_path, monkeypatch):
    """As a YAML file writes it, with escapes."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(Path(RECIPE).read_text().replace("name: moe_gspo", 'name: "x\\ntouch PWN1\\n#"'))
    with pytest.raises(ConfigError, match=r"^name = 'x\\ntouch PWN1\\n#': must be at most 100"):
        slurm.main(["r.yaml", "--nodes", "2"])
    assert not list(tmp_path.glob("*.sbatch"))


def test_a_seeds_name_has_room(tmp_path, monkeypatch):
    """95 letters and -seed1000 are 104."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="name = .*must be at most 91 letters"):
        slurm.main([RECIPE, "--nodes", "2", "--name", "x" * 95, "--array", "1-1000"])
