"""RL steps of a whole run: the recipe's choices do what they say, and other layouts repeat the same steps.

Left out: learning (test_algorithms_learn.py) and the command line (test_launch.py).
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    KlConfig,
    Layout,
    MismatchConfig,
    OptimizerConfig,
    RolloutConfig,
    RoutingConfig,
    TrainConfig,
    WarmStartConfig,
)
from gspo_megatron.recipe.check import needs_whole_pass
from gspo_megatron.trainer import build
from gspo_megatron.trainer.gspo_trainer import GspoTrainer
from gspo_megatron.trainer.rl import run_step
from gspo_megatron.trainer.sft import warm_start
from tools.validation.ranks import spawn

ONE, PP2, DP2 = (Layout(1, pipeline, None, 1, 1) for pipeline in (1, 2, 1))
CP2 = Layout(1, 1, None, 2, 1, context_parallel_size=2)  # with experts over both ranks
CONFIG = TrainConfig(
    warm_start=WarmStartConfig(steps=30, num_examples=256, batch_size=32, eval_interval=99),
    data=DataConfig(max_prompt_length=64, num_eval_prompts=8, eval_samples=1),
    rollout=RolloutConfig(num_prompts=8, group_size=4, max_response_length=6),
    optimizer=OptimizerConfig(lr=1e-3),
    max_tokens_per_microbatch=512,
)
GRPO = AlgorithmConfig(name="grpo", num_minibatches=2)
CHOICES = {
    "gspo": AlgorithmConfig(),
    "whole pass": AlgorithmConfig(),  # with WHOLE_PASS
    "rollout": AlgorithmConfig(old_logprobs="rollout"),
    "shuffled": AlgorithmConfig(shuffle_advantages=True),
    "masked": AlgorithmConfig(mismatch=MismatchConfig("sequence_masked", 1.5)),
    "grpo": GRPO,
    "kl in the reward": dataclasses.replace(GRPO, kl=KlConfig(coef=0.5, place="reward")),
    "overlong": dataclasses.replace(GRPO, overlong_buffer=3, overlong_penalty=0.7),
    "resampled": dataclasses.replace(GRPO, resampling_rounds=2),
}
WHOLE_PASS = RoutingConfig(diagnostics_interval=99)


def two_steps(rank: int, world_size: int, layout: Layout, names: list[str], folder: str) -> dict:
    """{choice: the metric rows of two RL steps}, all from the weights that one short warm start leaves, and {"samples":
    {choice: its rows of samples.jsonl}} of rank 0."""
    run = build.build_run(dataclasses.replace(CONFIG, output_dir=Path(folder)).resolved(layout))
    warm_start(run)  # so that some responses end before the limit and some are right
    weights = [p for model in run.policy.models for p in model.parameters()]
    start = [w.detach().clone() for w in weights]
    rows: dict = {"samples": {}}
    for name in names:
        routing = WHOLE_PASS if name == "whole pass" else CONFIG.routing
        run.config = run.policy.config = dataclasses.replace(
            run.config, algorithm=CHOICES[name].resolved(), routing=routing
        )
        run.prompts.position = 0
        with torch.no_grad():
            for weight, value in zip(weights, start, strict=True):
                weight.copy_(value)
        trainer = GspoTrainer(run.config, policy=run.policy)
        rows[name] = [run_step(run, trainer, step) for step in (1, 2)]
        written = [json.loads(line) for line in (run.folder / "samples.jsonl").open()]
        rows["samples"][name] = [row for row in written if row["phase"] == "rl"][-4:]
    build.close_run(run)
    return rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return spawn(two_steps, 1, ONE, list(CHOICES), str(tmp_path_factory.mktemp("one")), timeout=280)[0]


def learning(row: dict) -> dict:
    """What does not depend on the clock."""
    clock = ("time/", "perf/", "route/", "phase")
    return {key: value for key, value in row.items() if not key.startswith(clock)}


def test_the_first_minibatch_uses_its_own_log_probs(alone):
    """At the same weights and packing they are those that the pass gives, to the bit."""
    assert [learning(row) for row in alone["gspo"]] == [learning(row) for row in alone["whole pass"]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"algorithm": AlgorithmConfig(old_logprobs="first_minibatch")}, False),
        ({"algorithm": dataclasses.replace(GRPO, kl=KlConfig(coef=0.5))}, False),
        ({"algorithm": CHOICES["kl in the reward"]}, True),
        ({"routing": RoutingConfig(replay="R2")}, True),
        ({"routing": RoutingConfig(replay="R3")}, True),
        ({"routing": WHOLE_PASS}, True),
    ],
)
def test_what_needs_a_pass_over_all_minibatches(changes, expected):
    assert needs_whole_pass(dataclasses.replace(CONFIG, **changes).resolved(ONE)) == expected


def test_rollout_log_probs_may_stand_in_the_denominator(alone):
    """In fp32 they differ from recomputed ones by rounding, so the same steps are taken up to that; no mismatch is left
    to log, since the ratio has it."""
    recomputed, rollout = alone["gspo"][0], alone["rollout"][0]
    assert rollout["mismatch/max"] == 0 < recomputed["mismatch/max"] < 1e-5
    assert rollout["ratio/mean"] == pytest.approx(recomputed["ratio/mean"], abs=1e-5)
    assert rollout["grad_norm"] == pytest.approx(recomputed["grad_norm"], rel=1e-2)


def test_a_correction_of_no_mismatch_changes_next_to_nothing(alone):
    """Weights exp(1e-7): the masked run is the plain one up to rounding."""
    plain, masked = alone["gspo"][1], alone["masked"][1]
    assert masked["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3) and masked["ratio/std"] > 0


def test_shuffled_advantages_are_the_same_ones_elsewhere(alone):
    """Within each group: mean, spread and extremes stay, the gradient does not."""
    plain, control = alone["gspo"][0], alone["shuffled"][0]
    for key in ("mean", "std", "min", "max", "zero_groups"):
        assert control[f"advantage/{key}"] == pytest.approx(plain[f"advantage/{key}"], abs=1e-12)
    assert control["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_penalties_reach_the_advantages_and_not_the_logged_reward(alone):
    """The first step's responses and rewards are the same; its advantages are not. The KL is 0 at first (the policy is
    its reference), so there it first shows in the second step."""
    plain = alone["grpo"]
    for name, step in (("overlong", 0), ("kl in the reward", 1)):
        assert alone[name][0]["reward/mean"] == plain[0]["reward/mean"]
        assert alone[name][step]["advantage/std"] != pytest.approx(plain[step]["advantage/std"], rel=1e-6)
    assert alone["kl in the reward"][1]["kl/ref"] != 0  # the k1 estimate, which has either sign


def test_groups_without_signal_are_sampled_anew(alone):
    """At most two further rounds; after them groups without signal fill what is missing, and nothing else does."""
    assert alone["grpo"][0]["advantage/zero_groups"] > 0
    for plain, row in zip(alone["grpo"], alone["resampled"], strict=True):
        assert "sampling/rounds" not in plain and 1 <= row["sampling/rounds"] <= 3
        assert row["advantage/zero_groups"] == pytest.approx(row["sampling/filled"])
    first = alone["resampled"][0]
    assert first["sampling/rounds"] > 1
    assert first["advantage/zero_groups"] < alone["grpo"][0]["advantage/zero_groups"]


@pytest.mark.parametrize("layout", ["PP2", "DP2", "CP2"])
def test_two_ranks_repeat_the_steps_of_one(alone, layout, tmp_path):
    """Same prompts, samples, minibatches and advantages whatever the number of replicas; the rest is rounding."""
    names = ["gspo", "shuffled", "kl in the reward"] if layout == "DP2" else ["gspo", "kl in the reward"]
    both = spawn(two_steps, 2, {"PP2": PP2, "DP2": DP2, "CP2": CP2}[layout], names, str(tmp_path), timeout=280)
    for name in names:
        for step in (0, 1):
            ours, other = learning(both[0][name][step]), learning(both[1][name][step])
            assert ours == other  # both ranks report the same numbers
            for key, value in learning(alone[name][step]).items():
                if not key.startswith("mismatch/"):  # of the size of rounding itself
                    assert ours[key] == pytest.approx(value, rel=2e-3, abs=2e-5), (name, step, key)
        for ours, other in zip(both[0]["samples"][name], alone["samples"][name], strict=True):
            for key in ("advantage", "ratio"):
                assert ours.pop(key) == pytest.approx(other[key], rel=2e-3, abs=2e-5)
            assert ours == {key: other[key] for key in ours} and len(ours) == len(other) - 2


def test_samples_are_of_the_step_they_name(alone):
    """Two a step, of the first two prompts; what they say lies within what the step's row says of all."""
    for name in CHOICES:
        rows = alone["samples"][name]
        assert [(row["step"], row["split"]) for row in rows] == [(1, "train")] * 2 + [(2, "train")] * 2
        assert len({row["question"] for row in rows}) == 4
        for row in rows:
            step = alone[name][row["step"] - 1]
            assert step["ratio/min"] <= row["ratio"] <= step["ratio/max"]
            assert step["advantage/min"] <= row["advantage"] <= step["advantage/max"]
            assert row["prompt"] != row["question"] and row["question"] in row["prompt"] and row["answer"]
            assert row["tokens"] == 6 or row["finish_reason"] == "stop"
