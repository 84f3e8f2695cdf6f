"""Numbers and names that mean nothing are refused by the option's name, before any work, by every command that takes
them."""

import pytest

from gspo_megatron.cli import check_learning, convert, doctor, plot, slurm, study, upcycle
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe.load import REPOSITORY

LONG = "a" * 300  # bytes of a name; Linux takes 255
EXAMPLE = str(REPOSITORY / "examples/recipes/moe_gspo.yaml")


@pytest.mark.parametrize(
    ("command", "argv", "told"),
    [
        (check_learning, ["runs/x", "--min-rise", "nan"], "--min-rise = nan: must be a finite number"),
        (check_learning, ["runs/x", "--max-control-rise", "inf"], "--max-control-rise = inf: must be a finite number"),
        (upcycle, ["MODEL", "TARGET", "--max-shard-size", "inf"], "--max-shard-size = inf: must be a finite number"),
        (upcycle, ["MODEL", "TARGET", "--experts", "1000000000"], "--experts = 1000000000: must be at most 4,096"),
        (upcycle, ["MODEL", "TARGET", "--seed", "-1"], "--seed = -1: must be 0 or more"),
        (convert, ["MODEL", "TARGET", "--max-shard-size", "inf"], "--max-shard-size = inf: must be a finite number"),
        (study, ["algorithms", "--lr", "inf"], r"--lr\[0\] = inf: must be a finite number"),
        (study, ["algorithms", "--seeds", str(2**63)], f"--seeds = {2**63}: must be at most"),
        (doctor, ["--noise-floor", "--num-prompts", str(2**63)], f"--num-prompts = {2**63}: must be at most"),
        (slurm, [EXAMPLE, "--nodes", str(2**63)], f"--nodes = {2**63}: must be at most"),
        (convert, ["MODEL", LONG], "TARGET = 'aaa.*: is too long"),
        (upcycle, [LONG, "TARGET"], "SOURCE = 'aaa.*: is too long"),
        (plot, [LONG], "RUN = 'aaa.*: is too long"),
        (check_learning, [LONG], "RUN = 'aaa.*: is too long"),
        (study, ["algorithms", "--folder", LONG], "--folder = 'aaa.*: is too long"),
        (doctor, ["--noise-floor", "--checkpoint", LONG], "--checkpoint = 'aaa.*: is too long"),
    ],
)
def test_a_value_that_means_nothing(command, argv, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").touch()
    words = {"MODEL": str(model), "TARGET": str(tmp_path / "target")}
    with pytest.raises(ConfigError, match=told):
        command.main([words.get(word, word) for word in argv])
