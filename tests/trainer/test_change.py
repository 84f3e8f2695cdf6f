"""A run goes on with other values of its recipe: they count from the next step on, once, and nothing else moves.

Left out: which fields may change (recipe/test_changes.py) and which folder is taken (test_folders.py).
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from gspo_megatron.config import Layout, RewardConfig, TaskConfig, TrackingConfig, TrainConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.metrics.recipe_event import Event
from gspo_megatron.metrics.tracker import MetricsError, read_record
from gspo_megatron.recipe.load import read_saved, save_recipe
from gspo_megatron.trainer import build
from gspo_megatron.trainer.changed import change_after, weights_before
from gspo_megatron.trainer.resume import Progress
from tests.trainer.test_resume import CONFIG, DP2, train_once
from tools.validation.ranks import spawn

LR, CLIP, GREEDY = 3e-5, 1e-9, 1e-3
CHANGES = {
    "algorithm.clip_ratio_low": (3e-4, CLIP),
    "algorithm.clip_ratio_high": (4e-4, CLIP),
    "optimizer.lr": (1e-4, LR),
    "optimizer.warmup_steps": (8, 0),
}


def with_others(config: TrainConfig) -> TrainConfig:
    """The recipe with the new values of CHANGES, as a start that asks for a change has it."""
    return dataclasses.replace(
        config,
        resume="change",
        algorithm=dataclasses.replace(config.algorithm, clip_ratio_low=CLIP, clip_ratio_high=CLIP),
        optimizer=dataclasses.replace(config.optimizer, lr=LR, warmup_steps=0),
    )


def letters(folder: Path) -> dict[str, TaskConfig]:
    """A task whose rewards differ whatever the model has learned: where all are equal, no response is clipped."""
    rows = ({"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(100))
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(
        "def score(completions, **kwargs):\n    return [sum(map(ord, text)) % 7 / 6 for text in completions]\n"
    )
    return {"sums": TaskConfig(data=folder / "sums.jsonl", reward=(RewardConfig(f"{folder}/rewards.py:score"),))}


def changed(rank: int, world_size: int, folder: Path) -> dict:
    """Runs of three RL steps. All but `whole` were ended before the checkpoint of step 2."""
    config = dataclasses.replace(CONFIG, tasks=letters(folder), parallel=DP2, tracking=TrackingConfig(log_samples=8))
    results = {"whole": outcome(train_once(dataclasses.replace(config, output_dir=folder / "whole")))}
    train_once(dataclasses.replace(config, output_dir=folder / "start"), ("rl", 2))

    def goes_on(name: str, *starts: tuple[TrainConfig, tuple[str, int] | None], origin: str = "start") -> None:
        if rank == 0:
            shutil.copytree(folder / origin, folder / name)
        dist.barrier()
        for recipe, end in starts:
            last = train_once(dataclasses.replace(recipe, output_dir=folder / name), end)
        results[name] = outcome(last)

    other = with_others(config)
    auto = dataclasses.replace(other, resume="auto")
    back = dataclasses.replace(config, resume="change")
    goes_on("the same values", (back, None))
    goes_on("changed", (other, None))
    goes_on("killed", (other, ("rl", 2)))  # right after the change
    goes_on("killed, and the same command", (other, None), origin="killed")
    goes_on("killed, and as any run", (auto, None), origin="killed")
    goes_on("killed, and the old values", (back, None), origin="killed")
    cold = dataclasses.replace(back, rollout=dataclasses.replace(config.rollout, temperature=GREEDY))
    goes_on("cold", (cold, None))
    goes_on("changed back", (other, ("rl", 3)), (back, None))
    return results


def two_tasks(rank: int, world_size: int, folder: Path) -> list[list[str]]:
    """The tasks of the prompts of RL steps 1 to 4: the weights change behind step 1 and back behind step 2, and the
    start that is asked for step 4 is told of no change."""
    tasks = {"spell_backward": TaskConfig(weight=1.0), "chain_sum": TaskConfig(weight=1000.0)}
    turned = {"spell_backward": TaskConfig(weight=1000.0), "chain_sum": TaskConfig(weight=1.0)}
    config = dataclasses.replace(CONFIG, tasks=tasks, output_dir=folder, resume="change", steps=4, eval_interval=9)
    train_once(dataclasses.replace(config, resume="auto"), ("rl", 2))
    train_once(dataclasses.replace(config, tasks=turned), ("rl", 3))
    train_once(config, ("rl", 4))
    run = build.build_run(dataclasses.replace(config, resume="auto"))
    drawn = [prompt.item.task for prompt in run.prompts.fixed(16)]
    held_out = {prompt.item.task for prompt in run.held_out}
    build.close_run(run)
    return [drawn[first : first + 4] for first in range(0, 16, 4)] + [sorted(held_out)]


def test_tasks_are_drawn_by_new_weights_from_the_next_prompt_on(tmp_path):
    """Four prompts a step. With 1000 to 1 all are of one task, and the held-out ones are of the first weights'."""
    sums, letters = ["chain_sum"] * 4, ["spell_backward"] * 4
    assert spawn(two_tasks, 1, tmp_path, timeout=280)[0] == [sums, letters, sums, sums, ["chain_sum"]]


def test_weights_before_a_prompt_follow_from_the_events():
    """a was 1 up to prompt 8, then 2 up to 24; b was 5 all the time, and a change of something else is none."""
    config = TrainConfig(tasks={"a": TaskConfig(weight=3), "b": TaskConfig(weight=5)})
    events = [
        Event("rl", 2, {"tasks.a.weight": (1.0, 2.0)}, 8),
        Event("rl", 4, {"optimizer.lr": (1.0, 2.0)}, 16),
        Event("rl", 6, {"tasks.a.weight": (2.0, 3.0), "optimizer.lr": (2.0, 1.0)}, 24),
    ]
    assert weights_before(config, events) == [(8, {"a": 1.0, "b": 5}), (24, {"a": 2.0, "b": 5})]
    assert weights_before(config, events[1:2]) == weights_before(config, []) == []
    with pytest.raises(MetricsError, match="a task's weight that is none .* by hand"):
        weights_before(config, [Event("rl", 2, {"tasks.a.weight": ("x", 3)}, 8)])


def outcome(result: dict) -> dict:
    rows, events = read_record(result["folder"])
    clocks = ("time/", "perf/")
    plain = [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]
    samples = [json.loads(line) for line in (result["folder"] / "samples.jsonl").open()]
    recipe = read_saved(result["folder"] / "config.yaml")
    return {**result, "rows": plain, "events": events, "samples": samples, "recipe": recipe}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    return spawn(changed, 2, tmp_path_factory.mktemp("changed"), timeout=280)[0]


def same(one: dict, other: dict) -> bool:
    assert one["weights"] and one["weights"].keys() == other["weights"].keys()
    weights = all(value.equal(other["weights"][name]) for name, value in one["weights"].items())
    return weights and all(one[part] == other[part] for part in ("rows", "samples", "events"))


def test_nothing_differs_where_no_value_does(runs):
    """Asked for a change without one, and a change that was ended before its first checkpoint and taken back: the run
    that was never ended, to the bit, and no event."""
    assert runs["whole"]["events"] == []
    for name in ("the same values", "killed, and the old values"):
        assert same(runs["whole"], runs[name]), name
        assert runs[name]["folder"].name == "moe_gspo"


def test_the_new_values_count_from_the_next_step_on(runs):
    """The learning rate by value; with a clip range of 1e-9 a response is clipped just where its ratio is on the side
    that its advantage asks for. One event, behind step 1."""
    whole, run = runs["whole"], runs["changed"]
    assert run["events"] == [Event("rl", 1, CHANGES, 4)]
    assert run["rows"][:5] == whole["rows"][:5] and len(run["rows"]) == len(whole["rows"]) == 7  # up to RL step 1
    for row, before in zip(run["rows"][5:], whole["rows"][5:], strict=True):
        assert row["lr"] == LR < before["lr"]
    sides = [
        (sample["clipped"], sample["advantage"] * (sample["ratio"] - 1) > 0)
        for sample in run["samples"]
        if sample["split"] == "train" and sample["step"] > 1 and sample["advantage"] and abs(sample["ratio"] - 1) > 1e-8
    ]
    assert all(clipped == is_on_side for clipped, is_on_side in sides)
    assert any(clipped for clipped, _ in sides) and not all(clipped for clipped, _ in sides)


def test_a_new_temperature_is_sampled_with(runs):
    """At a temperature of 0.001 the four responses to one prompt are one; at 1 they were two or more."""
    kinds: dict[tuple[int, str], set[str]] = {}
    for sample in runs["cold"]["samples"]:
        if (sample["phase"], sample["split"]) == ("rl", "train"):
            kinds.setdefault((sample["step"], sample["prompt"]), set()).add(sample["response"])
    assert len(kinds) == 3 * 2  # rank 0 has two prompts a step
    assert all((len(responses) == 1) == (step > 1) for (step, _), responses in kinds.items())
    assert runs["cold"]["events"] == [Event("rl", 1, {"rollout.temperature": (1.0, GREEDY)}, 4)]


def test_a_kill_right_after_a_change_notes_it_once(runs):
    """The same command again, or one that asks for no change: it is the recipe of the run by then."""
    assert runs["killed"]["events"] == [Event("rl", 1, CHANGES, 4)]
    for name in ("killed, and the same command", "killed, and as any run"):
        assert same(runs["changed"], runs[name]), name


def test_the_run_folder_has_the_recipe_that_is_running(runs):
    recipe = runs["changed"]["recipe"]
    assert recipe["optimizer"]["lr"] == LR and recipe["algorithm"]["clip_ratio_low"] == CLIP
    assert recipe["resume"] == "auto"  # as a recipe of its own it goes on, or starts, like any other


def test_a_change_back_is_a_change(runs):
    """Step 2 was taken with the new values, step 3 with the old ones."""
    events = runs["changed back"]["events"]
    assert events == [
        Event("rl", 1, CHANGES, 4),
        Event("rl", 2, {name: (new, old) for name, (old, new) in CHANGES.items()}, 8),
    ]
    assert [row["lr"] == LR for row in runs["changed back"]["rows"][5:]] == [True, False]
    assert runs["changed back"]["recipe"]["optimizer"]["lr"] == 1e-4


def test_a_checkpoint_without_a_recipe_takes_no_change(tmp_path):
    """Of version 0.1.0: were the run ended before its next checkpoint, nobody would know of the change."""
    config = TrainConfig().resolved(Layout())
    save_recipe(config, tmp_path / "config.yaml")
    (tmp_path / "checkpoints/step_000001").mkdir(parents=True)
    place = (tmp_path, tmp_path / "checkpoints/step_000001", Progress("rl", 1, 8, None))
    assert change_after(config, *place) is None
    with pytest.raises(ConfigError, match=r"clip_ratio_low = 1e-09: is 0\.0003 in the run, .* kept no recipe .* Go on"):
        change_after(with_others(config), *place)
