"""A run that was ended and started again is the run that was never ended: weights to the bit, each step once.

Left out: other layouts than these two (backend/checkpoint/test_sharded.py loads under others).
"""

import dataclasses
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.parallel import topology
from gspo_megatron.config import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    KlConfig,
    Layout,
    RolloutConfig,
    TrainConfig,
    WarmStartConfig,
)
from gspo_megatron.errors import CheckpointError
from gspo_megatron.metrics.tracker import Tracker, read_metrics
from gspo_megatron.trainer import build, rl
from gspo_megatron.trainer import run as runs
from gspo_megatron.trainer import sft as warm_starts
from gspo_megatron.trainer.build import to_come
from gspo_megatron.trainer.folders import Plan
from gspo_megatron.trainer.resume import Progress, newest_first, prune, restore_record, survey, sweep
from tools.validation.faults.scenarios import LONG
from tools.validation.launching import ROOT, TORCHRUN, gone, launched, wait_until
from tools.validation.ranks import spawn

DP2 = Layout(1, 1, None, 1, 1, use_distributed_optimizer=True)
PP2 = Layout(1, 2, None, 1, 1)
CONFIG = TrainConfig(
    steps=3,
    eval_interval=2,
    max_tokens_per_microbatch=512,
    device="cpu",
    warm_start=WarmStartConfig(steps=3, num_examples=64, batch_size=16, eval_interval=99),
    data=DataConfig(max_prompt_length=64, num_eval_prompts=4, eval_samples=1),
    rollout=RolloutConfig(num_prompts=4, group_size=4, max_response_length=6),
    checkpoint=CheckpointConfig(interval=1, asynchronous=False),  # each is visible when its step ends
).resolved(Layout())
GRPO = AlgorithmConfig(name="grpo", num_minibatches=2, entropy_coef=0.01, kl=KlConfig(coef=0.05))  # has a reference
PPO = AlgorithmConfig(name="ppo", num_minibatches=2, entropy_coef=0.01)  # has a critic and, for its KL, a reference
CASES = {  # layout, algorithm, dtype, where the first start ends: after so many steps of a phase, before its checkpoint
    "warm start": (DP2, GRPO, "fp32", ("warm_start", 2)),
    "grpo": (DP2, GRPO, "bf16", ("rl", 2)),
    "ppo": (DP2, PPO, "fp32", ("rl", 3)),
}
EP2 = Layout(1, 1, None, 2, 1, use_distributed_optimizer=True)
MOVED = {  # from the first layout of each row to the others
    "PP2": {"PP2": PP2, "TP2": Layout(2, 1, None, 1, 1), "PP2xVP2": Layout(1, 2, 2, 1, 1),
            "EP2": Layout(1, 1, None, 2, 1), "DP2": DP2},
    "EP2": {"EP2": EP2, "DP2, EP1": DP2, "PP2, EP1": PP2},
}  # fmt: skip


class Ended(Exception):
    """Stands for a kill: nothing of the process is used afterwards."""


def train_once(config: TrainConfig, end: tuple[str, int] | None = None) -> dict:
    """One start of a run, which ends before the checkpoint of `end`. {name: full weight} and the folder."""
    run, keep, weights = build.build_run(config), runs.Run.maybe_save, {}

    def watched(self, phase: str, step: int, row: dict, critic=None) -> None:
        if (phase, step) == end:
            raise Ended
        keep(self, phase, step, row, critic)
        models = self.policy.models + (critic.models if critic else [])
        for place, model in enumerate(models):
            full = parameters.gather_full([model], self.topology)
            weights.update({f"{place} {name}": value for name, value in full.items()})

    runs.Run.maybe_save = watched
    try:
        warm_starts.warm_start(run)
        rl.reinforce(run)
    except Ended:
        weights = {}
    finally:
        runs.Run.maybe_save = keep
        dist.barrier()
        run.reporter.close()
        if run.hold:
            run.hold.close()
        topology.destroy_model_parallel()
    return {"weights": weights, "folder": run.folder}


def ended_and_resumed(rank: int, world_size: int, folder: Path) -> dict:
    results = {}
    for name, (layout, algorithm, dtype, end) in CASES.items():
        model = dataclasses.replace(CONFIG.model, params_dtype=dtype)
        config = dataclasses.replace(CONFIG, parallel=layout, model=model, algorithm=algorithm.resolved())
        whole = train_once(dataclasses.replace(config, output_dir=folder / name / "whole"))
        config = dataclasses.replace(config, output_dir=folder / name / "ended")
        train_once(config, end)
        results[name] = whole, train_once(config)
    return results


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict:
    return spawn(ended_and_resumed, 2, tmp_path_factory.mktemp("ended"), timeout=280)[0]


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_never_ended(ended, name):
    """Every weight, the critic's too, is the same to the bit; each step is in the record once with the same numbers."""
    whole, resumed = ended[name]
    assert whole["folder"].name == resumed["folder"].name == "moe_gspo"  # the second start took the same folder
    assert whole["weights"].keys() == resumed["weights"].keys() and whole["weights"]
    for key, value in whole["weights"].items():
        assert value.equal(resumed["weights"][key]), key
    rows = [read_metrics(result["folder"]) for result in (whole, resumed)]
    clocks = ("time/", "perf/")
    plain = [[{k: v for k, v in row.items() if not k.startswith(clocks)} for row in found] for found in rows]
    assert plain[0] == plain[1] and len(plain[0]) == 3 + 1 + 3
    samples = [[json.loads(line) for line in (r["folder"] / "samples.jsonl").open()] for r in (whole, resumed)]
    assert samples[0] == samples[1]


def moved(rank: int, world_size: int, folder: Path, origin: str) -> dict:
    """A run ended after two RL steps under one layout, and its last step under that and others."""
    config = dataclasses.replace(CONFIG, algorithm=GRPO.resolved())
    start = dataclasses.replace(config, parallel=MOVED[origin][origin], output_dir=folder / "start")
    train_once(start, ("rl", 3))
    results = {}
    for name, layout in MOVED[origin].items():
        if rank == 0:
            shutil.copytree(folder / "start", folder / name)
        dist.barrier()
        results[name] = read_after(train_once(dataclasses.replace(config, parallel=layout, output_dir=folder / name)))
    return results


def read_after(result: dict) -> dict:
    return {"rows": read_metrics(result["folder"]), "weights": result["weights"]}


@pytest.mark.parametrize("origin", MOVED)
def test_another_layout_goes_on_with_the_same_numbers(tmp_path, origin):
    """Step 3 after a resume elsewhere: the same loss and reward, the gradient's norm to fp32's rounding.

    Sampled tokens can differ where two logits are closer than rounding; here they do not (the reward is the same).
    """
    found = spawn(moved, 2, tmp_path, origin, timeout=280)[0]
    expected = found.pop(origin)["rows"][-1]
    assert expected["step"] == 3
    for name, result in found.items():
        row = result["rows"][-1]
        assert [(r["phase"], r["step"]) for r in result["rows"]][-1] == ("rl", 3)
        assert row["reward/mean"] == pytest.approx(expected["reward/mean"], abs=1e-9), name
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5), name
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), name


# ---- Real processes ----

RECIPE = [
    "--steps", "7", "--eval-interval", "2", "--warm-start.steps", "2", "--warm-start.num-examples", "64",
    "--warm-start.batch-size", "16", "--data.num-eval-prompts", "4", "--rollout.num-prompts", "4",
    "--rollout.group-size", "4", "--checkpoint.interval", "1", "--output-dir", "runs", "--device", "cpu",
]  # fmt: skip
TRAINING = [*TORCHRUN, "--nproc-per-node", "2", str(ROOT / "examples/train_moe_gspo.sh"), *RECIPE]


def end_by(launch, number: signal.Signals, moment: Callable[[], bool]) -> None:
    """The signal goes to one rank, once `moment` has come; torchrun then ends the other."""
    assert wait_until(moment, 100), launch.stderr
    torchrun = psutil.Process(launch.process.pid)
    ranks = [p.pid for p in torchrun.children()]
    everyone = [p.pid for p in torchrun.children(recursive=True)]
    os.kill(random.choice(ranks), number)
    assert launch.wait(20) != 0
    assert gone(everyone)  # no process of a checkpoint's writing outlives its rank


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_and_the_same_command_again(tmp_path):
    """Killed while the first checkpoint is written and again in RL, then told to stop (SIGUSR1); the fourth start ends
    the run as if nothing had been."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    for folder in (whole, again):
        folder.mkdir()
    with launched(TRAINING, whole, CUDA_VISIBLE_DEVICES="") as launch:
        assert launch.wait(LONG) == 0, launch.stderr
    writing = lambda: any(again.glob("runs/*/checkpoints/*.unfinished"))  # noqa: E731

    def at_step(step: int) -> bool:
        return any(f'"rl", "step": {step},' in p.read_text() for p in again.glob("runs/*/metrics.jsonl"))

    ends = ((signal.SIGKILL, writing), (signal.SIGKILL, lambda: at_step(2)), (signal.SIGUSR1, lambda: at_step(4)))
    for number, moment in ends:
        with launched(TRAINING, again, CUDA_VISIBLE_DEVICES="") as launch:
            end_by(launch, number, moment)
    assert "stopped as asked, after rl step" in launch.stderr
    with launched(TRAINING, again, CUDA_VISIBLE_DEVICES="") as launch:
        assert launch.wait(LONG) == 0, launch.stderr
        assert "goes on after rl step" in launch.stdout
    runs_made = sorted(p.name for p in (again / "runs").iterdir())
    final = runs_made[-1]  # moe_gspo, or moe_gspo-2 where the first kill came before any checkpoint was whole
    assert len(runs_made) <= 2
    rows = [read_metrics(folder) for folder in (whole / "runs/moe_gspo", again / "runs" / final)]
    numbers = [[(r["phase"], r["step"], r.get("loss"), r.get("grad_norm")) for r in found] for found in rows]
    assert numbers[0] == numbers[1]
    assert not list((again / "runs" / final).rglob("*.unfinished"))


# ---- Files alone ----


def made(run_dir: Path, phase: str, step: int, score: float | None = None) -> Path:
    """An empty checkpoint as far as this module looks at one."""
    progress = Progress(phase, step, 8 * step, score)
    folder = run_dir / "checkpoints" / progress.folder
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps({"counters": {}, "progress": dataclasses.asdict(progress)}))
    return folder


def test_a_copy_that_somebody_keeps_is_neither_removed_nor_counted(tmp_path):
    """Of rl 10 and 20 and a copy of 20, keep_last 1 removes 10 alone."""
    for step in (10, 20):
        made(tmp_path, "rl", step, None)
    shutil.copytree(tmp_path / "checkpoints/step_000020", tmp_path / "checkpoints/mine")
    removed = prune(tmp_path, keep_last=1, keep_every=0, keep_best=True)
    assert {path.name for path in removed} == {"step_000010"}
    assert {path.name for path in survey(tmp_path)[0]} == {"step_000020", "mine"}


def test_prompts_to_come_are_those_of_the_steps_that_are_left():
    """Of 4 steps of 96 prompts, 2 are left after step 2: prompts 192 to 383. A warm start has taken none."""
    config = TrainConfig(steps=4, rollout=RolloutConfig(num_prompts=96))
    assert to_come(config, None) == range(0, 384)
    assert to_come(config, Progress("rl", 2, 192, None)) == range(192, 384)
    assert to_come(config, Progress("warm_start", 50, 0, None)) == range(0, 384)
    assert len(to_come(config, Progress("rl", 9, 864, None))) == 0


def test_which_checkpoints_are_kept(tmp_path):
    """Of rl 10, 20, 30 (score .5), 40 (.4), 50: the last two, every 20th, and the best. The warm start's goes."""
    made(tmp_path, "warm_start", 60)
    for step, score in ((10, None), (20, None), (30, 0.5), (40, 0.4), (50, None)):
        made(tmp_path, "rl", step, score)
    (tmp_path / "checkpoints/torn").mkdir()
    (tmp_path / "checkpoints/torn/progress.json").write_text("{")
    removed = prune(tmp_path, keep_last=2, keep_every=20, keep_best=True)
    assert {path.name for path in removed} == {"step_000010"}
    found, damage = survey(tmp_path)
    assert [p.step for p in found.values()] == [20, 30, 40, 50, 60]
    assert damage[0].startswith(f"{tmp_path / 'checkpoints/torn/progress.json'}: damaged (Expecting property name")
    prune(tmp_path, keep_last=1, keep_every=0, keep_best=True)
    assert {path.name for path in survey(tmp_path)[0]} == {"step_000030", "step_000050"}
    prune(tmp_path, keep_last=1, keep_every=0, keep_best=False)
    assert {path.name for path in survey(tmp_path)[0]} == {"step_000050"}


ROWS = [("warm_start", 1), ("warm_start", 2), ("rl", 0), ("rl", 1), ("rl", 2)]


def lines(steps: list[tuple[str, int]]) -> str:
    return "".join(json.dumps({"phase": phase, "step": step}) + "\n" for phase, step in steps)


def steps_of(run_dir: Path) -> list[tuple[str, int]]:
    return [(row["phase"], row["step"]) for row in read_metrics(run_dir)]


@pytest.mark.parametrize("carries", [True, False], ids=["today's checkpoint", "one of version 0.1.0"])
def test_the_record_is_cut_back(tmp_path, carries):
    samples = "".join(json.dumps({"step": step, "response": "grün"}) + "\n" for step in (1, 2))
    for progress, left, kept in ((Progress("rl", 1, 8, None), 4, [1]), (Progress("warm_start", 1, 0, None), 1, [])):
        (tmp_path / "metrics.jsonl").write_text(lines(ROWS))
        (tmp_path / "samples.jsonl").write_text(samples + '{"step": 2, "resp')
        checkpoint = tmp_path / "checkpoints" / progress.folder
        checkpoint.mkdir(parents=True)
        if carries:
            (checkpoint / "metrics.jsonl").write_text(lines(ROWS[:left]))
        assert restore_record(tmp_path, checkpoint, progress) == []
        assert steps_of(tmp_path) == ROWS[:left]
        assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").open()] == kept


@pytest.mark.parametrize(
    ("progress", "kept"),
    [(Progress("warm_start", 3, 0, None), 2), (Progress("rl", 0, 8, None), 4), (Progress("rl", 1, 8, None), 5)],
)
def test_samples_of_evaluations_are_cut_by_phase_and_step(tmp_path, progress, kept):
    order = [("warm_start", 2), ("warm_start", 3), ("warm_start", 40), ("rl", 0), ("rl", 1), ("rl", 2)]
    (tmp_path / "metrics.jsonl").write_text(lines(ROWS))
    (tmp_path / "samples.jsonl").write_text(lines(order))
    assert restore_record(tmp_path, tmp_path / "checkpoints" / progress.folder, progress) is not None
    left = [json.loads(line) for line in (tmp_path / "samples.jsonl").open()]
    assert [(row["phase"], row["step"]) for row in left] == order[:kept]


WHOLE = lines(ROWS[:4])
HARMED = {  # what became of metrics.jsonl, whose whole contents are WHOLE, and whether a word is said
    "cut in its last line": (WHOLE[:-9], "was damaged"),
    "without its last line": (lines(ROWS[:3]), "was damaged"),
    "empty": ("", "is missing or empty"),
    "missing": (None, "is missing or empty"),
    "zeros in the middle": (WHOLE[:20] + "\0" * 40 + WHOLE[60:], "was damaged"),
    "a line of garbage": (lines(ROWS[:2]) + "\udcff}{\n" + lines(ROWS[2:4]), "was damaged"),
    "nested": ("[" * 100_000 + "\n", "was damaged"),
}


@pytest.mark.parametrize("harm", HARMED)
def test_a_damaged_record_is_put_back_from_the_checkpoint(tmp_path, harm):
    """The checkpoint of rl step 1 is there, so the record has that step again, whatever has become of the file."""
    content, says = HARMED[harm]
    checkpoint = tmp_path / "checkpoints/step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "metrics.jsonl").write_text(WHOLE)
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    said = restore_record(tmp_path, checkpoint, Progress("rl", 1, 8, None))
    assert len(said) == 1 and f"metrics.jsonl {says}: its rows up to rl step 1 are those of {checkpoint}" in said[0]
    assert (tmp_path / "metrics.jsonl").read_text() == WHOLE


def test_links_in_a_run_folder_stay_and_what_they_lead_to_is_put_back(tmp_path):
    """A record and TensorBoard's events on another disk: the repeated step is in each once."""
    disk, run = tmp_path / "disk", tmp_path / "run"
    checkpoint = run / "checkpoints/step_000001"
    for folder in (disk / "events", checkpoint):
        folder.mkdir(parents=True)
    kept = '{"phase": "rl", "step": 1, "loss": 0.5}\n'
    (checkpoint / "metrics.jsonl").write_text(kept)
    (disk / "record").write_text(kept + '{"phase": "rl", "step": 2, "loss": 0.25}\n')
    (disk / "events/events.1").write_text("old")
    (run / "metrics.jsonl").symlink_to(disk / "record")
    (run / "tensorboard").symlink_to(disk / "events")
    assert restore_record(run, checkpoint, Progress("rl", 1, 8, None)) == []
    assert (run / "metrics.jsonl").is_symlink() and (disk / "record").read_text() == kept
    assert (run / "tensorboard").is_symlink() and list((disk / "events").iterdir()) == []
    with Tracker(run):
        pass
    events = EventAccumulator(str(disk / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5)]
    assert sorted(path.name for path in disk.iterdir()) == ["events", "record"]


def test_a_lost_step_of_an_old_record_is_named(tmp_path):
    """A checkpoint of version 0.1.0 carries no record: what can be read stays, and what is lost is said."""
    (tmp_path / "metrics.jsonl").write_bytes(lines(ROWS[:2]).encode() + b"\0\0\n" + lines(ROWS[2:4])[:-9].encode())
    checkpoint = tmp_path / "checkpoints/step_000001"
    checkpoint.mkdir(parents=True)
    said = restore_record(tmp_path, checkpoint, Progress("rl", 1, 8, None))
    assert steps_of(tmp_path) == ROWS[:3]
    assert said[0].endswith("damaged lines left out: 1") and "the row of rl step 1 is lost" in said[1]


BAD_SAMPLES = (
    b"garbage",
    b"\0" * 4096,
    b"\xff\xfe",
    b"[]",
    b"null",
    b"[" * 100_000,
    b'{"step": "1"}',
    b'{"step": null}',
)


@pytest.mark.parametrize("bad", BAD_SAMPLES, ids=lambda bad: repr(bad[:12]))
def test_damaged_samples_are_left_out(tmp_path, bad):
    good = b'{"step": 1, "response": "a"}\n'
    (tmp_path / "metrics.jsonl").write_text(WHOLE)
    (tmp_path / "samples.jsonl").write_bytes(good + bad + b"\n" + good)
    said = restore_record(tmp_path, tmp_path / "checkpoints/step_000001", Progress("rl", 1, 8, None))
    assert said == [f"{tmp_path / 'samples.jsonl'}: damaged lines left out: 1"]
    assert (tmp_path / "samples.jsonl").read_bytes() == good + good


BAD_PROGRESS = {
    "empty": b"", "null": b"null", "a list": b"[]", "no table": b"{}", "not UTF-8": b"\xff\xfe{}",
    "cut": b'{"progress": {',
    "nested": b"[" * 100_000, "zeros": b"\0" * 200, "a number": b'{"progress": 7}',
    "no step": b'{"progress": {"phase": "rl", "prompts": 1, "score": null}}',
    "a step in words": b'{"progress": {"phase": "rl", "step": "3", "prompts": 1, "score": null}}',
    "a true step": b'{"progress": {"phase": "rl", "step": true, "prompts": 1, "score": null}}',
    "no phase": b'{"progress": {"phase": "sleep", "step": 3, "prompts": 1, "score": null}}',
    "a phase that is a list": b'{"progress": {"phase": [], "step": 3, "prompts": 1, "score": null}}',
    "a score in words": b'{"progress": {"phase": "rl", "step": 3, "prompts": 1, "score": "good"}}',
}  # fmt: skip


@pytest.mark.parametrize("harm", [*BAD_PROGRESS, "missing", "a folder"])
def test_a_checkpoint_with_damaged_progress_is_named_and_the_one_before_is_found(tmp_path, harm):
    good, bad = made(tmp_path, "rl", 2), made(tmp_path, "rl", 3)
    path = bad / "progress.json"
    path.unlink()
    if harm == "a folder":
        path.mkdir()
    elif harm != "missing":
        path.write_bytes(BAD_PROGRESS[harm])
    found, damage = survey(tmp_path)
    assert list(found) == [good]
    assert len(damage) == 1 and damage[0].startswith(f"{path}: damaged (")
    assert damage[0].endswith("The checkpoint before it is tried.")


def test_a_kill_inside_a_removal_leaves_nothing_for_good(tmp_path):
    """What such a kill leaves is step_000001.unfinished. It stands in no later removal's way, be it a folder or a file,
    and a start removes it."""
    for step in (1, 2, 3):
        made(tmp_path, "rl", step)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step_000001.unfinished/hf").mkdir(parents=True)
    (checkpoints / "step_000001.unfinished/hf/config.json").write_text("{}")
    (checkpoints / "step_000002.unfinished").write_text("a file")
    removed = prune(tmp_path, keep_last=1, keep_every=0, keep_best=False)
    assert {path.name for path in removed} == {"step_000001", "step_000002"}
    assert [path.name for path in checkpoints.iterdir()] == ["step_000003"]
    (checkpoints / "step_000001.old.unfinished/hf").mkdir(parents=True)
    (tmp_path / "config.yaml.new").write_text("")
    (tmp_path / "hf.unfinished").mkdir()
    assert {path.name for path in sweep(tmp_path)} == {"step_000001.old.unfinished", "config.yaml.new", "hf.unfinished"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "progress.json", "step_000003"]


def spoiled(rank: int, world_size: int, folder: Path) -> list[str]:
    """What a start says of a checkpoint with a changed, a shortened and a missing file, with none intact, and with one
    of a later version."""
    config = dataclasses.replace(CONFIG, parallel=DP2, algorithm=GRPO.resolved(), output_dir=folder)
    train_once(config, ("rl", 3))
    places = folder / "moe_gspo/checkpoints"
    messages = [after(harm, places / "step_000002", rank) for harm in (flip, shorten, Path.unlink)]
    assert train_once(config)["weights"]  # goes on from step 1 and writes step 2 again, in the spoiled one's place
    assert sorted(path.name for path in places.iterdir()) == ["step_000002", "step_000003"]
    messages.append(after(flip, places / "step_000003", rank))
    return [*messages, after(flip, places / "step_000002", rank), after(make_newer, places / "step_000003", rank)]


def after(harm: Callable[[Path], None], victim: Path, rank: int) -> str:
    """What is found once a file of `victim` was harmed."""
    dist.barrier()
    if rank == 0:
        harm(sorted(victim.glob("*.distcp"))[0])
    dist.barrier()
    try:
        found, progress, notes = build._intact(plan_of(victim.parents[2]))
    except CheckpointError as error:
        return str(error)
    return f"{notes[0]} | {found.name} {progress.step}"


def plan_of(folder: Path) -> Plan:
    return Plan(folder / "moe_gspo", newest_first(survey(folder / "moe_gspo")[0]))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_newer(path: Path) -> None:
    (path.parent / "manifest.json").write_text(json.dumps({"format": 99}))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_spoiled_checkpoint_is_named_and_the_one_before_is_taken(tmp_path):
    changed = "contents changed after it was written"
    for messages in spawn(spoiled, 2, tmp_path, timeout=120):
        for message, problem in zip(messages[:3], (changed, "bytes, and", "missing"), strict=True):
            assert problem in message and "step_000002/" in message and message.endswith("| step_000001 1")
        assert changed in messages[3] and messages[3].endswith("| step_000002 2")
        assert "no checkpoint of" in messages[4] and "--resume never" in messages[4]
        assert "step_000003/manifest.json: format = 99" in messages[5] and "|" not in messages[5]
