"""Which folder of a name a start takes: the one of the same recipe that got furthest and is nobody's at the moment.

Files alone; real starts in the same folder are in test_resume.py and in tools/validation/faults/.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from gspo_megatron.config import (
    CheckpointConfig,
    DataConfig,
    Layout,
    RewardConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
)
from gspo_megatron.errors import CheckpointError, ConfigError
from gspo_megatron.process.folder_lock import held, holder
from gspo_megatron.recipe.load import save_recipe
from gspo_megatron.trainer import folders
from gspo_megatron.trainer.folders import Plan, discard_if_empty, take
from gspo_megatron.trainer.resume import Progress, mark_finished
from tools.validation.launching import ROOT

CONFIG = TrainConfig(steps=5).resolved(Layout())


def planned(config: TrainConfig) -> Plan:
    """What a start would do; its hold is given back."""
    plan, hold = take(config)
    if hold is not None:
        hold.close()
    return plan


def checkpoint(run_dir: Path, phase: str, step: int) -> Path:
    """One as far as a start looks at it before it verifies it."""
    progress = Progress(phase, step, 8 * step, None)
    folder = run_dir / "checkpoints" / progress.folder
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps({"counters": {}, "progress": dataclasses.asdict(progress)}))
    return folder


def run_folder(config: TrainConfig, name: str, *steps: int) -> Path:
    """A run of this recipe with checkpoints of these RL steps and a record."""
    folder = config.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text('{"phase": "warm_start", "step": 1}\n')
    for step in steps:
        checkpoint(folder, "rl", step)
    return folder


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return dataclasses.replace(CONFIG, output_dir=tmp_path)


def test_the_first_start_makes_the_folder(config):
    assert planned(config) == Plan(config.output_dir / "moe_gspo")


def test_an_unfinished_run_goes_on_from_its_newest_checkpoint(config):
    run = run_folder(config, "moe_gspo", 2)
    warm = checkpoint(run, "warm_start", 3)
    (run / "checkpoints/step_000003.unfinished").mkdir()
    assert planned(config) == Plan(run, (run / "checkpoints/step_000002", warm))
    assert planned(dataclasses.replace(config, resume="never")) == Plan(config.output_dir / "moe_gspo-2")


def test_progress_is_not_left_behind_for_a_later_folder(config):
    """moe_gspo is unfinished (3 of 5); a second start ended before its first checkpoint, a third before its first
    step."""
    run = run_folder(config, "moe_gspo", 3)
    run_folder(config, "moe_gspo-2")
    (config.output_dir / "moe_gspo-3").mkdir()
    assert planned(config).folder == run


def test_trackers_may_be_asked_for_later(config):
    run = run_folder(config, "moe_gspo", 3)
    assert planned(dataclasses.replace(config, tracking=TrackingConfig(wandb=True, log_samples=9))).folder == run


@pytest.mark.parametrize("steps", [(3, 1), (1, 3)])
def test_the_one_that_got_furthest_is_taken(config, steps):
    runs = [run_folder(config, name, step) for name, step in zip(("moe_gspo", "moe_gspo-2"), steps, strict=True)]
    assert planned(config).folder == runs[steps.index(3)]


def test_equal_ones_are_taken_by_number_and_a_gap_does_not_hide_one(config):
    far = run_folder(config, "moe_gspo-10", 3)
    near = run_folder(config, "moe_gspo-9", 3)
    assert planned(config).folder == near
    with closing(held(near)):
        assert planned(config).folder == far


def test_two_preempted_jobs_of_one_recipe_go_on_in_their_two_folders(config):
    """Both start at once: the first takes the further one, the second the other one, and a third a new one."""
    runs = [run_folder(config, "moe_gspo", 3), run_folder(config, "moe_gspo-2", 2)]
    first, first_hold = take(config)
    second, second_hold = take(config)
    third, third_hold = take(config)
    assert [first.folder, second.folder, third.folder] == [*runs, config.output_dir / "moe_gspo-3"]
    assert second.notes == (f"{runs[0]} is being trained by another process{holder(runs[0])}: passed over",)
    assert f"pid {os.getpid()}" in second.notes[0]
    assert third.notes[-1] == f"a new run starts in {third.folder}"
    for hold in (first_hold, second_hold, third_hold):
        hold.close()


TAKE = """
import dataclasses, pathlib, sys, time
from gspo_megatron.config import Layout, TrainConfig
from gspo_megatron.trainer.folders import take
config = dataclasses.replace(TrainConfig(steps=5).resolved(Layout()), output_dir=pathlib.Path(sys.argv[1]))
while time.time() < float(sys.argv[2]):
    pass
plan, hold = take(config)
print(plan.folder.name, flush=True)
sys.stdin.read()  # it is held until the test has seen all of them
"""


def test_starts_at_the_same_moment_take_folders_of_their_own(config):
    """Four processes, let go together: two unfinished runs and two new ones, each once."""
    for name in ("moe_gspo", "moe_gspo-2"):
        run_folder(config, name, 3)
    moment = str(time.time() + 4)
    command = [sys.executable, "-c", TAKE, str(config.output_dir), moment]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    starts = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) for _ in range(4)]
    taken = [start.stdout.readline().strip() for start in starts]
    for start in starts:
        start.communicate("")
    assert sorted(taken) == ["moe_gspo", "moe_gspo-2", "moe_gspo-3", "moe_gspo-4"]


def test_recipe_a_then_b_then_a_goes_on_with_a(config):
    first = run_folder(config, "moe_gspo", 3)
    other = dataclasses.replace(config, seed=2)
    assert planned(other) == Plan(
        config.output_dir / "moe_gspo-2",
        notes=(
            f"{first} is of another recipe (seed = 1 there, 2 here): passed over",
            f"a new run starts in {config.output_dir / 'moe_gspo-2'}",
        ),
    )
    run_folder(other, "moe_gspo-2", 4)
    assert planned(config).folder == first
    assert planned(other).folder == config.output_dir / "moe_gspo-2"


def test_layout_intervals_and_what_is_refused_may_differ(config):
    run = run_folder(config, "moe_gspo", 3)
    for changes in (
        {"parallel": Layout(1, 2, None, 1, 1), "eval_interval": 7, "checkpoint": CheckpointConfig(keep_last=9)},
        {"data": DataConfig(max_prompt_length=100)},  # the remedy that a prompt which is too long asks for
        {"steps": 9},
    ):
        assert planned(dataclasses.replace(config, **changes)).folder == run


def test_a_run_of_a_name_that_ends_in_a_number_is_another_one(config):
    run_folder(dataclasses.replace(config, name="moe_gspo-2"), "moe_gspo-2", 4)
    assert planned(config) == Plan(config.output_dir / "moe_gspo")


def test_a_finished_run_is_left_as_it_is(config):
    """The same command says so; more steps go on; another run, unfinished, goes first."""
    run = run_folder(config, "moe_gspo", 5)
    mark_finished(run, 5, has_hf=False)
    assert planned(config) == Plan(run, is_finished=True)
    assert planned(dataclasses.replace(config, steps=4)) == Plan(run, is_finished=True)
    assert planned(dataclasses.replace(config, steps=9)).checkpoints == (run / "checkpoints/step_000005",)
    assert planned(dataclasses.replace(config, resume="never")) == Plan(config.output_dir / "moe_gspo-2")
    assert planned(dataclasses.replace(config, seed=2)).folder == config.output_dir / "moe_gspo-2"
    second = run_folder(config, "moe_gspo-3", 1)
    assert planned(config).folder == second


def test_a_run_that_was_ended_after_its_last_checkpoint_is_finished_there(config):
    """All steps are made, the mark is missing or damaged, or is of an earlier end, or the exported model is wanted."""
    run = run_folder(config, "moe_gspo", 5)
    wanted = Plan(run, (run / "checkpoints/step_000005",))
    assert planned(config) == wanted
    for mark in ("", "null", "[]", '{"step": "5", "hf": true}', '{"step": 3, "hf": true}'):
        (run / "finished.json").write_text(mark)
        assert planned(config) == wanted
    mark_finished(run, 5, has_hf=False)
    assert planned(dataclasses.replace(config, save_hf=True)) == wanted
    mark_finished(run, 5, has_hf=True)
    assert planned(dataclasses.replace(config, save_hf=True)) == Plan(run, is_finished=True)


@pytest.mark.parametrize(
    ("ended_with", "wanted", "is_over"),
    [(2, 2, True), (2, 1, True), (1, 2, False), (0, 1, False)],  # 0: the run was asked for steps
)
def test_a_run_of_epochs_is_finished_with_as_many_as_are_wanted(config, ended_with, wanted, is_over):
    """How many steps they are is not known here: the mark says of how many epochs step 5 was the last."""
    task = TaskConfig(data=Path("sums.jsonl"), reward=(RewardConfig("rewards.py:f"),))
    made = dataclasses.replace(config, tasks={"sums": task}, steps=5)
    run = run_folder(made, "moe_gspo", 3, 5)
    asked = dataclasses.replace(made, steps=100, num_epochs=wanted)
    assert not planned(asked).is_finished  # without the mark the end is made once more
    mark_finished(run, 5, has_hf=False, epochs=ended_with)
    plan = planned(asked)
    assert (plan.folder, plan.is_finished) == (run, is_over)
    checkpoint(run, "rl", 6)  # it has gone on since
    assert not planned(asked).is_finished


def test_a_finished_run_without_its_checkpoints_is_not_begun_anew(config):
    run = run_folder(config, "moe_gspo")
    mark_finished(run, 5, has_hf=False)
    assert planned(config) == Plan(run, is_finished=True)
    assert planned(dataclasses.replace(config, steps=9)).folder == config.output_dir / "moe_gspo-2"


# ---- Empty folders ----


def test_a_folder_that_a_start_left_empty_is_used(config):
    """Killed by kill -9 before its first step: recipe, tokenizer, half a checkpoint, files without a line, trackers."""
    folder = config.output_dir / "moe_gspo"
    for inside in ("tokenizer", "tensorboard", "wandb/run", "mlflow", "checkpoints/warm_start_000001.unfinished"):
        (folder / inside).mkdir(parents=True)
    for name in ("metrics.jsonl", "wandb.json", "mlflow.json"):
        (folder / name).touch()
    save_recipe(dataclasses.replace(config, seed=2), folder / "config.yaml")
    assert planned(config) == Plan(folder)
    assert planned(dataclasses.replace(config, resume="never")) == Plan(folder)
    with closing(held(folder)):
        assert planned(config).folder == config.output_dir / "moe_gspo-2"


def test_a_start_that_ends_early_leaves_no_folder(config):
    plan, hold = take(config)
    discard_if_empty(plan.folder)
    assert not plan.folder.exists()
    hold.close()
    discard_if_empty(plan.folder)  # twice does no harm


KEPT = ["notes.txt", "plots", "hf", "finished.json", "checkpoints/step_000001", "checkpoints/best", "tokenizer"]


@pytest.mark.parametrize("kept", KEPT)
def test_a_folder_with_anything_in_it_is_kept(config, kept):
    """Also a checkpoint of another name, and a folder that no start has made, with what a start leaves."""
    folder = config.output_dir / "moe_gspo"
    (folder / kept).mkdir(parents=True)
    if kept != "tokenizer":
        (folder / "config.yaml").touch()
    discard_if_empty(folder)
    assert (folder / kept).exists()
    assert not folders.is_empty(folder)


def test_a_file_or_a_link_of_the_name_is_passed_by(config):
    (config.output_dir / "moe_gspo").write_text("")
    (config.output_dir / "moe_gspo-2").symlink_to("nowhere")
    assert planned(config) == Plan(config.output_dir / "moe_gspo-3")


def test_a_hold_of_a_folder_that_was_removed_is_none(config, monkeypatch):
    """Between the opening of the lock file and the lock the folder goes, as an early end removes it."""
    plan, hold = take(config)
    hold.close()
    real = folders.held.__globals__["fcntl"].flock

    def meanwhile(file, flags):
        discard_if_empty(plan.folder)
        real(file, flags)

    monkeypatch.setattr("gspo_megatron.process.folder_lock.fcntl.flock", meanwhile)
    assert held(plan.folder) is None


def test_a_file_system_without_locks_is_told(config, monkeypatch):
    def no_locks(file, flags):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("gspo_megatron.process.folder_lock.fcntl.flock", no_locks)
    assert "its file system has no locks" in planned(config).notes[0]


def test_a_run_folder_that_cannot_be_written_is_named(config):
    run = run_folder(config, "moe_gspo", 3)
    (run / ".lock").mkdir()  # as good as missing rights, also for root
    with pytest.raises(CheckpointError, match=r"moe_gspo/\.lock: cannot be written .* Make the folder writable"):
        take(config)


# ---- Damage ----

BAD_RECIPE = {
    "empty": b"", "null": b"null", "a list": b"- 1", "a word": b"moe", "not UTF-8": b"seed: \xff", "cut": b"a: [1",
    "zeros": b"\0" * 400, "nested": b"[" * 20_000, "no words": b"1: 2",
}  # fmt: skip


@pytest.mark.parametrize("harm", [*BAD_RECIPE, "missing"])
def test_a_damaged_recipe_is_named_and_the_checkpoint_s_is_read(config, harm):
    run = run_folder(config, "moe_gspo", 2, 3)
    save_recipe(config, run / "checkpoints/step_000003/config.yaml")
    path = run / "config.yaml"
    path.unlink()
    if harm != "missing":
        path.write_bytes(BAD_RECIPE[harm])
    plan = planned(config)
    assert plan.folder == run and plan.checkpoints[0].name == "step_000003"
    assert len(plan.notes) == 1 and plan.notes[0].startswith(f"{path}: cannot be read (")
    assert plan.notes[0].endswith(f"Its copy in {run / 'checkpoints/step_000003'} is read instead.")
    other = planned(dataclasses.replace(config, seed=2))  # it is compared, too
    assert other.folder == config.output_dir / "moe_gspo-2" and "seed = 1 there, 2 here" in other.notes[0]


def test_a_damaged_recipe_without_a_copy_is_refused(config):
    """Of version 0.1.0: nobody knows whether that run is this one. Another run that is known goes first."""
    run = run_folder(config, "moe_gspo", 3)
    (run / "config.yaml").write_text("- 1")
    with pytest.raises(CheckpointError, match=r"config.yaml: cannot be read .* unknown whether .* --resume never"):
        take(config)
    second = run_folder(config, "moe_gspo-2", 1)
    assert planned(config).folder == second


def test_a_checkpoint_whose_progress_is_damaged_is_named(config):
    run = run_folder(config, "moe_gspo", 2, 3)
    (run / "checkpoints/step_000003/progress.json").write_text("{}")
    plan = planned(config)
    assert [path.name for path in plan.checkpoints] == ["step_000002"]
    assert "step_000003/progress.json: damaged" in plan.notes[0]
    (run / "checkpoints/step_000002/progress.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"step_000002/.*\n.*step_000003/(.|\n)*no checkpoint of .* --resume never"
    ):
        take(config)


# ---- Other values in the middle of a run ----


def with_lr(config: TrainConfig, lr: float, resume: str = "change") -> TrainConfig:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=lr), resume=resume)


def test_a_run_goes_on_with_other_values_where_that_is_asked_for(config):
    """Without it another run begins, and the start says what would go on."""
    run = run_folder(config, "moe_gspo", 2, 3)
    assert planned(with_lr(config, 2e-4)) == Plan(
        run, (run / "checkpoints/step_000003", run / "checkpoints/step_000002")
    )
    assert planned(dataclasses.replace(config, resume="change")).folder == run
    plan = planned(with_lr(config, 2e-4, "auto"))
    assert plan.folder.name == "moe_gspo-2"
    assert plan.notes[0] == (
        f"{run} is of another recipe (optimizer.lr = 0.0001 there, 0.0002 here): passed over. --resume change goes on "
        "there with what differs"
    )
    other_seed = dataclasses.replace(with_lr(config, 2e-4, "auto"), seed=2)
    assert planned(other_seed).notes[0].endswith("passed over")


def test_the_furthest_run_that_may_be_changed_is_changed(config):
    """moe_gspo got further, but has another seed; moe_gspo-2 and -3 may be changed."""
    run_folder(dataclasses.replace(config, seed=2), "moe_gspo", 4)
    run_folder(config, "moe_gspo-2", 1)
    best = run_folder(config, "moe_gspo-3", 2)
    plan = planned(with_lr(config, 2e-4))
    assert plan.folder == best and "moe_gspo is of another recipe (seed = 2 there, 1 here: it fixes" in plan.notes[0]


def test_no_other_run_is_changed_where_one_is_of_the_very_recipe(config):
    """Two runs of two learning rates under one name: each goes on itself, also where it is held, or finished."""
    run_folder(config, "moe_gspo", 3)
    own = run_folder(with_lr(config, 2e-4), "moe_gspo-2", 1)
    wanted = with_lr(config, 2e-4)
    assert planned(wanted).folder == own
    with closing(held(own)), pytest.raises(ConfigError, match="moe_gspo-2 is being trained by another process"):
        take(wanted)
    checkpoint(own, "rl", 5)
    mark_finished(own, 5, has_hf=False)
    assert planned(wanted) == Plan(own, is_finished=True)


def test_a_finished_run_has_no_step_left_for_another_value(config):
    run = run_folder(config, "moe_gspo", 5)
    mark_finished(run, 5, has_hf=False)
    said = "optimizer.lr = 0.0001 there, 0.0002 here: no step is left for it"
    assert planned(with_lr(config, 2e-4)) == Plan(run, notes=(said,), is_finished=True)
    assert planned(dataclasses.replace(with_lr(config, 2e-4), steps=9)).checkpoints == (
        run / "checkpoints/step_000005",
    )


def test_what_may_not_change_is_refused_with_all_of_it(config):
    run = run_folder(config, "moe_gspo", 3)
    before = sorted(path.name for path in config.output_dir.rglob("*"))
    batch = dataclasses.replace(config.rollout, group_size=4)
    with pytest.raises(ConfigError) as refused:
        take(dataclasses.replace(with_lr(config, 2e-4), seed=2, rollout=batch))
    assert str(refused.value) == (
        f"resume = 'change': no run named 'moe_gspo' in {config.output_dir} can go on with this recipe. Give the "
        "values that it has where they may not change (docs/resuming.md), or another name and --resume auto for a new "
        f"run.\n{run} is of another recipe (seed = 1 there, 2 here: it fixes the initial weights, the order of the "
        "prompts and every draw; rollout.group_size = 8 there, 4 here: it says what a batch is): passed over"
    )
    assert sorted(path.name for path in config.output_dir.rglob("*")) == before


def test_of_many_refused_values_eight_are_told(config):
    """Two of the model, three of the data, two of the batch, the seed and the replay are nine."""
    run_folder(config, "moe_gspo", 3)
    other = dataclasses.replace(
        with_lr(config, 2e-4),
        seed=2,
        model=dataclasses.replace(config.model, recompute=True, params_dtype="bf16"),
        data=DataConfig(vocab_size=999, num_eval_prompts=7, eval_samples=9),
        rollout=dataclasses.replace(config.rollout, num_prompts=64, group_size=4),
        routing=dataclasses.replace(config.routing, replay="R2"),
    )
    with pytest.raises(ConfigError, match=r"params_dtype.*group_size = 8 there, 4 here: .*; and 1 more\): passed over"):
        take(other)


def test_there_must_be_a_run_to_change(config):
    with pytest.raises(ConfigError, match="no run named 'moe_gspo' in .* or another name and --resume auto"):
        take(with_lr(config, 2e-4))
    run_folder(config, "moe_gspo")  # ended before its first checkpoint
    with pytest.raises(ConfigError, match="has no checkpoint to go on from"):
        take(with_lr(config, 2e-4))
    assert [path.name for path in config.output_dir.iterdir()] == ["moe_gspo"]
